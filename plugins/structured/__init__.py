"""Structured pruning: whole channels and attention heads are removed, then the smaller model is fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.cost.macs import layer_macs
from compressor.data.batches import Batches
from compressor.errors import CompressorError, UsageError, first_line, one_of
from compressor.sparsity.pattern import Mask
from compressor.sparsity.surgery import Surgery
from compressor.training.pruner import Cost, Objective, Pruner, found, refuse_unread
from compressor.weights import twin

from .groups import find_groups
from .removal import Group, removal
from .scores import channel_scores, entry_scores

_TRIALS = 16
_SCORES = ("magnitude", "random", "taylor", "diff-pruning", "diff-pruning-released")


@dataclass(frozen=True)
class Structured(Pruner):
    """Removes the channels and heads of least score, in every group of layers that share them.

    `macs`: the share of the model's multiply-accumulates that stays; `density`: where given, the share of the channels
    of every group instead. `score`: `magnitude` (sum of squares), `random`, `taylor` (|w ∂L/∂w|, L over all times),
    `diff-pruning` (Σ_t |w ∂L_t/∂w| over the times from the least noise on, up to the first whose loss is below `threshold`
    times the largest yet), or `diff-pruning-released` (|w Σ_t ∂L_t/∂w| over the same times, as the authors' scripts have it).
    `teacher`: the weight of the dense model's prediction in fine-tuning, beside the noise; `teacher_only`: learn from it alone.
    `timesteps`: batches that all but the first two look at. `multiple`: widths stay multiples of it where they were.
    The outputs of layers that the run's rules leave out stay, and those of frozen layers.

    Sources: Fang et al. 2023, "DepGraph" (groups, by torch-pruning) and "Structural Pruning for Diffusion Models" (score).
    """

    macs: float = 0.5
    density: float | None = None
    score: Literal["magnitude", "random", "taylor", "diff-pruning", "diff-pruning-released"] = "diff-pruning"
    threshold: float = 0.05
    timesteps: int = 32
    multiple: int = 8
    seed: int = 0
    teacher: float = 0.0
    teacher_only: bool = False
    surgery: Surgery | None = found()
    compared = True

    def __post_init__(self) -> None:
        one_of("structured: score", self.score, _SCORES)
        for name, value in (("macs", self.macs), ("density", self.density)):
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"structured: {name} must be above 0 and at most 1, got {value!r}")
        if not 0 <= self.threshold < 1:
            raise UsageError(f"structured: threshold must be at least 0 and below 1, got {self.threshold!r}")
        for name, whole in (("timesteps", self.timesteps), ("multiple", self.multiple)):
            if whole < 1:
                raise UsageError(f"structured: {name} must be at least 1, got {whole}")
        if not 0 <= self.teacher < float("inf"):
            raise UsageError(f"structured: teacher must be a number of at least 0, got {self.teacher!r}")
        if self.density is not None:
            refuse_unread(self, "density says what stays", "macs")
        if self.score != "random":
            refuse_unread(self, f"score {self.score} draws nothing", "seed")
        if not self.score.startswith("diff-pruning"):
            refuse_unread(self, f"score {self.score} has none", "threshold")
        if self.score in ("magnitude", "random"):
            refuse_unread(self, f"score {self.score} looks at no data", "timesteps")
        if self.teacher_only:
            refuse_unread(self, "teacher_only learns from the teacher alone", "teacher")

    @property
    def objective(self) -> Objective:  # type: ignore[override]  # derived from the settings, which are what is set
        return Objective.taught(self.teacher, self.teacher_only)

    def with_cost(self, share: float, measure: Cost = "macs") -> Self:
        if measure == "density":
            return replace(self, density=share, macs=type(self).macs)
        return replace(self, macs=share, density=None)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        return {}

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        return {}

    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        groups = find_groups(model, adapter, self.multiple)
        if self.score == "random":
            scores = [channel_scores(group, None, self.seed) for group in groups]
        else:
            entries = entry_scores(model, adapter, batches, self.score, self.timesteps, self.threshold)
            scores = [channel_scores(group, entries, self.seed) for group in groups]
        if self.density is not None:
            found = removal(model, groups, scores, self.density)
            _macs(model, adapter, found)  # raises where the smaller model does not work
        else:
            found = self._matching(model, adapter, groups, scores)
        return replace(self, surgery=found)

    def _matching(self, model: nn.Module, adapter: Adapter, groups: list[Group], scores: list[Tensor]) -> Surgery:
        """The surgery whose multiply-accumulates come nearest to the share `macs` of the model's."""
        whole = _macs(model, adapter, Surgery())
        low, high, tried = 0.0, 1.0, []
        for _ in range(_TRIALS):
            density = (low + high) / 2
            found = removal(model, groups, scores, density)
            share = _macs(model, adapter, found) / whole
            tried.append((abs(share - self.macs), share, found))
            low, high = (density, high) if share < self.macs else (low, density)
        _, share, best = min(tried, key=lambda trial: trial[0])
        if abs(share - self.macs) > 0.1:
            raise CompressorError(
                f"structured: {self.macs:.0%} of the multiply-accumulates cannot be reached, only {share:.0%}",
                f"What is no inner width stays as it is, and widths stay multiples of {self.multiple}: choose another macs, or a "
                "smaller multiple.",
            )
        return best


def _macs(model: nn.Module, adapter: Adapter, surgery: Surgery) -> int:
    """Multiply-accumulates of the model after `surgery`, tried on a copy."""
    tried = twin(model).eval()
    surgery.apply(tried)
    try:
        return layer_macs(tried, adapter)[0]
    except Exception as error:  # whatever a model raises whose shapes do not fit
        raise CompressorError(
            f"structured: this model does not work with fewer channels: {first_line(error)}",
            "Name the layers whose outputs must stay with --ignore.",
        ) from error
