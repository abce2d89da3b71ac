"""The latencies of several models, all timed in turns in one process."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from compressor.adapter import Adapter, to_device
from compressor.cost.latency import latencies, latency, predictions
from compressor.environment import resolve_device
from compressor.lower import lowering
from compressor.lower.job import lively
from compressor.progress import Progress
from compressor.report.content import DENSE, LOWERED, Latency
from compressor.runs.inputs import Inputs
from compressor.runs.speed import relative_rms
from compressor.weights import in_float32


def timed(
    found: Inputs, models: Mapping[str, nn.Module], lowered: bool, max_error: float | None = None
) -> Generator[Progress, None, dict[str, list[Latency]]]:
    """The latency entries of `models` by name, one of which is `dense`: eager, and lowered where asked for.

    Speed-ups are against the dense model of the same kind: eager against eager, lowered against lowered, which is dense at its best.
    `max_error` is that of `compressor.lower`: with it, each lowered form has its error.
    """
    settings = found.recipe.evaluate
    if not settings.latency_rounds:
        return {name: [] for name in models}
    device = resolve_device(found.recipe.train.device)
    on = {name: in_float32(model).to(device).eval() for name, model in models.items()}
    yield Progress("latency", 0, 1, "eager")
    eager = latencies(on, found.adapter, settings.latency_batch, settings.latency_rounds)
    entries = {name: [entry] for name, entry in eager.items()}
    if lowered:
        example = to_device(found.adapter.example_inputs(settings.latency_batch), device)
        fast, errors = {}, {}
        for name, model in on.items():
            yield Progress(f"lower {name}", 0, 1)
            fast[name] = (yield from lowering(model, example, adapter=found.adapter, max_error=max_error)).model
            if max_error is not None:
                errors[name] = _error(found.adapter, fast[name], model, example)
        yield Progress("latency", 0, 1, "lowered")
        times = predictions(fast, found.adapter, example, settings.latency_rounds, device)
        dtype = eager[DENSE].dtype
        for name, own in times.items():
            entry = latency(LOWERED, device, dtype, settings.latency_batch, own, LOWERED, times[DENSE])
            entries[name].append(entry.model_copy(update={"error": errors.get(name)}))
    return entries


@torch.no_grad()
def _error(adapter: Adapter, form: nn.Module, model: nn.Module, example: Any) -> float:
    inputs = lively(example, partial(adapter.predict, model))
    return relative_rms(adapter.predict(form, inputs), adapter.predict(model, inputs).double().cpu())
