"""The optimizer of a run, how its state is kept in a checkpoint, and what of a run lies in the machine's memory instead of a GPU's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import UsageError
from compressor.training.arithmetic import adamw
from compressor.training.muon import Muon
from compressor.training.settings import Training

_EIGHT = "eight-bit"
"""By what a state in 8 bits is known in a checkpoint; with it are the parts of torchao's tensor."""
_PARTS = ("codes", "scale", "qmap")


def optimizer_of(
    settings: Training, trained: Iterable[nn.Parameter], device: torch.device, matrices: Collection[Tensor] = ()
) -> torch.optim.Optimizer:
    """The optimizer of `settings` for what is `trained` on `device`; `matrices` are those of it that are weights of layers. Raises
    UsageError where it needs a package that is not there, and for settings that cannot hold together."""
    check_optimizer(settings)
    given: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer == "muon":
        return Muon(trained, matrices, **given)
    if settings.optimizer == "adamw":
        return Visiting(trained, **given) if "optimizer" in settings.offload else adamw(trained, settings, device)
    return _eight_bit()(list(trained), **given)


def check_optimizer(settings: Training) -> None:
    """Raise UsageError for settings of the optimizer, and of adapters, that cannot hold together. Needs no model."""
    lora, outside = settings.mode == "lora", "optimizer" in settings.offload
    if not lora and (idle := settings.lora.model_dump(exclude_defaults=True)):
        raise UsageError(f"train.lora.{next(iter(idle))} is of adapters", "Give train.mode=lora too.")
    if lora and "shadow" in settings.offload:
        raise UsageError("train.offload shadow with train.mode lora: adapters have no shadow", "Leave shadow out.")
    if settings.optimizer == "adamw-8bit" and outside:
        raise UsageError(
            "train.optimizer adamw-8bit with train.offload optimizer: a state in 8 bits stays where its weight is",
            "Leave one of the two out: offload takes all of the state off the GPU, adamw-8bit three quarters of it.",
        )
    apart = {
        "train.mode lora": lora,
        "train.parallel fsdp": settings.parallel == "fsdp",
        "train.offload optimizer": outside,
    }
    for what in (name for name, given in apart.items() if given and settings.optimizer == "muon"):
        raise UsageError(
            f"train.optimizer muon with {what}: its step is that of a whole matrix, with its momentum beside it",
            "Use train.optimizer=adamw, or leave the other out.",
        )


def _eight_bit() -> Callable[..., torch.optim.Optimizer]:
    """torchao's AdamW with moments in 8 bits, each block of 256 with a scale of its own; tensors below 4,096 entries in float32.

    A second moment below all codes of its block counts as the smallest of them (3.25e-7 of the largest), not as 0: divided by the
    root of 0, a first moment moves its weight by a hundred learning rates and more in one step.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError(
            "train.optimizer adamw-8bit needs torchao, which is not installed",
            'pip install "diffusion-compressor[torchao]"',
        ) from error

    class Plain(AdamW8bit):  # type: ignore[misc]
        """Without torch.compile: it would need a compiler, and minutes for each shape; and the same bytes come of every call."""

        def step(self, closure: Any = None) -> Any:
            for moments in self.state.values():
                if isinstance(codes := getattr(moments["exp_avg_sq"], "codes", None), Tensor):
                    codes.clamp_(min=1)
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Plain


class Visiting(torch.optim.Optimizer):
    """AdamW whose state is in the machine's memory: that of one tensor at a time goes to where the tensor is, for its own step.

    On a GPU the state then takes the room of the largest tensor's, for the time that all of it takes to go there and back at every
    step. The numbers are those of AdamW.
    """

    def __init__(self, trained: Iterable[nn.Parameter], **settings: Any) -> None:
        super().__init__(list(trained), settings)
        first = self.param_groups[0]["params"][0]
        # its hooks are its own: those of this optimizer are called once
        self._one = torch.optim.AdamW([first], **settings)
        self.register_load_state_dict_post_hook(lambda _: self._home())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all tensors that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                here = {name: _moved(name, value, weight.device) for name, value in self.state[weight].items()}
                self._one.param_groups[0].update({**group, "params": [weight]})
                self._one.state = defaultdict(dict, {weight: here})
                self._one.step()
                self.state[weight] = {name: _moved(name, value) for name, value in here.items()}
        self._one.state = defaultdict(dict)

    def _home(self) -> None:
        """Loading has put the state where the weights are."""
        for own in self.state.values():
            for name, value in own.items():
                own[name] = _moved(name, value)


def _moved(name: str, value: Any, device: torch.device | str = "cpu") -> Any:
    return value if name == "step" or not isinstance(value, Tensor) else value.to(device)  # AdamW counts on the CPU


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step have the learning rate `lr`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def stored(state: Any) -> Any:
    """The state of an optimizer in plain tensors, numbers, dicts and lists; `revived` is the inverse."""
    if isinstance(state, Mapping):
        return {key: stored(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [stored(value) for value in state]
    if type(state) is not Tensor and isinstance(state, Tensor) and all(hasattr(state, part) for part in _PARTS):
        return {_EIGHT: bool(state.signed), **{part: getattr(state, part) for part in _PARTS}}  # type: ignore[attr-defined]
    return state


def revived(state: Any) -> Any:
    """What `stored` was given, as `load_state_dict` takes it."""
    if isinstance(state, list):
        return [revived(value) for value in state]
    if not isinstance(state, Mapping):
        return state
    if _EIGHT in state:
        from torchao.optim.subclass_8bit import OptimState8bit

        return OptimState8bit(*(state[part] for part in _PARTS), state[_EIGHT], dtype=torch.float32)
    return {
        int(key) if isinstance(key, str) and key.isdecimal() else key: revived(value) for key, value in state.items()
    }


def dense_gradients(trained: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of those of `trained` that have one. Sparse ones, of nn.Embedding(sparse=True), become dense, in place: neither
    norms nor AdamW take them."""
    with_gradient = [weight for weight in trained if weight.grad is not None]
    for weight in with_gradient:
        if weight.grad.layout != torch.strided:  # type: ignore[union-attr]
            weight.grad = weight.grad.to_dense()  # type: ignore[union-attr]
    return [weight.grad for weight in with_gradient if weight.grad is not None]


@torch.no_grad()
def average_(average: Mapping[str, Tensor], values: Mapping[str, Tensor], share: float) -> None:
    """Move every tensor of `average`, in place and where it is, by `share` of the way to that of `values`."""
    if all(value.device == values[name].device for name, value in average.items()):
        torch._foreach_lerp_(list(average.values()), [values[name] for name in average], share)
        return
    for name, value in average.items():  # one at a time: all of them need not fit beside each other
        value.lerp_(values[name].to(value.device), share)
