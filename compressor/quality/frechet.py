"""The Fréchet distance between two sets of features, with a bootstrap interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.seeds import generator

FEWEST = 8
"""Of fewer samples resampling knows too little of the others: intervals of two hold half of the time, of four or six in 82 to 100%."""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (d,) and covariance (d, d), float64, of a set of features."""

    mean: Tensor
    covariance: Tensor


def gaussian(features: Tensor) -> Gaussian:
    """The statistics of `features` (n, d). Raises CompressorError for fewer than two rows or values not finite."""
    x = features.double()
    if x.shape[0] < 2 or not bool(x.isfinite().all()):
        raise CompressorError(
            f"features {tuple(x.shape)} must be at least 2 rows of finite numbers", "Draw more samples."
        )
    return Gaussian(x.mean(0), x.T.cov().reshape(x.shape[1], x.shape[1]))  # of one feature it is a number


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½). Source: Heusel et al. 2017, eq. 6."""
    return _distance(b, a, _root(a.covariance))


def bootstrap(features: Tensor, reference: Gaussian, draws: int, seed: int) -> tuple[float, float] | None:
    """The 95% interval of the distance of `features` (n, d) from `reference`; None where `draws` is 0, or n below `FEWEST`.

    Resampling a finite sample makes the distance larger on average, as using fewer samples does. That shift is no part
    of the uncertainty, so the draws are centred on the estimate. The reference is taken as given.
    """
    if draws == 0 or len(features) < FEWEST:
        return None
    root = _root(reference.covariance)
    estimate = _distance(gaussian(features), reference, root)
    rng = generator(seed, "bootstrap")
    n = len(features)
    values = torch.tensor(
        [_distance(gaussian(features[torch.randint(n, (n,), generator=rng)]), reference, root) for _ in range(draws)],
        dtype=torch.float64,
    )
    deviations = torch.quantile(values - values.mean(), torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = (estimate + deviations).tolist()
    return max(0.0, low), high


def _distance(a: Gaussian, b: Gaussian, root_b: Tensor) -> float:
    """The distance, given the square root of b's covariance: tr (Σa Σb)^½ = tr (Σb^½ Σa Σb^½)^½, which is symmetric."""
    cross = torch.linalg.eigvalsh(root_b @ a.covariance @ root_b).clamp(min=0).sqrt().sum()
    squared = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(squared))


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
