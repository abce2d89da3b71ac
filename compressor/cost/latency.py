"""Latency: models timed side by side, as entries of a report's row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compressor.adapter import Adapter, to_device
from compressor.cost.timing import interleaved, iqr_ms, median_ms


@torch.no_grad()
def latencies(models: Sequence[nn.Module], adapter: Adapter, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """The latency entry of each model's row, the first being dense. Rounds are interleaved, in alternating order."""
    device = next(models[0].parameters()).device
    inputs = to_device(adapter.example_inputs(batch_size), device)
    dtype = str(next(models[0].parameters()).dtype).removeprefix("torch.")
    times = interleaved([lambda m=m: adapter.predict(m, inputs) for m in models], rounds, device)  # type: ignore[misc]
    dense = median_ms(times[0])
    return [latency_entry("eager", device, dtype, batch_size, seconds, "eager", dense) for seconds in times]


def latency_entry(
    backend: str, device: torch.device, dtype: str, batch: int, seconds: Sequence[float], against: str, dense_ms: float
) -> dict[str, Any]:
    """One entry of a row's `latency`: the median of `seconds`, compared with that of the dense form `against`."""
    return {
        "backend": backend,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": dtype,
        "batch": batch,
        "median_ms": median_ms(seconds),
        "iqr_ms": iqr_ms(seconds),
        "against": against,
        "speedup_vs_dense": dense_ms / median_ms(seconds),
    }
