"""V:N:M where the rows that share a choice need not be neighbours: similar rows are found and meet.

A kernel that writes each row of its result to a place of its own runs such a weight as fast as one whose rows are neighbours,
and the weight keeps more of its magnitude. VENOM's V:N:M is another format (`venom:64:2:8`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from compressor.errors import UsageError
from compressor.seeds import generator
from compressor.sparsity.pattern import NM, Mask, Pattern

_AT_ONCE = 64
"""Rows that are compared with all others at a time."""
_EXCHANGED, _EXCHANGES = 2**14, 2000
"""Rows of weights with so many entries, at most, are exchanged so often, at most."""


@dataclass(frozen=True)
class Clustered(Pattern):
    """`v` output rows, wherever they are, share one choice of `n` of every `m` input channels; `v` is a power of two.

    Rows are paired by the magnitude that they keep under one choice, the best pairs first, and the pairs paired again until V
    rows are together. Each row obeys N:M. Its string form is `4c:2:4`.
    """

    n: int
    m: int
    v: int
    density: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        neighbours = NM(self.n, self.m, self.v)
        if self.v < 2 or self.v & (self.v - 1):
            raise UsageError(
                f"pattern {self}: rows are clustered in powers of two, got {self.v}", "Write 2c, 4c or 8c."
            )
        object.__setattr__(self, "density", neighbours.density)

    def __str__(self) -> str:
        return f"{self.v}c:{self.n}:{self.m}"

    @property
    def grouped(self) -> NM:
        return NM(self.n, self.m)

    @property
    def neighbours(self) -> NM:
        """The pattern that holds once the rows are in `order`."""
        return NM(self.n, self.m, self.v)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return self.neighbours.misfit(shape)

    def survivors(self, score: Tensor) -> Tensor:
        """Of magnitudes that have this pattern already, rows that share a choice go on sharing it: then nothing of them is lost."""
        order, there = None, score > 0
        if not bool((score < 0).any()) and not self.grouped.violations(there):
            order = self.order(there)
        if order is None or self.neighbours.violations(there[order]):
            order = self._clusters(score)
        return self._chosen(score, order)

    def masks(self, scores: Mapping[str, Tensor], previous: Mapping[str, Mask] | None = None) -> dict[str, Mask]:
        """As `Pattern.masks`; rows that shared a choice in `previous` go on sharing one, which also saves the search."""
        found = {}
        for name, score in scores.items():
            before = (previous or {}).get(name)
            if before is None or before.pattern != self:
                found[name] = self.mask(score)
            else:
                self.check(score)
                found[name] = Mask(self._chosen(score, self.order(before.keep)), self)
        return found

    def violations(self, keep: Tensor) -> int:
        return self.neighbours.violations(keep[self.order(keep)])

    def order(self, keep: Tensor) -> Tensor:
        """Row numbers (out,) in which rows that share a choice follow each other, `v` at a time. `keep` is bool, or a weight.

        Rows of a weight that have zeros where their group keeps join the rows that they have most in common with.
        """
        support = keep.bool().cpu()  # bool != 0 is a hundred times as slow
        flat = support.flatten(1).numpy()
        full = self.n * (flat.shape[1] // self.m)
        groups: dict[bytes, list[int]] = {}
        odd: list[int] = []  # also every row of a weight that is all zeros
        for row, (bits, count) in enumerate(zip(np.packbits(flat, axis=1), flat.sum(1).tolist(), strict=True)):
            if count == full:
                groups.setdefault(bits.tobytes(), []).append(row)
            else:
                odd.append(row)
        order, loose = [], odd
        for rows in groups.values():
            alone = len(rows) % self.v
            order += rows[: len(rows) - alone]
            loose = loose + rows[len(rows) - alone :]
        order += self._met(support, sorted(loose)) if odd else loose
        return torch.tensor(self._swapped(support, order) if odd else order, device=keep.device)

    def _met(self, support: Tensor, rows: list[int]) -> list[int]:
        """`rows` of `support` (out, in, *kernel) in an order in which those that can share a choice follow each other.

        The row with most entries is joined by those that have most in common with it and can share; then the next of those left.
        Where one finds too few, the rest follows as it is: then rows share no choice, or too little is left of them to see it.
        """
        some = support[rows]
        numbers = some.flatten(1).float()
        left = torch.ones(len(rows), dtype=torch.bool)
        first = numbers.sum(1).argsort(descending=True, stable=True)
        order: list[int] = []
        for seeds in torch.split(first, _AT_ONCE):
            for seed, likeness in zip(seeds.tolist(), numbers[seeds] @ numbers.t(), strict=True):
                if not left[seed]:
                    continue
                group, ranked = [seed], likeness.argsort(descending=True, stable=True)
                left[seed] = False
                while len(group) < self.v:
                    ranked = ranked[left[ranked]]
                    row = self._next(some, some[group].any(0), ranked)
                    if row is None:
                        return [rows[i] for i in (*order, *group, *left.nonzero().flatten().tolist())]
                    left[row] = False
                    group.append(row)
                order += group
        return [rows[i] for i in order]

    def _swapped(self, support: Tensor, order: list[int]) -> list[int]:
        """`order`, in which rows are exchanged until those that follow each other can share a choice; as it was where that fails.

        Of few inputs many rows go with each other by chance, so that what `_met` joins first may leave others alone. A row of a group
        that keeps too much changes places with the row by which most is gained; none of both moves again for some exchanges.
        """
        if support.numel() > _EXCHANGED:
            return order
        lanes = rearrange(
            support.flatten(2) if support.dim() > 2 else support[..., None], "o (i m) k -> o (i k) m", m=self.m
        )

        def excess(shared: Tensor) -> Tensor:
            return (shared.sum(-1) - self.n).clamp_(min=0).sum(-1)

        rng, rows = generator("clustered"), torch.tensor(order)
        waits = torch.zeros(len(rows), dtype=torch.long)
        # of rows that share nothing, more is kept in excess than here: a share of what there can be, larger where more rows meet
        most = (self.m - self.n) * (1 - 1 / self.v) ** 2 * lanes.shape[1] * len(rows) / self.v
        for turn in range(_EXCHANGES):
            groups = lanes[rows].view(-1, self.v, *lanes.shape[1:])
            count = groups.sum(1, keepdim=True)
            over = excess(count[:, 0] > 0)
            if not bool(over.any()):
                return rows.tolist()
            if int(over.sum()) > most:
                break
            wrong = over.nonzero().flatten()
            group = int(wrong[torch.randint(len(wrong), (), generator=rng)])
            one = group * self.v + int(torch.randint(self.v, (), generator=rng))
            others = (count - groups.int() > 0).flatten(0, 1)  # what the rest of each row's group keeps
            change = excess(others[one] | lanes[rows]) + excess(others | lanes[rows[one]]) - over[group]
            change = (change - over.repeat_interleave(self.v)) + torch.rand(len(rows), generator=rng)
            change[(waits[rows] > turn) | (torch.arange(len(rows)) // self.v == group)] = torch.inf
            other = int(change.argmin())
            if bool(change[other] < 1) or bool(torch.rand((), generator=rng) < 0.3 and change[other] < torch.inf):
                waits[rows[[one, other]]] = turn + 5
                rows[[one, other]] = rows[[other, one]]
        return order

    def _next(self, support: Tensor, shared: Tensor, ranked: Tensor) -> int | None:
        """The first of the `ranked` rows of `support` that can share a choice with the entries `shared` (in, *kernel)."""
        for some in (ranked[:4], ranked[4:_AT_ONCE], ranked[_AT_ONCE:]):  # nearly always one of the first
            lanes = rearrange(support[some] | shared, "o (i m) ... -> m o (i ...)", m=self.m)
            fits = (lanes.sum(0) <= self.n).all(1).nonzero().flatten()
            if len(fits):
                return int(some[fits[0]])
        return None

    def _chosen(self, score: Tensor, order: Tensor) -> Tensor:
        keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        keep[order] = self.neighbours.survivors(score[order])
        return keep

    def _clusters(self, score: Tensor) -> Tensor:
        """Row numbers in which similar rows follow each other."""
        members = torch.arange(len(score), device=score.device)[:, None]
        sums = score.float()
        while members.shape[1] < self.v:
            keep = self.grouped.survivors(sums)
            first, second = _paired(sums.flatten(1), keep.flatten(1))
            members = torch.cat([members[first], members[second]], dim=1)
            sums = sums[first] + sums[second]
        return members.flatten()


def _paired(scores: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers of pairs: in each round, rows that are each other's best partner are paired.

    How well two rows go together is what each keeps of its score under the other's choice.
    """
    scores = scores.nan_to_num(posinf=0.0, neginf=0.0)
    chosen = keep.to(scores.dtype)
    likeness = scores @ chosen.t()
    likeness = likeness + likeness.t()
    likeness.fill_diagonal_(-torch.inf)
    # Equal likeness must not send a round in circles: of equal pairs the first wins, for both of its rows.
    firsts, seconds = [], []
    left = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    rows = torch.arange(len(scores), device=scores.device)
    while bool(left.any()):
        best = likeness.argmax(1)
        mutual = left & (best[best] == rows) & (rows < best)
        if not bool(mutual.any()):
            place = int(likeness.argmax())
            mutual = rows == min(divmod(place, len(scores)))
            best[mutual] = max(divmod(place, len(scores)))
        first, second = rows[mutual], best[mutual]
        firsts.append(first)
        seconds.append(second)
        for gone in (first, second):
            left[gone] = False
            likeness[gone] = -torch.inf
            likeness[:, gone] = -torch.inf
    return torch.cat(firsts), torch.cat(seconds)
