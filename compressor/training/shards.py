"""Weights of which each process has some rows (FSDP2): this process's part of a tensor, and the whole of it.

FSDP2 cuts every parameter along dim 0, as `torch.chunk` does, and holds the part in a DTensor. Patterns of groups along input channels
lie within rows, so that masks, estimators and averages of the parts are the parts of those of the whole. All functions here give
plain tensors back as they are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compressor.errors import UsageError
from compressor.sparsity.pattern import NM, Pattern


def is_cut(tensor: Any) -> bool:
    """Whether `tensor` is a DTensor. Where nothing has imported the class, which takes two seconds, none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this process has; it shares memory with it."""
    part: Any = tensor
    return part.to_local() if is_cut(tensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """The rows of `whole` that this process has of `like`."""
    if not is_cut(like):
        return whole
    cut: Any = like
    chunks = whole.chunk(cut.device_mesh.size())
    rank = cut.device_mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else whole[:0]


def cut_like(part: Tensor, like: Tensor) -> Tensor:
    """`part`, the rows that this process has, as a tensor that is cut like `like`."""
    if not is_cut(like):
        return part
    cut: Any = like
    return type(cut).from_local(  # type: ignore[no-any-return]
        part, cut.device_mesh, cut.placements, run_check=False, shape=cut.shape, stride=cut.stride()
    )


def count_like(count: Tensor, like: Tensor) -> Tensor:
    """`count`, of this process's part of `like`, as a tensor whose whole is the sum over all processes."""
    if not is_cut(like):
        return count
    from torch.distributed.tensor import Partial

    cut: Any = like
    return type(cut).from_local(count, cut.device_mesh, [Partial()], run_check=False)  # type: ignore[no-any-return]


def part_of_count(count: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a whole `count`, so that the sum over all processes is the count again."""
    cut: Any = like
    return count if not is_cut(like) or cut.device_mesh.get_local_rank() == 0 else torch.zeros_like(count)


def whole(value: Any, keep: bool = True) -> Any:
    """`value`, nested, with every tensor that is cut put together on the CPU; None in its place unless this process shall `keep` it.

    All processes of the mesh have to call it. One tensor at a time is whole on the device.
    """

    def joined(leaf: Any) -> Any:
        if not is_cut(leaf):
            return leaf
        full: Any = leaf.detach().full_tensor()
        return full.cpu() if keep else None

    return tree_map(joined, value)


def refuse_unlocal(pattern: Pattern, weights: Mapping[str, Tensor]) -> None:
    """Raise UsageError where a mask of `pattern` for one of `weights` that is cut cannot be chosen from a part alone."""
    for name, weight in weights.items():
        if is_cut(weight):
            cut: Any = weight
            refuse_cut(pattern, name, tuple(weight.shape), cut.device_mesh.size())


def refuse_cut(pattern: Pattern, name: str, shape: tuple[int, ...], size: int) -> None:
    """As `refuse_unlocal`, for a weight of `shape` that will be cut into `size` parts."""
    rows = -(-shape[0] // size)  # of every part but the last ones
    if not isinstance(pattern, NM):
        reason = f"{pattern} chooses among all rows of a weight"
    elif rows % pattern.v:
        reason = f"{pattern} groups {pattern.v} rows, and a process has {rows} of the {shape[0]}"
    elif rows * (size - 1) >= shape[0]:
        reason = f"its {shape[0]} rows leave nothing for some of the {size} processes"
    else:
        return
    raise UsageError(
        f"train.parallel fsdp: {name} {shape}: {reason}, and each process has its own rows alone",
        "Use a pattern N:M (or V:N:M where V divides the rows of a process), another number of processes, --ignore for this layer, "
        "or train.parallel=ddp where the model fits one device.",
    )


def fully_sharded_(module: nn.Module, device: torch.device) -> None:
    """Cut the parameters of `module`, in place, over all processes: block by block, so that one block is whole at a time.

    Blocks are the modules in a ModuleList that share no parameter with others; what is left is one more part. Parameters are
    moved to `device` part by part.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = list(_blocks(module))
    inside = {id(inner) for block in blocks for inner in block.modules()}
    users: Counter[int] = Counter()
    for block in blocks:
        users.update({id(parameter) for parameter in block.parameters()})
    for other in module.modules():
        if id(other) not in inside:
            users.update({id(parameter) for parameter in other.parameters(recurse=False)})
    for block in blocks:
        if all(users[id(parameter)] == 1 for parameter in block.parameters()):
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules in lists of `module` that have parameters."""
    for child in module.children():
        listed = isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList)
        if listed and any(True for _ in child.parameters()):
            yield child
        elif not listed:
            yield from _blocks(child)
