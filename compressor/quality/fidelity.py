"""Whether generated samples look like the real ones, and whether they are as varied: measures in any extractor's features.

All of them take features (n, d), float64, of real and of generated images. Distances and kernels are computed a block of rows
at a time, so that memory grows with n, not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compressor.quality.frechet import Gaussian, frechet_distance, gaussian
from compressor.quality.metric import Metric
from compressor.quality.settings import Evaluation
from compressor.report.content import Quality
from compressor.seeds import generator

LIMIT = 10_000
"""The most samples of a side that these measures take; of more, as many are drawn by the seed."""

SUBSETS = 100
SUBSET_SIZE = 1000
_BLOCK_ENTRIES = 4 * 1024 * 1024
_ROUNDING = 1e-13
"""Of the norms of two samples: what their squared distance is off by, at most."""
_LOOKED_AT = 100


@dataclass(frozen=True, eq=False)
class Reference:
    """The real images as these measures see them: `features` (n, d), at most `LIMIT` of them, and the statistics of all.

    `spatial` are the statistics of the spatial features, where the extractor has some; `unseen` (m, d) those of the images that are
    held out from training, where there are some, at most `LIMIT`.
    """

    features: Tensor
    gaussian: Gaussian
    spatial: Gaussian | None = None
    unseen: Tensor | None = None

    @classmethod
    def of(cls, features: Tensor, spatial: Tensor | None, seed: int, unseen: Tensor | None = None) -> Reference:
        """The reference that `features` (n, d) and `spatial` (n, e) of all real images make, and `unseen` (m, d) of those held out."""
        statistics = None if spatial is None else gaussian(spatial)
        held_out = None if unseen is None else drawn(unseen, seed, "unseen")
        return cls(drawn(features, seed, "real"), gaussian(features), statistics, held_out)

    @cached_property
    def _squared_radii(self) -> dict[int, Tensor]:
        return {}

    def squared_radii(self, k: int) -> Tensor:
        """As the function, of the real features; computed once for each `k`."""
        if k not in self._squared_radii:
            self._squared_radii[k] = squared_radii(self.features, k)
        return self._squared_radii[k]


def measures(
    metric: Metric, features: Tensor, spatial: Tensor | None, reference: Reference, settings: Evaluation
) -> list[Quality]:
    """The entries of a report row for `settings.measures`, from the features (n, d) of its generated images.

    `metric` made the features. `sfd` is left out where there are no spatial features. Where images are held out, `kid_unseen` and
    `copying` come last, unless no measures are wanted.
    """
    real, fake = reference.features, drawn(features, settings.seed, "generated")
    unseen = reference.features if reference.unseen is None else reference.unseen
    entries = []
    of_unseen: tuple[str, ...] = ()
    if settings.measures and reference.unseen is not None:
        of_unseen = ("kid_unseen", "copying") if len(reference.unseen) > 1 else ("copying",)  # KID is of pairs
    for measure in dict.fromkeys((*settings.measures, *of_unseen)):
        interval = None
        samples = len(fake)
        if measure in ("kid", "kid_unseen"):
            values, size = kid(unseen if measure == "kid_unseen" else real, fake, settings.seed)
            value = float(values.mean())
            interval = jackknife(values, size, len(fake)) if settings.bootstrap else None
        elif measure == "copying":
            value = copying(real, unseen, fake)
        elif measure == "precision":
            value = precision(reference.squared_radii(3), real, fake)
        elif measure == "recall":
            value = precision(squared_radii(fake, 3), fake, real)
        elif measure == "density":
            value = density(reference.squared_radii(5), real, fake, 5)
        elif measure == "coverage":
            value = coverage(reference.squared_radii(5), real, fake)
        elif spatial is None or reference.spatial is None:
            continue
        else:
            value, samples = frechet_distance(gaussian(spatial), reference.spatial), len(spatial)
        entries.append(
            Quality(
                metric=metric.measure_name(measure),
                value=value,
                ci95=interval,
                samples=samples,
                sampler_steps=settings.sampler_steps,
                seed=settings.seed,
            )
        )
    return entries


def drawn(features: Tensor, seed: int, side: str) -> Tensor:
    """`features` (n, d) as float64; of more than `LIMIT` rows, as many drawn by `seed` without replacement."""
    if len(features) > LIMIT:
        features = features[torch.randperm(len(features), generator=generator(seed, "fidelity", side))[:LIMIT]]
    return features.double()


# --- Kernel distance. ---


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """k(x, y) = (x·y / d + 1)³ of every pair, (n, m), for `x` (n, d) and `y` (m, d). Source: Bińkowski et al. 2018, sec. 4."""
    return (x @ y.T / x.shape[1] + 1).pow_(3)


def unbiased_squared_mmd(among_x: Tensor, among_y: Tensor, between: Tensor, m: int) -> Tensor:
    """Σ_{i≠j} k(xᵢ, xⱼ) / m(m-1) + Σ_{i≠j} k(yᵢ, yⱼ) / m(m-1) - 2 Σ k(xᵢ, yⱼ) / m². Source: Gretton et al. 2012, eq. 3.

    The arguments are the three sums, for samples of `m` each. Below zero where the samples are nearer than chance has them.
    """
    return (among_x + among_y) / (m * (m - 1)) - 2 * between / m**2


def kid(real: Tensor, fake: Tensor, seed: int) -> tuple[Tensor, int]:
    """The kernel inception distance of each of `SUBSETS` pairs of subsets, and the subsets' size m. Its mean is the KID.

    m is `SUBSET_SIZE`, or half of the smaller side where that is less. Source: Bińkowski et al. 2018, sec. 4.
    """
    m = min(SUBSET_SIZE, max(2, min(len(real), len(fake)) // 2))
    x, y = subsets(len(real), m, seed, "real"), subsets(len(fake), m, seed, "generated")
    among = [_kernel_sums(s, s, at, at) - s @ polynomial_diagonal(at) for s, at in ((x, real), (y, fake))]
    return unbiased_squared_mmd(among[0], among[1], _kernel_sums(x, y, real, fake), m), m


def polynomial_diagonal(x: Tensor) -> Tensor:
    """k(x, x) of every row, (n,)."""
    return (x.square().sum(1) / x.shape[1] + 1) ** 3


def subsets(n: int, size: int, seed: int, side: str) -> Tensor:
    """(`SUBSETS`, n) of zeros and ones: in each row, `size` ones, drawn without replacement."""
    rng = generator(seed, "kid", side)
    chosen = torch.stack([torch.randperm(n, generator=rng)[:size] for _ in range(SUBSETS)])
    return torch.zeros(SUBSETS, n, dtype=torch.float64).scatter_(1, chosen, 1.0)


def _kernel_sums(left: Tensor, right: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """For each subset s, the sum of k(xᵢ, yⱼ) over i in `left[s]` and j in `right[s]`. Each pair is computed once."""
    total = torch.zeros(len(left), dtype=torch.float64)
    for rows in _blocks(len(x), len(y)):
        total += (left[:, rows] @ polynomial_kernel(x[rows], y)).mul_(right).sum(1)
    return total


def jackknife(values: Tensor, size: int, n: int) -> tuple[float, float] | None:
    """The 95% interval of the mean of `values` (s,), each from `size` of the same `n` samples; None where that is all of them.

    Subsets share samples, so their values spread less than those of new samples of that size would, and more than those of
    new samples of n. The factor makes the spread that of new samples of n. Source: Shao and Wu 1989 (delete-d jackknife).
    """
    if size >= n:
        return None
    spread = torch.quantile(values - values.mean(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = (values.mean() + math.sqrt(size / (n - size)) * spread).tolist()
    return low, high


# --- Nearest neighbours. ---


def squared_radii(x: Tensor, k: int) -> Tensor:
    """The squared distance (n,) of each of `x` (n, d) from its k-th nearest other; the farthest where there are fewer."""
    found = []
    for rows in _blocks(len(x), len(x)):
        squared = _squared_distances(x[rows], x)
        squared[torch.arange(len(squared)), rows] = math.inf  # itself
        found.append(squared.kthvalue(min(k, len(x) - 1), dim=1).values)
    return torch.cat(found)


def precision(squared: Tensor, centres: Tensor, points: Tensor) -> float:
    """The share of `points` that lie in a ball around any of `centres`, of `squared` radii.

    With real centres this is precision; with generated centres, and real points, recall. Source: Kynkäänniemi et al. 2019, eqs. 1, 2.
    """
    return float((_holding(squared, centres, points) > 0).double().mean())


def density(squared: Tensor, centres: Tensor, points: Tensor, k: int) -> float:
    """How many balls around real `centres` hold a generated point, on average, over `k`. Source: Naeem et al. 2020, sec. 3.

    It is 1 on average where both are of one distribution, and above where points crowd in dense places.
    """
    return float(_holding(squared, centres, points).double().mean()) / k


def coverage(squared: Tensor, centres: Tensor, points: Tensor) -> float:
    """The share of balls around real `centres` that hold a generated point. Source: Naeem et al. 2020, sec. 3."""
    held = [_at_least(centres[rows], points).amin(1) <= squared[rows] for rows in _blocks(len(centres), len(points))]
    return float(torch.cat(held).double().mean())


def copying(seen: Tensor, unseen: Tensor, points: Tensor) -> float:
    """How likely one of `points` is nearer to all that was `seen` than one of the `unseen` is; ties count a half.

    A half is as near as new images are; towards 1, `points` are copies. It is the Mann-Whitney statistic of the distances, over the
    number of pairs. Source: Meehan et al. 2020, "A non-parametric test to detect data-copying in generative models", sec. 3,
    with the whole space as one cell.
    """
    new, own = (
        torch.cat([_squared_distances(x[rows], seen).amin(1) for rows in _blocks(len(x), len(seen))])
        for x in (unseen, points)
    )
    ordered = new.sort().values
    nearer = len(new) - torch.searchsorted(ordered, own, right=True)
    level = torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own)
    return float((nearer + level / 2).double().mean()) / len(new)


def _holding(squared: Tensor, centres: Tensor, points: Tensor) -> Tensor:
    """How many of the balls hold each point, (m,)."""
    counts = [(_at_least(points[rows], centres) <= squared).sum(1) for rows in _blocks(len(points), len(centres))]
    return torch.cat(counts)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|² of every pair, (n, m); 0 where it cannot be told from that, so that copies are at none from each other."""
    squared, off = _with_rounding(x, y)
    return squared.masked_fill_(squared < off, 0)


def _at_least(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|² of every pair, (n, m), less what it may be off by: on the edge of a ball is in it, whatever the last digits say.
    Copies lie there, and features that count something."""
    squared, off = _with_rounding(x, y)
    return squared.sub_(off)


def _with_rounding(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """|x - y|² of every pair, (n, m), and what each may be off by."""
    # far from 0 all digits of the norms would be of where the samples lie; the middle, since one of them may lie far off itself
    origin = y[:: max(1, len(y) // _LOOKED_AT)].median(0).values
    x, y = x - origin, y - origin
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return norms - 2 * (x @ y.T), _ROUNDING * norms


def _blocks(rows: int, columns: int) -> Iterator[Tensor]:
    """Row numbers in pieces whose products with `columns` columns stay small."""
    return iter(torch.split(torch.arange(rows), max(1, _BLOCK_ENTRIES // max(1, columns))))
