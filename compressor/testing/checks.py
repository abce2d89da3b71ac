"""The checks of a pruner. Each says in its docstring what it checks, as a user reads it."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor import saving
from compressor.errors import CompressorError
from compressor.seeds import repeatable
from compressor.sparsity.pattern import Mask, Unstructured
from compressor.testing.trial import STEPS, BrokenError, Trial, alike, attributes, hold, same, same_masks
from compressor.training.engine import steps
from compressor.training.pruner import Pruner, settings_of

_ROUNDING = 0.01
"""Shares of small layers are rounded."""
_FEWEST = 0.5
"""A mask may keep fewer than its pattern allows, but a method of half of it is one of another pattern."""


def _targets(trial: Trial) -> None:
    """Targets are parameters of the model."""
    parameters = dict(trial.model.named_parameters())
    for name, weight in trial.pruner.targets(trial.model).items():
        hold(name in parameters, f"targets() names {name!r}, which is no parameter")
        hold(parameters[name] is weight, f"targets() gives another tensor for {name}")


def _legal(trial: Trial) -> None:
    """Masks obey their pattern at every progress."""
    weights, pruner = trial.weights(), trial.asked
    previous: dict[str, Mask] = {}
    for progress in (0.0, 0.3, 0.6, 1.0):
        found = pruner.masks(weights, progress, previous)
        hold(isinstance(found, Mapping), f"masks() returned {type(found).__name__}, not a mapping")
        for name, mask in found.items():
            hold(name in weights, f"masks() names {name!r}, which it was not asked about")
            hold(isinstance(mask, Mask), f"{name}: masks() returned {type(mask).__name__}")
            hold(mask.keep.shape == weights[name].shape, f"{name}: a mask of another shape than the weight")
            try:
                mask.verify()
            except CompressorError as error:
                raise BrokenError(f"{name} at progress {progress}: {error.message}") from error
        previous = dict(found)


def _finished(trial: Trial) -> None:
    """The finished masks are those of the method's pattern."""
    pruner, weights = trial.asked, trial.weights()
    if not weights or trial.prepared(1)[0].surgery is not None:
        return
    pattern = pruner.pattern
    found = pruner.masks(weights, 1.0, dict(pruner.masks(weights, 0.0, {})))
    hold(bool(found), "masks() leaves every weight dense at the end: a method that means to has no targets()")
    for name, mask in found.items():
        hold(bool(mask.keep.any()), f"{name}: the mask keeps no entry at all")
        if not isinstance(pattern, Unstructured):  # of which layers may have different shares
            try:
                pattern.verify(mask.keep)
            except CompressorError as error:
                raise BrokenError(f"{name}: the finished mask ({mask.pattern}) is {error.message}") from error
    kept = sum(int(mask.keep.sum()) for mask in found.values()) / sum(mask.keep.numel() for mask in found.values())
    hold(
        _FEWEST * pattern.density <= kept <= pattern.density + _ROUNDING,
        f"{kept:.1%} of the weights are kept at the end, and the method's pattern {pattern} says {pattern.density:.1%}",
    )


def _pure(trial: Trial) -> None:
    """masks() changes nothing, and gives the same for the same."""
    weights, pruner = trial.weights(), trial.asked
    before = {name: weight.clone() for name, weight in weights.items()}
    with repeatable("check"):
        chance = _generators()
        first = dict(pruner.masks(weights, 0.5, {}))
        moved = _generators() != chance
    pruner.masks({name: weight + 1 for name, weight in weights.items()}, 0.1, {})
    again = [dict(pruner.masks(weights, 0.5, {})) for _ in range(2)]
    hold(same(weights, before), "masks() changed a weight that it was given")
    hold(all(same_masks(first, found) for found in again), "masks() gave other masks for the same arguments")
    hold(
        not moved,
        "masks() leaves the generators of torch, NumPy or Python other than they were, from which a loop around it draws: "
        "use a torch.Generator of its own",
    )
    kept = {name: mask.keep.clone() for name, mask in first.items()}
    pruner.masks({name: -weight for name, weight in weights.items()}, 0.9, first)
    hold(same({n: m.keep for n, m in first.items()}, kept), "masks() changed the masks that it was given")


def _generators() -> tuple[object, ...]:
    """The states of the global generators on the CPU."""
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


def _ranks(trial: Trial) -> None:
    """Every rank gets the same masks: they do not depend on a process's random numbers."""
    weights, found = trial.weights(), []
    for seed in (1, 2):
        prepared, model = trial.prepared(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            masks = prepared.masks(weights, 0.5, {}) if prepared.surgery is None else {}
        found.append((masks, prepared.surgery, model))
    hold(same_masks(found[0][0], found[1][0]), "other masks where torch's own generator has another seed")
    hold(found[0][1] == found[1][1], "another surgery where torch's own generator has another seed")
    hold(same(found[0][2].state_dict(), found[1][2].state_dict()), "prepare() leaves other weights with another seed")


def _elsewhere(trial: Trial) -> None:
    """A process of its own gets the same masks, whatever Python's hashes are and whichever model came before."""
    if trial.elsewhere is None:
        return
    here, there = trial.answer(), trial.elsewhere.answer(trial.adapter.family)
    for what, value in here.items():
        hold(
            there.get(what) == value,
            f"{what} in another process: do not use hash() or the order of a set, and keep nothing outside the pruner",
        )


def _left_alone(trial: Trial) -> None:
    """prepare() leaves the pruner that it is called on as it was."""
    if type(trial.pruner).state is not Pruner.state:  # a resumed run gets what it found, wherever it is
        return
    before, after = attributes(trial.pruner), attributes(trial.called)
    other = [name for name in {**before, **after} if not alike(before.get(name), after.get(name))]
    hold(
        not other,
        f"prepare() changed {', '.join(map(repr, other))} of the pruner that it was called on, which a resumed run does not have: "
        "put what it finds into the copy that it returns, and into `state` and `restored`",
    )


def _settings(trial: Trial) -> None:
    """prepare() leaves the settings as they are."""
    prepared, _ = trial.prepared(1)
    before, after = settings_of(trial.pruner), settings_of(prepared)
    for name, value in before.items():
        hold(
            alike(value, after.get(name)),
            f"prepare() changed the setting {name!r}; declare what it finds as {name} = compressor.found()",
        )


def _sparse(trial: Trial) -> None:
    """The finished model is as sparse as its masks say, finite, and the given one is as it was."""
    before = {name: value.clone() for name, value in trial.model.state_dict().items()}
    result = trial.pruned()
    hold(same(before, trial.model.state_dict()), "the given model changed")
    weights = dict(result.model.named_parameters())
    for name, weight in weights.items():
        hold(bool(weight.isfinite().all()), f"{name} is not finite")
    for name, mask in result.masks.items():
        hold(not bool(weights[name].detach()[~mask.keep].any()), f"{name} is not zero where its mask is")
        mask.pattern.verify(weights[name].detach())


def _deterministic(trial: Trial) -> None:
    """The same seed gives the same bytes."""
    hold(same(trial.pruned().model.state_dict(), trial.run(seed=7).model.state_dict()), "two runs differ")


def _resumable(trial: Trial) -> None:
    """An interrupted run goes on to the same bytes."""
    half = trial.started()
    for _ in range(STEPS // 2):
        half.advance()
    with tempfile.TemporaryDirectory() as folder:
        saving.save_state(Path(folder), half.state())
        resumed = trial.started(saving.load_state(Path(folder)))
    for _ in steps(resumed):
        pass
    found = resumed.finish().model.state_dict()
    hold(same(trial.pruned().model.state_dict(), found), "the resumed run gave other weights (state, restored)")


def _saved(trial: Trial) -> None:
    """The result is saved and loaded without loss, and without pickle."""
    result = trial.pruned()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        saving.save(path, result.model, result.masks)
        kinds = {file.suffix for file in path.iterdir()}
        hold(kinds <= {".json", ".safetensors"}, f"files of other kinds: {sorted(kinds)}")
        loaded = saving.load(path, copy.deepcopy(trial.model))
    hold(same(result.model.state_dict(), loaded.state_dict()), "the loaded weights are others")


def _exported(trial: Trial) -> None:
    """torch.export takes the result."""
    result, inputs = trial.pruned(), trial.adapter.example_inputs(2)

    class Answer(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, given: Any) -> Tensor:
            return trial.adapter.predict(self.model, given)

    with torch.no_grad():
        program = torch.export.export(Answer(result.model), (inputs,), strict=False)
        expected, found = trial.adapter.predict(result.model, inputs), program.module()(inputs)
    hold(torch.allclose(expected, found, rtol=1e-4, atol=1e-5), "the exported program answers otherwise")


CHECKS: tuple[Callable[[Trial], None], ...] = (
    _targets,
    _legal,
    _finished,
    _pure,
    _ranks,
    _left_alone,
    _settings,
    _sparse,
    _deterministic,
    _resumable,
    _saved,
    _exported,
    _elsewhere,  # last: it takes longer than the others
)
