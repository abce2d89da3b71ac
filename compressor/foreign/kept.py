"""What a model keeps of its calls beside its weights: caches, counters, buffers that its forward writes to."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, set, frozenset)
_OF_TORCH = frozenset(vars(nn.Module())) | {"forward"}
"""Attributes in which torch keeps hooks, parameters and modules; and a forward that was set on a module."""


class Place(NamedTuple):
    """A buffer, or another attribute, of the module at `path`."""

    path: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}.{self.name}".lstrip(".")


class Kept:
    """What `model` keeps now, to see what calls of it change, and to undo that: in the model, and in copies of it.

    Seen are buffers, and attributes that hold numbers, texts, tensors, and what is made of these; not parameters and modules, nor
    what cannot be copied.
    """

    def __init__(self, model: nn.Module) -> None:
        own = {id(value): value for value in (*model.modules(), *model.parameters())}
        self._before = {path: (type(module), _copies(module, own)) for path, module in model.named_modules()}

    def changed(self, model: nn.Module) -> set[Place]:
        """The places of `model` that are not what they were."""
        found = set()
        for path, (_, was) in self._before.items():
            now = _held(model.get_submodule(path))
            found |= {
                Place(path, name)
                for name in was.keys() | now.keys()
                if not (name in was and name in now and same(was[name], now[name]))
            }
        return found

    def put_back(self, model: nn.Module, places: Collection[Place]) -> None:
        """Let these `places` of `model`, or of a copy in which other modules stand for some, be what they were."""
        modules = dict(model.named_modules()) if places else {}
        for path, name in places:
            kind, was = self._before[path]
            if type(modules.get(path)) is kind:
                _put_back(modules[path], was, name)

    def values(self, model: nn.Module) -> dict[str, Any]:
        """What of `model` is not what it was, by place: tensors, numbers and texts that are not in its state."""
        own = {_memory(one) for one in model.state_dict(keep_vars=True).values() if type(one) in (Tensor, nn.Parameter)}
        found = {}
        for path, name in sorted(self.changed(model)):
            module = model.get_submodule(path)
            value = _held(module).get(name)
            in_state = name in module._buffers and name not in module._non_persistent_buffers_set
            if in_state or not _storable(value) or (isinstance(value, Tensor) and _memory(value) in own):
                continue
            found[str(Place(path, name))] = value.detach() if isinstance(value, Tensor) else value
        return found

    def take(self, model: nn.Module, values: Mapping[str, Any]) -> None:
        """Let `model` keep what `values` gave."""
        device = next((value.device for value in model.parameters()), torch.device("cpu"))
        for place, value in values.items():
            path, _, name = place.rpartition(".")
            if name not in _OF_TORCH:
                there = value.to(device) if isinstance(value, Tensor) else value
                _put_back(model.get_submodule(path), {name: there}, name)


class Resting:
    """To be told after each call of `model`, which then keeps what it kept before the first: as far as that one changed it."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._kept = model, Kept(model)
        self._changed: set[Place] | None = None

    def called(self) -> None:
        """The model was called."""
        if self._changed is None:
            self._changed = self._kept.changed(self._model)
        self._kept.put_back(self._model, self._changed)


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """What calls of `model` in the block change of what it keeps is undone when it ends."""
    kept = Kept(model)
    try:
        yield
    finally:
        kept.put_back(model, kept.changed(model))


_UNSEEN = object()
"""In the place of what is not looked at."""


def _storable(value: Any) -> bool:
    """Whether a file of numbers, texts and tensors can hold `value`."""
    if type(value) is Tensor:
        odd = value.is_meta or value.is_quantized or value.dtype in (torch.complex128, torch.complex32)
        return value.layout == torch.strided and not odd
    return type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))


def _memory(tensor: Tensor) -> int:
    """Where `tensor`, or what it is a view of, lies; for one without values the tensor itself, which none shares."""
    return id(tensor) if tensor.layout != torch.strided or not tensor.numel() else tensor.untyped_storage().data_ptr()


def _held(module: nn.Module) -> dict[str, Any]:
    return {**{name: value for name, value in vars(module).items() if name not in _OF_TORCH}, **module._buffers}


def _copies(module: nn.Module, own: dict[int, Any]) -> dict[str, Any]:
    """Copies of what `module` holds, in which what is a model's `own` stays itself."""
    found = {}
    for name, value in _held(module).items():
        try:
            seen = not any(isinstance(one, (nn.Module, nn.Parameter)) for one in tree_leaves(value))
            found[name] = copy.deepcopy(value, dict(own)) if seen else _UNSEEN
        except Exception:  # Python's own, torch's, and what a `__deepcopy__` raises
            found[name] = _UNSEEN
    return found


@torch.no_grad()
def _put_back(module: nn.Module, before: dict[str, Any], name: str) -> None:
    now, was = module._buffers.get(name), before.get(name)
    if isinstance(now, Tensor) and isinstance(was, Tensor) and (now.shape, now.dtype) == (was.shape, was.dtype):
        now.copy_(was)  # in place: a compiled form holds this very tensor
    elif name not in before:
        module._buffers.pop(name, None)
        vars(module).pop(name, None)
    else:
        held = module._buffers if name in module._buffers else vars(module)
        held[name] = copy.deepcopy(was)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, as far as they can be looked into."""
    return _same(one, other, set())


def _same(one: Any, other: Any, seen: set[int]) -> bool:
    if one is other or one is _UNSEEN or isinstance(one, (nn.Module, torch.fx.Graph)) or id(one) in seen:
        return True
    if type(one) is not type(other):
        return False
    seen.add(id(one))
    if isinstance(one, Tensor):
        alike = (one.shape, one.dtype, one.device, one.layout) == (other.shape, other.dtype, other.device, other.layout)
        plain = type(one) is Tensor and one.layout == torch.strided and not one.is_meta and not one.is_quantized
        return alike and (not plain or torch.equal(_bits(one), _bits(other)))
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(_same(one[key], other[key], seen) for key in one)
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(_same(a, b, seen) for a, b in zip(one, other, strict=True))
    if isinstance(one, _PLAIN):
        return bool(one == other) or repr(one) == repr(other)  # NaN is not equal to itself
    return not hasattr(one, "__dict__") or _same(vars(one), vars(other), seen)


def _bits(tensor: Tensor) -> Tensor:
    own = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return own.view(-1).view(torch.uint8)  # of memory of its own: what was expanded has no bytes that follow each other
