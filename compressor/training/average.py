"""The average of a model's weights in a training loop of the user's own, which stays sparse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError, UsageError
from compressor.sparsity.pattern import Mask
from compressor.training.answers import masks_of, verify
from compressor.training.optimizers import average_
from compressor.training.rounding import sparse
from compressor.training.settings import gradual
from compressor.training.shadow import Shadow
from compressor.training.shards import is_cut


class Average:
    """An exponential moving average of the parameters of `model`, whose masked weights `shadow` keeps.

    Masks move, so that an average of *sparse* weights is not sparse. This one is of the dense weights behind the masks, and of
    the other parameters as they are; where it is used, it is masked once. `decay` is reached gradually: after n updates it is at most
    (1 + n) / (10 + n). Buffers and what is no float are not averaged. Memory: a copy of the parameters where they are, in float32 at
    least, since in half precision an average stands still; `applied` takes another one.

    Raises UsageError for a decay outside [0, 1), for weights of the shadow that are not the model's, and for those that FSDP2 has cut.
    """

    def __init__(self, model: nn.Module, shadow: Shadow, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise UsageError(
                f"decay {decay!r}", "Give a share from 0 to below 1: 0.9999 averages over some 10,000 steps."
            )
        self.decay, self.updates = decay, 0
        self._shadow, self._parameters = shadow, {n: p for n, p in model.named_parameters() if p.is_floating_point()}
        self._names = {name: _named(name, weight, self._parameters) for name, weight in shadow.weights.items()}
        if cut := [name for name, weight in self._parameters.items() if is_cut(weight)]:
            raise UsageError(
                f"{cut[0]} is spread over processes", "`compressor run` averages under FSDP2; here, use DDP."
            )
        self.values: dict[str, Tensor] = {
            name: value.to(_wide(value), copy=True) for name, value in self._now().items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of now. To be called after each step of the optimizer."""
        now = {name: value.to(self.values[name].dtype) for name, value in self._now().items()}
        average_(self.values, now, 1 - gradual(self.decay, self.updates))
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[dict[str, Mask]]:
        """The model has the average, masked, while the block runs, and its own weights again after it. Gives the masks."""
        own = {name: weight.detach().clone() for name, weight in self._parameters.items()}
        try:
            yield self.write_()
        finally:
            with torch.no_grad():
                for name, value in own.items():
                    self._parameters[name].copy_(value)

    @torch.no_grad()
    def write_(self) -> dict[str, Mask]:
        """Put the average, masked by the method, into the model for good; the masks, which hold their pattern, by weight name.

        To be called when training is over, after `shadow.close()`.
        """
        pruner, dense = self._shadow.pruner, {name: self.values[own] for name, own in self._names.items()}
        masks = masks_of(pruner, dense, 1.0, self._shadow.masks)
        verify(masks, pruner.pattern)
        weights = {n: dense[n].to(self._parameters[own].dtype) for n, own in self._names.items() if n in masks}
        masked = {own: sparse(weights[n], masks[n], pruner) for n, own in self._names.items() if n in masks}
        for name, weight in self._parameters.items():
            weight.copy_(masked.get(name, self.values[name]))
        return masks

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, beside those of the model, the optimizer and the shadow."""
        return {"updates": self.updates, "values": dict(self.values)}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave. Raises CompressorError where it is of another model."""
        values = state["values"]
        if {name: value.shape for name, value in values.items()} != {n: v.shape for n, v in self.values.items()}:
            raise CompressorError("this average is of another model", "Restore it for the model that it was made of.")
        for name, value in self.values.items():
            value.copy_(values[name])
        self.updates = int(state["updates"])

    def _now(self) -> dict[str, Tensor]:
        """The dense value of every parameter, where the parameter is."""
        dense = {own: self._shadow.dense[name] for name, own in self._names.items()}
        return {name: dense.get(name, p.detach()).to(p.device) for name, p in self._parameters.items()}


def _named(name: str, weight: nn.Parameter, parameters: Mapping[str, nn.Parameter]) -> str:
    """What the model calls the `weight` that the shadow calls `name`."""
    for own, parameter in parameters.items():
        if parameter is weight:
            return own
    raise UsageError(f"{name} of the shadow is no parameter of this model", "Give both the same model.")


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
