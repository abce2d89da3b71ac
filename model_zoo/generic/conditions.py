"""A call of a model by its pipeline, taken apart into the noisy input, the time, and what is told beside them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.adapter import Conditions
from compressor.data.naming import flat
from compressor.errors import UsageError
from compressor.model_zoo.generic.conventions import HOW_TO_RECORD, Convention, convention
from compressor.model_zoo.generic.pretrained import model_class


def conditions(config: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Conditions:
    """What a pipeline that calls a model of `config` with these arguments tells it. Floating-point tensors come in float32.

    Left out is what the class takes where it is given nothing. Raises UsageError for a class that is not in the table, and for
    arguments that have no row for each sample.
    """
    told = convention(config)
    parameters = dict(list(inspect.signature(model_class(config).forward).parameters.items())[1:])
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    given.pop("return_dict", None)
    noisy = _noisy(given.pop(told.noisy), told)
    time = given.pop(told.time)
    arrays: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    constants: dict[str, Any] = {}
    for name, value in given.items():
        leaves = flat({name: _as_tensor(name, value, told)})
        if not any(isinstance(leaf, Tensor) for leaf in leaves.values()):
            default = parameters[name].default if name in parameters else inspect.Parameter.empty
            if not (value is default or value == default):
                constants[name] = value
            continue
        for place, leaf in leaves.items():
            if not isinstance(leaf, Tensor):
                constants[place] = leaf
            elif name in told.shared and leaf.dim() == 2:
                shared[place] = _wide(leaf)
            else:
                arrays[place] = _wide(leaf)
    for place, leaf in arrays.items():
        if leaf.dim() == 0 or len(leaf) != len(noisy):
            raise UsageError(
                f"{config.get('_class_name')} is called with {place} {tuple(leaf.shape)} for {len(noisy)} samples",
                HOW_TO_RECORD,
            )
    return Conditions(told.noisy, noisy, told.time, time, arrays, shared, constants)


def _noisy(value: Any, told: Convention) -> Tensor:
    """The noisy input as a batch; of a list of samples, without the dim of the only frame."""
    found: Tensor = torch.stack(list(value)).squeeze(2) if isinstance(value, (list, tuple)) else value
    return _wide(found)


def _as_tensor(name: str, value: Any, told: Convention) -> Any:
    """Lists that the class takes, as tensors with a row per sample: the inverse of `arguments.called`."""
    if name in told.sizes and not isinstance(value, Tensor) and value is not None:
        return torch.tensor(value)
    if name in told.listed and isinstance(value, (list, tuple)):
        return torch.stack(list(value))
    return value


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
