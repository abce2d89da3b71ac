"""Magnitude pruning with a frozen mask: the recipe of NVIDIA's ASP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from compressor.sparsity.estimator import Estimator, Exact
from compressor.sparsity.pattern import NM, Mask, Pattern
from compressor.training.pruner import Pruner


@dataclass(frozen=True)
class Magnitude(Pruner):
    """Keeps the largest |w| of the pretrained weights, once; fine-tuning then moves only what was kept.

    Unstructured patterns compare within each layer as a whole.

    Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 4.
    """

    pattern: Pattern = NM(2, 4)
    estimator: Estimator = Exact()
    compared = True
    separable = True

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        return previous or self.pattern.magnitude_masks(weights)
