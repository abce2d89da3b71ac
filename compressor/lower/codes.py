"""8-bit codes of weights and of inputs: the one rule that all quantising backends share."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of each 8-bit type."""


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
