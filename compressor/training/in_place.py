"""One-shot pruning of a model itself, for models of which no second copy fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compressor.adapter import Adapter, with_rules
from compressor.data.batches import as_batches
from compressor.discovery import no_exit
from compressor.errors import UsageError
from compressor.processes import refuse_ranks
from compressor.seeds import repeatable
from compressor.sparsity.packed import PackedMasks
from compressor.training.answers import masks_of, prepared, verify
from compressor.training.arithmetic import in_own_precision
from compressor.training.engine import LEFT_DENSE, Result, choose_layers, chosen
from compressor.training.given import refuse_untrainable, unfrozen
from compressor.training.pruner import Pruner, refuse_misplaced, warn_of_idle
from compressor.training.rounding import check_quantise, sparse
from compressor.training.settings import Training
from compressor.validation import validated
from compressor.weights import bare, check_finite


@no_exit()
@in_own_precision()
@torch.no_grad()
def prune_(
    model: nn.Module,
    pruner: Pruner,
    *,
    adapter: Adapter,
    data: Any,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    **training: Any,
) -> Result:
    """Prune the module `model` itself: `compressor.prune_` (`compressor.runs.placed`), which also takes pipelines, says the rest."""
    refuse_ranks("pruning")
    settings = validated(Training, {**training, "steps": 0}, "prune_()")
    refuse_misplaced(model, pruner, adapter)
    model = bare(model).eval()
    refuse_untrainable(model, 0)
    warn_of_idle(model, ignore)
    rules = with_rules(adapter, targets, ignore)
    check_finite(model.state_dict(), type(model).__name__)
    frozen = [value for value in model.parameters() if not value.requires_grad]
    try:
        unfrozen(model)
        layers = chosen(model, pruner, rules)  # raises before anything is changed
        check_quantise(pruner, {layer.name: layer.weight.dtype for layer in layers})
        with repeatable(settings.seed, "prepare"):
            pruner = prepared(pruner, model, rules, as_batches(data, settings.batch_size, settings.seed))
        if pruner.surgery is not None:
            raise UsageError(
                f"prune_: {type(pruner).__name__} removes structure", "Use compressor.prune, which works on a copy."
            )
        masks = PackedMasks()
        layers = chosen(model, pruner, rules)
        for group in [[layer] for layer in layers] if pruner.separable else [layers]:
            weights = {layer.name: layer.weight.detach() for layer in group}
            dense = {name: weight.float() for name, weight in weights.items()}
            with repeatable(settings.seed, "masks", gpus=True):
                found = masks_of(pruner, dense, 1.0, {})
            for name, mask in found.items():
                verify({name: mask}, pruner.pattern)
                weights[name].copy_(sparse(weights[name], mask, pruner))
                masks[name] = mask
        every = [
            replace(layer, reason=LEFT_DENSE) if layer.reason is None and layer.name not in masks else layer
            for layer in choose_layers(model, pruner, rules)
        ]
    finally:
        for value in frozen:
            value.requires_grad_(False)
    return Result(model, masks, every, (), dict.fromkeys(masks, 0.0), None)
