"""The latencies of compared models, all timed in turns in one process."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from compressor.adapter import to_device
from compressor.cost.latency import predictions
from compressor.environment import resolve_device
from compressor.errors import CompressorError
from compressor.lower import lower
from compressor.runs.inputs import Inputs
from compressor.weights import in_float32

_ROUNDS = 21
_SEARCH = 6


def macs_of_equal_latency(masked: Inputs, other: Inputs) -> float:
    """The share of multiply-accumulates at which `other`'s method, lowered, takes as long as `masked`'s, lowered."""
    device = resolve_device(masked.recipe.train.device)
    batch = masked.recipe.evaluate.latency_batch
    example = to_device(masked.adapter.example_inputs(batch), device)

    def fast(found: Inputs) -> nn.Module:
        return lower(in_float32(found.one_shot().model).to(device), example, adapter=found.adapter).model

    goal = fast(masked)
    low, high = 0.05, 1.0
    for _ in range(_SEARCH):
        share = (low + high) / 2
        try:
            pruner = other.pruner.with_cost(share)
            if pruner is None:
                raise TypeError(f"{other.method} cannot be told what to cost")
            candidate = fast(replace(other, pruner=pruner))
        except CompressorError:  # not reachable: too small
            low = share
            continue
        times = predictions({"goal": goal, "candidate": candidate}, masked.adapter, example, _ROUNDS, device)
        low, high = (share, high) if times["candidate"].median_ms < times["goal"].median_ms else (low, share)
    return round((low + high) / 2, 4)
