"""Depth pruning: whole blocks are removed, one after the other, then the shallower model learns from the dense one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter, cloned, to_device
from compressor.cost.macs import layer_macs
from compressor.data.batches import Batches
from compressor.errors import CompressorError, UsageError, one_of
from compressor.seeds import generator
from compressor.sparsity.layers import reached, survey
from compressor.sparsity.pattern import NM, Mask
from compressor.sparsity.surgery import Surgery
from compressor.training.calibration import visits
from compressor.training.pruner import Cost, Objective, Pruner, found, refuse_unread
from compressor.weights import twin


@dataclass(frozen=True)
class Depth(Pruner):
    """Removes whole blocks until about the share `macs` of the multiply-accumulates is left.

    A block: a module whose class appears in an `nn.ModuleList`, whose output has the shape of its first argument (or, where it
    has two streams, each of its outputs that of one argument), and whose parts no other code reads. `score`: `error` removes
    next whatever adds least to the mean square difference from the dense model's predictions, for each multiply-accumulate
    that it saves; `random` draws. `timesteps`: batches that are looked at, one per time. `teacher`: the weight of the dense
    model's prediction in fine-tuning, beside the noise; `teacher_only`: learn from it alone. A block stays where the run's
    rules leave out all of its layers.

    Sources: Song et al. 2024, "SLEB" (one block after the other, by the whole model's answer); Kim et al. 2024, "BK-SDM" (blocks
    of a diffusion model, then distillation).
    """

    macs: float = 0.75
    score: Literal["error", "random"] = "error"
    timesteps: int = 8
    teacher: float = 1.0
    teacher_only: bool = False
    seed: int = 0
    surgery: Surgery | None = found()

    def __post_init__(self) -> None:
        one_of("depth: score", self.score, ("error", "random"))
        if not 0 < self.macs <= 1:
            raise UsageError(f"depth: macs must be above 0 and at most 1, got {self.macs!r}")
        if self.timesteps < 1:
            raise UsageError(f"depth: timesteps must be at least 1, got {self.timesteps}")
        if not 0 <= self.teacher < float("inf"):
            raise UsageError(f"depth: teacher must be a number of at least 0, got {self.teacher!r}")
        if self.score == "error":
            refuse_unread(self, "score error draws nothing", "seed")
        else:
            refuse_unread(self, f"score {self.score} looks at no data", "timesteps")
        if self.teacher_only:
            refuse_unread(self, "teacher_only learns from the teacher alone", "teacher")

    @property
    def objective(self) -> Objective:  # type: ignore[override]  # derived from the settings, which are what is set
        return Objective.taught(self.teacher, self.teacher_only)

    def with_cost(self, share: float, measure: Cost = "macs") -> Self | None:
        return replace(self, macs=share) if measure == "macs" else None  # blocks hold no like share of the weights

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        return {}

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        return {}

    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        was_training = model.training
        model.eval()
        try:
            return replace(self, surgery=self._removed(model, adapter, batches))
        finally:
            model.train(was_training)

    def _removed(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Surgery:
        whole = layer_macs(model, adapter)[0]
        blocks = survey_blocks(model, adapter)
        saved = {name: block.saves for name, block in blocks.items()}
        too_many = (1 - self.macs) * whole
        rng = generator("depth", self.seed)
        gone: tuple[str, ...] = ()
        error = _Error(model, adapter, batches, self.timesteps, blocks) if self.score == "error" else None
        while left := [name for name in saved if name not in gone]:
            if error is None:
                chosen = left[int(torch.randint(len(left), (1,), generator=rng))]
            else:
                errors = {name: error((*gone, name)) / saved[name] for name in left}
                chosen = min(left, key=errors.__getitem__)
                if math.isinf(errors[chosen]):
                    raise CompressorError(
                        f"depth: without {chosen} the model's answers are not finite, nor without any other block",
                        "Check that the data are finite, and that the dense model's answers to them are.",
                    )
            if saved[chosen] > 2 * too_many:
                break  # without it, the share is farther from what is wanted
            gone += (chosen,)
            too_many -= saved[chosen]
        if too_many > 0.15 * whole and not left:
            raise CompressorError(
                f"depth: {self.macs:.0%} of the multiply-accumulates cannot be reached, only {self.macs + too_many / whole:.0%}",
                "What is no block stays as it is. Choose a larger macs.",
            )
        return without(gone, blocks)


class _Error:
    """The mean square difference from the dense model's predictions, over the denoising times, without some blocks; infinity where
    one is not finite."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, batches: Batches, timesteps: int, blocks: Mapping[str, Block]
    ) -> None:
        self.model, self.adapter, self.blocks = model, adapter, blocks
        device = next(model.parameters()).device
        self.inputs = [to_device(visit.inputs, device) for visit in visits(adapter, batches, timesteps)]
        self.dense: list[Tensor] = []
        self.dense = self._predictions(())

    def __call__(self, gone: Collection[str]) -> float:
        pairs = zip(self._predictions(gone), self.dense, strict=True)
        total = sum(float((found - dense).square().mean()) for found, dense in pairs)
        return total if math.isfinite(total) else math.inf

    @torch.no_grad()
    def _predictions(self, gone: Collection[str]) -> list[Tensor]:
        without(gone, self.blocks).apply(found := twin(self.model))
        return [self.adapter.predict(found, cloned(inputs)).float() for inputs in self.inputs]


@dataclass(frozen=True)
class Block:
    """A block that can be removed: the multiply-accumulates of one sample that it `saves`, and which of its arguments are passed
    on instead of its outputs, where it has several (`Surgery.passed`)."""

    saves: int
    passed: tuple[str | None, ...] = ()


def without(blocks: Collection[str], found: Mapping[str, Block]) -> Surgery:
    """The surgery that removes `blocks`, which are of those `found`."""
    return Surgery(removed=tuple(blocks), passed={name: found[name].passed for name in blocks if found[name].passed})


def find_blocks(model: nn.Module, adapter: Adapter) -> dict[str, int]:
    """The names of the blocks of `survey_blocks`, and what each saves."""
    return {name: block.saves for name, block in survey_blocks(model, adapter).items()}


def survey_blocks(model: nn.Module, adapter: Adapter) -> dict[str, Block]:
    """The blocks that can be removed and save something, outermost ones only, by name, in the order of the model.

    Raises CompressorError where there is none.
    """
    listed = {type(part) for parts in model.modules() if isinstance(parts, nn.ModuleList) for part in parts}
    layers = survey(model, NM(2, 4))
    alike: dict[str, tuple[str | None, ...]] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if (passed := _passed(module, args, kwargs, output)) is not None:
            alike[name] = passed

    tried = twin(model)
    for name, module in tried.named_modules():
        inside = [layer for layer in layers if layer.module_name.startswith(f"{name}.")]
        free = [layer for layer in inside if reached(layer, adapter.targets, adapter.ignore)]
        if type(module) in listed and len(inside) > 1 and free:
            module.register_forward_hook(partial(note, name), with_kwargs=True)
    whole = layer_macs(tried, adapter)[0]
    found: dict[str, Block] = {}
    for name, _ in model.named_modules():
        if name in alike and not any(name.startswith(f"{other}.") for other in found):
            try:
                smaller = twin(model)
                without((name,), {name: Block(0, alike[name])}).apply(smaller)
                saves = whole - layer_macs(smaller, adapter)[0]
            except Exception:  # whatever a model raises that reads a part of this block elsewhere
                continue
            if saves > 0:  # its layers may never be called
                found[name] = Block(saves, alike[name])
    if not found:
        raise CompressorError(
            "depth: this model has no block that could be removed",
            "A block: a module whose class appears in an nn.ModuleList, whose output has the shape of its first argument, or "
            "each of whose outputs has the shape of one of its arguments alone.",
        )
    return found


def _passed(module: nn.Module, args: Any, kwargs: Any, output: Any) -> tuple[str | None, ...] | None:
    """Which arguments of a call could stand for its `output`: () for the first one, names where there are several outputs.

    None where it is not clear which: an output has no argument's shape, or that of several.
    """
    first = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(output, Tensor):
        return () if isinstance(first, Tensor) and first.shape == output.shape else None
    if not isinstance(output, tuple) or not any(isinstance(one, Tensor) for one in output):
        return None
    try:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return None
    shapes = {name: value.shape for name, value in given.items() if isinstance(value, Tensor)}
    passed: list[str | None] = []
    for one in output:
        alike = [name for name, shape in shapes.items() if isinstance(one, Tensor) and shape == one.shape]
        if one is not None and len(alike) != 1:
            return None
        passed.append(alike[0] if alike else None)
    return tuple(passed)
