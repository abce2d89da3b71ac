"""Projections of one tensor as one product: query, key and value of an attention, and whatever else a module makes of one tensor by
several Linears.

One large product keeps a GPU busier than three, and inputs that are multiplied in 8 bits come to codes once. It is what diffusers'
`fuse_projections` does; here it is done wherever it is seen in the example's forward, whatever class the module is of. Rows of a
weight keep their zeros, so a pattern that all have is that of the whole.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compressor.lower.backend import exporting


class _Shared(NamedTuple):
    """A tensor, how often it had been written to, and the Linears (by id) that were called on it."""

    x: weakref.ref[Tensor]
    changes: int
    layers: list[int]


class Sharers:
    """Which Linears every module calls on one tensor, told call by call: `enter`, `takes` and `leave`. Keeps no tensor."""

    def __init__(self) -> None:
        self._open: list[list[_Shared]] = [[]]
        self._seen: dict[int, set[tuple[int, ...]]] = {}

    def enter(self) -> None:
        """A module begins; what it calls is inside it."""
        self._open.append([])

    def takes(self, layer: nn.Module, x: Tensor) -> None:
        """`layer`, which has begun, was called on x."""
        for one in self._open[-2]:
            if one.x() is x and one.changes == _changes(x):
                one.layers.append(id(layer))
                return
        self._open[-2].append(_Shared(weakref.ref(x), _changes(x), [id(layer)]))

    def leave(self) -> None:
        """The module that began last has ended."""
        for one in self._open.pop():
            for layer in one.layers:
                self._seen.setdefault(layer, set()).add(tuple(one.layers))

    def groups(self) -> list[tuple[int, ...]]:
        """The layers (by id, in the order of their calls) that always came together, each once."""
        every = dict.fromkeys(group for seen in self._seen.values() for group in seen)
        return [
            group
            for group in every
            if 1 < len(group) == len(set(group)) and all(self._seen[layer] == {group} for layer in group)
        ]


def _changes(x: Tensor) -> int:
    """How often x was written to; tensors of inference mode do not count it."""
    return 0 if x.is_inference() else x._version


@torch.no_grad()
def joined(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One Linear that gives what `layers` give, side by side; its weight is a copy. Bias is zero where one of them has none."""
    weight = torch.cat([layer.weight for layer in layers])
    whole = nn.Linear(weight.shape[1], weight.shape[0], any(layer.bias is not None for layer in layers), device="meta")
    whole.weight = nn.Parameter(weight, requires_grad=False)
    if whole.bias is not None:
        parts = [weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach() for layer in layers]
        whole.bias = nn.Parameter(torch.cat(parts), requires_grad=False)
    return whole.eval()


class FusedProjections(nn.Module):
    """Stands for the first of several Linears that take the same x (..., in), and has the `product` of all, (..., sum of `sizes`).

    The product is made where the first is called, and its parts go to the `others` if those are called next, in their order, on the
    same x, which was not written to since. What comes otherwise is multiplied anew: slower, and as right. In inference mode and under
    torch.compile there is no count of what is written: there, a module that writes to x between its projections, and did not when
    they were found, gets the parts of before. `rows` are the sizes of x before its last; parts of another x have memory of their own,
    as a view that the model takes of them may be one that it can only take of those.
    """

    def __init__(self, product: nn.Module, sizes: Sequence[int], rows: Sequence[int]) -> None:
        super().__init__()
        self.product, self.sizes, self.rows = product, list(sizes), tuple(rows)
        self._made: tuple[Tensor, tuple[object, ...], tuple[Tensor, ...], int] | None = None

    def others(self) -> list[nn.Module]:
        """What stands for the second Linear, and for each that follows."""
        return [_Part(self, place) for place in range(1, len(self.sizes))]

    def forward(self, input: Tensor) -> Tensor:
        return self.part(input, 0)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}  # a copy has its own; what has a gradient could not be copied

    def part(self, x: Tensor, place: int) -> Tensor:
        """What the Linear at `place` gives for x."""
        made, how = self._made, _how(x)  # read once: another thread may set it
        if place and made is not None and made[0] is x and made[1] == how and made[3] == place:
            parts, in_order = made[2], True
        else:
            parts, in_order = self.product(x).split(self.sizes, -1), place == 0
            if exporting() or x.shape[:-1] != self.rows:  # what is exported takes any shape
                parts = tuple(part.contiguous() for part in parts)
        self._made = (x, how, parts, place + 1) if in_order and place + 1 < len(parts) else None
        return parts[place]

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}"


def _how(x: Tensor) -> tuple[object, ...]:
    """What a product of x depends on besides its numbers, and how often these were written to."""
    kind = x.device.type
    casts = kind != "meta" and torch.is_autocast_enabled(kind)  # which has none
    autocast = torch.get_autocast_dtype(kind) if casts else None
    known = () if torch.compiler.is_compiling() else (torch.is_inference_mode_enabled(), _changes(x))
    return torch.is_grad_enabled(), autocast, *known


class _Part(nn.Module):
    """Stands for the Linear at `place` of those that `first` multiplies."""

    def __init__(self, first: FusedProjections, place: int) -> None:
        super().__init__()
        self._first = (first,)  # no module of this one: it has its place already
        self.place = place

    def forward(self, input: Tensor) -> Tensor:
        return self._first[0].part(input, self.place)

    def extra_repr(self) -> str:
        return f"place={self.place}"
