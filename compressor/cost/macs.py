"""Cost: parameters, multiply-accumulates, bytes, latency. Every name carries its unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from compressor.adapter import Adapter, to_device
from compressor.foreign.kept import undone
from compressor.report.content import Costs
from compressor.saving import packing
from compressor.saving.plain import file_bytes, plain_state
from compressor.sparsity.layers import Layer, weighted
from compressor.weights import in_float32


def layer_macs(model: nn.Module, adapter: Adapter) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates of one forward pass of one sample: of the whole model, and by weight name.

    Attention products count in the total. A weight that is used twice counts twice.
    """
    by_weight: dict[str, int] = {}
    model = in_float32(model)

    def counter_of(layer: Layer) -> Callable[[nn.Module, Any, Any], None]:
        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            answer: Tensor = output[0] if isinstance(output, tuple) else output
            # positions at which the whole weight is applied: tokens of a Linear, output pixels of a convolution
            positions = answer.numel() // layer.weight.shape[0]
            by_weight[layer.name] = by_weight.get(layer.name, 0) + positions * layer.weight.numel()

        return count

    # torch's attention module does not call its last layer, but multiplies with its weight
    callers = {id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    layers = [layer for layer in weighted(model) if isinstance(layer.weight, nn.Parameter)]
    handles = [callers.get(id(layer.module), layer.module).register_forward_hook(counter_of(layer)) for layer in layers]
    counter = FlopCounterMode(display=False, custom_mapping=_UNKNOWN)
    fast = torch.backends.mha.get_fastpath_enabled()
    # of torch's transformer layers, which the counter takes for free too
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), undone(model), counter:
            adapter.predict(model, to_device(adapter.example_inputs(1), next(model.parameters()).device))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
    return counter.get_total_flops() // 2, by_weight


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop(query, key, value))


def _trilinear(first: Any, second: Any, weight: Any, *new: Sequence[int], out_shape: Any = None, **kwargs: Any) -> int:
    shapes = []
    for shape, places in zip((first, second, weight), new, strict=False):
        wider = list(shape)
        for place in sorted(places):
            wider.insert(place, 1)
        shapes.append(wider)
    return 2 * int(math.prod(map(max, zip(*shapes, strict=True))))


def _layer_of_lstm(given: Any, of_input: Any, of_state: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(math.prod(given[:2]) * (math.prod(of_input) + math.prod(of_state)))


def _recurrent(given: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(math.prod(given[:2]) * sum(math.prod(shape) for shape in weights if len(shape) == 2))


def _product(first: Any, second: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(math.prod(first) * math.prod(second[1:]))


def _added(_: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _product(*args)


def _added_batches(_: Any, first: Any, second: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(math.prod(first) * second[-1])


_UNKNOWN: Any = {
    torch.ops.aten.mv: _product,
    torch.ops.aten.dot: _product,
    torch.ops.aten.vdot: _product,
    torch.ops.aten._int_mm: _product,
    torch.ops.aten.addmv: _added,
    torch.ops.aten.addbmm: _added_batches,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._trilinear: _trilinear,
    torch.ops.aten.mkldnn_rnn_layer: _layer_of_lstm,
    torch.ops.aten._cudnn_rnn: _recurrent,
}
"""Products that torch's counter would take for free: with vectors, of whole numbers, summed over a batch; the CPU's fused attention,
nn.Bilinear, recurrent layers in one kernel. From the shapes of their arguments, two operations for each multiply-accumulate."""


def costs(model: nn.Module, adapter: Adapter, pruned: Mapping[str, str]) -> Costs:
    """The cost fields of a report row; `pruned` holds the pattern of each masked weight by its name.

    `size_bytes` is that of the weights' file as `compressor.save` writes it, packed, in `model`'s dtypes. `macs_effective`
    leaves out multiplications by a zero of a masked weight.

    `macs_lowered` equals `macs_dense`: no kernel here skips zeros until the model is lowered.
    """
    total, by_weight = layer_macs(model, adapter)
    parameters = dict(model.named_parameters())
    nonzero = {name: int(torch.count_nonzero(value)) for name, value in parameters.items()}
    skipped = sum(by_weight.get(name, 0) * (1 - nonzero[name] / parameters[name].numel()) for name in pruned)
    masked = sum(parameters[name].numel() for name in pruned)
    tensors, _ = packing.packed_state(plain_state(model), pruned, "meta")
    return Costs(
        density=sum(nonzero[name] for name in pruned) / masked if masked else 1.0,
        params=sum(value.numel() for value in parameters.values()),
        nonzero_params=sum(nonzero.values()),
        size_bytes=file_bytes(tensors),
        macs_dense=total,
        macs_effective=round(total - skipped),
        macs_lowered=total,
    )


def lowered_macs(model: nn.Module, adapter: Adapter, skipped: Mapping[str, float]) -> int:
    """Multiply-accumulates of one sample without those that kernels leave out; `skipped` has the density that is left of
    each weight whose zeros they skip."""
    total, by_weight = layer_macs(model, adapter)
    return round(total - sum(by_weight.get(name, 0) * (1 - density) for name, density in skipped.items()))
