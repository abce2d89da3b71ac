"""V:N:M weights as the compiled CPU kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.lower.backend import was_cast
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.codes import quantised
from compressor.sparsity.pattern import NM

_PAIRS = torch.tensor([[0, 0, 1, 2], [0, 0, 3, 4], [0, 0, 0, 5], [0, 0, 0, 0]])
"""The row of a pair of channels (i < j of four) among the six that a panel holds."""


_LARGEST_SUM = 2**31 - 1
LARGEST_INNER = _LARGEST_SUM // 127**2 // 2 * 4
"""Channels of which two of four, in codes of 8 bits on both sides, sum to 32 bits at most."""
LARGEST_INNER_OF_BYTES = _LARGEST_SUM // (127 * 255) // 2 * 4
"""The same of codes up to 127 of weights and 255 of inputs."""
_LARGEST_CODE = 2**15 - 1


SET = 8
"""Pairs of channels whose products the kernels sum in 16 bits, where lanes are BYTES: in two sums, of the even and of the odd ones."""


class Lanes(IntEnum):
    """What a lane of 32 bits holds, as the kernels number it."""

    FLOATS = 0
    """One fp32."""
    HALVES = 1
    """A pair of bf16."""
    CODES = 2
    """A pair of whole numbers of 16 bits: codes of weights (8 bits of them) and of inputs."""
    BYTES = 3
    """Bytes: two codes of inputs (of 0 to 255), or four of weights (about 7 bits of them, or 8 where 16 bits need not hold a sum); of
    attention four of queries, and four of keys."""


class Layout(NamedTuple):
    """What the kernels must know of a weight's buffers, in their order."""

    out: int
    channels: int
    v: int
    taps: int
    """Kernel positions of a convolution; 1 of a Linear."""
    block: int
    """Channels whose panel is in the cache at a time."""
    group: int
    """Channels of which some are kept: M."""
    steps: int
    """Steps per group: N, or 1 where a step takes a pair of channels."""
    rows: int
    """Rows of the panel per group: M, or the six pairs of a group of four."""
    lanes: int
    """What a lane holds: see Lanes."""
    largest: int
    """CODES: the largest code of an input, so that no sum leaves 32 bits; BYTES: the bits that hold a sum of four pairs; else 0."""

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.channels // max(1, self.block))

    @property
    def lengths(self) -> tuple[int, int]:
        """How many values and places the buffers hold."""
        whole, left = divmod(self.channels, max(1, self.block))
        steps = [channels // max(1, self.group) * self.steps for channels in (self.block, left)]
        if self.lanes == Lanes.BYTES:
            steps = [-(-some // SET) * SET for some in steps]
        places = (whole * steps[0] + steps[1]) * self.taps * (self.out // max(1, self.v))
        lanes = places // SET * (1 + SET // 2) if self.lanes == Lanes.BYTES else places
        return lanes * self.v, places


@dataclass(frozen=True)
class Parts:
    """What the kernels read of a weight."""

    values: Tensor
    index: Tensor
    bias: Tensor | None
    order: Tensor | None
    scale: Tensor | None
    total: Tensor | None


_PACKED = 0x314D4E56
_NUMBERS = 24
"""Whole numbers of 64 bits that a packed weight begins with: what it is, its bytes, its layout, its tile, where its parts begin, and
_UNCAST."""
_UNCAST = 0x7F800001
"""A signalling NaN where fp32 is read: no cast there and back leaves it as it is."""
_LINE = 64
"""Bytes of a line of the cache: parts begin with one."""


class _Span(NamedTuple):
    """Where a part lies in a packed weight, in bytes."""

    begin: int
    end: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, packed: Tensor) -> Tensor:
        """The part, a view."""
        lanes = packed[self.begin // 4 : -(-self.end // 4)].view(self.dtype)
        return lanes[: self.shape.numel()].view(self.shape)


def _numbers(packed: Tensor) -> list[int]:
    """What a packed weight begins with."""
    return packed[: 2 * _NUMBERS].clone().view(torch.int64).tolist()  # a copy begins with whole words


def _in_one(layout: Layout, tile: int, parts: Sequence[Tensor | None]) -> tuple[Tensor, tuple[_Span | None, ...]]:
    """The parts in one tensor, which is of fp32 in name alone, so that a cast of the model is seen; and where each lies."""
    spans: list[_Span | None] = []
    end = _NUMBERS * 8
    for part in parts:
        begin = -(-end // _LINE) * _LINE
        end = end if part is None else begin + part.nbytes
        spans.append(None if part is None else _Span(begin, end, part.dtype, part.shape))
    size = -(-end // _LINE) * _LINE
    packed = torch.zeros(size // 4, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
    begins = [0 if span is None else span.begin for span in spans]
    numbers = torch.tensor([_PACKED, size, *layout, tile, *begins, _UNCAST], dtype=torch.int64, device="cpu")
    packed[: 2 * len(numbers)].view(torch.int64).copy_(numbers)
    for part, span in zip(parts, spans, strict=True):
        if part is not None and span is not None:
            span.of(packed).copy_(part)
    return packed, tuple(spans)


class KernelWeight(nn.Module):
    """A weight (out, in, *kernel) that obeys `pattern`, as the kernels read it: in one buffer, `packed`, whose parts are `parts`.

    `values` holds 32-bit lanes, ordered by block of channels, kernel position, group of V rows, step, row; `index` the panel
    row of each step. `layout` describes them to the kernel. `together` is how many of the rows that share a choice the kernel
    takes at a time; None: all.

    With `lanes` CODES, weights are quantised to 8 bits per row (`quantised`), over all channels and kernel positions. Inputs get
    codes of up to `largest`, or of fewer where a sum of products could leave 32 bits otherwise. With BYTES it is
    `quantised_for_bytes`, per row too, for sums in `bits` (16, or 32, which need VNNI), and `total` [block][row] has the
    sums of a row's codes in the blocks before each one, and last in all.
    Raises CompressorError where the weight does not obey the pattern, or codes of 8 bits would be too large for 32-bit sums.
    """

    packed: Tensor
    _was_cast = False

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        pattern: NM | Clustered,
        *,
        block: int,
        together: int | None = None,
        lanes: Lanes = Lanes.FLOATS,
        largest: int = _LARGEST_CODE,
        bits: int = 16,
        tile: int = 6,
    ) -> None:
        super().__init__()
        order, scale, total = None, None, None
        codes, self.dtype = weight, weight.dtype
        if lanes == Lanes.CODES:
            codes, scale = quantised(weight.flatten(1), torch.int8)
            largest = min(largest, _LARGEST_SUM // max(1, int(codes.abs().sum(1, dtype=torch.int64).max())))
            codes = codes.view_as(weight)
            if largest < 127:
                raise CompressorError(
                    f"sums of {weight.shape[1]} products of 8-bit codes do not fit 32 bits", "Lower in float32."
                )
        if isinstance(pattern, Clustered):
            # rows that share a choice follow each other here, and go back to their places after
            order = pattern.order(weight)
            weight, codes, pattern = weight[order], codes[order], pattern.neighbours
            if bias is not None and lanes < Lanes.CODES:  # which have no use of it before rows are in their places
                bias = bias[order]
        out, channels = weight.shape[:2]
        v, n, m = together or pattern.v, pattern.n, pattern.m  # a part of rows that share a choice shares one too
        kept, at = _kept(weight, codes, replace(pattern, v=v))
        taps = at.shape[-1]
        if lanes == Lanes.BYTES:
            kept, scale = quantised_for_bytes(kept, block // m, bits)
            total = _totals(kept, block // m)
            if order is not None:
                back = order.argsort()
                scale, total = scale[back], total[:, back]
        values, index = _lanes(kept, at, block, m, lanes)
        steps, rows = (n, m) if lanes == Lanes.FLOATS else (1, 6 if m == 4 else 1)
        most = {Lanes.CODES: largest, Lanes.BYTES: bits}.get(lanes, 0)
        self.layout = Layout(out, channels, v, taps, block, m, steps, rows, int(lanes), most)
        self.tile = tile
        parts = (  # as Parts has them
            values,
            index.to(torch.uint16),
            None if bias is None else bias.detach().float(),
            None if order is None else order.to(torch.int32),
            None if scale is None else scale.flatten(),
            total,
        )
        packed, self._spans = _in_one(self.layout, tile, parts)
        self._begins_with = _numbers(packed)
        self.register_buffer("packed", packed)
        self._seen: tuple[Tensor, Parts] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}  # nobody saves views of one storage in several dtypes

    @property
    def parts(self) -> Parts:
        """What `packed` holds, as views of it. Raises CompressorError where the model was cast."""
        if torch.compiler.is_compiling():  # which sees no numbers to look at
            if self._was_cast:
                raise was_cast()
            return self._views(self.packed)
        if self._seen is None or self._seen[0] is not self.packed:  # another tensor once the model was moved, or cast
            views = self._views(self.packed)
            if not (_is_here(self.packed) and _is_here(views.values)):
                return views  # what a mode of torch's makes of it is not to be kept
            self._refuse_other(self.packed)
            self._seen = (self.packed, views)
        return self._seen[1]

    def _apply(self, fn: Any, recurse: bool = True) -> KernelWeight:
        asked, before = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)), self.packed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.packed.dtype == torch.float32:
            return self
        if asked.dtype == self.dtype and asked.device == before.device:  # the weight's own, which is no cast
            self.packed = before
        else:
            self._was_cast = True
        return self

    def _views(self, packed: Tensor) -> Parts:
        if packed.dtype != torch.float32:
            raise was_cast()
        parts: list[Any] = [None if span is None else span.of(packed) for span in self._spans]
        return Parts(*parts)

    @property
    def arguments(self) -> tuple[Tensor | list[int] | None, ...]:
        """The weight as operators take it."""
        p = self.parts
        return p.values, p.index, p.bias, p.order, p.scale, p.total, list(self.layout)

    def _refuse_other(self, packed: Tensor) -> None:
        """Raise CompressorError unless `packed` is laid out as this weight is, and leads nowhere outside of it."""
        again = "Lower the dense model again instead."
        if packed.dtype != torch.float32:
            raise was_cast()
        numbers = _numbers(packed) if packed.shape == self.packed.shape else []
        if numbers != self._begins_with:
            cast = numbers and _UNCAST not in numbers
            raise CompressorError("a lowered model was cast" if cast else "a state of a model lowered otherwise", again)
        views, layout = self._views(packed), self.layout
        panel = layout.block // layout.group * layout.rows
        rows = None if views.order is None else views.order.sort().values.tolist()
        if int(views.index.to(torch.int32).max()) >= panel or rows not in (None, list(range(layout.out))):
            raise CompressorError("a packed weight is not as its numbers say", again)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}packed")
        if _is_here(given):
            self._refuse_other(given)  # before it is copied over what is here
            self._was_cast = False
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._seen = None


def _is_here(given: Any) -> bool:
    """Whether it is a tensor whose numbers can be read: none of a compiler's or a tracer's, on no other device."""
    return type(given) in (Tensor, nn.Parameter) and given.device.type == "cpu"


def _kept(weight: Tensor, codes: Tensor, pattern: NM) -> tuple[Tensor, Tensor]:
    """What is kept of `codes`, which stand for `weight`: (groups of rows, v, groups of channels, n, taps), and its places in their
    groups: (groups of rows, groups of channels, n, taps). Exactly n of every m, also where a kept weight happens to be zero."""
    groups, channels, n, m = len(weight) // pattern.v, weight.shape[1] // pattern.m, pattern.n, pattern.m
    grouped = codes.reshape(groups, pattern.v, channels, m, -1)
    taps = grouped.shape[-1]
    if n == m:
        return grouped, torch.arange(m)[None, None, :, None].expand(groups, channels, -1, taps)
    keep = (weight != 0).view(torch.uint8).reshape(grouped.shape).amax(1)  # any() takes 75 times as long
    if bool((keep.sum(2, dtype=torch.int16) != n).any()):
        survivors = pattern.survivors(weight.abs())
        if bool(((weight != 0) & ~survivors).any()):
            raise CompressorError(
                f"a weight {tuple(weight.shape)} does not obey {pattern}", "Prune it by that pattern."
            )
        keep = survivors[:: pattern.v].reshape(keep.shape)
    at = keep.movedim(2, 3).flatten().nonzero().view(groups, channels, taps, n).remainder(m).movedim(3, 2)
    return grouped.gather(3, at[:, None].expand(-1, pattern.v, -1, -1, -1)), at


def quantised_for_bytes(kept: Tensor, groups: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of `kept` (groups of rows, v, groups of channels, 2, taps), int8 in the same shape, and what a code of each row stands
    for: (rows) in float32. Blocks hold `groups` groups of channels.

    Inputs have codes of 0 to 255. Two products sum to 16 bits where weights of one sign in a pair add up to 128 at most, since
    128 * 255 < 2^15; and the products of a sum of four pairs, with codes less 128, where all magnitudes of weights add up to 255. A
    row's scale is the smallest by which its pairs are 127 and its sums 251 at most before they are rounded half to even. Where sums
    have 32 `bits`, it is the smallest by which its weights are 127 at most. Raises CompressorError where a sum of products could leave
    32 bits.
    """
    # in float64, so that the order of a sum is no matter
    most = kept.abs().amax((2, 3, 4)).double() / 127 if bits == 32 else _in_16_bits(kept.double(), groups)
    scale = most.float().clamp_min(1e-30)
    codes = (kept.float() / scale[:, :, None, None, None]).round().to(torch.int8)
    products, most_of_codes = kept[0, 0].numel(), _LARGEST_SUM // 255
    if products > most_of_codes // 127 and int(codes.abs().sum((2, 3, 4), dtype=torch.int64).max()) > most_of_codes:
        raise CompressorError(f"sums of {products} products of bytes do not fit 32 bits", "Lower in float32.")
    return codes, scale.flatten()


def _in_16_bits(kept: Tensor, groups: int) -> Tensor:
    """The scales (groups of rows, v) of `kept` by which sums of four pairs fit 16 bits."""
    pairs = torch.maximum(kept.clamp_min(0).sum(3), (-kept).clamp_min(0).sum(3)).amax((2, 3))
    sums = torch.stack([_in_sets(part).abs().sum((3, 5)).amax((2, 3, 4)) for part in _blocks(kept, groups)])
    return torch.maximum(pairs / 127, sums.amax(0) / 251)


def _blocks(kept: Tensor, groups: int) -> Sequence[Tensor]:
    """`kept` (groups of rows, v, groups of channels, ...) block by block, of `groups` groups of channels."""
    return torch.split(kept, groups, 2)


def _in_sets(kept: Tensor) -> Tensor:
    """`kept` (groups of rows, v, groups of channels, 2, taps) of a block as (groups of rows, v, sets, 4, 2 sums, 2, taps); the last
    set is filled with zeros."""
    filled = F.pad(kept, (0, 0, 0, 0, 0, -kept.shape[2] % SET))
    return filled.reshape(*kept.shape[:2], -1, SET // 2, 2, *kept.shape[3:])


def _byte_lanes(kept: Tensor) -> Tensor:
    """The lanes of a block: of each set and row first -128 times what the weights of each of both sums add up to, in 16 bits (sums of
    32 bits do not read it), then two pairs to a lane."""
    sets = _in_sets(kept).permute(6, 0, 2, 3, 1, 4, 5)  # (taps, groups of rows, sets, 4, v, 2 sums, 2)
    begin = (
        (-128 * (sets[..., 0].to(torch.int16) + sets[..., 1]).sum(3, dtype=torch.int16)).contiguous().view(torch.int32)
    )
    pairs = sets.flatten(5).contiguous().view(torch.int32)
    return torch.cat([begin.flatten(3)[:, :, :, None], pairs.flatten(4)], 3).flatten()


def _totals(kept: Tensor, groups: int) -> Tensor:
    """The sums of each row's codes in the blocks before each one, and last in all: (blocks + 1, rows), int32."""
    blocks = [part.sum((2, 3, 4), dtype=torch.int32).flatten() for part in _blocks(kept, groups)]
    return torch.stack([torch.zeros_like(blocks[0]), *blocks]).cumsum(0, dtype=torch.int32)


def _lanes(kept: Tensor, at: Tensor, block: int, m: int, lanes: Lanes) -> tuple[Tensor, Tensor]:
    """The kept values as 32-bit lanes and their rows of the panel, block of channels by block.

    `kept` (groups of rows, v, groups of channels, n, taps); `at` (groups of rows, groups of channels, n, taps): the places of
    the kept in their group of `m`.
    """
    values, index = [], []
    for own, here in zip(_blocks(kept, block // m), torch.split(at, block // m, 1), strict=True):
        group = torch.arange(here.shape[1], device=here.device)
        if lanes == Lanes.FLOATS:
            rows = here.permute(3, 0, 1, 2) + m * group[:, None]
            words = own.permute(4, 0, 2, 3, 1).float()
        else:
            rows = group.expand(here.shape[3], here.shape[0], -1)
            if m == 4:
                rows = _PAIRS[here[:, :, 0], here[:, :, 1]].permute(2, 0, 1) + 6 * group
            if lanes == Lanes.BYTES:
                rows = F.pad(rows, (0, -len(group) % SET))  # with weights of zero
                words = _byte_lanes(own)
            else:
                words = own.permute(4, 0, 2, 1, 3).to(torch.int16 if lanes == Lanes.CODES else torch.bfloat16)
        values.append(words.contiguous().flatten().view(torch.int32))
        index.append(rows.flatten())
    return torch.cat(values), torch.cat(index)
