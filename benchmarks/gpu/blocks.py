"""A model's repeated blocks, compiled one by one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def compiled(model: nn.Module, mode: str = "default") -> nn.Module:
    """A copy whose repeated blocks are compiled; what lies around them runs as it is."""
    torch.compiler.reset()
    form = copy.deepcopy(model)
    lists = [module for module in form.modules() if isinstance(module, nn.ModuleList)]
    kinds = {type(one) for own in lists for one in own if len(list(one.children())) > 1}  # not the layers of a block
    blocks = [name for name, module in form.named_modules() if type(module) in kinds]
    for name in blocks:
        if not any(name.startswith(f"{other}.") for other in blocks):
            block = form.get_submodule(name)
            block.register_forward_pre_hook(_in_rows)
            block.compile(mode=mode, dynamic=False)
    return form


def _in_rows(block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first block of a DiT gets a transposed image, all others what a block gives: each would be compiled for itself."""
    return tree_map_only(Tensor, lambda x: x.contiguous() if x.dim() == 3 else x, given)  # type: ignore[no-any-return]


def convolutional(model: nn.Module) -> bool:
    """Whether most of the weights are those of convolutions."""
    share = {
        kind: sum(m.weight.numel() for m in model.modules() if isinstance(m, kind)) for kind in (nn.Conv2d, nn.Linear)
    }
    return share[nn.Conv2d] > share[nn.Linear]
