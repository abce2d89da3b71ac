"""SparseDM: masks renewed at every step, an improved straight-through estimator, and the dense model as teacher.

Source: Wang, Chen, Li, Mi, Zhu 2025, "SparseDM: Toward Sparse Efficient Diffusion Models", arXiv 2404.10445.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.data.batches import Batches
from compressor.errors import UsageError, one_of
from compressor.sparsity.estimator import Estimator
from compressor.sparsity.pattern import NM, Mask, Pattern
from compressor.training.pruner import Objective, Pruner

from .presets import PRESETS

_PROGRESSIVE = (NM(31, 32), NM(15, 16), NM(7, 8), NM(3, 4))


@dataclass(frozen=True)
class SRSTE(Estimator):
    """Sparse-refined straight-through: pruned weights are also pulled towards zero, which calms mask changes.

    `decay` is λ. As a term of the gradient it passes through the optimizer's moments, as published; `decoupled`
    applies it to the weight after the step instead, scaled by the learning rate.
    Source: Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch", eq. 9.
    """

    decay: float = 2e-4
    decoupled: bool = False

    def gradient(self, grad: Tensor, dense: Tensor, mask: Mask) -> Tensor:
        """g + λ (1 - m) ⊙ w"""
        return grad if self.decoupled else grad + self.decay * mask.rest(dense)

    def shrink(self, dense: Tensor, mask: Mask, lr: float) -> Tensor:
        return dense.sub(mask.rest(dense), alpha=lr * self.decay) if self.decoupled else dense


@dataclass(frozen=True)
class SparseDM(Pruner):
    """Turns a pretrained diffusion model into an N:M sparse one and fine-tunes it against its dense self.

    `decay`: λ of the estimator; 0 is the plain straight-through estimator. `decoupled`: apply it outside the gradient.
    `teacher`: α, the weight of the dense teacher's prediction beside the noise; 0 is SR-STE alone. `teacher_only`:
    learn from the teacher alone (its weight is then 1). `progressive`: reach N:M over 31:32, 15:16, 7:8 and 3:4, in
    equal shares of the steps; weights that a stage does not fit skip it. `fixed`: keep the first masks. `start`: the weights
    that training starts from: the `pretrained` ones, or those that `obs` has updated to make up for what its masks prune.
    `preset`: `paper` is the published method; `best` sets `start` to `obs` and `teacher_only`, whatever they
    are, which did better here.
    """

    pattern: Pattern = NM(2, 4)
    decay: float = 2e-4
    decoupled: bool = False
    teacher: float = 0.1
    teacher_only: bool = False
    progressive: bool = False
    fixed: bool = False
    start: Literal["pretrained", "obs"] = "pretrained"
    preset: Literal["paper", "best"] = "paper"
    compared = True
    presets = PRESETS

    def __post_init__(self) -> None:
        one_of("sparsedm: start", self.start, ("pretrained", "obs"))
        one_of("sparsedm: preset", self.preset, ("paper", "best"))
        if self.progressive and self.fixed:
            raise UsageError("sparsedm: progressive masks cannot be fixed", "Leave one of the two out.")
        if self.preset == "best":
            object.__setattr__(self, "start", "obs")
            object.__setattr__(self, "teacher_only", True)
        for name in ("decay", "teacher"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"sparsedm: {name} must be a number of at least 0, got {getattr(self, name)!r}")

    @property
    def estimator(self) -> Estimator:  # type: ignore[override]  # derived from the settings, which are what is set
        return SRSTE(self.decay, self.decoupled)

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        return Objective(noise=0.0, teacher=1.0) if self.teacher_only else Objective(teacher=self.teacher)

    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        if self.start == "obs":
            from ..obs import OBS

            OBS(self.pattern).prepare(model, adapter, batches)
        return self

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        if self.fixed and previous:
            return previous
        scores = {name: weight.abs() for name, weight in weights.items()}
        if not self.progressive:
            return self.pattern.masks(scores, previous)
        return {name: self._stage(score, progress).mask(score) for name, score in scores.items()}

    def _stage(self, weight: Tensor, progress: float) -> Pattern:
        """The pattern of the schedule in force for `weight` at `progress`."""
        looser = [p for p in _PROGRESSIVE if p.density > self.pattern.density and not p.misfit(tuple(weight.shape))]
        stages: list[Pattern] = [*looser, self.pattern]
        return stages[min(int(progress * len(stages)), len(stages) - 1)]
