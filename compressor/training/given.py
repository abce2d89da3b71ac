"""The model that a run is given, and the copy that it works on: in float32, and as the given one was again at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.adapter import Adapter, cloned
from compressor.errors import CompressorError, UsageError
from compressor.foreign.kept import undone
from compressor.foreign.sound import copied, refuse_empty, refuse_kept
from compressor.seeds import repeatable
from compressor.training.arithmetic import eagerly
from compressor.training.shards import local
from compressor.weights import HALF, cast_, check_finite, dtypes_of, float32_, sketch

_DIVERGED = 1000.0


@dataclass(frozen=True)
class Given:
    """How the given model was: the dtype of each floating-point tensor by name, and which parameters took gradients."""

    dtypes: Mapping[str, torch.dtype]
    trained: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """How `model` is."""
        return cls(dtypes_of(model), frozenset(n for n, value in model.named_parameters() if value.requires_grad))

    def returned(self, model: nn.Module) -> nn.Module:
        """`model`, in place, as the given one was, and in eval mode. Zeros stay zeros in every dtype.

        Raises CompressorError where a weight is too large for its dtype.
        """
        off: Any = getattr(model, "disable_gradient_checkpointing", None)  # models of diffusers
        if callable(off) and getattr(model, "is_gradient_checkpointing", False):
            off()
        model._compiled_call_impl = None
        cast_(model, self.dtypes)
        for name, value in model.named_parameters():
            value.requires_grad_(name in self.trained)
        return model.eval()


def student_of(model: nn.Module, steps: int, checkpointed: bool = False) -> nn.Module:
    """The copy of `model` that a run of so many `steps` prunes and trains: in training mode, and what is in half precision in float32.

    A BatchNorm in eval mode in a model in training mode was put there, and keeps its statistics. `checkpointed` is what
    `checkpointed_` does. Nothing trains a model in one shot (no steps), so that a frozen one is pruned like any other. Raises
    CompressorError as `refuse_untrainable` does, and where a weight is not finite.
    """
    refuse_untrainable(model, steps)
    refuse_kept(model)
    check_finite(model.state_dict(), type(model).__name__)
    student = float32_(copied(model))
    kept = [one for one in student.modules() if isinstance(one, _BatchNorm) and student.training and not one.training]
    student.train()
    for norm in kept:
        norm.eval()
    if checkpointed and steps:
        checkpointed_(student)
    return student if steps else unfrozen(student)


def refuse_untrainable(model: nn.Module, steps: int) -> None:
    """Raise CompressorError where `model` has no values, or weights that nothing can be computed with, or shall be trained for `steps`
    and has weights of another dtype than float32 and half precision."""
    refuse_empty(model.state_dict())
    for name, value in model.named_parameters() if steps else ():
        if value.requires_grad and value.dtype not in (torch.float32, *HALF):
            raise CompressorError(
                f"{name} is {value.dtype}: only float32 is trained, and float16 and bfloat16 through it",
                'Call model.float() first; dtype="bfloat16" then computes in bfloat16 and keeps the weights.',
            )
    refuse_8_bits(model)
    refuse_fused(model)


def refuse_fused(model: nn.Module) -> None:
    """Raise UsageError for attention whose projections diffusers fused: the fused ones are computed with, and those that they were
    made of are what is loaded again."""
    for name, module in model.named_modules():
        if getattr(module, "fused_projections", False) is True:
            raise UsageError(
                f"{name} has fused projections (fuse_qkv_projections()): what is pruned of them would not be loaded again",
                "Load the model anew, and fuse nothing: compressor.lower does that with the pruned model.",
            )


def refuse_8_bits(model: nn.Module) -> None:
    """Raise CompressorError for weights that are stored in 8-bit floating point, with which torch does not compute."""
    for name, value in model.named_parameters():
        if value.is_floating_point() and value.element_size() == 1:
            raise CompressorError(
                f"{name} is {value.dtype}, in which weights are stored and not computed with",
                "Load the model in float32, float16 or bfloat16 (without layerwise casting).",
            )


@dataclass
class Asked:
    """What a run was last asked, and what was to be answered; to be asked again when its model is checked.

    `scale` is what a loss is held against: the largest mean square that was to be answered so far, or the loss of the first step
    where that is larger. Before the first step it is 0, and nothing is judged by it.
    """

    inputs: Any = None
    wanted: Tensor | None = None
    scale: float = 0.0

    def note(self, inputs: Any, wanted: Tensor, loss: float) -> None:
        """A step was taken on `inputs` and more, whose answers were off by `loss`, without its weights, before it."""
        first = loss if self.wanted is None and not self.scale else 0.0
        self.inputs, self.wanted = inputs, wanted
        self.scale = max(self.scale, first, float(wanted.detach().float().square().mean()))


def teacher_of(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` frozen, in float32, on `device` and in eval mode. Parameters that are so already are shared, not copied: nobody
    writes to them. Buffers are its own: a forward may write to those."""
    shared = {id(value): nn.Parameter(value.detach(), requires_grad=False) for value in model.parameters()}
    return float32_(copied(model, shared)).to(device).eval()


def no_number(step: int, loss: float, parameters: Mapping[str, Tensor], steps: int) -> CompressorError:
    """The error of a run whose loss or gradients were not finite in the `steps` up to `step`."""
    bad = [n for n, p in parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    where = f"the gradient of {bad[0]} is not finite" if bad else "the gradient is finite"
    found = f"step {step}: the loss is {loss}, and {where}, {steps} steps in a row"
    return CompressorError(found, "Lower the learning rate, or check the data.")


def refuse_skipped(steps: int, done: int) -> None:
    """Raise CompressorError where the last `steps` of a run of `done` steps were skipped, which left its model as it was before."""
    if steps:
        raise CompressorError(
            f"step {done}: the run ends in {steps} steps whose loss or gradient was not finite",
            "Lower the learning rate, or check the data.",
        )


@torch.no_grad()
def check_result(model: nn.Module, adapter: Adapter, asked: Asked, step: int) -> None:
    """Raise CompressorError unless all weights of `model` are finite, and its answer to what was last `asked` is finite and off by
    less than a thousand times what is the scale of this run.

    A step that is too long leaves weights that are finite, and too large for any answer: its own loss, from before, does not tell.
    Who answers zeros is off by the mean square of what was wanted; a model that is only bad, one that training begins from scratch
    or that pruning broke, was as bad in the first step.
    """
    hint = "Lower the learning rate."
    check_finite({name: local(value) for name, value in model.state_dict().items()}, f"step {step}", hint)
    if asked.wanted is None:
        return
    training = [module for module in model.modules() if module.training]
    with repeatable("check", step, gpus=True), eagerly(model), undone(model):
        try:
            answer = adapter.predict(model.eval(), cloned(asked.inputs))
        finally:
            for module in training:
                module.training = True
    if not bool(answer.isfinite().all()):
        raise CompressorError(f"step {step}: the model's answer is not finite any more", hint)
    loss = float((answer.float() - asked.wanted.to(answer.device).float()).square().mean())
    if asked.scale and not loss <= _DIVERGED * asked.scale:
        largest = max(model.named_parameters(), key=lambda one: _magnitude(one[1]))[0]
        raise CompressorError(
            f"step {step}: diverged: the loss is {loss:.3g}, {loss / asked.scale:,.0f} times what it is held against (the mean square "
            f"of what was to be answered, or the first loss); the largest weights are those of {largest}",
            hint,
        )


def _magnitude(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.numel() else 0.0


def checkpointed_(model: nn.Module) -> nn.Module:
    """`model`, in place, that computes its blocks a second time in the backward pass instead of keeping what they need.

    Raises UsageError where it cannot: it is models of diffusers that can.
    """
    on: Any = getattr(model, "enable_gradient_checkpointing", None)
    try:
        if callable(on):
            on()
            return model
    except ValueError:  # diffusers' word for a class without it
        pass
    raise UsageError(
        f"{type(model).__name__} has no gradient checkpointing",
        "Leave train.gradient_checkpointing false; train.accumulate saves memory too.",
    )


def surveyed(model: nn.Module, steps: int) -> nn.Module:
    """What a run of so many `steps` finds layers in, for no memory: `model`, or where a student of it is not frozen, a sketch.

    Raises CompressorError where a weight of `model` is not finite.
    """
    check_finite(model.state_dict(), type(model).__name__)
    return model if steps or not _frozen(model) else unfrozen(sketch(model))


def _frozen(model: nn.Module) -> bool:
    return not any(value.requires_grad for value in model.parameters())


def unfrozen(model: nn.Module) -> nn.Module:
    """`model`, in place, whose parameters take gradients if none did: nothing is trained, so that a frozen model is pruned like any
    other. What is frozen beside what is not stays dense."""
    for value in model.parameters() if _frozen(model) else ():
        value.requires_grad_(value.is_floating_point())
    return model
