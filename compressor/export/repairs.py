"""What torch's exporter writes and ONNX does not allow, put right by the names, types and shapes that the graph notes beside.

- `squeeze` of a dim that is not 1 leaves a tensor as it is in torch, and is an error in ONNX:
  https://github.com/pytorch/pytorch/issues/79117
- `concat` and `stack` of several dtypes give the widest one in torch; ONNX's `Concat` takes one dtype.
- a value of the graph may be called as an input shall be: `linear`, `mul`, `embedding`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx


def put_right(graph: onnx.ModelProto, inputs: Sequence[str], output: str) -> None:
    """Mend `graph` in place, and call its inputs and its output so."""
    own = [one.name for one in (*graph.graph.input, *graph.graph.output)]
    _rename(graph, dict(zip(own, [*inputs, output], strict=True)))
    for part in _graphs(graph.graph):
        _mend(part, {one.name: one.type.tensor_type for one in (*part.input, *part.value_info, *part.output)})


def _graphs(graph: Any) -> Iterator[Any]:
    """`graph`, and those inside its nodes: branches and bodies of loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _rename(graph: onnx.ModelProto, names: Mapping[str, str]) -> None:
    """Give values their new `names`; whatever else has one of these gets another."""
    parts = list(_graphs(graph.graph))
    named = [one for part in parts for one in (*part.input, *part.output, *part.value_info, *part.initializer)]
    known = {one.name for one in named} | {name for part in parts for node in part.node for name in node.output}
    new = dict(names)
    for name in {*names.values()} & known - names.keys():
        number = next(n for n in range(1, len(known) + 2) if f"{name}_{n}" not in known)
        new[name] = f"{name}_{number}"
    for one in named:
        one.name = new.get(one.name, one.name)
    for node in (node for part in parts for node in part.node):
        for places in (node.input, node.output):
            places[:] = [new.get(name, name) for name in places]


def _mend(graph: Any, types: Mapping[str, Any]) -> None:
    """Mend the `Squeeze` and `Concat` of a graph whose values have such `types`."""
    from onnx import helper

    dtypes = {one.name: one.data_type for one in graph.initializer} | {n: t.elem_type for n, t in types.items()}
    ranks = {name: len(one.shape.dim) for name, one in types.items() if one.HasField("shape")}
    nodes = []
    for node in graph.node:
        out = node.output[0]
        if node.op_type == "Squeeze" and ranks.get(node.input[0], 0) == ranks.get(out):
            node.op_type = "Identity"
            del node.input[1:]
        if node.op_type == "Concat" and len({dtypes.get(name) for name in node.input}) > 1:
            for place, name in enumerate(node.input):
                if out in dtypes and dtypes.get(name, dtypes[out]) != dtypes[out]:
                    node.input[place] = f"{out}_of_{place}"
                    nodes.append(
                        helper.make_node("Cast", [name], [node.input[place]], f"{node.name}_{place}", to=dtypes[out])
                    )
        nodes.append(node)
    if len(nodes) > len(graph.node):
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]  # clearing ends those of the graph
        del graph.node[:]
        graph.node.extend(copies)
