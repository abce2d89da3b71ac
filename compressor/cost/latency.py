"""Latency: models timed side by side, as entries of a report's row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compressor.adapter import Adapter, check_examples, to_device
from compressor.cost.timing import Times, ratio_interval, side_by_side
from compressor.report.content import DENSE, EAGER, Latency
from compressor.weights import in_float32


@torch.no_grad()
def predictions(
    models: Mapping[str, nn.Module], adapter: Adapter, example: Any, rounds: int, device: torch.device
) -> dict[str, Times]:
    """The times of one prediction of each of `models` on the inputs `example`, by name. Models take turns."""
    return side_by_side({name: lambda m=m: adapter.predict(m, example) for name, m in models.items()}, rounds, device)  # type: ignore[misc]


def latencies(models: Mapping[str, nn.Module], adapter: Adapter, batch_size: int, rounds: int) -> dict[str, Latency]:
    """The latency of each model as it is, in float32, by the name of its row. The speed-ups are over the model called `dense`,
    or over the first where none is: a model that was trained from random weights has no dense one beside it."""
    models = {name: in_float32(model) for name, model in models.items()}
    against = DENSE if DENSE in models else next(iter(models))
    first = next(models[against].parameters())
    example = to_device(adapter.example_inputs(batch_size), first.device)
    dtype = str(first.dtype).removeprefix("torch.")
    with torch.no_grad():
        check_examples(adapter, adapter.predict(models[against], example), batch_size)
    times = predictions(models, adapter, example, rounds, first.device)
    return {
        name: latency(EAGER, first.device, dtype, batch_size, own, EAGER, times[against]) for name, own in times.items()
    }


def latency(
    backend: str, device: torch.device, dtype: str, batch: int, times: Times, against: str, dense: Times
) -> Latency:
    """One entry of a row's `latency`: its `times`, compared with those of the dense form `against`."""
    speedup = dense.median_ms / times.median_ms
    interval = ratio_interval(dense, times) if dense is not times else None
    entry = Latency(
        backend=backend,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=dtype,
        batch=batch,
        median_ms=times.median_ms,
        iqr_ms=times.iqr_ms,
        against=against,
        speedup_vs_dense=speedup,
    )
    if interval is None:
        return entry
    # that of the median of ratios: the ratio of medians may lie beside it where rounds were unsteady
    return entry.model_copy(update={"speedup_ci95": (min(interval[0], speedup), max(interval[1], speedup))})
