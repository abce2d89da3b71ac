"""Recovery by adapters: a sparse weight stays as it is, and what is trained is a product of two thin matrices under its mask.

The layer computes with W + s (B A) ∘ mask, where A is (rank, in x kernel), B (out, rank) and s = alpha / rank. As with the
Shadow, the model always holds the true weights, so that layers stay plain: after each optimizer step the sum is written into
them. With G the gradient of that sum, A receives s Bᵀ (G ∘ mask) and B receives s (G ∘ mask) Aᵀ, which is what backward through
the product would give. So merging is nothing but the end, and every zero is kept.

Source: Hu et al. 2022, "LoRA", section 4 (B starts at zero); the mask on the product is ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from compressor.errors import UsageError
from compressor.seeds import generator
from compressor.sparsity.notation import parse
from compressor.sparsity.pattern import Mask
from compressor.training.answers import copied_
from compressor.training.settings import Lora


def refuse_unmasked(masked: Collection[str]) -> None:
    """Raise UsageError where no weight is masked: there is none to recover."""
    if not masked:
        raise UsageError(
            "train.mode lora: the method masks no weight, so that there is none to recover",
            "Choose a method with a pattern, or train.mode=full.",
        )


class Adapters:
    """The matrices behind `weights` (parameters by name, already masked by `masks`), which `attach` trains with an optimizer.

    `dense` has the weights with their products, which are as sparse as they were. It has what a Shadow has, so that a run is
    the same with either. Raises UsageError where nothing is masked.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Mask], settings: Lora, seed: int
    ) -> None:
        refuse_unmasked(masks)
        self.masks = dict(masks)
        self.progress = 0.0
        self.flips = {name: torch.zeros((), dtype=torch.int64, device=w.device) for name, w in weights.items()}
        self.flipped = {name: count.clone() for name, count in self.flips.items()}
        self.dense = {name: weight.detach().clone() for name, weight in weights.items()}
        self.scale = settings.scale
        self._weights = {name: weights[name] for name in masks}
        self._start = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.matrices: dict[str, nn.Parameter] = {}
        for name, weight in self._weights.items():
            rows, columns = weight.detach().flatten(1).shape
            rank = min(settings.rank, rows, columns)
            drawn = torch.randn(rank, columns, generator=generator(seed, "lora", name)) / math.sqrt(columns)
            self.matrices[f"{name}.A"] = nn.Parameter(drawn.to(weight))
            self.matrices[f"{name}.B"] = nn.Parameter(weight.new_zeros(rows, rank))
        self._handles: tuple[Any, ...] = ()

    def attach(self, optimizer: Optimizer) -> None:
        """Train with `optimizer`, whose parameters are `matrices`."""
        self._handles = (optimizer.register_step_post_hook(self._after_step),)

    def close(self) -> None:
        """Take the hook off the optimizer; the model keeps the merged weights."""
        for handle in self._handles:
            handle.remove()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        masks = {name: {"keep": mask.keep, "pattern": str(mask.pattern)} for name, mask in self.masks.items()}
        matrices = {name: value.detach() for name, value in self.matrices.items()}
        return {"matrices": matrices, "start": dict(self._start), "masks": masks}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Take what `state` gave, on any device, and write the merged weights."""
        for name, value in self.matrices.items():
            copied_(value, state["matrices"][name], name)
        for name, start in self._start.items():
            copied_(start, state["start"][name], name)
            mask = state["masks"][name]
            self.masks[name] = Mask(mask["keep"].to(start.device, copy=True), parse(mask["pattern"]))
        self._write()

    @torch.no_grad()
    def take_gradients(self) -> list[nn.Parameter]:
        """Give the matrices their gradients, from those of the weights; what is trained. To be called before each step."""
        for name, weight in self._weights.items():
            first, second = self.matrices[f"{name}.A"], self.matrices[f"{name}.B"]
            first.grad = second.grad = None  # those of the step before, where this one did not come to the weight
            if weight.grad is not None:
                masked = (self.scale * weight.grad * self.masks[name].keep).flatten(1)
                first.grad, second.grad = second.T @ masked, masked @ first.T
        return list(self.matrices.values())

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._write()

    def _write(self) -> None:
        for name, weight in self._weights.items():
            product: Tensor = self.scale * self.matrices[f"{name}.B"] @ self.matrices[f"{name}.A"]
            weight.data.copy_(self._start[name] + product.view_as(weight) * self.masks[name].keep)
            self.dense[name].copy_(weight.data)
