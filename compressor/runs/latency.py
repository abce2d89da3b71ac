"""The latencies of several models, all timed in turns in one process."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import nn

from compressor.adapter import to_device
from compressor.cost.latency import latencies, latency_entry
from compressor.cost.timing import interleaved, median_ms
from compressor.environment import resolve_device
from compressor.lower import lowering
from compressor.progress import Progress
from compressor.runs.inputs import Inputs


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
        times = in_turns(found, list(fast.values()), example, settings.latency_rounds, device)
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        for name, seconds in zip(fast, times, strict=True):
            entry = latency_entry(
                "lowered", device, dtype, settings.latency_batch, seconds, "lowered", median_ms(times[0])
            )
            entries[name].append(entry)
    return entries


@torch.no_grad()
def in_turns(
    found: Inputs, models: list[nn.Module], example: Any, rounds: int, device: torch.device
) -> list[list[float]]:
    calls = [lambda model=model: found.adapter.predict(model, example) for model in models]
    return interleaved(calls, rounds, device)
