"""VENOM's format: the rows of a block share four columns of every M, and each row keeps N of these four for itself.

Sparse tensor cores, which know 2:4 alone, can so run densities below a half: four columns of M are gathered, and what is left of them
is 2:4. The literature writes it V:N:M, which is another thing here (`compressor.NM`), so it has a name of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from compressor.errors import UsageError
from compressor.sparsity.pattern import NM, Pattern

_COLUMNS = 4


@dataclass(frozen=True)
class Venom(Pattern):
    """`block` neighbouring output rows share a choice of 4 of every `m` input channels; each row keeps `n` of these 4.

    The columns with the largest scores, summed over the block, are chosen first, then each row's own; ties go to the first. Every row
    is N:M too. Its string form is `venom:64:2:8` (block, n, m).
    Source: Castro et al. 2023, "VENOM: A Vectorized N:M Format for Unleashing the Power of Sparse Tensor Cores", section 3.
    """

    n: int
    m: int
    block: int
    density: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        NM(self.n, self.m, self.block)  # whole numbers of at least 1, n at most m
        if self.m < _COLUMNS or self.n > _COLUMNS:
            raise UsageError(
                f"pattern {self}: N of {_COLUMNS} columns are kept, and these are {_COLUMNS} of every M",
                "N is at most 4 and M at least 4, as in venom:64:2:8.",
            )
        object.__setattr__(self, "density", self.n / self.m)

    def __str__(self) -> str:
        return f"venom:{self.block}:{self.n}:{self.m}"

    @property
    def grouped(self) -> NM:
        return NM(self.n, self.m)

    @property
    def no_kernel(self) -> str:
        """Why a kernel for V:N:M does not take it: the reason that plans give."""
        return f"{self}: the rows of a block share columns and choose among them; no kernel here gains from that, so it stays dense"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return NM(self.n, self.m, self.block).misfit(shape)

    def survivors(self, score: Tensor) -> Tensor:
        columns = self._lanes(NM(_COLUMNS, self.m, self.block).survivors(score))[:, :1]
        places = columns.byte().argsort(dim=0, descending=True, stable=True)[:_COLUMNS]  # ascending, for ties
        lanes = self._lanes(score)
        places = places.expand(-1, *lanes.shape[1:])
        four = lanes.gather(0, places).movedim(0, -1)
        own = NM(self.n, _COLUMNS).survivors(four.reshape(-1, _COLUMNS)).view(four.shape).movedim(-1, 0)
        keep = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
        self._lanes(keep).scatter_(0, places, own)
        return keep

    def violations(self, keep: Tensor) -> int:
        lanes = self._lanes(keep)
        return int((lanes.any(1).sum(0) > _COLUMNS).sum() + (lanes.sum(0) > self.n).sum())

    def _lanes(self, tensor: Tensor) -> Tensor:
        """(out, in, *kernel) -> (m, block, out / block, *kernel, in / m): the M entries of each group side by side."""
        return rearrange(tensor, "(o v) (i m) ... -> m v o ... i", m=self.m, v=self.block)
