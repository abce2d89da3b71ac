"""The CPU backend: V:N:M weights through compiled kernels.

V rows of output share their kept channels, so a vector of activations is loaded once for V rows of multiplications, and the
gather is a row pointer into a panel. `vnm_kernels` finds the kernels, `vnm_weight` lays weights out for them, and
`vnm_operators` makes them operators of torch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.lower.backend import Backend, Unit, refuse_gradients
from compressor.lower.vnm_kernels import VNNI, kernels, level, unavailable, unavailable_without_vnni, version
from compressor.lower.vnm_operators import HALF, direct
from compressor.lower.vnm_weight import LARGEST_INNER, LARGEST_INNER_OF_BYTES, KernelWeight, Lanes
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.pattern import NM
from compressor.sparsity.venom import Venom

_LARGEST_INDEX = 65_535
_LARGEST_SIDE = 7


def _operators() -> Any:
    return torch.ops.compressor  # which has no annotations


# Inputs are laid out anew in these modules, and not in the operators, so that a compiler sees it: it lays them out as it makes them,
# and once for layers that take the same.


class VNMLinear(nn.Module):
    """x (..., in) -> (..., out)."""

    def __init__(self, weight: KernelWeight) -> None:
        super().__init__()
        self.packed = weight

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        w, operators, x = self.packed, _operators(), x.contiguous()
        out: Tensor = (
            operators.vnm_linear_direct(x, w.packed, w.layout.out)
            if direct()
            else operators.vnm_linear(x, *w.arguments, w.tile)
        )
        return out


class VNMPair(nn.Module):
    """Linear, GELU, Linear: x (..., in) -> (..., out); the hidden channels never leave the cache."""

    def __init__(self, first: KernelWeight, second: KernelWeight, tanh: bool) -> None:
        super().__init__()
        self.first, self.second, self.tanh = first, second, tanh

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        a, b, operators, x = self.first, self.second, _operators(), x.contiguous()
        out: Tensor = (
            operators.vnm_pair_direct(x, a.packed, b.packed, b.layout.out, self.tanh)
            if direct()
            else operators.vnm_pair(x, *a.arguments, *b.arguments, self.tanh, b.tile)
        )
        return out


class VNMConv(nn.Module):
    """x ([batch,] in, height, width) -> ([batch,] out, height', width'), as Conv2d has them; `padding` None: half of the
    kernel's side, so that an odd one with a stride of 1 keeps the size."""

    def __init__(self, weight: KernelWeight, side: int, stride: int = 1, padding: int | None = None) -> None:
        super().__init__()
        self.packed, self.where = weight, (side, stride, side // 2 if padding is None else padding)

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        if x.dim() == 3:  # an image without a batch
            return self.forward(x[None])[0]
        w = self.packed
        largest = None
        # `in`: torch 2.10 compiles no comparison of an enum's names by `>=`
        if w.layout.lanes in (Lanes.CODES, Lanes.BYTES) and x.dim() == 4 and x.numel():
            # here, so that a compiler takes it on its way through what makes x; torch's vector_norm takes 18 times as long
            dims = (1, 2, 3)
            ends = torch.stack((x.amin(dims), x.amax(dims))) if w.layout.lanes == Lanes.BYTES else x.abs().amax(dims)
            largest = ends.float()
        operators, x = _operators(), x.contiguous()
        out: Tensor = (
            operators.vnm_conv_direct(x, w.packed, x if largest is None else largest, w.layout.out, *self.where)
            if direct()
            else operators.vnm_conv(x, *w.arguments, largest, *self.where, w.tile)
        )
        return out


def _shape_of_work(pattern: NM | Clustered, lanes: Lanes, pixels: bool) -> tuple[int, int, int]:
    """How the kernels of this machine's level like to work: how many of the rows that share a choice at a time, about how
    many channels to a block, and how many vectors of tokens (or `pixels`) to a tile. Found by measuring, but for NEON: there it is
    what fills the registers (see _vnm.c), and blocks of as many bytes as for AVX2."""
    wide = level().startswith("avx512")
    most = next(v for v in ((8, 4, 2, 1) if wide else (4, 2, 1)) if pattern.v % v == 0)
    if lanes == Lanes.BYTES:
        channels = 512 if wide and not pixels else 256
        whole = level() in VNNI and wide and most < 8  # sums of four vectors stay in registers
        vectors = 24 if pixels else 4 if whole or level() in ("portable", "neon") else 2
    elif level() == "neon":
        channels, vectors = {1: (128, 20), 2: (128, 20), 4: (256, 10)}[most]
        if lanes == Lanes.CODES:
            channels, vectors = {1: (96, 12), 2: (96, 12), 4: (128, 8)}[most]
    elif not wide and lanes == Lanes.CODES:
        channels, vectors = {1: (96, 4), 2: (96, 4), 4: (128, 18) if pixels else (128, 3)}[most]
    elif not wide:
        channels, vectors = {1: (128, 9), 2: (128, 9), 4: (128, 12) if pixels else (192, 3)}[most]
    elif lanes != Lanes.FLOATS:
        channels, vectors = {1: (96, 5), 2: (96, 5), 4: (512, 5), 8: (512, 6)}[most]
    else:
        channels, vectors = {1: (96, 6), 2: (96, 6), 4: (128, 5), 8: (512, 6)}[most]
    return most, channels, vectors


def _block(channels: int, pattern: NM | Clustered, about: int) -> int:
    """Channels in a block: whole groups, and rows of every kernel, about `about` of them."""
    step = math.lcm(pattern.m, 8)
    return min(-(-channels // step), max(1, about // step)) * step


class VNM(Backend):
    """Compiled CPU kernels for weights whose V rows share their N of M (4:2:4 and the like), fp32 and bf16."""

    name = "vnm"
    bits = 16
    """Of the sums of four pairs of bytes."""

    @property
    def version(self) -> str:  # type: ignore[override]
        return version()

    def unavailable(self, device: torch.device) -> str | None:
        return unavailable(device)

    def remark(self, device: torch.device) -> str | None:
        return kernels()[1] if device.type == "cpu" else None

    def refusal(self, unit: Unit) -> str | None:
        if reason := other_dtype(unit):
            return reason
        for pattern, layer in zip(unit.patterns, unit.layers, strict=True):
            if pattern is None:
                return "its weight obeys no N:M pattern"
            if isinstance(pattern, Venom):
                return pattern.no_kernel
            if pattern.v % 2:
                return (
                    f"{pattern} shares no choice between rows: a CPU gains nothing from V = {pattern.v}; "
                    f"2:{pattern.n}:{pattern.m}, 4:{pattern.n}:{pattern.m} or 8:{pattern.n}:{pattern.m} would"
                )
            if math.lcm(pattern.m, 8) * 2 > _LARGEST_INDEX:
                return f"groups of {pattern.m} channels are too large for the kernels"
            if isinstance(layer, nn.Conv2d) and (reason := no_plain_convolution(layer)):
                return reason
        return None

    def build(self, unit: Unit) -> nn.Module:
        extension, why = kernels()
        if extension is None:
            raise CompressorError(f"{unit.name} cannot be lowered", why or "")
        patterns = [pattern for pattern in unit.patterns if isinstance(pattern, (NM, Clustered))]
        linear = not any(isinstance(layer, nn.Conv2d) for layer in unit.layers)
        half = linear and unit.dtype == torch.bfloat16 and extension.level() == "avx512_bf16"
        lanes = self._lanes(half and all((p.n, p.m) == (2, 4) for p in patterns))
        weights = []
        for layer, pattern in zip(unit.layers, patterns, strict=True):
            rows, channels, tile = _shape_of_work(pattern, lanes, isinstance(layer, nn.Conv2d))
            block = _block(layer.weight.shape[1], pattern, channels)
            weight = layer.weight.detach()
            weights.append(
                KernelWeight(
                    weight, layer.bias, pattern, together=rows, block=block, lanes=lanes, bits=self.bits, tile=tile
                )
            )
        if isinstance(unit.module, nn.Conv2d):
            conv = unit.module
            padding = {"valid": 0, "same": None}[conv.padding] if isinstance(conv.padding, str) else conv.padding[0]
            return VNMConv(weights[0], conv.kernel_size[0], conv.stride[0], padding)
        if isinstance(unit.module, nn.Linear):
            return VNMLinear(weights[0])
        if weights[0].parts.order is not None:  # its rows find their places only when all of them are there
            return nn.Sequential(VNMLinear(weights[0]), unit.activation, VNMLinear(weights[1]))
        return VNMPair(weights[0], weights[1], unit.activation.approximate == "tanh")

    def _lanes(self, pairs: bool) -> Lanes:
        """What a lane of a unit's weights holds; `pairs`: whether bf16 products take all of them."""
        return Lanes.HALVES if pairs else Lanes.FLOATS


class VNMInt8(VNM):
    """V:2:4 weights in 8 bits, per output row, times inputs in whole numbers, per token or image, summed in 32 bits.

    What that changes is no rounding error of the layer's own precision, so it is for those who ask for it.
    """

    name = "vnm-int8"
    quantises = True
    products = "int8"
    largest_inner = LARGEST_INNER
    """Channels of a row of which two of four are kept, times kernel positions."""

    def refusal(self, unit: Unit) -> str | None:
        if reason := super().refusal(unit):
            return reason
        for pattern in unit.patterns:
            if pattern is not None and (pattern.n, pattern.m) != (2, 4):
                return f"{pattern}: 8-bit products take pairs of channels, two of four, as in 4:2:4"
        return self._too_long(unit, self.largest_inner)

    def _too_long(self, unit: Unit, most: int) -> str | None:
        """Why sums of a layer could leave 32 bits; None where they are of up to `most` products."""
        found = (layer.weight[0].numel() for layer in unit.layers)
        return next((f"{n} products: sums of more than {most} could leave 32 bits" for n in found if n > most), None)

    def _lanes(self, pairs: bool) -> Lanes:
        return Lanes.CODES


class VNMW7A8(VNMInt8):
    """V:2:4 weights in about 7 bits, per output row, times inputs in 8, per token or image: less exact than vnm-int8, and faster with
    AVX2."""

    name = "vnm-w7a8"
    products = "w7a8"

    def unavailable(self, device: torch.device) -> str | None:
        if (reason := super().unavailable(device)) is None and level() in VNNI:
            return f"{self.name.replace('w7', 'w8')} is as fast on this processor, and more exact"
        return reason

    def _lanes(self, pairs: bool) -> Lanes:
        return Lanes.BYTES


class VNMW8A8(VNMW7A8):
    """The same with all 8 bits of weights, on processors that sum products of bytes in 32 bits: with VNNI, of AVX-512 or by
    itself (AVX-VNNI)."""

    name = "vnm-w8a8"
    products = "w8a8"
    bits = 32
    largest_inner = LARGEST_INNER_OF_BYTES

    def unavailable(self, device: torch.device) -> str | None:
        return unavailable_without_vnni(device, self.name.replace("w8a8", "w7a8"))


def other_dtype(unit: Unit) -> str | None:
    """Why the kernels do not take the dtype of `unit`; None where they do."""
    return None if unit.dtype in HALF else f"the kernels take float32 and bfloat16, not {unit.dtype}"


def no_plain_convolution(layer: nn.Conv2d) -> str | None:
    """Why the kernels do not take `layer`, whatever its weight; None where they do."""
    side = layer.kernel_size[0]
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups"
    if layer.dilation != (1, 1):
        return f"dilation {layer.dilation}: the kernels take 1"
    if layer.kernel_size != (side, side) or side > _LARGEST_SIDE:
        return f"a kernel of {layer.kernel_size}: the kernels take squares of up to {_LARGEST_SIDE}"
    if layer.stride not in [(stride, stride) for stride in range(1, side + 1)]:
        return f"stride {layer.stride}: the kernels take one for both sides, up to the kernel's {side}"
    if layer.padding_mode != "zeros" or layer.padding not in (
        "valid",
        *(["same"] if side % 2 else []),
        *((p, p) for p in range(side)),
    ):
        what = f"the kernels take zeros, as many on all sides, less than the kernel's {side}"
        return f"padding {layer.padding} ({layer.padding_mode}): {what}"
    return None
