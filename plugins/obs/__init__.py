"""Optimal brain surgeon, one-shot: what is pruned is made up for by what stays, by the inputs' second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.data.batches import Batches
from compressor.errors import UsageError
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.estimator import Estimator, Exact
from compressor.sparsity.layers import Layer
from compressor.sparsity.packed import PackedMasks
from compressor.sparsity.pattern import NM, Mask, Pattern, Unstructured, largest
from compressor.sparsity.venom import Venom
from compressor.training.calibration import (
    Falls,
    check_calibration,
    check_seen,
    from_matrix,
    matrix,
    observable,
    observe,
    visits,
)
from compressor.training.engine import chosen
from compressor.training.pruner import Pruner, found

_BLOCK = 128


@dataclass(frozen=True)
class OBS(Pruner):
    """Prunes column by column what adds least to each layer's output error, and updates the rest to make up for it.

    The Hessian of a layer is that of the squared error of its output, 2 Σ weight · x xᵀ over the denoising times. Layers are
    taken in packages whose Hessians fit into `memory_mb`; later ones see the inputs that pruned ones make. Masks are frozen.
    `damping` is added to the diagonal, as a share of its mean. `timesteps`: batches of the
    calibration, one per time. `last_weight`: what the last sampling step counts, the first counting 1. `falls`: how the weights
    between fall (`compressor.calibration.visits`).

    Sources: Frantar & Alistarh 2023, "SparseGPT" (update and masks); Zhu et al. 2025, "OBS-Diff", arXiv 2510.06751 (times).
    """

    pattern: Pattern = NM(2, 4)
    timesteps: int = 32
    last_weight: float = 0.1
    falls: Falls = "early"
    damping: float = 0.01
    memory_mb: int = 1024
    estimator: Estimator = Exact()
    chosen: Mapping[str, Mask] = found(dict)
    compared = True
    separable = True

    def __post_init__(self) -> None:
        check_calibration("obs", self.timesteps, self.last_weight, self.falls)
        if not 0 < self.damping < float("inf"):
            raise UsageError(f"obs: damping must be above 0, got {self.damping!r}")
        if self.memory_mb < 1:
            raise UsageError(f"obs: memory_mb must be at least 1, got {self.memory_mb}")

    @torch.no_grad()
    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        layers = [layer for layer in chosen(model, self, adapter) if observable(layer.module)]
        masks = PackedMasks()
        for package in packages(layers, self.memory_mb * 2**20):
            found: dict[str, Tensor] = {}

            def take(name: str, columns: Tensor, weight: float, found: dict[str, Tensor] = found) -> None:
                if name not in found:
                    found[name] = columns.new_zeros((columns.shape[1],) * 2, dtype=torch.float64)
                found[name].add_(columns.T @ columns, alpha=2 * weight)

            seen = visits(adapter, batches, self.timesteps, self.last_weight, self.falls)
            observe(model, adapter, seen, {layer.name: layer.module for layer in package}, take)
            for layer in package:
                if layer.name in found:
                    check_seen("obs", layer.name, found[layer.name].diagonal())
                    updated, masks[layer.name] = prune_layer(
                        layer.weight.detach(), found.pop(layer.name), self.pattern, self.damping
                    )
                    layer.weight.data.copy_(updated)
        return replace(self, chosen=masks)

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        if previous:
            return previous
        rest = {name: weight.abs() for name, weight in weights.items() if name not in self.chosen}
        found = {name: self.chosen[name] for name in weights if name in self.chosen}
        return {
            **{name: Mask(mask.keep.to(weights[name].device), mask.pattern) for name, mask in found.items()},
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

    `hessian`, in float64, is used up: its memory is worked in, since that of a wide layer is hundreds of megabytes.
    The survivors of a few columns are chosen when these come up, by w² / U_jj² on the weights as updated so far, U being the
    Cholesky factor of the inverse Hessian (`rule`). Columns whose inputs were always zero become zero, and have no part in the
    damping; where all of them were, nothing is known, and |w| chooses.
    Source: Frantar & Alistarh 2023, algorithm 1; the choice for unstructured patterns is not theirs (`rule`).
    """
    dead = hessian.diagonal() == 0
    if bool(dead.all()):
        mask = pattern.mask(weight.abs())
        return mask.apply(weight), mask
    flat = matrix(weight).double().masked_fill(dead, 0.0)
    _invert(hessian, dead, damping)
    factor = torch.linalg.cholesky(hessian, upper=True)
    del hessian
    spread = factor.diagonal().square()
    span, choose = rule(pattern, flat.square() / spread, weight.shape)
    keep = torch.zeros_like(flat, dtype=torch.bool)
    width = max(_BLOCK // span, 1) * span
    for start in range(0, flat.shape[1], width):
        end = min(start + width, flat.shape[1])
        block, errors = flat[:, start:end], torch.zeros_like(flat[:, start:end])
        for at in range(end - start):
            column = start + at
            if column % span == 0:
                ahead = slice(column, column + span)
                keep[:, ahead] = choose(column, flat[:, ahead].square() / spread[ahead])
            lost = block[:, at].masked_fill(keep[:, column], 0.0) / factor[column, column]
            block[:, at:] -= lost[:, None] * factor[column, column:end]
            errors[:, at] = lost
        flat[:, end:] -= errors @ factor[start:end, end:]
    mask = Mask(from_matrix(keep, weight.shape), pattern)
    return mask.apply(from_matrix(flat, weight.shape)).to(weight.dtype), mask


Choose = Callable[[int, Tensor], Tensor]


def rule(pattern: Pattern, first: Tensor, shape: torch.Size) -> tuple[int, Choose]:
    """(span, choose): `choose(column, score)` says what stays of the `span` columns from `column` on, given their scores now.

    `first` (out, columns) has the scores before any update, of a weight of `shape`. N:M, V:N:M and venom choose in each group as
    it comes up. With clustered rows, `first` says which rows share, once. Unstructured: `first` says how many stay of each column,
    and the scores now say which. SparseGPT keeps the same share of every 128 columns, although the columns that come first
    have more left to make up for them, and so can lose more; it left 1.5 to 3.5 times the error on inputs held out
    (plugins/obs/README.md). A pattern of another kind is chosen by `first` alone.
    """
    if isinstance(pattern, (NM, Venom)):
        return pattern.m, lambda column, score: pattern.mask(score).keep
    once = matrix(pattern.mask(from_matrix(first, shape)).keep)
    if isinstance(pattern, Clustered):
        rows = pattern.order(from_matrix(once, shape))
        back = rows.argsort()
        return pattern.m, lambda column, score: pattern.neighbours.mask(score[rows]).keep[back]
    if isinstance(pattern, Unstructured):
        counts = once.sum(0).tolist()
        return 1, lambda column, score: largest(score, counts[column])
    return 1, lambda column, score: once[:, column : column + 1]


def _invert(hessian: Tensor, dead: Tensor, damping: float) -> None:
    """Put the inverse of the damped Hessian into its place; more damping where numbers leave it indefinite.

    `dead` columns (bool) touch no other, so what stands on their diagonal only has to be invertible.
    """
    diagonal = hessian.diagonal().clone()
    mean = float(diagonal[~dead].mean())
    for power in range(6):
        added = torch.full_like(diagonal, mean * damping * 10**power).masked_fill(dead, mean)
        hessian.diagonal().copy_(diagonal + added)
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not int(failed):
            torch.cholesky_inverse(factor, out=hessian.mT)  # symmetric; in the order of memory that it is computed in
            return
    raise UsageError(
        "obs: the inputs' second moments cannot be inverted", "Check that the data are finite, or raise damping."
    )
