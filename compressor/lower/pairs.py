"""Feed-forward pairs: modules that are a Linear, a GELU and a Linear, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_ROUNDING = 1e-2
"""Relative: two ways to the same numbers differ by less, in every dtype."""


def chain_of(module: nn.Module, calls: list[Any], x: Any, result: Any) -> nn.Sequential | None:
    """Linear, GELU, Linear as one Sequential where that is all that `module` did with `x`; None otherwise."""
    linears = {id(m.weight): m for m in module.modules() if isinstance(m, nn.Linear)}
    steps: list[nn.Module] = []
    value = x
    for func, args, kwargs, out in calls:
        if not args or args[0] is not value:
            return None
        if func is F.linear or func is torch._C._nn.linear:
            layer = linears.get(id(args[1])) if len(args) > 1 else None
            if layer is None:
                return None
            steps.append(layer)
        elif func is F.gelu or func is torch._C._nn.gelu:
            steps.append(nn.GELU(kwargs.get("approximate", "none")))
        elif not (func is F.dropout and out is args[0]):  # in eval mode it gives back what it got
            return None
        value = out
    kinds = [type(step) for step in steps]
    return nn.Sequential(*steps) if value is result and kinds == [nn.Linear, nn.GELU, nn.Linear] else None


@torch.no_grad()
def is_chain(block: nn.Module, chain: nn.Module, shape: Sequence[int]) -> bool:
    """Whether a block is its chain for a single token too: its own code may do otherwise with few of them."""
    weight = next(chain.parameters())
    if weight.is_meta:
        return True
    rng = torch.Generator().manual_seed(0)
    x = torch.randn((1,) * (len(shape) - 1) + (shape[-1],), generator=rng).to(weight)
    try:
        own, wanted = block(x).float(), chain(x).float()
    except Exception:  # whatever it is, it is no chain
        return False
    return own.shape == wanted.shape and bool((own - wanted).abs().max() <= _ROUNDING * wanted.abs().max())
