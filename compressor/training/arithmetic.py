"""What a training step computes in: the precision of its passes, and which AdamW. Weights, averages and moments are float32 always."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from compressor.training.settings import Training

_CHOSEN = ("fused", "foreach", "capturable")
"""Which code of an optimizer runs: a matter of the device, and no part of its state."""


def precision(training: Training, device: torch.device) -> torch.dtype:
    """In what the forward and backward passes of student and teacher multiply: bfloat16 under autocast, or float32."""
    if training.dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.bfloat16 if training.dtype == "bfloat16" else torch.float32


def autocast(training: Training, device: torch.device) -> AbstractContextManager[Any]:
    """The context of a forward pass. Weights stay in float32, and so do gradients and all that an optimizer step touches."""
    # torch's own autocast: accelerate fixes one precision per process, and a second run may want another.
    enabled = precision(training, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def adamw(trained: Iterable[nn.Parameter], training: Training, device: torch.device) -> torch.optim.AdamW:
    """The optimizer of `trained` on `device`: one fused kernel on GPUs, where a kernel for each of its dozen operations reads and
    writes everything again. On a CPU torch's own choice stays: its fused AdamW rounds otherwise, and runs would not repeat."""
    fused = True if device.type == "cuda" else None
    return torch.optim.AdamW(
        list(trained), lr=training.lr, betas=training.betas, weight_decay=training.weight_decay, fused=fused
    )


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the `state_dict` of an optimizer into `optimizer`, which goes on with the code of its own device.

    Keys of `state["state"]` may be strings, as JSON has them.
    """
    own = [{key: group[key] for key in _CHOSEN if key in group} for group in optimizer.param_groups]
    groups = [{**group, **chosen} for group, chosen in zip(state["param_groups"], own, strict=True)]
    moments = {int(index): value for index, value in state["state"].items()}
    optimizer.load_state_dict({**state, "param_groups": groups, "state": moments})


def described(training: Training, device: torch.device) -> dict[str, str]:
    """What numbers depend on besides versions and hardware, for `run.json`."""
    dtype = precision(training, device)
    return {
        "passes": "bfloat16 (autocast)" if dtype == torch.bfloat16 else "float32",
        "optimizer": "AdamW, fused" if device.type == "cuda" else "AdamW",
    }
