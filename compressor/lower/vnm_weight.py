"""V:N:M weights as the compiled CPU kernels read them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.pattern import NM

_PAIRS = torch.tensor([[0, 0, 1, 2], [0, 0, 3, 4], [0, 0, 0, 5], [0, 0, 0, 0]])
"""The row of a pair of channels (i < j of four) among the six that a panel holds."""


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
    dot: int
    """1 where a lane holds a pair of bf16, else 0."""


class KernelWeight(nn.Module):
    """A weight (out, in, *kernel) that obeys `pattern`, as buffers that the kernels read.

    `values` holds 32-bit lanes, one fp32 or a pair of bf16 (`dot`), ordered by block of channels, kernel position, group of
    V rows, step, row; `index` the panel row of each step. `layout` describes them to the kernel. `together` is how many of
    the rows that share a choice the kernel takes at a time; None: all.
    """

    values: Tensor
    index: Tensor
    bias: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        pattern: NM | Clustered,
        *,
        block: int,
        together: int | None = None,
        dot: bool = False,
        tile: int = 6,
    ) -> None:
        super().__init__()
        order = None
        if isinstance(pattern, Clustered):
            # rows that share a choice follow each other here, and go back to their places after
            order = pattern.order(weight)
            weight, bias, pattern = weight[order], None if bias is None else bias[order], pattern.neighbours
        out, channels = weight.shape[:2]
        v, n, m = together or pattern.v, pattern.n, pattern.m  # a part of rows that share a choice shares one too
        # Exactly n survive of every m, also where a kept weight happens to be zero.
        survivors = replace(pattern, v=v).survivors(weight.abs())
        if bool(((weight != 0) & ~survivors).any()):
            raise CompressorError(
                f"a weight {tuple(weight.shape)} does not obey {pattern}", "Prune it by that pattern."
            )
        keep = survivors[::v].reshape(out // v, channels // m, m, -1)
        at = keep.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, :n].sort(dim=2).values
        taps = at.shape[-1]
        lanes = weight.reshape(out // v, v, channels // m, m, taps)
        # (groups of rows, v, groups of channels, n, taps)
        kept = lanes.gather(3, at[:, None].expand(-1, v, -1, -1, -1))
        values, index = _lanes(kept, at, block, m, dot)
        self.register_buffer("values", torch.cat(values))
        self.register_buffer("index", torch.cat(index).to(torch.uint16))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("order", None if order is None else order.to(torch.int32))
        self.layout = Layout(out, channels, v, taps, block, m, 1 if dot else n, 6 if dot else m, int(dot))
        self.tile = tile

    @property
    def numbers(self) -> list[int]:
        """The layout as operators take it."""
        return list(self.layout)

    def get_extra_state(self) -> Tensor:
        """How the values lie: a state of other numbers is none of this module's, whatever its shapes."""
        return torch.tensor(self.layout)

    def set_extra_state(self, state: Tensor) -> None:
        if tuple(state.tolist()) != self.layout:
            raise CompressorError("a state of a model lowered otherwise", "Lower the dense model again instead.")


def _lanes(kept: Tensor, at: Tensor, block: int, m: int, dot: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The kept values as 32-bit lanes and their rows of the panel, block of channels by block.

    `kept` (groups of rows, v, groups of channels, n, taps); `at` (groups of rows, groups of channels, n, taps): the places of
    the kept in their group of `m`.
    """
    values, index = [], []
    groups = block // m
    for start in range(0, at.shape[1], groups):
        some = slice(start, start + groups)
        here = at[:, some]
        group = torch.arange(here.shape[1])[None, :, None]
        if dot:
            rows = _PAIRS[here[:, :, 0], here[:, :, 1]] + 6 * group
            pairs = kept[:, :, some].permute(4, 0, 2, 1, 3).to(torch.bfloat16)
            values.append(pairs.contiguous().flatten().view(torch.int32))
            index.append(rows.permute(2, 0, 1).flatten())
        else:
            rows = here + m * group[..., None]
            values.append(kept[:, :, some].permute(4, 0, 2, 3, 1).float().contiguous().flatten().view(torch.int32))
            index.append(rows.permute(3, 0, 1, 2).flatten())
    return values, index
