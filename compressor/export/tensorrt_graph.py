"""An ONNX graph as TensorRT finds 2:4 weights in it: constants right at their products, named as their layers, in 16 or 8 bits.

TensorRT looks at constants alone, four input channels at a time: dim 0 of a MatMul's (in, out), dim 1 of a convolution's
(out, in, *kernel), at each kernel position by itself. Source: "Structured sparsity" in NVIDIA's TensorRT documentation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compressor.errors import GateError
from compressor.sparsity.codes import LARGEST

if TYPE_CHECKING:
    import onnx

_PRODUCTS = ("MatMul", "Gemm", "Conv")
_CODES = ("QuantizeLinear", "DequantizeLinear")
_LEAST_SCALE = 2.0**-14
"""The smallest normal number of float16: below it a scale itself would be rounded coarsely."""


@dataclass(frozen=True, eq=False)
class Product:
    """The weight (out, in, *kernel) of a layer, the name of the graph's constant that holds it, and the nodes that multiply by it."""

    constant: str
    weight: Tensor
    nodes: tuple[onnx.NodeProto, ...]


def straighten(graph: onnx.ModelProto) -> None:
    """Put weights where they are multiplied as they lie: constants behind a Transpose, or transposed by a Gemm, are laid out anew."""
    from onnx import numpy_helper

    constants = {one.name: one for one in graph.graph.initializer}
    flipped = {
        node.output[0]: node.input[0]
        for node in graph.graph.node
        if node.op_type == "Transpose" and node.input[0] in constants and len(constants[node.input[0]].dims) == 2
    }
    for node in graph.graph.node:
        source = flipped.get(node.input[1], node.input[1]) if node.op_type in ("MatMul", "Gemm") else ""
        if source not in constants:
            continue
        flag = next((a for a in node.attribute if a.name == "transB" and a.i), None)
        turned = (source != node.input[1]) != (flag is not None)
        if flag is not None:
            node.attribute.remove(flag)
        name = f"{source}_transposed" if turned else source
        if name not in constants:
            constants[name] = numpy_helper.from_array(numpy_helper.to_array(constants[source]).T.copy(), name)
            graph.graph.initializer.append(constants[name])
        node.input[1] = name
    _sweep(graph)


def products(graph: onnx.ModelProto) -> list[Product]:
    """Every constant that products and convolutions of the graph multiply by, in 8 bits through a pair of Q and DQ."""
    from onnx import numpy_helper

    constants = {one.name: one for one in graph.graph.initializer}
    coded = {one.output[0]: one.input[0] for one in graph.graph.node if one.op_type in _CODES}
    users = defaultdict[str, list[Any]](list)
    for node in graph.graph.node:
        if node.op_type in _PRODUCTS:
            name = coded.get(node.input[1], node.input[1])
            users[coded.get(name, name)].append(node)
    found = []
    for name, nodes in users.items():
        if name not in constants:
            continue
        value = torch.from_numpy(numpy_helper.to_array(constants[name]).copy())
        kinds = {_output_first(node) for node in nodes}
        if len(kinds) == 1 and (value.dim() == 2 or kinds == {True}):
            found.append(Product(name, value if kinds == {True} else value.t().contiguous(), tuple(nodes)))
    return found


def _output_first(node: onnx.NodeProto) -> bool:
    return node.op_type == "Conv" or any(a.name == "transB" and a.i for a in node.attribute)


def name_layers(graph: onnx.ModelProto, weights: Mapping[str, Tensor]) -> dict[str, Product]:
    """The product of each of `weights` (out, in, *kernel), by its name; those that are not in the graph are left out.

    Constants and nodes get the names of the weights and their layers, so that TensorRT's log speaks of layers as PyTorch does.
    """
    by_value = defaultdict[tuple[Any, ...], list[Product]](list)
    for product in products(graph):
        by_value[_value(product.weight)].append(product)
    found: dict[str, Product] = {}
    for name, weight in weights.items():
        alike = by_value.get(_value(weight))
        if alike:  # an exporter may keep one of two that are equal
            found[name] = alike.pop(0) if len(alike) > 1 else alike[0]
    taken = {one.name for one in graph.graph.node} | {one.name for one in graph.graph.initializer}
    renamed: dict[str, str] = {}
    for name, product in found.items():
        if name not in taken and product.constant not in renamed:
            renamed[product.constant] = name
        for place, node in enumerate(product.nodes):
            layer = name.removesuffix(".weight") + (f"_{place + 1}" if place else "")
            node.name = node.name if layer in taken else layer
            taken.add(layer)
    for one in graph.graph.initializer:
        one.name = renamed.get(one.name, one.name)
    for node in graph.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
    return {n: Product(renamed.get(p.constant, p.constant), p.weight, p.nodes) for n, p in found.items()}


def _value(weight: Tensor) -> tuple[Any, ...]:
    return tuple(weight.shape), weight.detach().cpu().contiguous().numpy().tobytes()


def not_sparse(weight: Tensor, groups: int = 1) -> str | None:
    """Why TensorRT takes (out, in, *kernel) for dense; None where four neighbouring input channels have two entries at most."""
    if groups != 1:
        return f"a convolution in {groups} groups"
    if weight.shape[1] % 4:
        return f"{weight.shape[1]} input channels, no multiple of 4"
    counts = (weight != 0).reshape(weight.shape[0], -1, 4, *weight.shape[2:]).sum(2)
    if int(counts.max()) > 2:
        share = float((counts > 2).double().mean())
        return f"{share:.0%} of its groups of four input channels have more than two entries"
    return None


# --- 8 bits. ---


def around(graph: onnx.ModelProto, found: Iterable[Product]) -> tuple[list[str], list[str]]:
    """The tensors that these products read and write, the bias being part of a product: those that get 8 bits.

    What is written is in 8 bits too: TensorRT is known to choose sparse int8 kernels where a product both takes and gives 8 bits.
    Source: the example `sparse_quant_trt` of NVIDIA's Model Optimizer.
    """
    users = _users(graph)
    constants = {one.name for one in graph.graph.initializer}
    ends = {one.name for one in graph.graph.output}
    read, written = [], []
    for product in found:
        for node in product.nodes:
            read.append(node.input[0])
            out = node.output[0]
            after = users.get(out, [])
            if node.op_type == "MatMul" and len(after) == 1 and after[0].op_type == "Add":
                other = next((name for name in after[0].input if name != out), out)
                out = after[0].output[0] if other in constants else out
            if out not in ends:
                written.append(out)
    return list(dict.fromkeys(read)), list(dict.fromkeys(written))


def quantise(graph: onnx.ModelProto, found: Iterable[Product], ranges: Mapping[str, float]) -> None:
    """Put Q and DQ around these products: a scale per output channel of a weight, one for a tensor that is read or written.

    `ranges` has the largest magnitude of each tensor that `around` names. All is symmetric, so that zero is zero. Weights stay in
    float16 before their Q, which TensorRT carries out when it builds: so its check for 2:4 sees what it would without 8 bits.
    """
    found = list({one.constant: one for one in found}.values())
    read, written = around(graph, found)
    sparse = {node.output[0] for product in found for node in product.nodes}
    pairs: dict[str, list[Any]] = {}  # by the tensor that each takes
    for name in dict.fromkeys([*written, *read]):
        out = _pair(graph, name, _scales(torch.tensor(ranges[name])), None, pairs)
        for node in graph.graph.node:
            for place, given in enumerate(node.input):
                if given == name and (name in written or (place == 0 and node.output[0] in sparse)):
                    node.input[place] = out
    for product in found:
        axis = 0 if _output_first(product.nodes[0]) else 1
        scales = _scales(product.weight.float().flatten(1).abs().amax(1))
        out = _pair(graph, product.constant, scales, axis, pairs)
        for node in product.nodes:
            node.input[1] = out
    _insert(graph, pairs)


def _scales(largest: Tensor) -> Tensor:
    """largest / 127 in float16, rounded up so that no code is beyond 127."""
    wanted = (largest.double() / LARGEST[torch.int8]).clamp(min=_LEAST_SCALE)
    scale = wanted.half()
    up = torch.nextafter(scale, torch.tensor(torch.inf, dtype=torch.float16))
    return torch.where(scale.double() < wanted, up, scale)


def _pair(graph: onnx.ModelProto, name: str, scale: Tensor, axis: int | None, pairs: dict[str, list[Any]]) -> str:
    """Add Q and DQ for the tensor `name` to `pairs`, and give the name of what comes out."""
    from onnx import helper, numpy_helper

    zero = torch.zeros(scale.shape, dtype=torch.int8)
    graph.graph.initializer.extend(
        [numpy_helper.from_array(scale.numpy(), f"{name}_scale"), numpy_helper.from_array(zero.numpy(), f"{name}_zero")]
    )
    more: dict[str, Any] = {} if axis is None else {"axis": axis}
    about = (f"{name}_scale", f"{name}_zero")
    pairs[name] = [
        helper.make_node("QuantizeLinear", [name, *about], [f"{name}_codes"], f"{name}_Q", **more),
        helper.make_node("DequantizeLinear", [f"{name}_codes", *about], [f"{name}_dequantized"], f"{name}_DQ", **more),
    ]
    return f"{name}_dequantized"


def _insert(graph: onnx.ModelProto, pairs: dict[str, list[Any]]) -> None:
    """Put nodes into the graph's order: as soon as the tensor that they take is there."""
    ordered = []
    for one in (*graph.graph.initializer, *graph.graph.input):
        ordered += pairs.get(one.name, [])
    for node in graph.graph.node:
        ordered.append(node)
        for name in node.output:
            ordered += pairs.get(name, [])
    copies = [type(node).FromString(node.SerializeToString()) for node in ordered]  # clearing ends those of the graph
    del graph.graph.node[:]
    graph.graph.node.extend(copies)


def verify(graph: onnx.ModelProto, eligible: Mapping[str, Tensor], int8: bool) -> None:
    """Raise GateError unless each of the weights `eligible` (out, in, *kernel), by its name, lies in the graph as TensorRT wants it:
    a constant that is 2:4 there; with `int8` behind a Q and a DQ, whose scales per output channel are positive and whose zero is 0."""
    from onnx import numpy_helper

    there = {one.constant: one for one in products(graph)}
    constants = {one.name: numpy_helper.to_array(one) for one in graph.graph.initializer}
    makers = {one.output[0]: one for one in graph.graph.node}
    for name, weight in eligible.items():
        product = there.get(name)
        if product is None or not torch.equal(product.weight, weight):
            raise GateError(f"{name}: its product is not in the file as it was made", "Please report this model.")
        codes = product.weight
        for node in product.nodes if int8 else ():
            for at, channels in ((0, None), (1, weight.shape[0])):
                pair = makers.get(node.input[at])
                if pair is None or pair.op_type != "DequantizeLinear":
                    raise GateError(f"{name}: input {at} of its product is not in 8 bits", "Please report this model.")
                scale, zero = constants[pair.input[1]], constants[pair.input[2]]
                if zero.any() or not (scale > 0).all() or scale.size != (channels or 1):
                    raise GateError(f"{name}: its scales would move zeros", "Please report this model.")
                if channels:
                    shape = (channels, *(1,) * (codes.dim() - 1))
                    codes = (codes.double() / torch.from_numpy(scale.copy()).double().view(shape)).round()
        if reason := not_sparse(codes):
            raise GateError(f"{name}: in the file {reason}", "Please report this model.")


def _users(graph: onnx.ModelProto) -> dict[str, list[Any]]:
    users = defaultdict[str, list[Any]](list)
    for node in graph.graph.node:
        for name in node.input:
            users[name].append(node)
    return users


def _sweep(graph: onnx.ModelProto) -> None:
    """Remove Transposes and constants that nothing reads any more."""
    used = {name for node in graph.graph.node for name in node.input} | {one.name for one in graph.graph.output}
    for node in [n for n in graph.graph.node if n.op_type == "Transpose" and n.output[0] not in used]:
        graph.graph.node.remove(node)
    used = {name for node in graph.graph.node for name in node.input} | {one.name for one in graph.graph.output}
    for one in [one for one in graph.graph.initializer if one.name not in used]:
        graph.graph.initializer.remove(one)
