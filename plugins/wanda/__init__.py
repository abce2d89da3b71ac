"""Wanda: weights are scored with what they multiply, once, without any update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.data.batches import Batches
from compressor.errors import UsageError
from compressor.sparsity.estimator import Estimator, Exact
from compressor.sparsity.pattern import NM, Mask, Pattern
from compressor.training.calibration import from_matrix, observable, observe, visits
from compressor.training.engine import choose_layers
from compressor.training.pruner import Pruner, found


@dataclass(frozen=True)
class Wanda(Pruner):
    """Keeps the largest |w| · ‖x‖₂, x being what the weight is multiplied with over the denoising times; the mask is frozen.

    `timesteps`: batches of the calibration, one per time. `last_weight`: what the last sampling step counts, the first
    counting 1 (`compressor.calibration.visits`).

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", eq. 1.
    """

    pattern: Pattern = NM(2, 4)
    timesteps: int = 32
    last_weight: float = 1.0
    estimator: Estimator = Exact()
    norms: Mapping[str, Tensor] = found(dict)
    compared = True

    def __post_init__(self) -> None:
        check_calibration("wanda", self.timesteps, self.last_weight)

    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        layers = {
            layer.name: layer.module
            for layer in choose_layers(model, self, adapter, None, None)
            if layer.reason is None and observable(layer.module)
        }
        sums: dict[str, Tensor] = {}

        def take(name: str, columns: Tensor, weight: float) -> None:
            found = columns.double().square_().sum(0).mul_(weight)
            sums[name] = sums[name] + found if name in sums else found

        observe(model, adapter, visits(adapter, batches, self.timesteps, self.last_weight), layers, take)
        return replace(self, norms={name: found.sqrt().float() for name, found in sums.items()})

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        return previous or self.pattern.masks({name: self.score(name, weight) for name, weight in weights.items()})

    def score(self, name: str, weight: Tensor) -> Tensor:
        """|w| · ‖x‖₂, shaped like `weight`; |w| alone for a layer that saw nothing."""
        if name not in self.norms:
            return weight.abs()
        norm = from_matrix(self.norms[name].to(weight.device).expand(weight.shape[0], -1), weight.shape)
        return weight.abs() * norm.to(weight.dtype)


def check_calibration(method: str, timesteps: int, last_weight: float) -> None:
    """Refuse settings of a calibration that mean nothing."""
    if not isinstance(timesteps, int) or timesteps < 1:
        raise UsageError(f"{method}: timesteps must be at least 1, got {timesteps}")
    if not 0 < last_weight <= 1:
        raise UsageError(f"{method}: last_weight must be above 0 and at most 1, got {last_weight!r}")
