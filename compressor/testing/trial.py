"""A pruner on the tiny model of a family, and what checks of it share."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor import registry
from compressor.adapter import Adapter
from compressor.data.batches import as_batches
from compressor.seeds import generator
from compressor.sparsity.pattern import Mask
from compressor.training.engine import FineTuning, Result, chosen, prune
from compressor.training.pruner import Pruner
from compressor.training.settings import Training

STEPS = 4
_DEEP = 8
"""So many objects inside each other are compared."""


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


class BrokenError(Exception):
    """A promise is broken; the message says how."""


def hold(condition: bool, message: str) -> None:
    """Raise BrokenError with `message` unless the `condition` holds."""
    if not condition:
        raise BrokenError(message)


class Answers(Protocol):
    """Who knows what a pruner answers in another process."""

    def answer(self, family: str) -> Mapping[str, str]:
        """Its `Trial.answer` there. Raises BrokenError where it fails there, and NotTriedError where it cannot be tried."""


class Trial:
    """A pruner on one family, with what several checks need."""

    def __init__(self, pruner: Pruner, adapter: Adapter, model: nn.Module, elsewhere: Answers | None = None) -> None:
        self._given, self.adapter, self.model, self.elsewhere = pruner, adapter, model, elsewhere
        shape = adapter.image_shape or (1, 8, 8)
        images = torch.rand(24, *shape, generator=generator("testing")) * 2 - 1
        labels = torch.arange(24) % max(1, adapter.num_classes)
        batch = (images, labels) if adapter.num_classes else images
        self.data = [_rows(batch, slice(8 * i, 8 * i + 8)) for i in range(3)]
        self.training = Training(steps=STEPS, batch_size=8, lr=1e-3, device="cpu")
        self.result: Result | None = None
        self._prepared: dict[int, tuple[Pruner, nn.Module]] = {}
        self._called: Pruner | None = None

    @property
    def pruner(self) -> Pruner:
        """The pruner as it was given: a copy of its own each time, so that nothing that `prepare` leaves in one is in the next."""
        try:
            return copy.deepcopy(self._given)
        except Exception:  # what cannot be copied is tried as it is
            return self._given

    @property
    def called(self) -> Pruner:
        """The pruner whose `prepare` was called."""
        self.prepared(1)
        assert self._called is not None
        return self._called

    @property
    def asked(self) -> Pruner:
        """The pruner whose masks are looked at: as a run asks it, prepared; one that removes structure, as it was given."""
        prepared = self.prepared(1)[0]
        return prepared if prepared.surgery is None else self.pruner

    def prepared(self, seed: int) -> tuple[Pruner, nn.Module]:
        """The prepared pruner and the model that it left, in a process whose own random numbers start at `seed`; made once."""
        if seed not in self._prepared:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = copy.deepcopy(self.model)
                self._called = self.pruner
                self._prepared[seed] = (
                    self._called.prepare(model, self.adapter, as_batches(self.data, 8, 0)),
                    model,
                )
        return self._prepared[seed]

    def answer(self) -> dict[str, str]:
        """What a prepared pruner says of this family, as hashes: the same wherever it is asked."""
        prepared, model = self.prepared(1)
        found = {"prepare() leaves other weights": _digest(model.state_dict())}
        if prepared.surgery is not None:
            return {**found, "another surgery": json.dumps(prepared.surgery.to_json(), sort_keys=True)}
        # not the weights that it was prepared for: what only knows those by heart is to be seen
        weights = {name: weight.flip(0).contiguous() for name, weight in self.weights().items()}
        masks = prepared.masks(weights, 0.5, {})
        return {**found, "other masks": _digest({name: mask.keep for name, mask in masks.items()})}

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


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same tensors by the same names."""
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def same_masks(first: Mapping[str, Mask], second: Mapping[str, Mask]) -> bool:
    """Whether both keep the same entries of the same weights."""
    return same({n: m.keep for n, m in first.items()}, {n: m.keep for n, m in second.items()})


def attributes(pruner: Pruner) -> dict[str, Any]:
    """What `pruner` keeps, by name."""
    fields = getattr(type(pruner), "__dataclass_fields__", {})
    slots = {name: getattr(pruner, name) for name in fields if hasattr(pruner, name)}
    return {**slots, **getattr(pruner, "__dict__", {})}


def alike(first: Any, second: Any, deep: int = _DEEP) -> bool:
    """Whether a thing is what its copy is. What cannot be told counts as the same."""
    if first is second or deep == 0:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, nn.Module):
        return alike(first.state_dict(), second.state_dict(), deep - 1)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(alike(first[key], second[key], deep - 1) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(alike(a, b, deep - 1) for a, b in zip(first, second, strict=True))
    if is_dataclass(first) or getattr(type(first), "__eq__", None) is object.__eq__:
        return alike(getattr(first, "__dict__", None), getattr(second, "__dict__", None), deep - 1)
    try:
        return bool(first == second)
    except Exception:  # whatever compares to no yes or no
        return True


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
