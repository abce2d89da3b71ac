"""The latencies of compared models, all timed in turns in one process."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compressor.adapter import to_device
from compressor.engine import resolve_device
from compressor.errors import CompressorError
from compressor.inputs import Inputs
from compressor.lower import lower, lowering
from compressor.measure import latencies, latency_entry
from compressor.progress import Progress
from compressor.rows import one_shot
from compressor.timing import interleaved, median_ms

_ROUNDS = 21
_SEARCH = 6


def timed(
    found: Inputs, models: Mapping[str, nn.Module], lowered: bool
) -> Generator[Progress, None, dict[str, list[dict[str, Any]]]]:
    """The latency entries of `models` by name, the first of which is the dense one: eager, and lowered where asked for.

    Speed-ups are against the dense model of the same kind: eager against eager, lowered against lowered, which is dense at its best.
    """
    settings = found.recipe.evaluate
    device = resolve_device(found.recipe.train.device)
    on = {name: model.to(device).eval() for name, model in models.items()}
    if not settings.latency_rounds:
        return {name: [] for name in models}
    yield Progress("latency", 0, 1, "eager")
    eager = latencies(list(on.values()), found.adapter, settings.latency_batch, settings.latency_rounds)
    entries = {name: [entry] for name, entry in zip(on, eager, strict=True)}
    if lowered:
        example = to_device(found.adapter.example_inputs(settings.latency_batch), device)
        fast = {}
        for name, model in on.items():
            yield Progress(f"lower {name}", 0, 1)
            fast[name] = (yield from lowering(model, example, adapter=found.adapter)).model
        yield Progress("latency", 0, 1, "lowered")
        times = _in_turns(found, list(fast.values()), example, settings.latency_rounds, device)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        for name, seconds in zip(fast, times, strict=True):
            entry = latency_entry(
                "lowered", device, dtype, settings.latency_batch, seconds, "lowered", median_ms(times[0])
            )
            entries[name].append(entry)
    return entries


def macs_of_equal_latency(masked: Inputs, other: Inputs) -> float:
    """The share of multiply-accumulates at which `other`'s method, lowered, takes as long as `masked`'s, lowered."""
    device = resolve_device(masked.recipe.train.device)
    batch = masked.recipe.evaluate.latency_batch
    example = to_device(masked.adapter.example_inputs(batch), device)

    def fast(found: Inputs) -> nn.Module:
        return lower(one_shot(found).model.to(device), example, adapter=found.adapter).model

    goal = fast(masked)
    low, high = 0.05, 1.0
    for _ in range(_SEARCH):
        share = (low + high) / 2
        try:
            candidate = fast(replace(other, pruner=replace(other.pruner, macs=share)))  # type: ignore[type-var]
        except CompressorError:  # not reachable: too small
            low = share
            continue
        times = _in_turns(masked, [goal, candidate], example, _ROUNDS, device)
        low, high = (share, high) if median_ms(times[1]) < median_ms(times[0]) else (low, share)
    return round((low + high) / 2, 4)


@torch.no_grad()
def _in_turns(
    found: Inputs, models: list[nn.Module], example: Any, rounds: int, device: torch.device
) -> list[list[float]]:
    calls = [lambda model=model: found.adapter.predict(model, example) for model in models]
    return interleaved(calls, rounds, device)
