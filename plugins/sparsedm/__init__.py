"""SparseDM: masks renewed at every step, an improved straight-through estimator, and the dense model as teacher.

Source: Wang, Chen, Li, Mi, Zhu 2025, "SparseDM: Toward Sparse Efficient Diffusion Models", arXiv 2404.10445.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor, nn

from compressor import discovery
from compressor.adapter import Adapter
from compressor.data.batches import Batches
from compressor.errors import UsageError, one_of
from compressor.sparsity.codes import QUANTISE, Quantise
from compressor.sparsity.estimator import SRSTE as SRSTE
from compressor.sparsity.estimator import Estimator
from compressor.sparsity.pattern import NM, Mask, Pattern
from compressor.training.pruner import Objective, Pruner, found, refuse_unread

from .presets import PRESETS

_TEACHER = 0.1
_START = {"paper": "pretrained", "best": "obs"}

_PROGRESSIVE = (NM(31, 32), NM(15, 16), NM(7, 8), NM(3, 4))


@dataclass(frozen=True)
class SparseDM(Pruner):
    """Turns a pretrained diffusion model into an N:M sparse one and fine-tunes it against its dense self.

    `decay`: λ of the estimator; 0 is the plain straight-through estimator. `decoupled`: apply it outside the gradient.
    `teacher`: α, the weight of the dense teacher's prediction beside the noise; 0 is SR-STE alone. `teacher_only`: learn
    from the teacher alone (its weight is then 1). `progressive`: reach N:M over 31:32, 15:16, 7:8 and 3:4, in equal shares
    of the steps; weights that a stage does not fit skip it. `fixed`: keep the first masks. `start`: the weights that
    training starts from: the `pretrained` ones, or those that the method `obs` has updated to make up for what its masks
    prune. `quantise`: with `int8` the weights under masks are trained, and saved, in 8 bits. `preset` says what holds for
    `start`, `teacher_only` and `teacher` where they are None: `paper` is the published method; `best`, which did better
    here, starts from `obs` and learns from the teacher alone. What is set wins over it.
    """

    pattern: Pattern = NM(2, 4)
    decay: float = 2e-4
    decoupled: bool = False
    teacher: float | None = None
    teacher_only: bool | None = None
    progressive: bool = False
    fixed: bool = False
    start: Literal["pretrained", "obs"] | None = None
    preset: Literal["paper", "best"] = "paper"
    quantise: Quantise = "none"
    updated: bool | None = found()
    compared = True
    presets = PRESETS

    def __post_init__(self) -> None:
        one_of("sparsedm: preset", self.preset, ("paper", "best"))
        one_of("sparsedm: quantise", self.quantise, QUANTISE)
        one_of("sparsedm: start", self.starts_from, ("pretrained", "obs"))
        if self.progressive and self.fixed:
            raise UsageError("sparsedm: progressive masks cannot be fixed", "Leave one of the two out.")
        if self.preset == "best" and self.teacher is not None and self.teacher_only is None:
            raise UsageError(
                f"sparsedm: preset best learns from the teacher alone, so teacher {self.teacher} beside the noise has no place",
                "Leave teacher out, or set teacher_only to false to learn from both.",
            )
        for name, value in (("decay", self.decay), ("teacher", self.teacher)):
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"sparsedm: {name} must be a number of at least 0, got {value!r}")
        if not self.decay:
            refuse_unread(self, "decay is 0", "decoupled")
        if self.fixed:
            refuse_unread(self, "of fixed masks nothing that is pruned comes back", "decay", "decoupled")
        if self.teacher_only:
            refuse_unread(self, "teacher_only learns from the teacher alone", "teacher")

    @property
    def starts_from(self) -> str:
        """`start`, or what the preset says."""
        return self.start if self.start is not None else _START[self.preset]

    @property
    def estimator(self) -> Estimator:  # type: ignore[override]  # derived from the settings, which are what is set
        return SRSTE(self.decay, self.decoupled)

    @property
    def objective(self) -> Objective:  # type: ignore[override]
        alone = self.preset == "best" if self.teacher_only is None else self.teacher_only
        return Objective.taught(_TEACHER if self.teacher is None else self.teacher, alone)

    @property
    def unprepared(self) -> bool:
        return self.starts_from == "obs" and not self.updated

    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        if self.starts_from == "obs":
            method: Callable[..., Pruner] = discovery.load("pruners", "obs")
            method(pattern=self.pattern).prepare(model, adapter, batches)
        return replace(self, updated=True)

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        if self.fixed and previous:
            return previous
        if not self.progressive:
            return self.pattern.magnitude_masks(weights, previous)
        stages = {name: self._stage(weight, progress) for name, weight in weights.items()}
        found: dict[str, Mask] = {}
        for stage in dict.fromkeys(stages.values()):
            found |= stage.magnitude_masks({n: w for n, w in weights.items() if stages[n] == stage}, previous)
        return {name: found[name] for name in weights}

    def _stage(self, weight: Tensor, progress: float) -> Pattern:
        """The pattern of the schedule in force for `weight` at `progress`."""
        looser = [p for p in _PROGRESSIVE if p.density > self.pattern.density and not p.misfit(tuple(weight.shape))]
        stages: list[Pattern] = [*looser, self.pattern]
        return stages[min(int(progress * len(stages)), len(stages) - 1)]
