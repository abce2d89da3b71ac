"""What a masked step does beyond a dense one, as a few kernels for GPUs: each reads and writes its tensors once.

In torch's operators it is some twenty passes over a weight. Every kernel gives the bits that torch's operators give: comparisons are
exact, and the one product is not fused with its sum. `on_gpu.kernels_for` decides where they are used.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_M = 16
_TILE = 8192
_FLAT = 1024
_UNFUSED = {"enable_fp_fusion": False}


@triton.jit
def _keep(
    score, keep, nan, groups, inner, N: tl.constexpr, M: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each group the N entries that fewer than N others beat; of equal ones the earlier wins. `nan` becomes 1 where one is."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, M)
    # group number r * inner + k starts at r * M * inner + k, and its entries are `inner` apart
    at = ((group // inner) * M * inner + group % inner)[:, None] + place[None, :] * inner
    there = (group < groups)[:, None] & (place >= 0)[None, :]
    value = _read(score + at, there, MAGNITUDE)
    broken = tl.max((value != value).to(tl.int32))  # noqa: PLR0124  # true of NaN alone
    if broken > 0:
        tl.atomic_max(nan, broken)
    mine, other = value[:, :, None], value[:, None, :]
    earlier = (place[None, :] < place[:, None])[None, :, :]
    beaten = (other > mine) | ((other == mine) & earlier)
    tl.store(keep + at, (tl.sum(beaten.to(tl.int32), axis=2) < N).to(tl.int8), mask=there)


@triton.jit
def _keep_of_four(score, keep, nan, groups, N: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    """`_keep` for groups of four neighbours in memory, in a third of its instructions: six comparisons, a word for four bytes."""
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = group < groups
    a = _read(score + group * 4, there, MAGNITUDE)
    b = _read(score + group * 4 + 1, there, MAGNITUDE)
    c = _read(score + group * 4 + 2, there, MAGNITUDE)
    d = _read(score + group * 4 + 3, there, MAGNITUDE)
    broken = tl.max(((a != a) | (b != b) | (c != c) | (d != d)).to(tl.int32))  # noqa: PLR0124  # true of NaN alone
    if broken > 0:
        tl.atomic_max(nan, broken)
    ab, ac, ad = (a >= b).to(tl.int32), (a >= c).to(tl.int32), (a >= d).to(tl.int32)
    bc, bd, cd = (b >= c).to(tl.int32), (b >= d).to(tl.int32), (c >= d).to(tl.int32)
    # how many beat each: earlier ones that are not smaller, and later ones that are larger
    first = (3 - ab - ac - ad < N).to(tl.int32)
    second = (ab + 2 - bc - bd < N).to(tl.int32)
    third = (ac + bc + 1 - cd < N).to(tl.int32)
    fourth = (ad + bd + cd < N).to(tl.int32)
    tl.store(keep + group, first | (second << 8) | (third << 16) | (fourth << 24), mask=there)


@triton.jit
def _read(at, there, MAGNITUDE: tl.constexpr):
    """Numbers, or their magnitudes, in float32 where they are shorter."""
    value = tl.load(at, mask=there, other=0.0)
    if value.dtype == tl.bfloat16 or value.dtype == tl.float16:
        value = value.to(tl.float32)
    if MAGNITUDE:
        value = tl.abs(value)
    return value


@triton.jit
def _settle(dense, keep, before, sparse, flips, count, COUNTED: tl.constexpr, BLOCK: tl.constexpr):
    """sparse = dense where `keep`, +0 elsewhere; `flips` grows by the entries in which `keep` is not as `before`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    kept = tl.load(keep + at, mask=there, other=0)
    value = tl.load(dense + at, mask=there, other=0.0)
    tl.store(sparse + at, tl.where(kept != 0, value, 0.0), mask=there)
    if COUNTED:
        was = tl.load(before + at, mask=there, other=0)
        tl.atomic_add(flips, tl.sum((was != kept).to(tl.int32)))


@triton.jit
def _refined(grad, dense, keep, out, decay, count, BLOCK: tl.constexpr):
    """out = grad + decay * dense, the latter where `keep` is False."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    kept = tl.load(keep + at, mask=there, other=1)
    pulled = tl.where(kept != 0, 0.0, tl.load(dense + at, mask=there, other=0.0))
    tl.store(out + at, tl.load(grad + at, mask=there, other=0.0) + decay * pulled, mask=there)


def takes(score: Tensor, m: int, v: int) -> bool:
    """Whether `keep` makes masks of that kind for such scores."""
    return v == 1 and m <= LARGEST_M and m & (m - 1) == 0 and score.is_floating_point() and score.element_size() > 1


def keep(score: Tensor, n: int, m: int, magnitude: bool = False, nan: Tensor | None = None) -> Tensor:
    """The mask N:M of `score` (out, in, *kernel), which is contiguous; of |score| with `magnitude`. A NaN sets `nan` (int32) to 1."""
    found = torch.empty(score.shape, dtype=torch.bool, device=score.device)
    flag = torch.zeros((), dtype=torch.int32, device=score.device) if nan is None else nan
    groups, inner, block = score.numel() // m, score[0, 0].numel(), _TILE // (m * m)
    if m == 4 and inner == 1:
        words = found.view(-1).view(torch.int32)
        _launch(_keep_of_four, groups, block, (score, words, flag, groups, n, magnitude, block))
    else:
        _launch(_keep, groups, block, (score, found.view(torch.int8), flag, groups, inner, n, m, magnitude, block))
    return found


def settle_(sparse: Tensor, dense: Tensor, keep: Tensor, before: Tensor | None) -> Tensor:
    """Write `dense` where `keep` is True into `sparse`, and +0 elsewhere. Gives how many entries of `before` are not as in `keep`."""
    flips = torch.zeros((), dtype=torch.int32, device=dense.device)
    masks = keep.view(torch.int8), (keep if before is None else before).view(torch.int8)
    count = dense.numel()
    _launch(_settle, count, _FLAT, (dense, *masks, sparse, flips, count, before is not None, _FLAT))
    return flips.long()


def refined(grad: Tensor, dense: Tensor, keep: Tensor, decay: float) -> Tensor:
    """grad + decay * dense where `keep` is False, grad elsewhere: a new tensor."""
    out, count = torch.empty_like(grad), grad.numel()
    _launch(_refined, count, _FLAT, (grad, dense, keep.view(torch.int8), out, decay, count, _FLAT))
    return out


def _launch(kernel: Any, count: int, block: int, arguments: tuple[Any, ...]) -> None:
    tensor: Tensor = arguments[0]
    with torch.cuda.device_of(tensor):  # Triton launches on the current GPU
        kernel[(triton.cdiv(count, block),)](*arguments, **_UNFUSED)


def differences(device: torch.device) -> str | None:
    """What the kernels give otherwise than torch, on a few small tensors with ties, infinities and negative zeros; None: nothing."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, -2.0, 3.5, float("inf"), -float("inf")])
    score = values[torch.randint(8, (6, 32, 3), generator=torch.Generator().manual_seed(0))]
    for one in (score, score[..., 0].contiguous()):  # four neighbours in memory have a kernel of their own
        for n, m in ((2, 4), (3, 8)):
            if not torch.equal(keep(one.to(device), n, m).cpu(), _sorted_out(one, n, m)):
                return f"masks of {n}:{m}"
    dense, grad = score.clamp(-9, 9) / 3, score.clamp(-9, 9).flip(0) / 7
    kept, before, zero = _sorted_out(score, 2, 4), _sorted_out(-score, 2, 4), torch.zeros(())
    sparse = torch.empty_like(dense, device=device)
    flips = settle_(sparse, dense.to(device), kept.to(device), before.to(device))
    if not torch.equal(sparse.cpu(), torch.where(kept, dense, zero)) or int(flips) != int((kept ^ before).sum()):
        return "masked weights"
    on = [tensor.to(device) for tensor in (grad, dense, kept)]
    if not torch.equal(refined(on[0], on[1], on[2], 2e-4).cpu(), grad + 2e-4 * torch.where(kept, zero, dense)):
        return "gradients"
    return None


def _sorted_out(score: Tensor, n: int, m: int) -> Tensor:
    """The mask N:M of `score` (out, in, *kernel) by sorting, of which the first of equal entries come first."""
    groups = score.unflatten(1, (-1, m))
    first = groups.argsort(dim=2, descending=True, stable=True)[:, :, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, first, True).flatten(1, 2)
