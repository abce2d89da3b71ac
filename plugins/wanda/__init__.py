"""Wanda: weights are scored with what they multiply, once, without any update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.data.batches import Batches
from compressor.errors import UsageError, one_of
from compressor.sparsity.estimator import Estimator, Exact
from compressor.sparsity.pattern import NM, Mask, Pattern, Unstructured
from compressor.training.calibration import (
    Falls,
    check_calibration,
    check_seen,
    from_matrix,
    observable,
    observe,
    visits,
)
from compressor.training.engine import chosen
from compressor.training.pruner import Pruner, found


@dataclass(frozen=True)
class Wanda(Pruner):
    """Keeps the largest |w| · ‖x‖₂, x being what the weight is multiplied with over the denoising times; the mask is frozen.

    `within`: what unstructured scores are compared in, so that all that compete see the same scale: each output `row`, as
    published (of a convolution: all weights of an output channel), or the whole `layer`. Other patterns compare in their groups.
    `timesteps`: batches of the calibration, one per time. `last_weight`: what the last sampling step counts, the first
    counting 1. `falls`: how the weights between fall (`compressor.calibration.visits`).

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", eq. 1 and section 3.
    """

    pattern: Pattern = NM(2, 4)
    within: Literal["row", "layer"] = "row"
    timesteps: int = 32
    last_weight: float = 1.0
    falls: Falls = "early"
    estimator: Estimator = Exact()
    norms: Mapping[str, Tensor] = found(dict)
    compared = True
    separable = True

    def __post_init__(self) -> None:
        check_calibration("wanda", self.timesteps, self.last_weight, self.falls)
        one_of("wanda: within", self.within, ("row", "layer"))
        if self.within == "layer" and not isinstance(self.pattern, Unstructured):
            raise UsageError(
                f"wanda: within: layer is of unstructured patterns, and {self.pattern} compares within its own groups",
                "Leave it out, or take a pattern like unstructured:0.5.",
            )

    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        layers = {layer.name: layer.module for layer in chosen(model, self, adapter) if observable(layer.module)}
        sums: dict[str, Tensor] = {}

        def take(name: str, columns: Tensor, weight: float) -> None:
            found = columns.double().square_().sum(0).mul_(weight)
            sums[name] = sums[name] + found if name in sums else found

        observe(model, adapter, visits(adapter, batches, self.timesteps, self.last_weight, self.falls), layers, take)
        for name, squares in sums.items():
            check_seen("wanda", name, squares)
        return replace(self, norms={name: squares.sqrt().float() for name, squares in sums.items()})

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        if previous:
            return previous
        scores = {name: self.score(name, weight) for name, weight in weights.items()}
        if isinstance(self.pattern, Unstructured) and self.within == "row":
            return {name: self.pattern.mask_by_row(score) for name, score in scores.items()}
        return self.pattern.masks(scores)

    def score(self, name: str, weight: Tensor) -> Tensor:
        """|w| · ‖x‖₂, shaped like `weight`; |w| alone for a layer that saw nothing, or nothing but zeros."""
        if name not in self.norms or not bool(self.norms[name].any()):
            return weight.abs()
        norm = from_matrix(self.norms[name].to(weight.device).expand(weight.shape[0], -1), weight.shape)
        return weight.abs() * norm.to(weight.dtype)
