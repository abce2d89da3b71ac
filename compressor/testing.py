"""Whether a pruner keeps the promises of its interface: a suite for methods of your own, and for every registered one.

    from compressor.testing import check_pruner
    check_pruner(MyPruner)

or `compressor check-plugin my_pruner.py:MyPruner`. It trains a tiny model of each family for a few steps.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from inspect import isclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import registry, saving
from compressor.adapter import Adapter
from compressor.data.batches import as_batches
from compressor.errors import CompressorError
from compressor.seeds import generator
from compressor.sparsity.pattern import Mask
from compressor.training.engine import FineTuning, Result, chosen, prune, steps
from compressor.training.pruner import Pruner, settings_of
from compressor.training.settings import Training

_STEPS = 4


@dataclass(frozen=True)
class Finding:
    """One check of one family: `fault` says what is wrong, None where nothing is."""

    check: str
    family: str
    fault: str | None


def check_pruner(pruner: Pruner | type[Pruner]) -> None:
    """Raise CompressorError, with everything that is wrong, unless `pruner` (a class with defaults for all settings, or an
    instance) keeps the promises of `compressor.Pruner`. Takes well under a minute on a CPU."""
    wrong = [found for found in findings(pruner) if found.fault is not None]
    if wrong:
        lines = "\n".join(f"  {found.check}, {found.family}: {found.fault}" for found in wrong)
        raise CompressorError(f"the pruner breaks {len(wrong)} promises:\n{lines}", "help(compressor.Pruner) has them.")


def findings(pruner: Pruner | type[Pruner]) -> Iterator[Finding]:
    """Every check on every family, one after another."""
    if isclass(pruner):
        try:
            made = registry.build_pruner(pruner, {})
        except Exception as error:  # a plugin may raise anything
            yield Finding("is made without settings", "all", f"{type(error).__name__}: {error}")
            return
    else:
        made = pruner
    if not isinstance(made, Pruner):
        yield Finding("is a Pruner", "all", f"{type(made).__name__} is no subclass of compressor.Pruner")
        return
    for family, (adapter, model) in families().items():
        trial = _Trial(made, adapter, model)
        for check in CHECKS:
            fault = None
            try:
                check(trial)
            except _Broken as broken:
                fault = str(broken)
            except (Exception, SystemExit) as error:  # a plugin may raise anything
                fault = f"{type(error).__name__}: {error}"
            yield Finding((check.__doc__ or "").strip().rstrip("."), family, fault)


def families() -> dict[str, tuple[Adapter, nn.Module]]:
    """A tiny model of each family with its adapter, with random weights that are always the same.

    It is the `small` one of the first registered model of the family that has one.
    """
    models: dict[str, tuple[Adapter, nn.Module]] = {}
    for name in registry.names("models"):
        adapter = registry.adapter(name).small()
        if adapter is not None and adapter.family not in models:
            models[adapter.family] = (adapter, _random(adapter))
    return models


def _random(adapter: Adapter) -> nn.Module:
    """The adapter's model with weights of a fixed seed, none of which is zero throughout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = adapter.build().float()
        for parameter in model.parameters():
            # some start at zero: no gradient would flow, and no mask could be told from another
            if not parameter.detach().any():
                parameter.data.normal_(0, 0.02)
    return model


class _Broken(Exception):
    """A promise is broken; the message says how."""


def _hold(condition: bool, message: str) -> None:
    if not condition:
        raise _Broken(message)


class _Trial:
    """A pruner on one family, with what several checks need."""

    def __init__(self, pruner: Pruner, adapter: Adapter, model: nn.Module) -> None:
        self.pruner, self.adapter, self.model = pruner, adapter, model
        shape = adapter.image_shape or (1, 8, 8)
        images = torch.rand(24, *shape, generator=generator("testing")) * 2 - 1
        labels = torch.arange(24) % max(1, adapter.num_classes)
        batch = (images, labels) if adapter.num_classes else images
        self.data = [_rows(batch, slice(8 * i, 8 * i + 8)) for i in range(3)]
        self.training = Training(steps=_STEPS, batch_size=8, lr=1e-3, device="cpu")
        self.result: Result | None = None
        self._prepared: dict[int, tuple[Pruner, nn.Module]] = {}

    def prepared(self, seed: int) -> tuple[Pruner, nn.Module]:
        """The prepared pruner and the model that it left, in a process whose own random numbers start at `seed`; made once."""
        if seed not in self._prepared:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = copy.deepcopy(self.model)
                self._prepared[seed] = (
                    self.pruner.prepare(model, self.adapter, as_batches(self.data, 8, 0)),
                    model,
                )
        return self._prepared[seed]

    def pruned(self) -> Result:
        """The result of a short run; made once."""
        if self.result is None:
            self.result = self.run()
        return self.result

    def run(self, seed: int = 0) -> Result:
        """A short run, in a process whose own random numbers start at `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            given = self.training.model_dump()
            return prune(self.model, self.pruner, adapter=self.adapter, data=self.data, **given)

    def started(self, previous: Mapping[str, Any] | None = None) -> FineTuning:
        """A run that has not begun, or goes on from `previous`."""
        return FineTuning(
            self.model, self.pruner, adapter=self.adapter, data=self.data, training=self.training, previous=previous
        )

    def weights(self) -> dict[str, Tensor]:
        """The dense weights that the pruner is asked about, under this family's rules."""
        layers = chosen(self.model, self.pruner, self.adapter)
        return {layer.name: layer.weight.detach().clone() for layer in layers}


def _rows(batch: Any, rows: slice) -> Any:
    return tuple(part[rows] for part in batch) if isinstance(batch, tuple) else batch[rows]


# --- The checks. Each says in its docstring what it checks, as a user reads it. ---


def _targets(trial: _Trial) -> None:
    """Targets are parameters of the model."""
    parameters = dict(trial.model.named_parameters())
    for name, weight in trial.pruner.targets(trial.model).items():
        _hold(name in parameters, f"targets() names {name!r}, which is no parameter")
        _hold(parameters[name] is weight, f"targets() gives another tensor for {name}")


def _legal(trial: _Trial) -> None:
    """Masks obey their pattern at every progress."""
    weights = trial.weights()
    previous: dict[str, Mask] = {}
    for progress in (0.0, 0.3, 0.6, 1.0):
        found = trial.pruner.masks(weights, progress, previous)
        _hold(isinstance(found, Mapping), f"masks() returned {type(found).__name__}, not a mapping")
        for name, mask in found.items():
            _hold(name in weights, f"masks() names {name!r}, which it was not asked about")
            _hold(isinstance(mask, Mask), f"{name}: masks() returned {type(mask).__name__}")
            _hold(mask.keep.shape == weights[name].shape, f"{name}: a mask of another shape than the weight")
            try:
                mask.verify()
            except CompressorError as error:
                raise _Broken(f"{name} at progress {progress}: {error.message}") from error
        previous = dict(found)


def _pure(trial: _Trial) -> None:
    """masks() changes nothing, and gives the same for the same."""
    weights = trial.weights()
    before = {name: weight.clone() for name, weight in weights.items()}
    first = dict(trial.pruner.masks(weights, 0.5, {}))
    trial.pruner.masks({name: weight + 1 for name, weight in weights.items()}, 0.1, {})
    again = [dict(trial.pruner.masks(weights, 0.5, {})) for _ in range(2)]
    _hold(_same(weights, before), "masks() changed a weight that it was given")
    _hold(all(_same_masks(first, found) for found in again), "masks() gave other masks for the same arguments")
    kept = {name: mask.keep.clone() for name, mask in first.items()}
    trial.pruner.masks({name: -weight for name, weight in weights.items()}, 0.9, first)
    _hold(_same({n: m.keep for n, m in first.items()}, kept), "masks() changed the masks that it was given")


def _ranks(trial: _Trial) -> None:
    """Every rank gets the same masks: they do not depend on a process's random numbers."""
    weights, found = trial.weights(), []
    for seed in (1, 2):
        prepared, model = trial.prepared(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            masks = prepared.masks(weights, 0.5, {}) if prepared.surgery is None else {}
        found.append((masks, prepared.surgery, model))
    _hold(_same_masks(found[0][0], found[1][0]), "other masks where torch's own generator has another seed")
    _hold(found[0][1] == found[1][1], "another surgery where torch's own generator has another seed")
    _hold(_same(found[0][2].state_dict(), found[1][2].state_dict()), "prepare() leaves other weights with another seed")


def _settings(trial: _Trial) -> None:
    """prepare() leaves the settings as they are."""
    prepared, _ = trial.prepared(1)
    before, after = settings_of(trial.pruner), settings_of(prepared)
    for name, value in before.items():
        same = after.get(name) is value
        if not same:
            with suppress(Exception):  # what is no setting, such as a dict of tensors, may not compare
                same = bool(after[name] == value)
        _hold(same, f"prepare() changed the setting {name!r}; declare what it finds as {name} = compressor.found()")


def _sparse(trial: _Trial) -> None:
    """The finished model is as sparse as its masks say, finite, and the given one is as it was."""
    before = {name: value.clone() for name, value in trial.model.state_dict().items()}
    result = trial.pruned()
    _hold(_same(before, trial.model.state_dict()), "the given model changed")
    weights = dict(result.model.named_parameters())
    for name, weight in weights.items():
        _hold(bool(weight.isfinite().all()), f"{name} is not finite")
    for name, mask in result.masks.items():
        _hold(not bool(weights[name].detach()[~mask.keep].any()), f"{name} is not zero where its mask is")
        mask.pattern.verify(weights[name].detach())


def _deterministic(trial: _Trial) -> None:
    """The same seed gives the same bytes."""
    _hold(_same(trial.pruned().model.state_dict(), trial.run(seed=7).model.state_dict()), "two runs differ")


def _resumable(trial: _Trial) -> None:
    """An interrupted run goes on to the same bytes."""
    half = trial.started()
    for _ in range(_STEPS // 2):
        half.advance()
    with tempfile.TemporaryDirectory() as folder:
        saving.save_state(Path(folder), half.state())
        resumed = trial.started(saving.load_state(Path(folder)))
    for _ in steps(resumed):
        pass
    found = resumed.finish().model.state_dict()
    _hold(_same(trial.pruned().model.state_dict(), found), "the resumed run gave other weights (state, restored)")


def _saved(trial: _Trial) -> None:
    """The result is saved and loaded without loss, and without pickle."""
    result = trial.pruned()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        saving.save(path, result.model, result.masks)
        kinds = {file.suffix for file in path.iterdir()}
        _hold(kinds <= {".json", ".safetensors"}, f"files of other kinds: {sorted(kinds)}")
        loaded = saving.load(path, copy.deepcopy(trial.model))
    _hold(_same(result.model.state_dict(), loaded.state_dict()), "the loaded weights are others")


def _exported(trial: _Trial) -> None:
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
    _hold(torch.allclose(expected, found, rtol=1e-4, atol=1e-5), "the exported program answers otherwise")


CHECKS: tuple[Callable[[_Trial], None], ...] = (
    _targets,
    _legal,
    _pure,
    _ranks,
    _settings,
    _sparse,
    _deterministic,
    _resumable,
    _saved,
    _exported,
)


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def _same_masks(first: Mapping[str, Mask], second: Mapping[str, Mask]) -> bool:
    return _same({n: m.keep for n, m in first.items()}, {n: m.keep for n, m in second.items()})
