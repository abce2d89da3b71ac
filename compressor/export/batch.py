"""For how many samples an exported graph is right: for any, unless the model does something else from some number on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compressor.errors import CompressorError, first_line

_RANGES = 8
"""So many ranges of batch sizes are looked at, at most."""
_SAME = ("aten.contiguous.default", "aten.clone.default", "aten._assert_tensor_metadata.default")
"""Operators that answer the very numbers that they are given, or nothing."""
_END = 2**63 - 1
"""Where a slice ends that takes all there is."""


def dynamic(tensors: Sequence[Tensor], batch: Any) -> tuple[Any, ...]:
    """torch.export's account of `tensors`: dim 0 is the `batch` where it is as long as that of the first."""
    samples = tensors[0].shape[:1]
    return (tuple({0: batch} if t.shape[:1] == samples else None for t in tensors),)


def limit(program: Any, module: nn.Module, tensors: Sequence[Tensor]) -> str | None:
    """How many samples `program`, exported from `module` with `tensors`, is right for, in words; None where it is for any number.

    Where torch followed the model up to a number only, it follows it again with more samples: diffusers' UNets, for one, lay their
    tensors out anew from 64 samples on, and compute the same.
    """
    most = _most(program)
    if most is None or isinstance(most, str):
        return most
    steps = _steps(_followed(module, tensors))
    upper = most
    for _ in range(_RANGES):
        samples = tensors[0].shape[:1]
        more = [t.new_empty((upper + 1, *t.shape[1:])) if t.shape[:1] == samples else t for t in tensors]
        try:
            other = _followed(module, more)
        except Exception as error:  # whatever a model raises
            raise CompressorError(
                f"with {upper + 1} samples torch cannot follow the model: {first_line(error)}",
                "It is exported for any batch: the model has to do the same with any.",
            ) from error
        found = _most(other)
        if _steps(other) != steps or isinstance(found, str) or (found is not None and found <= upper):
            return f"up to {upper}"
        if found is None:
            return None
        upper = found
    return f"up to {upper}"


def _followed(module: nn.Module, tensors: Sequence[Tensor]) -> Any:
    found = dynamic(tensors, torch.export.Dim.AUTO)
    return torch.export.export(module, tuple(tensors), dynamic_shapes=found, strict=False)


def _most(program: Any) -> int | str | None:
    """The largest batch that `program` was followed for; a text where it is for one alone, None where it is for any."""
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    first = placeholders[program.graph_signature.user_inputs[0]]
    if not first.dim():
        return None
    if isinstance(size := first.shape[0], int):
        return str(size)
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
