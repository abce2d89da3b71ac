"""For how many samples an exported graph is right: for any, unless the model does something else from some number on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compressor.errors import CompressorError, first_line

_RANGES = 8
"""So many ranges of batch sizes are looked at, at most."""
_LOOKED_AT = 256
"""Numbers of samples that conditions are looked at for."""
_LARGEST = 2**32
"""Bytes of inputs that no batch has which is ever run: for more samples, nothing is asked."""
_SAME = ("aten.contiguous.default", "aten.clone.default", "aten._assert_tensor_metadata.default")
"""Operators that answer the very numbers that they are given, or nothing."""
_END = 2**63 - 1
"""Where a slice ends that takes all there is."""


def dynamic(tensors: Sequence[Tensor], batch: Any) -> tuple[Any, ...]:
    """torch.export's account of `tensors`: dim 0 is the `batch` where it is as long as that of the first."""
    samples = tensors[0].shape[:1]
    return (tuple({0: batch} if t.shape[:1] == samples else None for t in tensors),)


def limit(module: nn.Module, tensors: Sequence[Tensor]) -> str | None:
    """How many samples a program is right for that is exported from `module` with `tensors`, in words; None where that is any number.

    Where torch followed the model up to a number only, or for all but some, it follows it again with such: diffusers' UNets, for one,
    lay their tensors out anew from 64 samples on, and compute the same.
    """
    program = _followed(module, tensors)
    most = _most(program)
    if isinstance(most, str):
        return most
    steps = _steps(program)
    for number in _others(program, _LOOKED_AT if most is None else min(most, _LOOKED_AT)):
        if _steps(_followed_for(number, module, tensors)) != steps:
            return f"all but {number}"
    if most is None:
        return None
    upper = most
    for _ in range(_RANGES):
        if _bytes(upper + 1, tensors) > _LARGEST:
            return None
        other = _followed_for(upper + 1, module, tensors)
        found = _most(other)
        if _steps(other) != steps or isinstance(found, str) or (found is not None and found <= upper):
            return f"up to {upper}"
        if found is None:
            return None
        upper = found
    return f"up to {upper}"


def _followed(module: nn.Module, tensors: Sequence[Tensor]) -> Any:
    export = partial(
        torch.export.export, module, tuple(tensors), dynamic_shapes=dynamic(tensors, torch.export.Dim.AUTO)
    )
    try:
        return export(strict=False)
    except Exception:  # the exporter of ONNX goes on in this way too
        return export(strict=True)


def _followed_for(number: int, module: nn.Module, tensors: Sequence[Tensor]) -> Any:
    samples = tensors[0].shape[:1]
    try:
        other = [t.new_empty((number, *t.shape[1:])) if t.shape[:1] == samples else t for t in tensors]
        return _followed(module, other)
    except Exception as error:  # whatever a model raises
        raise CompressorError(
            f"with {number} samples torch cannot follow the model: {first_line(error)}",
            "It is exported for any batch: the model has to do the same with any.",
        ) from error


def _bytes(number: int, tensors: Sequence[Tensor]) -> int:
    """The bytes that inputs like `tensors` take with this `number` of samples."""
    each = (t.nbytes // len(t) for t in tensors if t.dim() and len(t) and t.shape[:1] == tensors[0].shape[:1])
    return number * sum(each)


def _size(program: Any) -> Any:
    """The batch of `program`: a symbol, a number where it is for that alone, None where its first input has no dims."""
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    first = placeholders[program.graph_signature.user_inputs[0]]
    size = first.shape[0] if first.dim() else None
    return size if size is None or isinstance(size, int) or size.node.expr.free_symbols else int(size)


def _others(program: Any, most: int) -> list[int]:
    """Of each condition on the batch that torch met as it followed the model, the first number of samples for which it does not hold,
    from 2 up to `most`: a model may ask whether it has 7, or an even number."""
    if (size := _size(program)) is None:
        return []
    symbol, known = size.node.expr, size.node.shape_env
    conditions = {guard.expr.xreplace(known.replacements) for guard in known.guards}
    found = set()
    for condition in conditions:
        if condition.free_symbols == {symbol}:
            broken = (n for n in range(2, most + 1) if str(condition.subs(symbol, n)) == "False")
            found |= {*islice(broken, 1)}
    return sorted(found)


def _most(program: Any) -> int | str | None:
    """The largest batch that `program` was followed for; a text where it is for one alone, None where it is for any."""
    size = _size(program)
    if size is None or isinstance(size, int):
        return None if size is None else str(size)
    bounds = program.range_constraints.get(size.node.expr)
    return int(bounds.upper) if bounds is not None and bounds.upper < 2**31 else None


def _steps(program: Any) -> list[tuple[str, str]]:
    """What `program` computes: its operators in order, with what each is given, by the number of the operator that made it."""
    numbers: dict[Any, int] = {}
    steps: list[tuple[str, str]] = []
    for node in program.graph.nodes:
        whole = str(node.target) == "aten.slice.Tensor" and node.args[2:] in ((0, _END), (0, _END, 1))
        if whole or str(node.target) in _SAME:
            if node.args and node.args[0] in numbers:
                numbers[node] = numbers[node.args[0]]
            continue
        given = tree_map_only(torch.fx.Node, lambda n: f"%{numbers.get(n)}", (node.args, dict(node.kwargs)))
        numbers[node] = len(steps)
        steps.append((str(node.target) if node.op != "placeholder" else node.op, str(given)))
    return steps
