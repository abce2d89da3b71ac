"""Dense layers by the compiled CPU kernels: what has to be beaten where other libraries' dense forms are slower.

A dense weight is one that keeps both of every two channels.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from compressor.lower.backend import Kind, Unit
from compressor.lower.vnm import VNM, VNMW7A8, VNMW8A8, VNMInt8, no_plain_convolution, other_dtype
from compressor.sparsity.pattern import NM

_FEW = 16


def _as_kept(unit: Unit, group: int, most: int) -> Unit:
    """`unit` with weights that keep all of every `group` channels; up to `most` rows are taken at a time."""
    rows = (math.gcd(layer.weight.shape[0], most) for layer in unit.layers)
    return replace(unit, patterns=tuple(NM(group, group, v) for v in rows))


class VNMDense(VNM):
    """Dense convolutions of few channels by the same kernels, fp32 and bf16: what oneDNN lays out anew there takes longer than the
    products."""

    name = "vnm-dense"
    takes = frozenset({Kind.CONVOLUTION})
    skips_zeros = False

    def refusal(self, unit: Unit) -> str | None:
        (layer,) = unit.layers
        if reason := other_dtype(unit):
            return reason
        if (fewest := min(layer.weight.shape[:2])) > _FEW:
            return f"{fewest} channels or more on both sides: this is for up to {_FEW} on one, as first and last layers have"
        assert isinstance(layer, nn.Conv2d)
        return no_plain_convolution(layer)

    def build(self, unit: Unit) -> nn.Module:
        return super().build(_as_kept(unit, 1, 8))


class VNMDenseInt8(VNMInt8):
    """Dense weights in 8 bits, per output row, times inputs in whole numbers of up to 16 bits, per token or image.

    What 2:4 in the same numbers has to beat, and for the layers of a pruned model that stay dense.
    """

    name = "vnm-dense-int8"
    skips_zeros = False

    def refusal(self, unit: Unit) -> str | None:
        if reason := other_dtype(unit):
            return reason
        for layer in unit.layers:
            if isinstance(layer, nn.Conv2d) and (reason := no_plain_convolution(layer)):
                return reason
            if (channels := layer.weight.shape[1]) % 4:
                return f"{channels} input channels: 8-bit products take four at a time"
        return self._too_long(unit, self.largest_inner // 2)

    def build(self, unit: Unit) -> nn.Module:
        return super().build(_as_kept(unit, 2, 4))


class VNMDenseW7A8(VNMDenseInt8, VNMW7A8):
    """Dense weights in about 7 bits times inputs in 8: less exact than vnm-dense-int8, and faster with AVX2."""

    name = "vnm-dense-w7a8"


class VNMDenseW8A8(VNMDenseInt8, VNMW8A8):
    """The same with all 8 bits of weights, on processors with VNNI."""

    name = "vnm-dense-w8a8"
