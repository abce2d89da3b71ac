"""What a method answers, looked at before it is used: masks, gradients, the method that `prepare` gives.

Methods are anybody's code. What they answer is written into weights, where torch would stretch or drop much of what is wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.data.batches import Batches
from compressor.errors import CompressorError, memory, memory_behind, said_of
from compressor.sparsity.estimator import Estimator
from compressor.sparsity.pattern import Mask, Pattern, Unstructured
from compressor.sparsity.surgery import Surgery
from compressor.training.pruner import Pruner, settings_of
from compressor.training.settings import Training

_ROUNDING = 1e-6
_SAVED_WITH = "Go on with the model, the method and the settings that it was saved with."
_PURE = "It is pure: compute with copies (w.abs(), not w.abs_())."


def prepared(pruner: Pruner, model: nn.Module, adapter: Adapter, batches: Batches) -> Pruner:
    """What the `prepare` of `pruner` gives; modules of `model` that it left in another mode (train or eval) have theirs again.

    Raises CompressorError where that is no method, or its surgery is none, and where it left a hook on `model`, or tensors in it of
    other names, shapes or dtypes.
    """
    modes, before = [(module, module.training) for module in model.modules()], _outline(model)
    with memory("calibration"):
        found: Any = pruner.prepare(model, adapter, batches)
    for module, training in modes:
        module.training = training
    name = type(pruner).__name__
    after = _outline(model)
    if changed := [key for key in {**after, **before} if before.get(key) != after.get(key)]:
        raise CompressorError(
            f"prepare() of {name} left {changed[0]} of the model other than it was",
            "Take hooks off (handle.remove()), change weights in place alone, and remove structure by a Surgery.",
        )
    if not isinstance(found, Pruner):
        raise CompressorError(
            f"prepare() of {name} returned {type(found).__name__}", "Return self, or a copy with what it found."
        )
    if not isinstance(found.surgery, Surgery | None):
        raise CompressorError(
            f"the surgery of {name} is {type(found.surgery).__name__}", "Give a compressor.Surgery, or None."
        )
    return found


def _outline(model: nn.Module) -> dict[str, Any]:
    """What a method may not change of `model`: by name, the hooks of its modules, and the shape and dtype of its tensors."""
    hooks = {
        f"{name}.{kind}".lstrip("."): [*getattr(module, kind)]
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    }
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: (tuple(value.shape), value.dtype) for name, value in named} | hooks


def masks_of(
    pruner: Pruner, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]
) -> dict[str, Mask]:
    """The masks that `pruner` chooses, as `checked_masks` gives them.

    Raises CompressorError also where it has changed a weight or a mask that it was given, and for a `progress` that is no share. The
    first time, weights that were written to by their `data` or as NumPy arrays, which torch does not count, are found too.
    """
    if not isinstance(progress, Real) or not 0 <= progress <= 1 + _ROUNDING:
        raise CompressorError(
            f"the progress is {progress!r}, and it is a share of the steps", "progress = (step + 1) / steps"
        )
    given = {**weights, **{f"the previous mask of {name}": mask.keep for name, mask in previous.items()}}
    before = versions(given.values())
    sums = {} if previous else {name: _sum(weight) for name, weight in weights.items()}
    found = pruner.masks(dict(weights), progress, dict(previous))
    after = versions(given.values())
    changed = [name for name, old, new in zip(given, before, after, strict=True) if old != new]
    if what := next(iter(changed), None) or next((n for n, was in sums.items() if _sum(weights[n]) != was), None):
        raise CompressorError(f"masks() of {type(pruner).__name__} changed {what}", _PURE)
    return checked_masks(found, weights)


def checked_masks(masks: Any, weights: Mapping[str, Tensor]) -> dict[str, Mask]:
    """`masks` as a dict, or a CompressorError that names the weight and what a pruner returned for it."""
    if not isinstance(masks, Mapping):
        raise CompressorError(f"masks() returned {type(masks).__name__}", "Return a mapping of weight name to Mask.")
    for name, mask in masks.items():
        if name not in weights:
            raise CompressorError(f"masks() returned {name!r}, which is not a target", "Use the names of `weights`.")
        if not isinstance(mask, Mask):
            raise CompressorError(f"{name}: masks() returned {type(mask).__name__}", "Return pattern.mask(score).")
        if mask.keep.shape != weights[name].shape or mask.keep.device != weights[name].device:
            raise CompressorError(
                f"{name}: the mask is {tuple(mask.keep.shape)} on {mask.keep.device}, "
                f"the weight {tuple(weights[name].shape)} on {weights[name].device}",
                "A mask has the shape and device of its weight.",
            )
    return dict(masks)


def verify(masks: Mapping[str, Mask], finished: Pattern | None = None) -> None:
    """Raise CompressorError, with the name of the weight, where a mask breaks its pattern.

    Warns where they shall be of a method's `finished` pattern and keep more, or nothing of a weight; of `unstructured`, layers may
    have shares of their own.
    """
    for name, mask in masks.items():
        with said_of(name):
            mask.verify()
    if finished is None:
        return
    if empty := [name for name, mask in masks.items() if not bool(mask.keep.any())]:
        warnings.warn(
            f"{len(empty)} of {len(masks)} finished masks keep nothing: {empty[0]} is all zeros, so that its layer answers the same "
            "whatever it is asked",
            stacklevel=3,
        )
    if isinstance(finished, Unstructured):
        return
    if loose := [name for name, mask in masks.items() if mask.pattern.density > finished.density]:
        warnings.warn(
            f"{len(loose)} of {len(masks)} finished masks keep more than the method's pattern {finished} says: {loose[0]} is "
            f"{masks[loose[0]].pattern}",
            stacklevel=3,
        )


def gradient_of(estimator: Estimator, name: str, grad: Tensor, dense: Tensor, mask: Mask) -> Tensor:
    """The gradient that `estimator` gives the weight `name`, in memory of its own: an optimizer writes to the weight before it has
    read it. A sparse `grad` (of nn.Embedding(sparse=True)) is made dense.

    Raises CompressorError unless it is one for the weight, and `dense` is as it was.
    """
    before, grad = versions([dense]), grad if grad.layout == torch.strided else grad.to_dense()
    found = _like(f"{name}: gradient() of {type(estimator).__name__}", estimator.gradient(grad, dense, mask), grad)
    if versions([dense]) != before:
        raise CompressorError(f"{name}: gradient() of {type(estimator).__name__} changed the weight", _PURE)
    return found.clone() if found.untyped_storage().data_ptr() == dense.untyped_storage().data_ptr() else found


def shrunk_by(estimator: Estimator, name: str, dense: Tensor, mask: Mask, lr: float) -> Tensor:
    """The weight `name` as `estimator` leaves it after a step. Raises CompressorError unless it is one like `dense`."""
    return _like(f"{name}: shrink() of {type(estimator).__name__}", estimator.shrink(dense, mask, lr), dense)


def _like(what: str, found: Any, like: Tensor) -> Tensor:
    if isinstance(found, Tensor) and (found.shape, found.dtype, found.device) == (like.shape, like.dtype, like.device):
        return found
    shown = _shown(found) if isinstance(found, Tensor) else type(found).__name__
    raise CompressorError(f"{what} returned {shown}", f"Return a tensor like the weight: {_shown(like)}.")


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


_ROOM = ("device", "offload", "parallel", "accumulate", "gradient_checkpointing", "compiled")
"""Settings of training that say where and in which pieces it is computed: a run may go on with others."""


def same_run(state: Mapping[str, Any] | None, pruner: Pruner, training: Training, data: str) -> dict[str, str]:
    """What a run is of, in words, for its states: the method with its settings, those of the training, and the `data`.

    Raises CompressorError where the `state` that it goes on from says that it is of another. Those of earlier versions do not say.
    """
    now = {"method": type(pruner).__name__, "pattern": str(pruner.pattern)}
    now |= {f"settings.{name}": _in_words(value) for name, value in settings_of(pruner).items()}
    now |= {f"train.{name}": str(value) for name, value in training.model_dump(exclude={*_ROOM}).items()}
    now["data"] = data
    was = now if state is None else state.get("of", now)
    for name in now if was != now else ():
        if was.get(name) != now[name]:
            raise CompressorError(
                f"the state is not of this run: {name} was {was.get(name)}, and is {now[name]}",
                f"{_SAVED_WITH} Of train, {', '.join(_ROOM)} may be others.",
            )
    return now


def _in_words(value: Any) -> str:
    """A setting of a method; what has no words, the same in every process, is known by its class."""
    plain = isinstance(value, (str, int, float, bool, NoneType, Pattern))
    return str(value) if plain else type(value).__name__


@contextmanager
def restoring() -> Iterator[None]:
    """What fails in the block because a state is of another run, or is none, is a CompressorError that says so."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:  # dicts' words, and torch's
        if memory_behind(error) is not None:
            raise
        raise CompressorError(
            f"the state is not of this run: {type(error).__name__}: {' '.join(str(error).split()):.120}", _SAVED_WITH
        ) from error


def copied_(into: Tensor, value: Tensor, what: str) -> None:
    """Copy `value`, of a checkpoint, `into` a tensor. Raises CompressorError where it has another shape, which torch might stretch."""
    if value.shape != into.shape:
        raise CompressorError(
            f"{what} is {tuple(value.shape)} in the checkpoint, and {tuple(into.shape)} here",
            _SAVED_WITH,
        )
    into.copy_(value)


def version(tensor: Tensor) -> int:
    """A number that changes where `tensor` is written to, other than by its `data`."""
    return 0 if tensor.is_inference() else tensor._version


def _sum(weight: Tensor) -> int:
    """A sum of the bits of `weight`."""
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(weight.element_size(), torch.int64)
    return int(weight.detach().contiguous().view(bits).sum())


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """The `version` of each of `tensors`."""
    return [version(tensor) for tensor in tensors]
