"""The gathered form of V:N:M layers, in plain PyTorch operators: it needs no compiler, and exports to ONNX as it is.

The V output rows of a group share their kept channels. With activations laid out channel by channel those channels are
whole rows in memory, so copying them together is cheap, and what follows is an ordinary product of N / M the size:

    out[group] (V, tokens) = values[group] (V, kept) @ x^T[index[group]] (kept, tokens) + bias[group]

A few groups are taken at a time. Alone they are too small for several threads; all at once, as one batched product, the
copies leave the cache, which at V = 64 costs all that was gained.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.lower.backend import Backend, Unit, exporting
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.pattern import NM
from compressor.sparsity.venom import Venom

SMALLEST_V = 16
"""With fewer rows to a group, copying its channels costs far more than the smaller product saves."""
GAINING_V = 64
"""From about here on it is faster than the dense layer: on a CPU, in eager PyTorch and in ONNX Runtime."""

_ROWS = 512  # output channels of a product, about; and no more than this many groups
_MOST_GROUPS = 4


class _Groups(nn.Module):
    """The output channels of a few groups. `values` is (groups, V, kept), `index` (groups * kept,), `bias` (groups, V, 1)."""

    values: Tensor
    index: Tensor
    bias: Tensor | None

    def __init__(self, values: Tensor, index: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("index", index)
        self.register_buffer("bias", bias)

    def forward(self, xt: Tensor) -> Tensor:
        """xt (in, tokens) -> (groups * V, tokens)."""
        gathered = rearrange(xt.index_select(0, self.index), "(g k) t -> g k t", g=len(self.values))
        out = self.values @ gathered
        return rearrange(out if self.bias is None else out + self.bias, "g v t -> (g v) t")


class Product(nn.Module):
    """`weight @ xt + bias` for a V:N:M weight (out, in) and bias (out,): xt (in, tokens) -> (out, tokens).

    Raises CompressorError where the weight does not obey the pattern.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, pattern: NM) -> None:
        super().__init__()
        weight = weight.detach()
        pattern.verify(weight)
        self.out_features, self.in_features = weight.shape
        # Exactly N of M survive, also where kept entries happen to be zero.
        keep = pattern.survivors(weight.abs())[:: pattern.v]
        index = keep.nonzero()[:, 1].view(len(keep), -1)
        rows = rearrange(weight, "(g v) i -> g v i", v=pattern.v)
        values = rows.gather(2, index[:, None].expand(-1, pattern.v, -1))
        at_once = max(1, min(_MOST_GROUPS, _ROWS // pattern.v))
        parts = [range(start, min(start + at_once, len(rows))) for start in range(0, len(rows), at_once)]
        biases = None if bias is None else bias.detach().view(len(rows), pattern.v, 1)
        self.parts = nn.ModuleList(
            _Groups(
                values[part.start : part.stop].clone(),
                index[part.start : part.stop].flatten().clone(),
                None if biases is None else biases[part.start : part.stop].clone(),
            )
            for part in parts
        )

    def forward(self, xt: Tensor) -> Tensor:
        outs = [part(xt) for part in self.parts]
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class GatheredLinear(nn.Module):
    """A Linear with a V:N:M weight (out, in): x (..., in) -> (..., out), for inference.

    Raises CompressorError where the weight does not obey the pattern.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, pattern: NM) -> None:
        super().__init__()
        self.product = Product(weight, bias, pattern)

    def forward(self, x: Tensor) -> Tensor:
        return _tokens_first(self.product(_channels_first(x)), x)


class GatheredPair(nn.Module):
    """Linear, GELU, Linear: x (..., in) -> (..., out). The hidden activations stay channel by channel in between."""

    def __init__(self, first: Product, activation: nn.GELU, second: Product) -> None:
        super().__init__()
        self.first, self.activation, self.second = first, activation, second

    def forward(self, x: Tensor) -> Tensor:
        return _tokens_first(self.second(self.activation(self.first(_channels_first(x)))), x)


class GatheredConv1x1(nn.Module):
    """A 1x1 convolution with a V:N:M weight (out, in, 1, 1): x ([batch,] in, height, width) -> ([batch,] out, height, width)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, pattern: NM) -> None:
        super().__init__()
        self.product = Product(weight.flatten(1), bias, pattern)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.movedim(-3, 0)
        out: Tensor = self.product(channels.flatten(1))
        return _laid_out(out.reshape(len(out), *channels.shape[1:]).movedim(0, -3))


def _channels_first(x: Tensor) -> Tensor:
    """(..., in) -> (in, tokens), laid out anew: rows that lie together are what makes gathering them cheap."""
    return x.reshape(-1, x.shape[-1]).t().contiguous()


def _tokens_first(out: Tensor, x: Tensor) -> Tensor:
    """(out, tokens) -> (..., out), with the leading dims of `x`."""
    return _laid_out(out.t()).reshape(*x.shape[:-1], out.shape[0])


def _laid_out(out: Tensor) -> Tensor:
    """`out`, in memory as a dense layer leaves it where it is exported: there that costs nothing, and what follows may look at
    strides, as complex numbers do."""
    return out.contiguous() if exporting() else out


class Gathered(Backend):
    """V:N:M weights with many rows to a group (V from 16), in plain PyTorch operators. Needs no compiler; exports to ONNX."""

    name = "gathered"

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refusal(self, unit: Unit) -> str | None:
        for pattern, layer in zip(unit.patterns, unit.layers, strict=True):
            if pattern is None:
                return "its weight obeys no N:M pattern"
            if isinstance(pattern, Venom):
                return pattern.no_kernel
            if isinstance(pattern, Clustered):
                return f"{pattern}: rows that share a choice are not neighbours, so no group of them is one product"
            if pattern.v < SMALLEST_V:
                return (
                    f"{pattern} shares a choice between too few rows: gathering needs V of {SMALLEST_V} at least, "
                    f"and gains from {GAINING_V} on, as in {GAINING_V}:{pattern.n}:{pattern.m}"
                )
            if isinstance(layer, nn.Conv2d) and (reason := _no_product(layer)):
                return reason
        return None

    def build(self, unit: Unit) -> nn.Module:
        if reason := self.refusal(unit):
            raise CompressorError(f"{unit.name} has no gathered form: {reason}")
        pairs = [(layer, p) for layer, p in zip(unit.layers, unit.patterns, strict=True) if isinstance(p, NM)]
        if isinstance(unit.module, nn.Sequential):
            first, second = (Product(layer.weight, layer.bias, pattern) for layer, pattern in pairs)
            return GatheredPair(first, nn.GELU(unit.activation.approximate), second)
        ((layer, pattern),) = pairs
        kind = GatheredConv1x1 if isinstance(layer, nn.Conv2d) else GatheredLinear
        return kind(layer.weight, layer.bias, pattern)


def _no_product(layer: nn.Conv2d) -> str | None:
    """Why a convolution is more than a product of its weight with every pixel; None where it is not."""
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups"
    if layer.kernel_size != (1, 1):
        return f"a kernel of {layer.kernel_size}: only (1, 1) has a gathered form"
    if layer.stride != (1, 1) or layer.padding not in ((0, 0), "same", "valid"):
        return f"stride {layer.stride}, padding {layer.padding}: only stride 1 without padding has a gathered form"
    return None
