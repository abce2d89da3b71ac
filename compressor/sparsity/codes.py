"""8-bit codes of weights and of inputs: the one rule that all quantising backends and training share."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of each 8-bit type."""

Quantise = Literal["none", "int8"]
"""What masked weights are rounded to while they are trained."""
QUANTISE: tuple[Quantise, ...] = ("none", "int8")


def quantised(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes (rows, in) of `dtype` and scales (rows, 1) in float32, so that codes * scale is nearly `rows` (rows, in).

    Zeros stay zeros. The largest of a row gets the largest code; whole numbers are rounded half to even.
    """
    largest = LARGEST[dtype]
    values = rows.float()
    scale = values.abs().amax(1, keepdim=True).clamp_min(1e-12) / largest
    codes = values / scale
    if not dtype.is_floating_point:
        codes = codes.round()
    return codes.clamp(-largest, largest).to(dtype), scale


def gelu_quantised(rows: Tensor, dtype: torch.dtype, gelu: str) -> tuple[Tensor, Tensor]:
    """`quantised`, of GELU(rows) in float32 where `gelu` is its `approximate`: "none" or "tanh"; of `rows` where it is ""."""
    return quantised(F.gelu(rows.float(), approximate=gelu) if gelu else rows, dtype)


def fake_quantised(weight: Tensor) -> Tensor:
    """What `weight` (out, in, *kernel) is in 8 bits: codes * scale of each output row, in the weight's shape and dtype.

    In float32 it gives itself back when it is quantised again, to the last bit: 127 * scale / 127 is the scale for every float32
    scale. In half precision it does not: bfloat16 rounds by up to 2^-8, of a code and of the largest one, which is nearly one code.
    """
    codes, scale = quantised(weight.flatten(1), torch.int8)
    return (codes.float() * scale).view_as(weight).to(weight.dtype)
