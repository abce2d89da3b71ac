"""What a training step computes in: the precision of its passes, and which AdamW. Weights, averages and moments are float32 always."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from compressor.errors import CompressorError, UsageError, first_line
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


@contextmanager
def in_own_precision() -> Iterator[None]:
    """A context in which an autocast of the caller's has no part: numbers do not depend on where something is called."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """As `in_own_precision`; and gradients are there, also inside the caller's `no_grad` or `inference_mode`."""
    with in_own_precision(), torch.inference_mode(False), torch.enable_grad():
        yield


def compiled_(device: torch.device, *models: nn.Module | None) -> None:
    """Let `models` on `device`, in place, be called through torch.compile; names, state and weights stay theirs. None are left out.

    Each shape of inputs is compiled for itself, so that what a step computes does not depend on the shapes that came before: an
    interrupted run goes on to the bit. New weights and masks compile nothing: weights are inputs of what is compiled.
    Raises UsageError where torch.compile does not work on this machine.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # a missing compiler is told in many ways
        needs = "Triton" if device.type == "cuda" else "a C++ compiler"
        raise UsageError(
            f"train.compiled: torch.compile does not work here: {type(error).__name__}: {first_line(error)}",
            f"It needs {needs}; or leave train.compiled false.",
        ) from error
    for model in models:
        if model is not None:
            model.compile(dynamic=False)


def eagerly(model: nn.Module) -> AbstractContextManager[Any]:
    """A context in which calls of `model` run as written, though it may be compiled: for what is asked once."""
    if model._compiled_call_impl is None:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def adamw(trained: Iterable[nn.Parameter], training: Training, device: torch.device) -> torch.optim.AdamW:
    """The optimizer of `trained` on `device`: one fused kernel on GPUs, where a kernel for each of its dozen operations reads and
    writes everything again. On a CPU torch's own choice stays: its fused AdamW rounds otherwise, and runs would not repeat."""
    fused = True if device.type == "cuda" else None
    return torch.optim.AdamW(
        list(trained), lr=training.lr, betas=training.betas, weight_decay=training.weight_decay, fused=fused
    )


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the `state_dict` of an optimizer into `optimizer`, which goes on with the code of its own device.

    Keys of `state["state"]` may be strings, as JSON has them. Raises CompressorError for the state of another kind of optimizer.
    """
    shapes = [
        [(len(group["params"]), group.get("muon")) for group in one]
        for one in (state["param_groups"], optimizer.param_groups)
    ]
    if shapes[0] != shapes[1]:
        raise CompressorError(
            "the state is that of another optimizer",
            "Go on with the train.optimizer, and the layers, that it was saved with.",
        )
    groups = []
    for was, now in zip(state["param_groups"], optimizer.param_groups, strict=True):
        own = {key: value for key, value in now.items() if key in _CHOSEN or key not in was}
        groups.append({**was, **own})
    moments = {int(index): value for index, value in state["state"].items()}
    optimizer.load_state_dict({**state, "param_groups": groups, "state": moments})


def described(training: Training, device: torch.device) -> dict[str, str]:
    """What numbers depend on besides versions and hardware, for `run.json`."""
    dtype = precision(training, device)
    names = {"muon": "Muon for matrices, AdamW for the rest", "adamw-8bit": "AdamW, moments in 8 bits"}
    name = names.get(training.optimizer, "AdamW")
    fused = device.type == "cuda" and name == "AdamW" and "optimizer" not in training.offload
    return {
        "passes": ("bfloat16 (autocast)" if dtype == torch.bfloat16 else "float32") + ", compiled" * training.compiled,
        "optimizer": name + ", fused" * fused,
    }
