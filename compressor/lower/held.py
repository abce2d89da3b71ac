"""What a lowered model answers where it is asked for more than outputs: what its layers can tell, and a word where they cannot."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError, Refusal


@dataclass(frozen=True)
class HeldWeight:
    """What a model may ask of the `weight` or the `bias` of a layer that was lowered, as some cast their inputs to its dtype."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name!r} of a lowered layer's weight: a kernel has packed it; the model that was lowered has the weight"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Without its numbers. That it has this keeps nn.TransformerEncoderLayer from computing with its layers' weights itself."""
        raise CompressorError(
            f"{getattr(func, '__name__', func)} of a lowered layer's weight: a kernel has packed it",
            "Call the layer instead, or leave it dense; the model that was lowered has the weight.",
        )


_ASKED = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "groups")


def answer(module: nn.Module, dense: nn.Module) -> None:
    """Let `module` answer as the layer `dense` does, in whose place it comes, but for its numbers."""
    module.register_state_dict_pre_hook(_refuse_taken)  # type: ignore[no-untyped-call]
    first = next(dense.parameters(), None)
    # some look for the dtype of the first one that there is
    if first is not None and next(module.parameters(), None) is None:
        module.register_parameter("held", nn.Parameter(first.new_empty(0), requires_grad=False))
    for name in ("weight", "bias"):
        held = getattr(dense, name, None)
        if isinstance(held, Tensor):
            held = HeldWeight(held.shape, held.dtype, held.device)
        if hasattr(dense, name) and not hasattr(module, name):
            setattr(module, name, held)
    for name in _ASKED:
        if hasattr(dense, name) and not hasattr(module, name):
            setattr(module, name, getattr(dense, name))


def _refuse_taken(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise CompressorError where diffusers or transformers take the state of a model to save it, or to make another model of it: they
    would go on without the weights of lowered layers, with random ones in their place. Torch does not say who asks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        asked, home = frame.f_code.co_name, str(frame.f_globals.get("__name__")).partition(".")[0]
        if asked.startswith(_TAKE) and home in ("diffusers", "transformers"):
            raise CompressorError(
                f"{asked}: {prefix.rstrip('.') or 'the model'} is lowered ({type(module).__name__}), its weights packed",
                "Give the model that was lowered, which is as it was (remove() of what compressor.apply gave puts it back), and lower "
                "what comes of it.",
            )
        frame = frame.f_back


_TAKE = ("save_pretrained", "from_unet", "from_transformer", "load_lora")
"""How the functions begin that take all weights of a model."""


_LORA = (
    "and a LoRA's products are not in its kernels",
    "Merge the LoRA into the weights (fuse_lora, then unload_lora_weights), and lower what comes of that.",
)
_METHODS = {
    "enable_layerwise_casting": (
        "and what its kernels have packed is not cast",
        "Leave it out: max_error=... of compressor.lower makes weights smaller, and faster.",
    ),
    "fuse_qkv_projections": (
        "and its projections are packed one by one",
        "Lower the model with compressor.lower(..., fuse_projections=True).",
    ),
    **dict.fromkeys(("add_adapter", "load_adapter", "load_lora_adapter", "load_attn_procs"), _LORA),
}
"""Of models of diffusers and transformers."""


def refuse_methods(form: nn.Module) -> None:
    """Let methods of the lowered model `form` that look for plain layers and pass over others say so."""
    for name, (why, hint) in _METHODS.items():
        if callable(getattr(form, name, None)):
            vars(form)[name] = Refusal(f"{name}: the model is lowered, {why}", hint)
