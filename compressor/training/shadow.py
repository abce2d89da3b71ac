"""The Shadow: masked training on optimizer step hooks.

The model always holds its true sparse weights; the dense weights live here, as fp32 masters do in mixed precision.
Before an optimizer step every gradient is replaced by the estimator's and the dense weight put back; after it the new
dense weight is stored, the pruner asked for masks, and the sparse weight written. So layers stay plain `nn.Linear` and
`nn.Conv2d`: dense checkpoints load, torch.compile compiles once, export sees no extra operations, and masks are
computed once per optimizer step, not once per forward. The price is one dense copy and one bool mask in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.errors import CompressorError
from compressor.sparsity.notation import parse
from compressor.sparsity.pattern import Mask
from compressor.training.pruner import Pruner
from compressor.training.rounding import rounded
from compressor.training.shards import count_like, cut_like, local, part_of, part_of_count, refuse_unlocal


class Shadow:
    """The dense weights behind `weights` (target parameters by name), which it keeps masked while `optimizer` steps.

    Of weights that FSDP2 has cut, it holds and masks the rows of this process. `previous` are the masks to start from, if any.
    `progress`, the share of the steps that is done after the next one, is the caller's to set before each step.
    `flips` counts, per weight name, the entries whose mask changed in the last step; `flipped` since the start.
    Raises CompressorError at an optimizer step with a closure, or with gradients that a scaler has not unscaled; UsageError where
    a mask of a weight that is cut needs the rows of other processes.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        pruner: Pruner,
        optimizer: Optimizer,
        progress: float = 0.0,
        previous: Mapping[str, Mask] | None = None,
    ) -> None:
        refuse_unlocal(pruner.pattern, weights)
        self.pruner = pruner
        self.progress = progress
        self.dense: dict[str, Tensor] = {name: local(weight.detach()).clone() for name, weight in weights.items()}
        self.masks: dict[str, Mask] = dict(previous or {})
        self.flips: dict[str, Tensor] = {}
        self._weights = dict(weights)
        trained = _learning_rates(optimizer)
        if missing := [name for name, weight in weights.items() if id(weight) not in trained]:
            raise CompressorError(
                f"{missing[0]} is pruned but not trained by the optimizer", "Give it all the targets."
            )
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )
        self._renew_masks()
        self.flipped: dict[str, Tensor] = {name: torch.zeros_like(count) for name, count in self.flips.items()}

    def close(self) -> None:
        """Take the hooks off the optimizer; the model keeps its sparse weights."""
        for handle in self._handles:
            handle.remove()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, as nested dicts of tensors."""
        own = self._weights
        masks = {n: {"keep": cut_like(m.keep, own[n]), "pattern": str(m.pattern)} for n, m in self.masks.items()}
        return {
            "dense": {name: cut_like(dense, own[name]) for name, dense in self.dense.items()},
            "masks": masks,
            "flipped": {name: count_like(count, own[name]) for name, count in self.flipped.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave, on any device, and write the sparse weights.

        Raises CompressorError where its masks are not of these weights.
        """
        own = self._weights
        for name, weight in own.items():
            self.dense[name].copy_(part_of(state["dense"][name], weight))
            local(weight.data).copy_(self.dense[name])
        device = {name: weight.device for name, weight in self.dense.items()}
        masks = {
            name: Mask(
                (part_of(mask["keep"], own[name]) if name in own else mask["keep"]).to(device.get(name, "cpu")),
                parse(mask["pattern"]),
            )
            for name, mask in state["masks"].items()
        }
        self.masks = checked_masks(masks, self.dense)
        self.flipped = {n: part_of_count(count.to(device[n]), own[n]) for n, count in state["flipped"].items()}
        self._make_sparse()

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in args[1:]) or kwargs.get("closure") is not None:
            raise CompressorError(
                "optimizers that call a closure cannot train masked weights",
                "A closure sees the dense weights; use AdamW, SGD or another optimizer without one.",
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise CompressorError("the gradients are still scaled", "Call scaler.unscale_(optimizer) before the step.")
        estimator = self.pruner.estimator
        for name, weight in self._weights.items():
            mask = self.masks.get(name)
            if mask is not None and weight.grad is not None:
                weight.grad = cut_like(estimator.gradient(local(weight.grad), self.dense[name], mask), weight)
            local(weight.data).copy_(self.dense[name])

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        estimator, lr = self.pruner.estimator, _learning_rates(optimizer)
        for name, weight in self._weights.items():
            mask, dense = self.masks.get(name), local(weight.detach())
            if mask is not None and weight.grad is not None:
                shrunk = estimator.shrink(dense, mask, lr[id(weight)])
                if shrunk is not dense:
                    local(weight.data).copy_(shrunk)
            self.dense[name].copy_(local(weight.data))
        self._renew_masks()
        for name, count in self.flips.items():
            self.flipped[name] += count

    @torch.no_grad()
    def _renew_masks(self) -> None:
        masks = checked_masks(self.pruner.masks(self.dense, self.progress, dict(self.masks)), self.dense)
        for name, dense in self.dense.items():
            old, new = self.masks.get(name), masks.get(name)
            if old is None or new is None or old is new:
                self.flips[name] = torch.zeros((), dtype=torch.int64, device=dense.device)
            else:
                self.flips[name] = (old.keep ^ new.keep).count_nonzero()
        self.masks = masks
        self._make_sparse()

    @torch.no_grad()
    def _make_sparse(self) -> None:
        """Mask the model's weights, which hold the dense values, in place, and round them where the method quantises.

        Rounding has no gradient of its own: the estimator gets that of the rounded weight as it is (straight-through).
        """
        for name, mask in self.masks.items():
            data = local(self._weights[name].data).masked_fill_(~mask.keep, 0.0)
            if self.pruner.quantise != "none":
                data.copy_(rounded(data, self.pruner))


def _learning_rates(optimizer: Optimizer) -> dict[int, float]:
    """By the id of each trained parameter. Loading a state replaces the optimizer's groups, so they are not kept."""
    return {id(weight): float(group["lr"]) for group in optimizer.param_groups for weight in group["params"]}


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


def verify(masks: Mapping[str, Mask]) -> None:
    """Raise CompressorError, with the name of the weight, where a mask breaks its pattern."""
    for name, mask in masks.items():
        try:
            mask.verify()
        except CompressorError as error:
            raise CompressorError(f"{name}: {error.message}", error.hint) from error
