"""Which channels belong together: torch-pruning's dependency graph, and the counts that norms and heads allow."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compressor.adapter import Adapter, to_device
from compressor.errors import CompressorError, first_line
from compressor.seeds import generator
from compressor.sparsity.layers import Layer, reached
from compressor.sparsity.surgery import Surgery
from compressor.weights import ties, twin

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUSED = ("qkv", "to_qkv")
_PROJECTIONS = (*_FUSED, "to_q", "to_k", "to_v", "q", "k", "v", "q_proj", "k_proj", "v_proj", "query", "key", "value")


@dataclass(frozen=True, eq=False)
class Member:
    """A layer that has the channels of a group: as its output (`out`) or its input. Channel `root[i]` of the group is its
    channel `own[i]`."""

    name: str
    module: nn.Module
    out: bool
    root: Tensor
    own: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can only be removed together, in all `members`.

    `parts` is (pieces, items, channels): of each piece, the same number of items has to stay, a multiple of `step`; an
    item is a channel, or a head with all its channels.
    """

    width: int
    members: Sequence[Member]
    parts: Tensor
    step: int
    attention: str | None


def find_groups(model: nn.Module, adapter: Adapter, multiple: int) -> list[Group]:
    """The groups of `model` that can be made narrower: those whose every layer is of a known kind, and without parts of
    which a copy with random weights answers as it should.

    So outputs stay, and the streams of transformers, which every token's LayerNorm sees as a whole: of those, heads and
    hidden widths go.
    Raises CompressorError where there is none, or the model cannot be traced.
    """
    import torch_pruning

    names = {id(module): name for name, module in model.named_modules()}
    was_training = model.training
    frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    model.eval()
    for value in frozen.values():
        value.requires_grad_(value.is_floating_point())  # tracing follows gradients
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters that are no layer's: their groups are left out
            device = next(model.parameters()).device
            graph = torch_pruning.DependencyGraph().build_dependency(
                model,
                example_inputs=to_device(adapter.example_inputs(2), device),
                forward_fn=adapter.predict,
                verbose=False,
            )
            found = list(graph.get_all_groups(root_module_types=[nn.Linear, *_CONVOLUTIONS]))
    except Exception as error:  # tracing runs the user's model
        raise CompressorError(
            f"structured: the model's layers cannot be traced: {first_line(error)}",
            "Its forward pass must work on the adapter's example inputs, with gradients.",
        ) from error
    finally:
        model.train(was_training)
        for value in frozen.values():
            value.requires_grad_(False)
    tied = ties(model)
    fixed = {*tied, *tied.values(), *frozen}
    probe = _probe(model)
    groups = []
    for items in found:
        members = _members(items, names, graph)
        if members is None or any(_stays(member, fixed, adapter) for member in members):
            continue
        group = _group(members, model, multiple)
        if group is None:
            continue
        least = 1 - group.step / group.parts.shape[1]
        if all(_works(probe, adapter, group, density) for density in (0.5, least)):
            groups.append(group)
    if not groups:
        raise CompressorError(
            "structured: the model has no inner width that can be made narrower",
            "Ignore less, target more, or make more of it trainable (requires_grad).",
        )
    return groups


def removal(model: nn.Module, groups: Sequence[Group], scores: Sequence[Tensor], density: float) -> Surgery:
    """The surgery that keeps, of each group, about the share `density` of its channels, those of the largest `scores`.

    What rounding to allowed counts adds to one group is taken from the next.
    """
    state = model.state_dict()
    modules = dict(model.named_modules())
    gone: dict[tuple[str, int], set[int]] = {}
    numbers: dict[str, dict[str, int | tuple[int, ...]]] = {}
    owed = 0.0
    for group, score in zip(groups, scores, strict=True):
        _, items, _ = group.parts.shape
        most = items // group.step
        kept = min(most, max(1, round((density + owed) * most)))
        owed += density - kept / most
        by_item = score[group.parts].sum(-1)
        order = by_item.argsort(dim=1, descending=True, stable=True)
        dropped = group.parts.gather(
            1, order[:, kept * group.step :, None].expand(-1, -1, group.parts.shape[2])
        ).flatten()
        if group.attention is not None:
            heads = vars(modules[group.attention])
            key = "heads" if "heads" in heads else "num_heads"
            numbers.setdefault(group.attention, {})[key] = kept
            for key in ("inner_dim", "inner_kv_dim"):
                if key in heads:
                    numbers[group.attention][key] = heads[key] * kept // most
            if "sliceable_head_dim" in heads:
                numbers[group.attention]["sliceable_head_dim"] = kept
        for member in group.members:
            lost = member.own[torch.isin(member.root, dropped)].tolist()
            for name, dim in _tensors(member, state):
                gone.setdefault((name, dim), set()).update(lost)
    kept_entries: dict[str, dict[int, tuple[int, ...]]] = {}
    for (name, dim), entries in gone.items():
        if entries:
            size = state[name].shape[dim]
            kept_entries.setdefault(name, {})[dim] = tuple(i for i in range(size) if i not in entries)
    for group in groups:
        for member in group.members:
            _remember(member, modules, kept_entries, numbers)
    return Surgery(kept_entries, {name: own for name, own in numbers.items() if own})


def _members(items: Any, names: Mapping[int, str], graph: Any) -> list[Member] | None:
    """The layers of a torch-pruning group; None where one is of a kind that is not known here."""
    members = []
    for item in items:
        module = item.dep.target.module
        if id(module) not in names:
            if isinstance(module, nn.Parameter):
                return None
            continue  # an operation without weights
        out = bool(graph.is_out_channel_pruning_fn(item.dep.handler))
        plain = isinstance(module, (nn.Linear, nn.GroupNorm)) or (
            isinstance(module, _CONVOLUTIONS) and module.groups == 1
        )
        if not plain:
            return None
        root, own = (torch.tensor([int(i) for i in some]) for some in (item.root_idxs, item.idxs))
        if len(root) != len(own) or int(own.max()) >= _channels(module, out):
            return None  # a reshape between layers that mixes channels with positions
        members.append(Member(names[id(module)], module, out, root, own))
    return members


def _channels(module: nn.Module, out: bool) -> int:
    match module:
        case nn.Linear():
            return module.out_features if out else module.in_features
        case nn.GroupNorm():
            return module.num_channels
    return int(module.out_channels if out else module.in_channels)  # type: ignore[arg-type]


def _probe(model: nn.Module) -> nn.Module:
    """A copy of `model` with random weights, on which no part is silent as in models that start at zero."""
    probe = copy.deepcopy(model).eval().requires_grad_(False)
    for index, value in enumerate(probe.parameters()):
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator("structured", "probe", index)).to(value)
            value.copy_(value + 0.1 * noise if value.dim() < 2 else noise / math.sqrt(value[0].numel()))
    return probe


@torch.no_grad()
def _works(probe: nn.Module, adapter: Adapter, group: Group, density: float) -> bool:
    """Whether the model answers in its shape with the share `density` of the group; and, where no norm sees the channels as a
    whole, as if nothing read the others. An attention whose heads are not known for such answers otherwise, and a norm that is
    no layer does.
    """
    device = next(probe.parameters()).device
    rng = generator("structured", "inputs")
    example = tree_map_only(
        Tensor,
        lambda t: t + torch.randn(t.shape, generator=rng).to(t) if t.is_floating_point() else t,
        adapter.example_inputs(2),
    )
    inputs = to_device(example, device)
    smaller, silenced = twin(probe), twin(probe)
    surgery = removal(probe, [group], [torch.zeros(group.width)], density)
    modules = dict(silenced.named_modules())
    for member in group.members:
        dims = surgery.kept.get(f"{member.name}.weight", {})
        if not member.out and 1 in dims:
            weight = modules[member.name].weight
            mask = torch.zeros(weight.shape[1], device=device)
            mask[list(dims[1])] = 1
            modules[member.name].weight = nn.Parameter(weight * mask.view(-1, *[1] * (weight.dim() - 2)), False)
    try:
        surgery.apply(smaller)
        whole, found = adapter.predict(probe, inputs), adapter.predict(smaller, inputs)
        if found.shape != whole.shape or any(isinstance(m.module, nn.GroupNorm) for m in group.members):
            return found.shape == whole.shape
        expected = adapter.predict(silenced, inputs)
    except Exception:  # whatever a model raises whose shapes do not fit
        return False
    tolerance = 0.02 * float((whole - expected).abs().max()) + 1e-4 * float(whole.abs().max())
    return float((found - expected).abs().max()) <= tolerance


def _stays(member: Member, fixed: set[str], adapter: Adapter) -> bool:
    """Whether what `member` has must stay as it is: `fixed` are parameters that are shared or frozen."""
    if f"{member.name}.weight" in fixed or f"{member.name}.bias" in fixed:
        return True
    if not member.out:
        return False
    weight = getattr(member.module, "weight", None)
    layer = Layer(f"{member.name}.weight", member.name, member.module, weight, None)  # type: ignore[arg-type]
    targets = () if isinstance(member.module, nn.GroupNorm) else adapter.targets
    return not reached(layer, targets, adapter.ignore)


def _group(members: list[Member], model: nn.Module, multiple: int) -> Group | None:
    """What may be removed of the channels that `members` share; None where their norms or heads allow nothing."""
    width = 1 + max(int(member.root.max()) for member in members)
    attention = next((found for member in members if (found := _heads(member, model)) is not None), None)
    if attention is not None:
        owner, heads, fused = attention
        if width % (fused * heads):
            return None
        parts = torch.arange(width).view(fused, heads, -1).transpose(0, 1).reshape(1, heads, -1)
        return Group(width, members, parts, 1, owner) if heads > 1 else None
    pieces = math.lcm(*(m.module.num_groups for m in members if isinstance(m.module, nn.GroupNorm)))
    if width % pieces or width == pieces:
        return None
    items = width // pieces
    step = multiple // math.gcd(multiple, pieces) if width % multiple == 0 else 1
    if items % step or items == step:
        step = 1
    return Group(width, members, torch.arange(width).view(pieces, items, 1), step, None)


def _heads(member: Member, model: nn.Module) -> tuple[str, int, int] | None:
    """(the attention's name, its heads, 3 where queries, keys and values are one layer) where `member` makes one of those."""
    owner, _, own = member.name.rpartition(".")
    if not member.out or own not in _PROJECTIONS:
        return None
    found = vars(model.get_submodule(owner))
    heads = found.get("heads", found.get("num_heads"))
    return (owner, heads, 3 if own in _FUSED else 1) if isinstance(heads, int) else None


def _tensors(member: Member, state: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """The tensors of `member` that have the group's channels, with the dim."""
    if not member.out:
        return [(f"{member.name}.weight", 1)]
    return [(f"{member.name}.{key}", 0) for key in ("weight", "bias") if f"{member.name}.{key}" in state]


def _remember(
    member: Member,
    modules: Mapping[str, nn.Module],
    kept: Mapping[str, Mapping[int, tuple[int, ...]]],
    numbers: dict[str, dict[str, int | tuple[int, ...]]],
) -> None:
    """Note what `member`, and the module around it, have to know of their new widths."""
    dims = kept.get(f"{member.name}.weight", {})
    own = numbers.setdefault(member.name, {})
    if isinstance(member.module, nn.GroupNorm):
        if 0 in dims:
            own["num_channels"] = len(dims[0])
        return
    kind = "features" if isinstance(member.module, nn.Linear) else "channels"
    for dim, side in ((0, "out"), (1, "in")):
        if dim in dims:
            own[f"{side}_{kind}"] = len(dims[dim])
    around = member.name.rpartition(".")[0]
    if kind == "channels":  # what samples up and down checks its width
        for dim, key, side in ((1, "channels", "in_channels"), (0, "out_channels", "out_channels")):
            old = getattr(member.module, side)
            if dim in dims and "channels" in vars(modules[around]) and vars(modules[around]).get(key) == old:
                numbers.setdefault(around, {})[key] = len(dims[dim])
