"""The groups of channels that a model can do without, and the counts that norms and heads allow of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compressor.adapter import Adapter
from compressor.errors import CompressorError
from compressor.sparsity.layers import Layer, reached
from compressor.weights import ties

from .checks import HALF, Trial
from .graph import Channels, Member, Refused, Together
from .removal import Group, least

_FUSED = ("qkv", "to_qkv")
_PROJECTIONS = (*_FUSED, "to_q", "to_k", "to_v", "q", "k", "v", "q_proj", "k_proj", "v_proj", "query", "key", "value")


@dataclass(frozen=True, eq=False)
class Found:
    """The groups of a model that can be made narrower, and why the other layers that make channels keep theirs, by name."""

    groups: list[Group]
    left: Mapping[str, str]


def find_groups(model: nn.Module, adapter: Adapter, multiple: int) -> list[Group]:
    """The groups of `model` that can be made narrower. Raises CompressorError where there is none, with the reasons."""
    found = survey_groups(model, adapter, multiple)
    if not found.groups:
        reasons = [f"{name}: {reason}" for name, reason in found.left.items()]
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        shown = "; ".join(reasons[:3]) + more if reasons else "it has no Linear or convolution"
        raise CompressorError(
            f"structured: the model has no inner width that can be made narrower ({shown})",
            "Ignore less, target more, or make more of it trainable (requires_grad).",
        )
    return found.groups


def survey_groups(model: nn.Module, adapter: Adapter, multiple: int) -> Found:
    """The groups of `model`: for each layer that makes channels, all layers that have the same channels.

    A group is taken in only if two things hold. Every layer in it is of a kind from which channels can be removed. And a trial
    succeeds: a copy of the model with random weights, from which part of the group is removed, answers exactly as the copy in
    which no layer reads that part. So what a model answers stays, and so do the streams of transformers, which every token's
    LayerNorm sees as a whole: of those, heads and hidden widths go.
    Raises CompressorError where the model cannot be traced.
    """
    channels = Channels(model, adapter)
    tied = ties(model)
    fixed = {*tied, *tied.values(), *(name for name, value in model.named_parameters() if not value.requires_grad)}
    trial = Trial(model, adapter)
    groups: list[Group] = []
    left: dict[str, str] = {}
    done: set[int] = set()
    for root in channels.roots():
        if id(root) in done:
            continue
        try:
            together = channels.together(root)
            done.update(id(member.module) for member in together.members if member.out)
            _refuse_fixed(together.members, fixed, adapter)
            groups.append(_working(together, model, multiple, trial))
        except Refused as refused:
            left[channels.layers[id(root)]] = str(refused)
    return Found(_fitting(groups, trial, left), left)


def _working(together: Together, model: nn.Module, multiple: int, trial: Trial) -> Group:
    """The group of what goes `together`, tried out: channels of any place; else, where the model splits them, as many of each
    part. Raises Refused where the model works with neither.
    """
    reason = Refused()
    for parts in sorted({1, together.parts}):
        try:
            group = _group(together, model, multiple, parts)
            for density in (HALF, 1 - group.step / group.parts.shape[1]):
                trial.check([group], density)
            return group
        except Refused as refused:
            reason = refused
    raise reason


def _fitting(groups: Sequence[Group], trial: Trial, left: dict[str, str]) -> list[Group]:
    """The `groups` that can be made narrower all at once; why others cannot is noted in `left`."""
    kept: list[Group] = []
    try:
        trial.check(groups, HALF)
        return list(groups)
    except Refused:
        for group in groups:
            try:
                trial.check([*kept, group], HALF)
                kept.append(group)
            except Refused as refused:
                left[group.members[0].name] = f"together with other layers, {refused}"
    return kept


def _refuse_fixed(members: Sequence[Member], fixed: set[str], adapter: Adapter) -> None:
    """Raise Refused where a tensor is `fixed` (shared or frozen), or the run's rules leave out a layer that makes channels."""
    for member in members:
        for name in member.tensors:
            if name in fixed:
                raise Refused(f"{name} is frozen, or shared by two layers")
        if member.out:
            weight = getattr(member.module, "weight", None)
            layer = Layer(f"{member.name}.weight", member.name, member.module, weight, None)  # type: ignore[arg-type]
            follows = "in_channels" in member.counts or not {"out_features", "out_channels"} & set(member.counts)
            if not reached(layer, () if follows else adapter.targets, adapter.ignore):
                raise Refused(f"the rules of this run leave out {member.name}")


def _group(together: Together, model: nn.Module, multiple: int, parts: int) -> Group:
    """What may be removed of channels that go `together`: as many of each of so many `parts`.

    Raises Refused where norms or heads allow nothing.
    """
    members, first, _ = together
    width = len(first)
    if width < 2:
        raise Refused("it has one channel")
    attention = next((found for member in members if (found := _heads(member, model)) is not None), None)
    if attention is not None:
        owner, heads, fused = attention
        if heads < 2 or width % (fused * heads):
            raise Refused(f"{owner or 'the model'} has {heads} heads, of which none can go from {width} channels")
        by_head = torch.arange(width).view(fused, heads, -1).transpose(0, 1).reshape(1, heads, -1)
        head = torch.empty(width, dtype=torch.long).index_put((by_head[0],), torch.arange(heads)[:, None])
        if not torch.equal(head, head[first]):
            raise Refused(f"{owner or 'the model'} mixes its heads")
        return Group(width, members, by_head, 1, owner)
    counts = first.bincount()
    firsts = counts.nonzero().flatten()
    if len(counts[firsts].unique()) > 1:  # type: ignore[no-untyped-call]
        raise Refused("some of its channels only go with others, and some go alone")
    pieces = math.lcm(parts, *(m.module.num_groups for m in members if isinstance(m.module, nn.GroupNorm)))
    if len(firsts) % pieces or len(firsts) == pieces:
        raise Refused(f"of its {len(firsts)} channels none can go, as the model splits them into {pieces}")
    items = len(firsts) // pieces
    step = multiple // math.gcd(multiple, pieces) if len(firsts) % multiple == 0 else 1
    if items % step or items == step:
        step = 1
    group = Group(width, members, first.argsort(stable=True).view(pieces, items, -1), step, None)
    _refuse_shifts(group)
    return group


def _refuse_shifts(group: Group) -> None:
    """Raise Refused where a GroupNorm has channels of this group alone, and one would change to another of the norm's groups."""
    dropped = least(group, torch.arange(group.width).flip(0), group.step)
    for member in group.members:
        if isinstance(member.module, nn.GroupNorm) and len(member.own) == member.width:
            stays = torch.ones(member.width, dtype=torch.bool)
            stays[member.own[torch.isin(member.root, dropped)]] = False
            norm_groups = stays.view(member.module.num_groups, -1).sum(1)
            if int(norm_groups.min()) != int(norm_groups.max()):
                raise Refused(f"{member.name} would sort its channels into other groups")


def _heads(member: Member, model: nn.Module) -> tuple[str, int, int] | None:
    """(the attention's name, its heads, 3 where queries, keys and values are one layer) where `member` makes one of those."""
    owner, _, own = member.name.rpartition(".")
    if not member.out or own not in _PROJECTIONS or "weight" not in {key.rpartition(".")[2] for key in member.tensors}:
        return None
    found = vars(model.get_submodule(owner))
    heads = found.get("heads", found.get("num_heads"))
    return (owner, heads, 3 if own in _FUSED else 1) if isinstance(heads, int) else None
