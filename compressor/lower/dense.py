"""The dense forms that a sparse kernel has to beat: the layer as it is, oneDNN with a packed weight, cuBLASLt with a GELU.

On the CPU torch lays a weight out anew, or multiplies by a slower library, on every call; packed once, the same dense
layer can be twice as fast. A speed-up over the first alone would be no speed-up.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.lower.backend import Backend, Kind, Unit, exporting, other_input, refuse_gradients
from compressor.lower.dense_operators import PackedWeight, packed

_DTYPES = (torch.float32, torch.bfloat16)


class Eager(Backend):
    """The layer as it is."""

    name = "eager"
    takes = frozenset(Kind)
    skips_zeros = False

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refusal(self, unit: Unit) -> str | None:
        return None

    def build(self, unit: Unit) -> nn.Module:
        return unit.module


class OneDNN(Backend):
    """oneDNN with weights packed beforehand, and GELU in its epilogue: the best dense form of a layer on a CPU."""

    name = "onednn"
    skips_zeros = False

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"oneDNN runs on CPUs, the model is on {device}"
        return None if torch._C._has_mkldnn else "this torch has no oneDNN"

    def refusal(self, unit: Unit) -> str | None:
        if unit.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 on this processor"
        if unit.dtype not in _DTYPES:
            return f"oneDNN takes float32 and bfloat16 here, not {unit.dtype}"
        for layer in unit.layers:
            if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
                return f"padding {layer.padding} ({layer.padding_mode}) is not oneDNN's"
        return None

    def build(self, unit: Unit) -> nn.Module:
        if isinstance(unit.module, nn.Conv2d):
            return PrepackedConv(unit.module, unit.input_shape)
        tokens, layers = unit.tokens, unit.layers
        if len(layers) == 1:
            return PrepackedLinear(layers[0], tokens)
        gelu = PrepackedLinear(layers[0], tokens, unit.activation.approximate)
        return nn.Sequential(gelu, PrepackedLinear(layers[1], tokens))


class DenseGelu(Backend):
    """A feed-forward pair on an NVIDIA GPU whose GELU is done by cuBLASLt with the first product: the best dense form of it there.

    cuBLASLt has the GELU by tanh alone.
    """

    name = "dense-gelu"
    takes = frozenset({Kind.PAIR})
    skips_zeros = False

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"cuBLASLt runs on NVIDIA GPUs, the model is on {device}"
        return None if torch.version.hip is None else "this torch is for AMD GPUs, where this was never tried"

    def refusal(self, unit: Unit) -> str | None:
        if unit.dtype not in (torch.bfloat16, torch.float16):
            return f"a GELU by cuBLASLt was tried with products of 16 bits, not {unit.dtype}: lower with dtype=torch.bfloat16"
        if unit.activation.approximate != "tanh":
            return "its GELU is the exact one: cuBLASLt has only the one by tanh"
        return "its first layer has no bias, which cuBLASLt adds before a GELU" if unit.layers[0].bias is None else None

    def build(self, unit: Unit) -> nn.Module:
        if reason := self.refusal(unit):
            raise CompressorError(f"{unit.name} has no GELU by cuBLASLt: {reason}")
        first, second = unit.layers
        return nn.Sequential(LinearGelu(first), copy.deepcopy(second).requires_grad_(False))


class LinearGelu(nn.Module):
    """x (..., in) -> GELU by tanh of (..., out), for inference, by one product on a GPU."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.detach().clone())
        assert layer.bias is not None
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        out: Tensor = torch.ops.compressor.linear_gelu(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return out.reshape(*x.shape[:-1], self.weight.shape[0])


class _Immutable(nn.Module):
    """Holds a weight that torch can neither copy nor move, and that nothing changes: copies of a model share it."""

    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        # Opaque to torch's copying and moving, and packed for this processor: an attribute, not a buffer.
        self.packed, self.number = weight, weight.number
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Immutable:
        copied = copy.copy(self)
        copied._buffers = dict(self._buffers)
        copied.register_buffer("bias", None if self.bias is None else self.bias.clone())
        return copied

    def get_extra_state(self) -> Tensor:
        """Which weight this is. A state has no weight itself, and belongs to a model of the same."""
        return torch.tensor(self.number, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Raises CompressorError where `state` is that of another weight."""
        if not isinstance(state, Tensor) or state.is_meta or int(state) != self.number:
            raise CompressorError(
                "a state of a model lowered otherwise, or of other weights", "Lower the dense model again instead."
            )

    def _apply(self, fn: Any, recurse: bool = True) -> _Immutable:
        asked = fn(torch.empty(0, dtype=self.packed.dtype))
        if asked.dtype != self.packed.dtype or asked.device.type != "cpu":
            raise CompressorError("a lowered model was cast or moved", "Lower the dense model there instead.")
        return self


class PrepackedLinear(_Immutable):
    """A Linear whose weight lies as oneDNN wants it for about `tokens` rows; `gelu` is the `approximate` of the GELU that follows."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, tokens: int, gelu: str = "") -> None:
        super().__init__(packed(layer.weight, (tokens,)), layer.bias)
        self.attribute, self.algorithm = "gelu" if gelu else "none", gelu

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        if x.dtype != self.packed.dtype:
            return self.forward(_cast(x, self.packed.dtype)).to(x.dtype)
        attribute, algorithm = self.attribute, self.algorithm
        if exporting():
            out = F.linear(x, self.packed.plain(), self.bias)
            return F.gelu(out, approximate=algorithm) if attribute == "gelu" else out
        if torch.compiler.is_compiling():
            known: Tensor = torch.ops.compressor.packed_linear(x, self.bias, self.number, attribute, algorithm)
            return known
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed.tensor, self.bias, attribute, [], algorithm)
        return made


class PrepackedConv(_Immutable):
    """A convolution whose weight lies as oneDNN wants it for inputs of about `input_shape`."""

    def __init__(self, layer: nn.Conv2d, input_shape: tuple[int, ...]) -> None:
        padding, stride, dilation = (list(map(int, pair)) for pair in (layer.padding, layer.stride, layer.dilation))
        where = (padding, stride, dilation, layer.groups)
        super().__init__(packed(layer.weight, (*where, list(input_shape))), layer.bias)
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        if x.dtype != self.packed.dtype:
            return self.forward(_cast(x, self.packed.dtype)).to(x.dtype)
        if x.dim() == 3:  # an image without a batch
            return self.forward(x[None])[0]
        if exporting():
            padding, stride, dilation, groups = self.where
            return F.conv2d(x, self.packed.plain(), self.bias, stride, padding, dilation, groups)
        if torch.compiler.is_compiling():
            known: Tensor = torch.ops.compressor.packed_conv(x, self.bias, self.number, *self.where)
            return known
        weight = self.packed.tensor
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.where, "none", [], "")
        return out


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x, which came in another dtype than the layer's, as autocast makes it, in that."""
    if x.dtype not in _DTYPES:
        raise other_input(str(x.dtype), "float32 or bfloat16")
    return x.to(dtype)
