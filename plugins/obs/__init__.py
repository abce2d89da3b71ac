"""Optimal brain surgeon, one-shot: what is pruned is made up for by what stays, by the inputs' second moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.data.batches import Batches
from compressor.errors import UsageError
from compressor.sparsity.estimator import Estimator, Exact
from compressor.sparsity.layers import Layer
from compressor.sparsity.pattern import NM, Mask, Pattern
from compressor.training.calibration import from_matrix, matrix, observable, observe, visits
from compressor.training.engine import choose_layers
from compressor.training.pruner import Pruner, found

from ..wanda import check_calibration

_BLOCK = 128


@dataclass(frozen=True)
class OBS(Pruner):
    """Prunes column by column what adds least to each layer's output error, and updates the rest to make up for it.

    The Hessian of a layer is that of the squared error of its output, 2 Σ weight · x xᵀ over the denoising times. Layers are
    taken in packages whose Hessians fit into `memory_mb`; later ones see the inputs that pruned ones make. Masks are frozen.
    `damping` is added to the diagonal, as a share of its mean. `timesteps` and `last_weight`: as for `wanda`.

    Sources: Frantar & Alistarh 2023, "SparseGPT" (update and masks); Zhu et al. 2025, "OBS-Diff", arXiv 2510.06751 (times).
    """

    pattern: Pattern = NM(2, 4)
    timesteps: int = 32
    last_weight: float = 0.1
    damping: float = 0.01
    memory_mb: int = 1024
    estimator: Estimator = Exact()
    chosen: Mapping[str, Mask] = found(dict)
    compared = True

    def __post_init__(self) -> None:
        check_calibration("obs", self.timesteps, self.last_weight)
        if not 0 < self.damping < float("inf"):
            raise UsageError(f"obs: damping must be above 0, got {self.damping!r}")
        if self.memory_mb < 1:
            raise UsageError(f"obs: memory_mb must be at least 1, got {self.memory_mb}")

    @torch.no_grad()
    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        layers = [layer for layer in choose_layers(model, self, adapter, None, None) if layer.reason is None]
        chosen: dict[str, Mask] = {}
        for package in packages([layer for layer in layers if observable(layer.module)], self.memory_mb * 2**20):
            found: dict[str, Tensor] = {}

            def take(name: str, columns: Tensor, weight: float, found: dict[str, Tensor] = found) -> None:
                product = (columns.T @ columns).double().mul_(2 * weight)
                found[name] = found[name].add_(product) if name in found else product

            seen = visits(adapter, batches, self.timesteps, self.last_weight)
            observe(model, adapter, seen, {layer.name: layer.module for layer in package}, take)
            for layer in package:
                if layer.name in found:
                    updated, chosen[layer.name] = prune_layer(
                        layer.weight.detach(), found.pop(layer.name), self.pattern, self.damping
                    )
                    layer.weight.data.copy_(updated)
        return replace(self, chosen=chosen)

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        if previous:
            return previous
        rest = {name: weight.abs() for name, weight in weights.items() if name not in self.chosen}
        return {
            **{n: Mask(m.keep.to(weights[n].device), m.pattern) for n, m in self.chosen.items()},
            **self.pattern.masks(rest),
        }


def packages(layers: list[Layer], limit: int) -> Iterator[list[Layer]]:
    """`layers` in order, in pieces whose Hessians take at most `limit` bytes; a larger one is a piece of its own."""
    piece: list[Layer] = []
    taken = 0
    for layer in layers:
        size = 8 * layer.weight[0].numel() ** 2
        if piece and taken + size > limit:
            yield piece
            piece, taken = [], 0
        piece.append(layer)
        taken += size
    if piece:
        yield piece


def prune_layer(weight: Tensor, hessian: Tensor, pattern: Pattern, damping: float) -> tuple[Tensor, Mask]:
    """(the updated weight, its mask) for `weight` (out, in, *kernel) and the Hessian (columns, columns) of its inputs.

    For N:M and V:N:M, each group's survivors are chosen when its columns come up, by w² / U_jj² on the weights as updated
    so far, U being the Cholesky factor of the inverse Hessian; for other patterns all at once, by w² H_jj, which left less
    error than w² / [H⁻¹]_jj where many go together.
    Source: Frantar & Alistarh 2023, algorithm 1.
    """
    flat = matrix(weight).double().clone()
    inverse = _inverse(hessian, damping)
    factor = torch.linalg.cholesky(inverse, upper=True)
    spread = factor.diagonal().square()
    group = pattern if isinstance(pattern, NM) else None
    if group is not None:
        keep = torch.zeros_like(flat, dtype=torch.bool)
    else:
        score = from_matrix(flat.square() * hessian.diagonal(), weight.shape)
        keep = matrix(pattern.mask(score).keep).contiguous()
    width = max(_BLOCK // group.m, 1) * group.m if group is not None else _BLOCK
    for start in range(0, flat.shape[1], width):
        end = min(start + width, flat.shape[1])
        block, errors = flat[:, start:end], torch.zeros_like(flat[:, start:end])
        for at in range(end - start):
            column = start + at
            if group is not None and column % group.m == 0:
                ahead = slice(column, column + group.m)
                keep[:, ahead] = group.mask(flat[:, ahead].square() / spread[ahead]).keep
            lost = block[:, at].masked_fill(keep[:, column], 0.0) / factor[column, column]
            block[:, at:] -= lost[:, None] * factor[column, column:end]
            errors[:, at] = lost
        flat[:, end:] -= errors @ factor[start:end, end:]
    mask = Mask(from_matrix(keep, weight.shape), pattern)
    return mask.apply(from_matrix(flat, weight.shape)).to(weight.dtype), mask


def _inverse(hessian: Tensor, damping: float) -> Tensor:
    """The inverse of the damped Hessian; more damping where numbers leave it indefinite."""
    mean = float(hessian.diagonal().mean()) or 1.0
    for power in range(6):
        damped = hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (
            mean * damping * 10**power
        )
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_inverse(factor)
    raise UsageError(
        "obs: the inputs' second moments cannot be inverted", "Check that the data are finite, or raise damping."
    )
