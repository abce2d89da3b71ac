"""The Pruner interface: a method, as data. One required method; everything else has a default that does the usual."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.data import Batches
from compressor.estimator import Estimator, StraightThrough
from compressor.pattern import NM, Mask, Pattern
from compressor.surgery import Surgery
from compressor.targets import fitting


@dataclass(frozen=True)
class Objective:
    """Weights of the two losses: `noise * |target - student|^2 + teacher * |teacher - student|^2` (means of squares).

    The teacher, a frozen copy of the model from before pruning, exists only where `teacher` is above zero.
    """

    noise: float = 1.0
    teacher: float = 0.0


class Pruner(ABC):
    """A compression method. Subclasses are frozen dataclasses (their fields are the method's settings) or plain classes.

    A subclass may give `pattern`, `estimator` and `objective` as fields, class attributes or properties.
    """

    pattern: Pattern = NM(2, 4)
    """The pattern of the finished weights."""
    estimator: Estimator = StraightThrough()
    """How pruned weights are trained."""
    objective: Objective = Objective()
    """What fine-tuning minimises."""
    surgery: Surgery | None = None
    """What `prepare` found that can be removed of the model's structure. The engine removes it, before training."""

    @abstractmethod
    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        """The masks that hold now. Pure: called before training, after every optimizer step, and once on the average.

        `weights`: the dense target weights by parameter name; `progress`: the share of the steps that is done, 0 to 1
        (1 where there are none); `previous`: the masks now in force, {} at first. Weights left out stay dense.
        """

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """The parameters that may get a mask, by name. Default: Linear and Conv weights that the pattern fits.

        Raises UsageError where it fits none.
        """
        return fitting(model, self.pattern)

    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        """Called once, before training: calibrate scores, or update weights in place. Default: self.

        What it learns goes into the copy that it returns, and into that copy's `state`. Structure that it wants removed
        goes into the copy's `surgery`, which checkpoints hold anyway; `masks` then gets the weights that are left.
        `adapter.targets` and `adapter.ignore` are the rules of this run (`compressor.engine.chosen` applies them).
        """
        return self

    def state(self) -> Mapping[str, Any]:
        """What `prepare` found, as nested dicts of tensors, numbers and strings, for checkpoints. Default: nothing."""
        return {}

    def restored(self, state: Mapping[str, Any]) -> Self:
        """This pruner with the `state` (on the CPU) of a prepared one. A resumed run calls it instead of `prepare`."""
        return self
