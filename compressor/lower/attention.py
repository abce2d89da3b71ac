"""Attention in a lowered model: torch's scaled dot-product attention, replaced where a module calls it.

Which module calls it, and on what, is seen in the example's forward. In the lowered model the module's forward runs under a mode that
hands those calls to the compiled kernels; a call that they do not take is torch's own, as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from compressor.lower.backend import Backend, Kind, Unit, has_tangent
from compressor.lower.vnm_kernels import unavailable, unavailable_without_vnni, version
from compressor.lower.vnm_operators import attention
from compressor.lower.vnm_weight import Lanes

LARGEST_CHANNELS = 2**30 // (127 * 255)
"""Of a head of queries and keys in bytes: a sum of products of codes up to 127 and 255 fits 31 bits, so that two differ by 32."""

function = F.scaled_dot_product_attention


def fits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether the kernels take this call of `scaled_dot_product_attention`: (images, heads, tokens, channels) in float32 on a CPU,
    whose channels follow each other, every query with every key, and no gradient wanted."""
    tensors = (query, key, value)
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return False
    if not all(type(t) is Tensor and t.dim() == 4 and t.dtype == torch.float32 and t.is_cpu for t in tensors):
        return False
    if (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) or any(map(has_tangent, tensors)):
        return False
    alike = query.shape[:2] == key.shape[:2] and key.shape[:3] == value.shape[:3] and query.shape[3] == key.shape[3]
    return alike and all(t.numel() and t.stride(3) == 1 for t in tensors)


class _Instead(TorchFunctionMode):
    """Calls of torch's attention go to the compiled kernels where they fit."""

    def __init__(self, lanes: Lanes) -> None:
        super().__init__()
        self.lanes = lanes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is function and not _others() and fits(*args, **kwargs):
            return _call(self.lanes, *args, **kwargs)
        if func is Tensor.unflatten:  # whose `super()` torch.compile does not follow under a mode
            func = torch.unflatten
        return func(*args, **kwargs)


def _others() -> bool:
    """Whether a mode around this one may want to see torch's own function, as diffusers' does that skips attention. Of those around a
    mode's own code, it is none itself; a default device is no such mode."""
    around: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(not isinstance(mode, (_Instead, DeviceContext)) for mode in around)


def _call(
    lanes: Lanes, query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float | None = None, **__: Any
) -> Tensor:
    return attention(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale, lanes)


class SelfAttention(nn.Module):
    """x (images, tokens, 3, heads, channels), the queries, keys and values as one Linear makes them -> (images, heads, tokens,
    channels): the dense form of a unit of attention."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.parts(x), scale=self.scale)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values in x, (images, heads, tokens, channels) each."""
        query, key, value = x.permute(2, 0, 3, 1, 4)
        return query, key, value

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class CrossAttention(SelfAttention):
    """The same where the keys and values are of other tokens, a prompt's for one: x (images, queries + 2 keys, heads, channels) holds
    the queries, then the keys, then the values."""

    def __init__(self, queries: int, scale: float | None = None) -> None:
        super().__init__(scale)
        self.queries = queries

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys = (x.shape[1] - self.queries) // 2
        query, key, value = torch.split(x.transpose(1, 2), [self.queries, keys, keys], 2)
        return query, key, value

    def extra_repr(self) -> str:
        return f"{self.queries} queries, {super().extra_repr()}"


class _Forward:
    """What `inner` does, a module's forward, with its attention by the compiled kernels."""

    def __init__(self, inner: Callable[..., Any], lanes: Lanes) -> None:
        self.inner, self.lanes = inner, lanes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Instead(self.lanes):
            return self.inner(*args, **kwargs)


class FusedAttention(nn.Module):
    """`SelfAttention` by the compiled kernels; `lanes`: what it multiplies, as `vnm_operators.attention` says."""

    def __init__(self, dense: SelfAttention, lanes: Lanes) -> None:
        super().__init__()
        self.dense, self.lanes = dense, lanes

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Forward(self.dense, self.lanes)(x)
        return out


def attach(model: nn.Module, at: str, fused: FusedAttention) -> None:
    """Let the module `at` of `model` call the kernels of `fused` where it calls torch's attention."""
    module = model.get_submodule(at)
    module.forward = _Forward(module.forward, fused.lanes)


class VNMAttention(Backend):
    """Attention of a few tokens at a time: queries in lanes, scores that never leave the cache, in float32."""

    name = "attention"
    skips_zeros = False
    takes = frozenset({Kind.ATTENTION})
    lanes = Lanes.FLOATS

    @property
    def version(self) -> str:  # type: ignore[override]
        return version()

    def unavailable(self, device: torch.device) -> str | None:
        return unavailable(device)

    def refusal(self, unit: Unit) -> str | None:
        return None

    def build(self, unit: Unit) -> nn.Module:
        assert isinstance(unit.module, SelfAttention)
        return FusedAttention(unit.module, self.lanes)


class VNMAttentionInt16(VNMAttention):
    """The same in whole numbers: queries, keys, values and their shares as codes of up to 16 bits, summed in 32."""

    name = "attention-int16"
    quantises = True
    products = "int16"
    lanes = Lanes.CODES


class VNMAttentionInt8(VNMAttentionInt16):
    """The same with queries and keys in 8 bits, on processors that sum products of bytes in 32: with VNNI."""

    name = "attention-int8"
    products = "int8"
    lanes = Lanes.BYTES

    def unavailable(self, device: torch.device) -> str | None:
        return unavailable_without_vnni(device, "attention-int16")

    def refusal(self, unit: Unit) -> str | None:
        channels = unit.input_shape[-1]
        if channels > LARGEST_CHANNELS:
            return f"{channels} channels of a head: scores of more than {LARGEST_CHANNELS} could leave 31 bits"
        return None
