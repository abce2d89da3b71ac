"""The settings of a U-ViT that are not as its name says: those that a file of weights shows, and those that a user gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.errors import UsageError, did_you_mean
from compressor.model_zoo.uvit.network import UViT

_SHOWN = {"qkv_bias": ".attn.qkv.bias", "mlp_time_embed": "time_embed.", "conv": "final_layer."}
"""A part of the names that only a network with the setting has."""

_LARGEST = {"depth": 512, "img_size": 1024, "num_classes": 1_000_000, "mlp_ratio": 64}
_LARGEST_NUMBER = 65_536


def found_in(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """What `state` has beyond a U-ViT of `config`, as its settings: biases of qkv, layers of the time, a last convolution.

    Checkpoints of SparseDM have biases of qkv although their configuration says otherwise: its sparse layers always make one.
    What a state lacks is not found here, so that loading says that it is missing.
    """
    usual = _usual()
    return {
        setting: True
        for setting, part in _SHOWN.items()
        if not config.get(setting, usual[setting]) and any(part in name for name in state)
    }


def checked(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `settings` on top. Raises UsageError for settings that a U-ViT does not have or that cannot be."""
    usual = _usual()
    for name, value in settings.items():
        if name not in usual:
            raise UsageError(f"architecture: a U-ViT has no {name!r}", did_you_mean(name, usual))
        kind = type(usual[name])
        if kind is bool:
            fits, allowed = isinstance(value, bool), "true or false"
        else:
            largest = _LARGEST.get(name, _LARGEST_NUMBER)
            number = not isinstance(value, bool) and isinstance(value, (int, kind))
            fits = number and (0 < value <= largest or (name == "num_classes" and value == -1))
            allowed = f"{'whole ' if kind is int else ''}numbers above 0, up to {largest}"
        if not fits:
            raise UsageError(f"architecture: {name} is {str(value)[:60]}", f"Allowed: {allowed}.")
    result = {**config, **settings}
    try:
        with torch.device("meta"):
            UViT(**result)
    except ValueError as error:
        raise UsageError(f"architecture: {error}", "Change the settings together.") from error
    return result


def _usual() -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(UViT).parameters.items()}
