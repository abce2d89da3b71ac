"""What diffusers makes of the tensors of a LoRA file: it is asked to read the same names with numbers of ours, and these tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_HALF, _FIRST = re.compile(r"(lora_A|lora_B|lora_down|lora_up|down|up)\.weight$"), ("lora_A", "lora_down", "down")


def _ranks(raw: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of the layer of each alpha in `raw`; 1 where it has no first matrix."""
    first = {n[: half.start()]: len(v) for n, v in raw.items() if (half := _HALF.search(n)) and half[1] in _FIRST}
    alphas = {name: name.removesuffix("alpha") for name in raw if name.endswith(".alpha")}
    return {name: next((r for at, r in first.items() if at.startswith(layer)), 1) for name, layer in alphas.items()}


def numbered(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`raw` with the number of its rank, from 1, in each row of a first and each column of a second matrix; alphas scale by 1."""
    found, ranks = {name: torch.zeros(value.shape) for name, value in raw.items()}, _ranks(raw)
    for name, value in found.items():
        if name in ranks:
            value.fill_(ranks[name])
        elif (half := _HALF.search(name)) is not None and value.dim() > 1:
            rows = value if half[1] in _FIRST else value.transpose(0, 1)
            rows += torch.arange(1.0, len(rows) + 1).view(-1, *(1,) * (value.dim() - 1))
    return found


def aligned(tensors: Mapping[str, Tensor], numbers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the rows of each first matrix in the order of the columns of its second, as `numbers` tell.

    diffusers 0.42.1 swaps the halves of HunyuanVideo's `final_layer.adaLN_modulation` in both, and they are of the second alone.
    """
    found = dict(tensors)
    for name, value in numbers.items():
        other, own = numbers.get(name.replace("lora_A.", "lora_B.")), tensors.get(name)
        if "lora_A." in name and other is not None and own is not None and value.shape == own.shape:
            rows, columns = value.flatten(1).amax(1).tolist(), other.flatten(1).amax(0).tolist()
            if rows != columns and sorted(rows) == sorted({*columns}):
                found[name] = own[[rows.index(number) for number in columns]]
    return found


def left_out(raw: Mapping[str, Tensor], read: Any) -> list[str]:
    """The names in `raw` whose values `read` does not give back.

    It is asked to read the same names with an odd number of its own in each matrix, and twice the rank as each alpha: a number is
    there again, or doubled; and an alpha was used where the numbers of its layer are doubled, or is among those given back.
    """
    marks = {name: 2.0 * index + 1 for index, name in enumerate(raw)}
    marked = {name: torch.full(value.shape, marks[name]) for name, value in raw.items()}
    layers, ranks = dict[str, list[str]](), _ranks(raw)
    for name in raw:
        if name.endswith(".alpha"):
            base = name.removesuffix(".alpha")
            layers[name] = [n for n in raw if n.startswith(f"{base}.") and n != name]
            marked[name] = torch.full(raw[name].shape, 2.0 * ranks[name])
    tensors, alphas = read(marked)
    seen = {mark for value in tensors.values() for mark in value.flatten().unique_consecutive().tolist()}
    unread = [n for n in raw if n not in layers and not {marks[n], 2 * marks[n]} & seen]
    unused = [name for name, own in layers.items() if not any(2 * marks[n] in seen for n in own)]
    return [*unread, *(unused if len(unused) > len(alphas) else [])]
