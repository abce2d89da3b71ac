"""Patterns: the rules that say which zeros a weight may have, and the masks that obey them.

A pattern is a value with a string form; `parse` and `str` are inverses. Groups run along *input channels*, dim 1 of a
Linear or Conv weight, separately at each kernel position: the layout that sparse tensor cores, TensorRT and the
SparseDM code use. Ties go to the first entry, so exactly N of M survive whatever the scores are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor

from compressor.errors import CompressorError, UsageError
from compressor.sparsity.on_gpu import kernels_for


@dataclass(frozen=True, eq=False)
class Mask:
    """One legal choice of survivors: `keep` is a bool tensor shaped like the weight, `pattern` the rule that it obeys."""

    keep: Tensor
    pattern: Pattern

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Tensor) or self.keep.dtype != torch.bool:
            found = self.keep.dtype if isinstance(self.keep, Tensor) else type(self.keep).__name__
            raise CompressorError(f"a mask's keep must be a bool tensor, got {found}", "Compare or call .bool() on it.")
        if not isinstance(self.pattern, Pattern):
            raise CompressorError(
                f"a mask's pattern is {type(self.pattern).__name__}", "Give the Pattern: compressor.parse reads a text."
            )

    def apply(self, weight: Tensor) -> Tensor:
        """`weight` with zeros where `keep` is False: plain +0.0, also where the weight is negative or not finite."""
        return weight.masked_fill(~self.keep, 0.0)

    def rest(self, weight: Tensor) -> Tensor:
        """The other part: `weight` with zeros where `keep` is True, so that `apply` and `rest` add up to it."""
        return weight.masked_fill(self.keep, 0.0)

    def verify(self) -> None:
        """Raise CompressorError unless `keep` obeys the pattern."""
        self.pattern.verify(self.keep)


class Pattern(ABC):
    """The rule that says which zeros a weight may have. Subclasses are frozen dataclasses whose `str` parses back."""

    density: float
    """The kept share of a weight, in (0, 1]."""

    @property
    def grouped(self) -> NM | None:
        """The pattern N:M, or V:N:M with neighbouring rows, that every weight of this pattern obeys; None where there is none."""
        return None

    @abstractmethod
    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of `shape` (out, in, *kernel) cannot have this pattern; None where it can."""

    @abstractmethod
    def survivors(self, score: Tensor) -> Tensor:
        """The bool tensor that keeps the largest scores. `score` fits and has no NaN; `mask` has checked that."""

    @abstractmethod
    def violations(self, keep: Tensor) -> int:
        """How many groups of `keep` (bool, fitting shape) hold more survivors than the pattern allows."""

    def mask(self, score: Tensor) -> Mask:
        """The mask that keeps the largest entries of `score` (shaped like the weight; larger = keep).

        Raises CompressorError where the shape does not fit or a score is NaN.
        """
        self.check(score)
        return Mask(self.survivors(score), self)

    def check(self, score: Tensor) -> None:
        """Raise CompressorError where the shape of `score` does not fit, or it holds NaN or complex numbers, which have no order."""
        if score.is_complex():
            raise CompressorError(f"{self}: the score is {score.dtype}", "Give real numbers: weight.abs(), for one.")
        if reason := self.misfit(tuple(score.shape)):
            raise CompressorError(f"{self}: {reason}")
        # A sum is one cheap pass; only where it is not finite (inf scores are legal) is the exact question asked.
        if not torch.isfinite(score.sum()) and bool(score.isnan().any()):
            raise self._nan()

    def _nan(self) -> CompressorError:
        return CompressorError(f"{self}: the score holds NaN", "Scores must be numbers; inf keeps, -inf drops.")

    def masks(self, scores: Mapping[str, Tensor], previous: Mapping[str, Mask] | None = None) -> dict[str, Mask]:
        """The masks of several weights by name: `mask` of each, in fewer operations where the pattern knows how.

        `previous` holds the masks now in force, for patterns that start from them.
        """
        return {name: self.mask(score) for name, score in scores.items()}

    def magnitude_masks(
        self, weights: Mapping[str, Tensor], previous: Mapping[str, Mask] | None = None
    ) -> dict[str, Mask]:
        """`masks` of the magnitudes |w| of `weights`, which are never all there at once."""
        return self.masks(_Magnitudes(weights), previous)

    def verify(self, tensor: Tensor) -> None:
        """Raise CompressorError unless the nonzero entries of `tensor` (a weight or a keep) obey the pattern."""
        if reason := self.misfit(tuple(tensor.shape)):
            raise CompressorError(f"{self}: {reason}")
        if broken := self.violations(tensor != 0):
            raise CompressorError(f"not {self}: {broken} group(s) hold more nonzero entries than the pattern allows")


class _Magnitudes(Mapping[str, Tensor]):
    """|w| of weights by name, computed when it is asked for."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name].abs()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


_LARGEST = 999_999
_SMALL = 2**20
_JOINED = 2**21  # entries of small matrices that are taken as one, at most: they are copied for it
_CHUNK = 2**19  # entries at a time on a CPU: temporaries stay in its cache, and both threads busy


@dataclass(frozen=True)
class NM(Pattern):
    """Keep `n` of every `m` consecutive input channels; `v` output rows share one choice (the vector form, V:N:M).

    Every row of a V:N:M mask is also a legal N:M row. Rows that share are neighbours, and their scores are summed.
    VENOM (Castro et al. 2023) calls another format V:N:M: there V rows share 4 of every M columns, and each row keeps N of these
    4 for itself, so that its 4:2:4 is plain 2:4. Such a weight does not obey the pattern of that name here, but `venom:V:N:M`.
    Source: Zhou et al. 2021 (N:M).
    """

    n: int
    m: int
    v: int = 1
    density: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("n", "m", "v"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"pattern: {name} must be a whole number of at least 1, got {value!r}")
            if value > _LARGEST:
                raise UsageError(f"pattern: {name} is {value}, larger than {_LARGEST}", "Groups are small, as in 2:4.")
        if self.n > self.m:
            raise UsageError(f"pattern {self}: cannot keep {self.n} of {self.m}", "N is at most M, as in 2:4.")
        object.__setattr__(self, "density", self.n / self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.v == 1 else f"{self.v}:{self.n}:{self.m}"

    @property
    def grouped(self) -> NM:
        return self

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        if reason := _no_matrix(shape):
            return reason
        if shape[1] % self.m:
            return f"needs dim 1 divisible by {self.m}, got {shape}"
        if shape[0] % self.v:
            return f"needs dim 0 divisible by {self.v}, got {shape}"
        return None

    def survivors(self, score: Tensor) -> Tensor:
        if (kernels := kernels_for(score)) and kernels.takes(score, self.m, self.v):
            return kernels.keep(score, self.n, self.m)  # type: ignore[no-any-return]
        keep = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        rows = max(1, _CHUNK // (self.v * score[0].numel())) * self.v if score.device.type == "cpu" else len(score)
        for some, kept in zip(torch.split(score, rows), torch.split(keep, rows), strict=True):
            self._choose(self._lanes(some), self._lanes(kept))
        return keep

    def _choose(self, lanes: Tensor, kept: Tensor) -> None:
        if self.m <= 8:  # M(M-1)/2 comparisons beat a sort up to about here
            _keep_least_beaten(lanes[:, 0] if self.v == 1 else _shared(lanes)[:, 0], self.n, kept)
        else:
            order = _shared(lanes).argsort(dim=0, descending=True, stable=True)
            kept.zero_().scatter_(0, order[: self.n].expand(-1, self.v, *order.shape[2:]), True)

    def masks(self, scores: Mapping[str, Tensor], previous: Mapping[str, Mask] | None = None) -> dict[str, Mask]:
        """As `Pattern.masks`. Groups of a matrix follow each other in memory, so small matrices are taken as one, up to a size."""
        if on_gpu := self._on_gpu(scores):
            return on_gpu
        found: dict[str, Mask] = {}
        joined: dict[str, Tensor] = {}
        size = 0
        for name, score in scores.items():
            if self.v > 1 or score.dim() != 2 or score.numel() > _SMALL or self.misfit(tuple(score.shape)):
                found[name] = self.mask(score)
                continue
            first = next(iter(joined.values()), score)
            if (score.dtype, score.device) != (first.dtype, first.device) or size + score.numel() > _JOINED:
                found |= self._as_one(joined)
                joined, size = {}, 0
            joined[name] = score
            size += score.numel()
        found |= self._as_one(joined)
        return {name: found[name] for name in scores}

    def _as_one(self, joined: Mapping[str, Tensor]) -> dict[str, Mask]:
        """The masks of small matrices of one kind."""
        if len(joined) < 2:
            return {name: self.mask(score) for name, score in joined.items()}
        keep = self.mask(torch.cat([s.flatten() for s in joined.values()]).view(-1, self.m)).keep.flatten()
        parts = torch.split(keep, [s.numel() for s in joined.values()])
        return {n: Mask(part.view(s.shape), self) for part, (n, s) in zip(parts, joined.items(), strict=True)}

    def magnitude_masks(
        self, weights: Mapping[str, Tensor], previous: Mapping[str, Mask] | None = None
    ) -> dict[str, Mask]:
        return self._on_gpu(weights, magnitude=True) or super().magnitude_masks(weights, previous)

    def _on_gpu(self, scores: Mapping[str, Tensor], magnitude: bool = False) -> dict[str, Mask]:
        """The masks where kernels take all of `scores` (or their magnitudes), which are asked for NaN once, together; else none."""
        found: dict[str, Mask] = {}
        nan: Tensor | None = None
        for index, (name, score) in enumerate(scores.items()):
            kernels = kernels_for(score)
            apart = nan is not None and nan.device != score.device
            if kernels is None or apart or not kernels.takes(score, self.m, self.v):
                return {}
            if reason := self.misfit(tuple(score.shape)):
                raise CompressorError(f"{self}: {reason}")
            nan = torch.zeros(len(scores), dtype=torch.int32, device=score.device) if nan is None else nan
            found[name] = Mask(kernels.keep(score, self.n, self.m, magnitude, nan[index]), self)
        if nan is not None and bool(nan.any()):
            raise self._nan()
        return found

    def violations(self, keep: Tensor) -> int:
        return int((self._lanes(keep).any(1).sum(0) > self.n).sum())

    def _lanes(self, tensor: Tensor) -> Tensor:
        """(out, in, *kernel) -> (m, v, out / v, *kernel, in / m): the M entries of each group side by side."""
        return rearrange(tensor, "(o v) (i m) ... -> m v o ... i", m=self.m, v=self.v)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Keep the share `density` of a weight, wherever the largest scores are (ties to the first in memory order)."""

    density: float

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not isinstance(self.density, (int, float)) or not 0 < self.density <= 1:
            raise UsageError(f"pattern: density must be a number above 0 and up to 1, got {self.density!r}")
        object.__setattr__(self, "density", float(self.density))

    def __str__(self) -> str:
        return f"unstructured:{self.density!r}"

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return _no_matrix(shape)

    def survivors(self, score: Tensor) -> Tensor:
        return largest(score, self._count(score))

    def mask_by_row(self, score: Tensor) -> Mask:
        """As `mask`, but scores compete within their output row, `score[i]`, alone (ties to the first of the row).

        As many entries are kept as by `mask`; where the rows cannot share them evenly, some keep one more than others.
        """
        self.check(score)
        rows, total = len(score), self._count(score)
        quota = [total * (row + 1) // rows - total * row // rows for row in range(rows)]
        order = score.flatten(1).argsort(dim=1, descending=True, stable=True)
        keep = order.argsort(dim=1) < torch.tensor(quota, device=score.device)[:, None]
        return Mask(keep.view(score.shape), self)

    def violations(self, keep: Tensor) -> int:
        return int(int(keep.sum()) > self._count(keep))

    def _count(self, tensor: Tensor) -> int:
        return max(1, round(self.density * tensor.numel()))


def largest(score: Tensor, count: int) -> Tensor:
    """A bool tensor shaped like `score` that keeps exactly `count` entries: the largest, of equals the first in memory order."""
    order = score.flatten().argsort(descending=True, stable=True)
    keep = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    return keep.index_fill_(0, order[:count], True).view(score.shape)


def _no_matrix(shape: tuple[int, ...]) -> str | None:
    if len(shape) < 2:
        return f"needs a weight of at least 2 dims (out, in, *kernel), got {shape}"
    return f"the weight is empty, got {shape}" if 0 in shape else None


def _shared(lanes: Tensor) -> Tensor:
    """The summed scores of rows that share a choice: (m, v, *groups) -> (m, 1, *groups). Where inf meets -inf, inf wins."""
    return lanes.sum(1, keepdim=True).nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _keep_least_beaten(lanes: Tensor, n: int, kept: Tensor) -> None:
    """Write into `kept` (m, v, *groups) which of the M entries of `lanes` (m, *groups) fewer than `n` others beat.

    Of two equal entries the earlier one wins. `lanes` may be a strided view: one pass over it is all a pair costs.
    """
    m = lanes.shape[0]
    # Per entry, how many earlier ones beat it minus how many later ones it beats: m - 1 - i too few for entry i.
    balance = [torch.ge(lanes[0], lane).view(torch.int8) for lane in lanes[1:]]
    balance.insert(0, -sum(balance[1:], start=balance[0]) if balance else torch.zeros_like(lanes[0], dtype=torch.int8))
    for i in range(1, m):
        for j in range(i + 1, m):
            first_wins = torch.ge(lanes[i], lanes[j]).view(torch.int8)
            balance[i] -= first_wins
            balance[j] += first_wins
    for i in range(m):
        for row in kept[i]:
            torch.lt(balance[i], n - (m - 1 - i), out=row)
