"""An ONNX file with matrix products in int8: made by ONNX Runtime, and held to the whole-number arithmetic that it asks for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.adapter import tensors_of
from compressor.errors import GateError
from compressor.export.graph import OnnxRunner, constants_in, silence

if TYPE_CHECKING:
    import onnx

LARGEST_INT8 = 64
"""Of an int8 weight, as a magnitude. CPUs without VNNI add two products with unsigned 8-bit activations in 16 bits, where
sums beyond 2^15 - 1 are cut off: 2 x 255 x 64 = 32,640 fits, 2 x 255 x 65 does not. Source: ONNX Runtime's guide to
quantization (`reduce_range`), and the kernels of its MLAS library for AVX2 and AVX-512 (`vpmaddubsw`)."""


def quantize(file: Path, digest: str) -> None:
    """Replace `file`, and what lies beside it, by its int8 form, which means the same on every CPU: no weight is beyond
    `LARGEST_INT8`. `digest` is that of the model's weights.

    Raises GateError where one is, or where a weight's zero is no zero there.
    """
    from onnx import load, save_model
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph, folder = load(file, load_external_data=False), file.parent
    apart = any(one.external_data for one in graph.graph.initializer)
    target = file.with_name("quantized")
    with silence():
        quantize_dynamic(
            file,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=apart,
        )
    made = load(target, load_external_data=False)
    _check_zeros(constants_in(graph, folder), constants_in(made, folder))
    data = target.with_name("quantized.data")
    for other in folder.iterdir():
        if other not in (target, data):
            other.unlink()
    if not apart:
        os.replace(target, file)
        return
    place = f"{file.stem}-int8-{digest[:12]}.data"
    for tensor in _tensors_apart(made):
        next(entry for entry in tensor.external_data if entry.key == "location").value = place
    os.replace(data, folder / place)
    target.unlink()
    save_model(made, file)


def _check_zeros(before: Mapping[str, Callable[[], Any]], after: Mapping[str, Callable[[], Any]]) -> None:
    """Raise GateError where a weight in int8 is beyond `LARGEST_INT8`, or has a value where it was zero."""
    for name in before:
        if f"{name}_quantized" not in after:
            continue
        weight = after[f"{name}_quantized"]()
        if (largest := int(abs(weight.astype("int16")).max(initial=0))) > LARGEST_INT8:
            raise GateError(
                f"{name}: int8 weights up to {largest}, more than {LARGEST_INT8}: on CPUs without VNNI sums of two products "
                "would be cut off",
                "Please report this model.",
            )
        if bool(((weight != after[f"{name}_zero_point"]()) & (before[name]() == 0)).any()):
            raise GateError(f"{name}: int8 gave its zeros a value", "Please report this model.")


def _tensors_apart(graph: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The constants of a graph that lie beside its file."""
    from onnx import AttributeProto

    inside = (a.t for n in graph.graph.node for a in n.attribute if a.type == AttributeProto.TENSOR)
    return (one for one in (*graph.graph.initializer, *inside) if one.external_data)


@dataclass(frozen=True, eq=False)
class IntegerProduct:
    """A product of an int8 graph: x (..., in) in float32, quantized as it comes, times weight (in, out).

    `x` and `out` are the names of its input and output, `weight` reads whole numbers less their zero points, and `scale`,
    one number or (out,), says what one of them is worth.
    """

    x: str
    out: str
    weight: Callable[[], Tensor]
    scale: Tensor

    def of(self, x: Tensor) -> Tensor:
        """The product for `x`, without rounding in its sums: whole numbers below 2^53 are exact in float64.

        Source: DynamicQuantizeLinear and MatMulInteger in https://onnx.ai/onnx/operators/
        """
        weight = self.weight().double()
        if not x.numel():
            return torch.zeros(*x.shape[:-1], weight.shape[-1])
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        step = (high - low) / 255 if high > low else torch.ones(())
        zero = (-low / step).round().clamp(0, 255)
        levels = ((x / step).round() + zero).clamp(0, 255) - zero
        sums = (levels.double() @ weight).float()
        return sums * (step * self.scale)


def integer_products(graph: onnx.ModelProto, folder: Path) -> list[IntegerProduct]:
    """Every product in whole numbers that `quantize` put into a graph, whose file is in `folder`. Raises GateError for one of another
    make."""
    constants = constants_in(graph, folder)

    def whole(weight: str, zero: str) -> Tensor:
        return torch.from_numpy(constants[weight]().astype("int32") - constants[zero]().astype("int32"))

    makers = {name: node for node in graph.graph.node for name in node.output}
    users = {name: node for node in graph.graph.node for name in node.input}
    found = []
    for node in graph.graph.node:
        if "Integer" not in node.op_type and not node.op_type.startswith("QLinear"):
            continue
        try:
            levels, weight, _, zero = node.input
            quantized, scaled = makers[levels], users[users[node.output[0]].output[0]]
            scales = makers[scaled.input[1]].input
            kinds = (node.op_type, quantized.op_type, scaled.op_type, scales[0])
            if kinds != ("MatMulInteger", "DynamicQuantizeLinear", "Mul", quantized.output[1]):
                raise KeyError(node.op_type)
            scale = torch.from_numpy(constants[scales[1]]().copy())
            if not {weight, zero} <= constants.keys():
                raise KeyError(weight)
        except (KeyError, ValueError) as error:
            raise GateError(f"{node.name}: {node.op_type} of another make", "Please report this model.") from error
        found.append(IntegerProduct(quantized.input[0], scaled.output[0], partial(whole, weight, zero), scale))
    return found


def integer_errors(file: Path, inputs: Any) -> dict[str, float]:
    """How far ONNX Runtime is, on this machine, from the whole-number arithmetic that an int8 file asks for.

    For each product the largest difference of any value from `IntegerProduct.of` the same input, in standard deviations of
    that product, by the name of its output. `inputs` are an adapter's.
    """
    from onnx import ValueInfoProto, load, save_model

    graph = load(file, load_external_data=False)
    products = integer_products(graph, file.parent)
    given = [one.name for one in graph.graph.input]
    known = {*given, *(one.name for one in graph.graph.output)}
    shown = {name for one in products for name in (one.x, one.out)} - known
    graph.graph.output.extend(ValueInfoProto(name=name) for name in sorted(shown))
    inside = file.with_name("inside.onnx")  # where weights beside the graph are found
    try:
        save_model(graph, inside)
        values = OnnxRunner(inside).outputs(inputs) | dict(zip(given, tensors_of(inputs), strict=True))
    finally:
        inside.unlink(missing_ok=True)
    found = {}
    for one in products:
        wanted = one.of(values[one.x])
        if wanted.numel():  # an expert that no token went to
            difference = (values[one.out] - wanted).abs() / (float(wanted.std(correction=0)) or 1.0)
            found[one.out] = float(difference.nan_to_num(nan=math.inf).max())
    return found
