"""Sparse training from the pretrained weights without a teacher: masks renewed at every step, a straight-through estimator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from compressor.errors import UsageError, one_of
from compressor.sparsity.codes import QUANTISE, Quantise
from compressor.sparsity.estimator import SRSTE, Estimator
from compressor.sparsity.pattern import NM, Mask, Pattern
from compressor.training.pruner import Pruner, refuse_unread


@dataclass(frozen=True)
class STE(Pruner):
    """Keeps the largest |w|, chosen anew after every step; pruned weights get the gradient of what replaces them.

    `decay` λ pulls pruned weights towards zero (SR-STE); 0 is the plain straight-through estimator. `decoupled`: apply
    it to the weight after the step, not as a term of the gradient. `quantise`: with `int8` the weights under masks are trained, and
    saved, in 8 bits.
    Source: Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch", eqs. 6 and 9.
    """

    pattern: Pattern = NM(2, 4)
    decay: float = 2e-4
    decoupled: bool = False
    quantise: Quantise = "none"
    compared = True

    def __post_init__(self) -> None:
        one_of("sr-ste: quantise", self.quantise, QUANTISE)
        if not 0 <= self.decay < float("inf"):
            raise UsageError(f"sr-ste: decay must be a number of at least 0, got {self.decay!r}")
        if not self.decay:
            refuse_unread(self, "decay is 0", "decoupled")

    @property
    def estimator(self) -> Estimator:  # type: ignore[override]  # derived from the settings, which are what is set
        return SRSTE(self.decay, self.decoupled)

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        return self.pattern.magnitude_masks(weights, previous)
