"""Rows of a layer's input in 8 bits, with the GELU before them, as one kernel for GPUs: it reads and writes everything once.

A compiler makes two loops of it and takes the GELU in both; on an H100 that took three times as long as this. A program has a whole
row in registers, in two parts: the largest power of two that fits, and the rest.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from compressor.sparsity.codes import LARGEST, gelu_quantised

_ENTRIES = 65536
"""The longest row."""
_KINDS = {"": 0, "tanh": 1, "none": 2}


@triton.jit
def _quantise(
    x,
    by_row,
    by_column,
    bias,
    codes,
    scales,
    count,
    stride,
    columns,
    largest,
    SCALED: tl.constexpr,
    BIASED: tl.constexpr,
    KIND: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
):
    first, second = tl.arange(0, A), A + tl.arange(0, B)
    there = second < columns
    if SCALED:  # the same for all rows: read once
        scale_a, scale_b = tl.load(by_column + first), tl.load(by_column + second, mask=there, other=0.0)
    if BIASED:
        bias_a = tl.load(bias + first).to(tl.float32)
        bias_b = tl.load(bias + second, mask=there, other=0.0).to(tl.float32)
    for step in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + step
        if row < count:
            a = tl.load(x + row * stride + first).to(tl.float32)
            b = tl.load(x + row * stride + second, mask=there, other=0.0).to(tl.float32)
            if SCALED:
                own = tl.load(by_row + row)
                a, b = a * own * scale_a, b * own * scale_b
            if BIASED:
                a, b = a + bias_a, b + bias_b
            a, b = _gelu(a, KIND), _gelu(b, KIND)
            most = tl.maximum(tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0)), 1e-12)
            broken = tl.max((a != a).to(tl.int32), 0) + tl.max((b != b).to(tl.int32), 0)  # noqa: PLR0124  # NaN alone
            most = tl.where(broken > 0, float("nan"), most)
            tl.store(codes + row * columns + first, _codes(a, most, largest, ROUND).to(codes.dtype.element_ty))
            b = _codes(b, most, largest, ROUND).to(codes.dtype.element_ty)
            tl.store(codes + row * columns + second, b, mask=there)
            tl.store(scales + row, most / largest)


@triton.jit
def _gelu(v, KIND: tl.constexpr):
    if KIND == 1:
        v = v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
    if KIND == 2:
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    return v


@triton.jit
def _codes(v, most, largest, ROUND: tl.constexpr):
    c = tl.minimum(tl.maximum(v * (largest / most), -largest), largest)
    if ROUND:
        c = (c + 12582912.0) - 12582912.0  # 1.5 * 2^23: what is added and taken off again is rounded half to even
    return c


def takes(x: Tensor) -> bool:
    """Whether `quantised` takes x (rows, in)."""
    wide = x.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int32)
    return wide and 0 < x.shape[1] <= _ENTRIES and 0 < x.shape[0] < 2**31


def quantised(
    x: Tensor,
    dtype: torch.dtype,
    gelu: str,
    by_row: Tensor | None = None,
    by_column: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `codes.gelu_quantised` gives of x (rows, in) on a GPU, up to the last bits of scales, and codes of numbers halfway.

    With the scales `by_row` (rows, 1) and `by_column` (in,), of x * by_row * by_column + bias (in,).
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    by_row, by_column, bias = (None if one is None else one.contiguous() for one in (by_row, by_column, bias))
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=dtype, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    part = 1 << (columns.bit_length() - 1)
    rest = triton.next_power_of_2(max(1, columns - part))
    each = 1 if by_row is None else 8
    given = (x, by_row, by_column, bias, codes, scales, rows, x.stride(0), columns, LARGEST[dtype])
    kinds = (by_row is not None, bias is not None, _KINDS[gelu], dtype == torch.int8)
    warps = min(16, max(2, 1 << (max(1, columns // 1024).bit_length() - 1)))
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        _quantise[(triton.cdiv(rows, each),)](*given, *kinds, each, part, rest, num_warps=warps)
    return codes, scales


def differences(device: torch.device) -> str | None:
    """What the kernel gives otherwise than torch, on a few small tensors; None: nothing."""
    rng, wide = torch.Generator().manual_seed(0), torch.float32  # whatever a program has as its default
    x, scale, bias = (torch.randn(shape, generator=rng, dtype=wide) for shape in ((5, 200), (200,), (200,)))
    x *= torch.logspace(-3, 3, 5, dtype=wide)[:, None]
    x[0], x[1, :100] = 0, 0
    x, bias, rows = x.bfloat16(), bias.bfloat16(), torch.logspace(1, -1, 5, dtype=wide)[:, None]
    # Triton's interpreter, which is there for CPUs, rounds fp8 without a carry, and GPUs before 8.9 have none.
    floating = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    kinds = ((torch.int8, 1.0), (torch.float8_e4m3fn, 32.0))  # with one step of the largest codes
    for dtype, within in kinds if floating else kinds[:1]:
        for gelu, scaled in product(_KINDS, (False, True)):
            more = (rows, scale, bias) if scaled else ()
            wanted, its = gelu_quantised(x.float() * rows * scale + bias.float() if scaled else x, dtype, gelu)
            found, own = (
                part.cpu() for part in quantised(x.to(device), dtype, gelu, *(one.to(device) for one in more))
            )
            off = (found.float() - wanted.float()).abs()
            if not torch.allclose(own, its, 1e-4, 0) or off.max() > within or (off > 0).float().mean() > 0.01:
                return f"{dtype} codes" + f" of a GELU ({gelu})" * bool(gelu) + " of a scaled product" * scaled
    return None
