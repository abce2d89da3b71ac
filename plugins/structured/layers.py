"""Where each kind of layer has its channels: the dims of its tensors, and the attributes that count them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_STATISTICS = {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}


@dataclass(frozen=True)
class Side:
    """One side of a layer, its inputs or its outputs.

    `width`: how many channels it has. `tensors`: the layer's tensors that have them, by key, with the dim. `counts`: the
    layer's attributes that say how many there are.
    """

    width: int
    tensors: Mapping[str, int]
    counts: tuple[str, ...]


def side(layer: nn.Module, out: bool) -> Side | str | None:
    """The outputs (`out`) or inputs of `layer`.

    None where the layer treats all channels alike, so that it has nothing to remove. A text, the reason, where channels cannot
    be removed from it.
    """
    match layer:
        case nn.Linear():
            if out:
                return Side(layer.out_features, {"weight": 0, "bias": 0}, ("out_features",))
            return Side(layer.in_features, {"weight": 1}, ("in_features",))
        case _ConvNd():
            return _convolution(layer, out)
        case nn.GroupNorm():
            return Side(layer.num_channels, {"weight": 0, "bias": 0}, ("num_channels",))
        case _BatchNorm() | _InstanceNorm():
            return Side(layer.num_features, _STATISTICS, ("num_features",))
        case nn.PReLU():
            one = layer.num_parameters == 1
            return None if one else Side(layer.num_parameters, {"weight": 0}, ("num_parameters",))
        case nn.Embedding():
            return Side(layer.embedding_dim, {"weight": 1}, ("embedding_dim",))
        case nn.LayerNorm():
            return "a LayerNorm, which sees all channels as a whole"
    return f"a {type(layer).__name__}, from which channels cannot be removed here"


def _convolution(layer: _ConvNd, out: bool) -> Side | str:
    if layer.groups == layer.in_channels == layer.out_channels > 1:  # depthwise: a channel goes in and out by itself
        return Side(layer.out_channels, {"weight": 0, "bias": 0}, ("in_channels", "out_channels", "groups"))
    if layer.groups > 1:
        return "a convolution with groups, in which channels have fixed places"
    first, second = (1, 0) if layer.transposed else (0, 1)
    if out:
        return Side(layer.out_channels, {"weight": first, "bias": 0}, ("out_channels",))
    return Side(layer.in_channels, {"weight": second}, ("in_channels",))
