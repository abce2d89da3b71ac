"""What a pattern would do to a model, without weights and without running anything on real data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressor import registry
from compressor.cost.macs import layer_macs
from compressor.sparsity.layers import select, survey, weighted
from compressor.sparsity.notation import parse
from compressor.weights import bare


def inspect_model(
    name: str, weights: str | None, pattern: str, targets: Sequence[str] | None, ignore: Sequence[str] | None
) -> dict[str, Any]:
    """Every layer of the registered model `name` with shape, share of the MACs, and the reason where it stays dense.

    `weights` is loaded, and so checked, where given; else the model has no memory of its own. MACs are per sample, None where they
    are counted in the total alone. The model itself is under `module`.
    """
    adapter, rule = registry.adapter(name).opened(weights), parse(pattern)
    if weights is not None:
        model = bare(adapter.load(weights))
    else:
        with torch.device("meta"):
            model = adapter.build()
    total, by_weight = layer_macs(model, adapter)
    layers = select(
        model,
        rule,
        {layer.name for layer in survey(model, rule)},
        adapter.targets if targets is None else targets,
        adapter.ignore if ignore is None else ignore,
    )
    counted = (
        dict.fromkeys((one.name for one in weighted(model) if isinstance(one.weight, nn.Parameter)), 0) | by_weight
    )
    skipped = sum(by_weight.get(layer.name, 0) * (1 - rule.density) for layer in layers if layer.reason is None)
    return {
        "module": model,
        "model": name,
        "pattern": str(rule),
        "params": sum(p.numel() for p in model.parameters()),
        "macs_dense": total,
        "macs_effective": round(total - skipped),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.weight.shape),
                "macs": (macs := counted.get(layer.name)),
                "macs_share": None if macs is None else macs / total,
                "reason": layer.reason,
            }
            for layer in layers
        ],
    }
