"""Cost: parameters, multiply-accumulates, bytes, latency. Every name carries its unit."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from compressor.adapter import Adapter, to_device
from compressor.weights import FILE_METADATA, plain_state


def layer_macs(model: nn.Module, adapter: Adapter) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of one forward pass of one sample: of the whole model, and by weight name.

    Attention products count in the total. A weight that is used twice counts twice.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, int] = {}

    def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
        weight = module.weight
        if not isinstance(weight, nn.Parameter):
            return
        # positions at which the whole weight is applied: tokens of a Linear, output pixels of a convolution
        positions = output.numel() // weight.shape[0]
        found[names[id(weight)]] = found.get(names[id(weight)], 0) + positions * weight.numel()

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, kinds)]
    # torch's counter knows every fused attention but the CPU's, and takes it for free
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return int(sdpa_flop(query, key, value))

    counter = FlopCounterMode(display=False, custom_mapping={fused: attention})
    try:
        with torch.no_grad(), counter:
            adapter.predict(model, to_device(adapter.example_inputs(1), next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return counter.get_total_flops() // 2, found


def costs(model: nn.Module, adapter: Adapter, pruned: Collection[str]) -> dict[str, Any]:
    """The cost fields of a report row; `pruned` names its masked weights.

    `macs_effective` leaves out multiplications by a zero of a masked weight.

    `macs_lowered` equals `macs_dense`: no kernel here skips zeros until the model is lowered.
    """
    total, by_weight = layer_macs(model, adapter)
    parameters = dict(model.named_parameters())
    nonzero = {name: int(torch.count_nonzero(value)) for name, value in parameters.items()}
    skipped = sum(by_weight.get(name, 0) * (1 - nonzero[name] / parameters[name].numel()) for name in pruned)
    masked = sum(parameters[name].numel() for name in pruned)
    return {
        "density": sum(nonzero[name] for name in pruned) / masked if masked else 1.0,
        "params": sum(value.numel() for value in parameters.values()),
        "nonzero_params": sum(nonzero.values()),
        "size_bytes": len(save(plain_state(model), metadata=FILE_METADATA)),
        "macs_dense": total,
        "macs_effective": round(total - skipped),
        "macs_lowered": total,
    }


@torch.no_grad()
def latencies(models: Sequence[nn.Module], adapter: Adapter, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """The latency entry of each model's row, the first being dense. Rounds are interleaved, in alternating order."""
    device = next(models[0].parameters()).device
    inputs = to_device(adapter.example_inputs(batch_size), device)
    times: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 3):
        order = list(range(len(models)))
        for index in order if turn % 2 else reversed(order):
            began = time.perf_counter()
            adapter.predict(models[index], inputs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 3:  # the first rounds warm up
                times[index].append(1000 * (time.perf_counter() - began))
    quartiles = [torch.tensor(t).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist() for t in times]
    return [
        {
            "backend": "eager",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "dtype": str(next(models[0].parameters()).dtype).removeprefix("torch."),
            "batch": batch_size,
            "median_ms": middle,
            "iqr_ms": high - low,
            "speedup_vs_dense": quartiles[0][1] / middle,
        }
        for low, middle, high in quartiles
    ]
