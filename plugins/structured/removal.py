"""From channels that go to what the engine carries out: the entries of each tensor that stay, and the counts that layers keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.sparsity.surgery import Surgery

from .graph import Member

_AROUND = {"in_channels": "channels", "out_channels": "out_channels"}


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can only be removed together, in all `members`.

    `parts` is (pieces, items, channels): of each piece, the same number of items has to stay, a multiple of `step`. An
    item is a channel; or several that only go together, as the two of a gate; or a head with all its channels.
    """

    width: int
    members: Sequence[Member]
    parts: Tensor
    step: int
    attention: str | None


def removal(model: nn.Module, groups: Sequence[Group], scores: Sequence[Tensor], density: float) -> Surgery:
    """The surgery that keeps, of each group, about the share `density` of its channels, those of the largest `scores`.

    What rounding to allowed counts adds to one group is taken from the next.
    """
    modules = dict(model.named_modules())
    numbers: dict[str, dict[str, int | tuple[int, ...]]] = {}
    lost: dict[tuple[str, bool], set[int]] = {}
    members: dict[tuple[str, bool], Member] = {}
    owed = 0.0
    for group, score in zip(groups, scores, strict=True):
        most = group.parts.shape[1] // group.step
        kept = min(most, max(1, round((density + owed) * most)))
        owed += density - kept / most
        dropped = least(group, score, kept * group.step)
        if group.attention is not None:
            numbers.setdefault(group.attention, {}).update(_fewer_heads(modules[group.attention], kept, most))
        for member in group.members:
            members[member.name, member.out] = member
            gone = member.own[torch.isin(member.root, dropped)].tolist()
            lost.setdefault((member.name, member.out), set()).update(gone)
    kept_entries: dict[str, dict[int, tuple[int, ...]]] = {}
    for key, entries in lost.items():
        if entries:
            member = members[key]
            staying = tuple(i for i in range(member.width) if i not in entries)
            for tensor, dim in member.tensors.items():
                kept_entries.setdefault(tensor, {})[dim] = staying
            _count(member, len(staying), modules, numbers)
    return Surgery(kept_entries, {name: own for name, own in numbers.items() if own})


def least(group: Group, score: Tensor, kept: int) -> Tensor:
    """The channels of `group` that go where `kept` items of each piece stay, those of the largest `score`."""
    by_item = score[group.parts].sum(-1)
    order = by_item.argsort(dim=1, descending=True, stable=True)
    return group.parts.gather(1, order[:, kept:, None].expand(-1, -1, group.parts.shape[2])).flatten()


def _fewer_heads(attention: nn.Module, kept: int, of: int) -> dict[str, int | tuple[int, ...]]:
    """What an attention has to know of its `kept` heads."""
    own = vars(attention)
    numbers: dict[str, int | tuple[int, ...]] = {"heads" if "heads" in own else "num_heads": kept}
    numbers |= {key: own[key] * kept // of for key in ("inner_dim", "inner_kv_dim") if key in own}
    return numbers | ({"sliceable_head_dim": kept} if "sliceable_head_dim" in own else {})


def _count(
    member: Member,
    width: int,
    modules: Mapping[str, nn.Module],
    numbers: dict[str, dict[str, int | tuple[int, ...]]],
) -> None:
    """Note the new `width` for `member`, and for a module around it that checks the width of what it samples up or down."""
    around = member.name.rpartition(".")[0]
    for count in member.counts:
        numbers.setdefault(member.name, {})[count] = width
        key = _AROUND.get(count, "")
        known = vars(modules[around])
        if "channels" in known and key in known and known[key] == getattr(member.module, count):
            numbers.setdefault(around, {})[key] = width
