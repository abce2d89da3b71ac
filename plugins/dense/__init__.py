"""The control: the same fine-tuning with nothing pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from compressor.sparsity.pattern import Mask
from compressor.training.pruner import Pruner


@dataclass(frozen=True)
class DenseContinued(Pruner):
    """Trains on without masks: what the budget alone does to the model, which every other method must be held against."""

    compared = True

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        return {}

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        return {}
