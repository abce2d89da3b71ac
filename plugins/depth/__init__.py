"""Depth pruning: whole blocks are removed, one after the other, then the shallower model learns from the dense one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter, to_device
from compressor.cost.macs import layer_macs
from compressor.data.batches import Batches
from compressor.errors import CompressorError, UsageError, one_of
from compressor.seeds import generator
from compressor.sparsity.layers import reached, survey
from compressor.sparsity.pattern import NM, Mask
from compressor.sparsity.surgery import Surgery
from compressor.training.calibration import visits
from compressor.training.pruner import Cost, Objective, Pruner, found
from compressor.weights import twin


@dataclass(frozen=True)
class Depth(Pruner):
    """Removes whole blocks until about the share `macs` of the multiply-accumulates is left.

    A block: a module whose class appears in an `nn.ModuleList`, whose output has the shape of its first argument, and whose
    parts no other code reads. `score`: `error` removes next whatever adds least to the mean square
    difference from the dense model's predictions, for each multiply-accumulate that it saves; `random` draws. `timesteps`:
    batches that are looked at, one per time. `teacher`: the weight of the dense model's prediction in fine-tuning, beside the
    noise; `teacher_only`: learn from it alone. A block stays where the run's rules leave out all of its layers.

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

    @property
    def objective(self) -> Objective:  # type: ignore[override]  # derived from the settings, which are what is set
        return Objective(noise=0.0, teacher=1.0) if self.teacher_only else Objective(teacher=self.teacher)

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
            return replace(self, surgery=Surgery(removed=self._removed(model, adapter, batches)))
        finally:
            model.train(was_training)

    def _removed(self, model: nn.Module, adapter: Adapter, batches: Batches) -> tuple[str, ...]:
        whole = layer_macs(model, adapter)[0]
        saved = find_blocks(model, adapter)
        too_many = (1 - self.macs) * whole
        rng = generator("depth", self.seed)
        gone: tuple[str, ...] = ()
        error = _Error(model, adapter, batches, self.timesteps) if self.score == "error" else None
        while left := [name for name in saved if name not in gone]:
            if error is None:
                chosen = left[int(torch.randint(len(left), (1,), generator=rng))]
            else:
                chosen = min(left, key=lambda name: error((*gone, name)) / saved[name])
            if saved[chosen] > 2 * too_many:
                break  # without it, the share is farther from what is wanted
            gone += (chosen,)
            too_many -= saved[chosen]
        if too_many > 0.15 * whole and not left:
            raise CompressorError(
                f"depth: {self.macs:.0%} of the multiply-accumulates cannot be reached, only {self.macs + too_many / whole:.0%}",
                "What is no block stays as it is. Choose a larger macs.",
            )
        return gone


class _Error:
    """The mean square difference from the dense model's predictions, over the denoising times, without some blocks."""

    def __init__(self, model: nn.Module, adapter: Adapter, batches: Batches, timesteps: int) -> None:
        self.model, self.adapter = model, adapter
        device = next(model.parameters()).device
        self.inputs = [to_device(visit.inputs, device) for visit in visits(adapter, batches, timesteps)]
        self.dense: list[Tensor] = []
        self.dense = self._predictions(())

    def __call__(self, gone: Collection[str]) -> float:
        pairs = zip(self._predictions(gone), self.dense, strict=True)
        return sum(float((found - dense).square().mean()) for found, dense in pairs)

    @torch.no_grad()
    def _predictions(self, gone: Collection[str]) -> list[Tensor]:
        found = without(twin(self.model), gone)
        return [self.adapter.predict(found, inputs).float() for inputs in self.inputs]


def without(model: nn.Module, blocks: Collection[str]) -> nn.Module:
    """`model`, whose `blocks` are replaced in place."""
    Surgery(removed=tuple(blocks)).apply(model)
    return model


def find_blocks(model: nn.Module, adapter: Adapter) -> dict[str, int]:
    """The blocks that can be removed, outermost ones only, in the order of the model: their names, and the
    multiply-accumulates of one sample that each saves.

    Raises CompressorError where there is none.
    """
    listed = {type(part) for parts in model.modules() if isinstance(parts, nn.ModuleList) for part in parts}
    layers = survey(model, NM(2, 4))
    alike: set[str] = set()

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor) and isinstance(output, Tensor) and first.shape == output.shape:
            alike.add(name)

    tried = twin(model)
    for name, module in tried.named_modules():
        inside = [layer for layer in layers if layer.module_name.startswith(f"{name}.")]
        free = [layer for layer in inside if reached(layer, adapter.targets, adapter.ignore)]
        if type(module) in listed and len(inside) > 1 and free:
            module.register_forward_hook(partial(note, name), with_kwargs=True)
    whole = layer_macs(tried, adapter)[0]
    found: dict[str, int] = {}
    for name, _ in model.named_modules():
        if name in alike and not any(name.startswith(f"{other}.") for other in found):
            try:
                found[name] = whole - layer_macs(without(twin(model), (name,)), adapter)[0]
            except Exception:  # whatever a model raises that reads a part of this block elsewhere
                continue
    if not found:
        raise CompressorError(
            "depth: this model has no block that could be removed",
            "A block: a module whose class appears in an nn.ModuleList, whose output has the shape of its first argument.",
        )
    return found
