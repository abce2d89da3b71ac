"""Which channels go together: a walk over torch-pruning's dependency graph that ends on every model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter, to_device
from compressor.errors import CompressorError, first_line

from .layers import CONVOLUTIONS, Side, side


@dataclass(frozen=True, eq=False)
class Member:
    """A layer, or a parameter of its own, that has the channels of a group: as its outputs (`out`) or its inputs.

    Channel `root[i]` of the group is its channel `own[i]`, of `width`. `tensors`: what has them, by its name in the model's state,
    with the dim. `counts`: the attributes of `module` that count them.
    """

    name: str
    module: nn.Module
    out: bool
    root: Tensor
    own: Tensor
    width: int
    tensors: Mapping[str, int]
    counts: tuple[str, ...]


class Together(NamedTuple):
    """What goes together: the layers, the first of which makes the channels; for each channel (width,) the first of those that it
    can only go with; and into how many parts operations split them, at most."""

    members: list[Member]
    first: Tensor
    parts: int


class Refused(Exception):
    """These channels stay; the message says why."""


class _Index(NamedTuple):
    """A channel where the walk is (`idx`), and the channel of the first layer that led there; torch-pruning's own names."""

    idx: int
    root_idx: int


class Channels:
    """The channels of a model's layers, and what depends on them, as torch-pruning traces it.

    Raises CompressorError where the model cannot be traced.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.layers = {id(module): name for name, module in model.named_modules()}
        self.parameters = {id(value): name for name, value in model.named_parameters()}
        self.state = set(model.state_dict())
        self.graph, answer = _traced(model, adapter)
        sides = [side(module, out) for module in model.modules() for out in (True, False)]
        self.limit = max([answer, *(found.width for found in sides if isinstance(found, Side))])

    def roots(self) -> Iterable[nn.Module]:
        """The layers that make channels, in the graph's order."""
        for module in self.graph.module2node:
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and not getattr(module, "groups", 1) > 1:
                yield module

    def together(self, root: nn.Module) -> Together:
        """All that has output channels of `root`. Raises Refused, with the reason, where they have to stay.

        torch-pruning's own walk starts anew wherever a path gives it another list of channels. Where outputs are flattened and
        joined, every round gives a longer one, and it does not end. This one visits each channel of each layer and operation once:
        what arrives there from two channels of the root ties these together, and goes no further.
        """
        node = self.graph.module2node[root]
        handler = self.graph.get_pruner_of_module(root).prune_out_channels
        whole = side(root, True)
        if not isinstance(whole, Side):
            raise Refused(f"it is {whole}")
        tied = list(range(whole.width))
        reached: dict[tuple[int, Any], dict[int, int]] = {}
        nodes: list[tuple[Any, Any]] = []
        pending = [(node, handler, [_Index(i, i) for i in tied])]
        while pending:
            node, handler, arriving = pending.pop()
            key = (id(node), handler)
            if key not in reached:
                self._known(node, handler)
                reached[key] = {}
                nodes.append((node, handler))
            if any(not 0 <= index.idx < self.limit for index in arriving):
                raise Refused("operations between layers move its channels to places that no layer has")
            new = _new(arriving, reached[key], tied)
            for dependency in node.dependencies if new else ():
                if dependency.is_triggered_by(handler) and (found := _mapped(new, dependency.index_mapping)):
                    pending.append((dependency.target, dependency.handler, found))
        members = [self._member(node, handler, reached[id(node), handler]) for node, handler in nodes]
        first = torch.tensor([_first(tied, channel) for channel in tied])
        return Together(
            [member for member in members if member is not None], first, _parts([node for node, _ in nodes])
        )

    def _known(self, node: Any, handler: Any) -> None:
        """Raise Refused where channels cannot be removed from what `node` stands for."""
        if id(node.module) in self.layers:
            found = side(node.module, bool(self.graph.is_out_channel_pruning_fn(handler)))
            if isinstance(found, str):
                raise Refused(f"they reach {self.layers[id(node.module)]}, {found}")
        elif node.type.name == "OUTPUT":
            raise Refused("they reach the model's answer")

    def _member(self, node: Any, handler: Any, channels: Mapping[int, int]) -> Member | None:
        """What `node` stands for, with the `channels` of the root by its own; None for an operation without weights."""
        module = node.module
        own, root = torch.tensor(list(channels)), torch.tensor(list(channels.values()))
        if isinstance(module, nn.Parameter):
            name, dim = self.parameters[id(module)], node.pruning_dim % module.dim()
            member = Member(name, nn.Module(), True, root, own, module.shape[dim], {name: dim}, ())
        elif id(module) not in self.layers:
            return None
        else:
            name, out = self.layers[id(module)], bool(self.graph.is_out_channel_pruning_fn(handler))
            own_side = side(module, out)
            if not isinstance(own_side, Side):
                return None
            named = {f"{name}.{key}" if name else key: dim for key, dim in own_side.tensors.items()}
            tensors = {tensor: dim for tensor, dim in named.items() if tensor in self.state}
            member = Member(name, module, out, root, own, own_side.width, tensors, own_side.counts)
        if int(own.max()) >= member.width:
            raise Refused(f"what is done before {name} changes how many there are")
        return member


def _mapped(channels: list[_Index], mappings: Iterable[Any]) -> list[_Index]:
    """Where `channels` are after what the `mappings`, operations as torch-pruning has them, do to their places.

    Raises Refused where it cannot say: it knows the parts of joins and splits of channels, and not those of other dims.
    """
    found = channels
    for mapping in mappings:
        try:
            found = found if mapping is None else mapping(found)
        except (IndexError, TypeError) as error:
            raise Refused("operations between layers join or split them in a way that cannot be followed") from error
    # torch-pruning's answer where keys and values are repeated for heads
    if any(index.root_idx is None for index in found):
        raise Refused("operations between layers repeat them for several heads")
    return found


def _new(arriving: Iterable[_Index], reached: dict[int, int], tied: list[int]) -> list[_Index]:
    """Those that were not `reached` before, which they are now; the others tie channels of the root together."""
    new = []
    for index in arriving:
        if index.idx in reached:
            first, second = sorted((_first(tied, reached[index.idx]), _first(tied, index.root_idx)))
            tied[second] = first
        else:
            reached[index.idx] = index.root_idx
            new.append(index)
    return new


def _parts(nodes: Iterable[Any]) -> int:
    """Into how many parts the operations among `nodes` split their channels, at most."""
    kinds = [(str(node.type.name), len(node.outputs)) for node in nodes]
    return max([1, *(n for kind, n in kinds if kind in ("SPLIT", "UNBIND")), sum(kind == "SLICE" for kind, _ in kinds)])


def _first(tied: list[int], channel: int) -> int:
    """The first of the channels that `channel` is tied to."""
    while tied[channel] != channel:
        tied[channel] = tied[tied[channel]]
        channel = tied[channel]
    return channel


def _traced(model: nn.Module, adapter: Adapter) -> tuple[Any, int]:
    """torch-pruning's graph of `model`, and how many numbers the model answers for one sample."""
    import torch_pruning

    was_training = model.training
    frozen = [value for value in model.parameters() if not value.requires_grad]
    inputs = to_device(adapter.example_inputs(2), next(model.parameters()).device)
    answers: list[int] = []

    def forward(module: nn.Module, given: Any) -> Tensor:
        answer = adapter.predict(module, given)
        answers.append(answer.numel() // max(1, len(answer)))
        return answer

    model.eval()
    for value in frozen:
        value.requires_grad_(value.is_floating_point())  # tracing follows gradients
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # of parameters that are no layer's: torch-pruning guesses their dim
            graph = torch_pruning.DependencyGraph().build_dependency(
                model, example_inputs=inputs, forward_fn=forward, verbose=False
            )
    except Exception as error:  # tracing runs the user's model
        raise CompressorError(
            f"structured: the model's layers cannot be traced: {first_line(error)}",
            "Its forward pass must work on the adapter's example inputs, with gradients; some joins of split parts are more than "
            "torch-pruning can follow.",
        ) from error
    finally:
        model.train(was_training)
        for value in frozen:
            value.requires_grad_(False)
    return graph, answers[0]
