"""A layer in 8-bit products, dense ones and 2:4 ones alike: what is around the product, and the dense opponents on a GPU.

Weights are quantised per output channel, inputs per token as they come. A speed-up that 2:4 has in 8 bits is only one over the same
8 bits without it: `dense-int8` and `dense-fp8` are those.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.lower.backend import Backend, Unit, refuse_gradients, was_cast
from compressor.lower.operators import define
from compressor.sparsity.codes import LARGEST, gelu_quantised, quantised
from compressor.sparsity.on_gpu import checked

_LEAST_ROWS = 32
"""Rows that a product of whole numbers is padded to: torch asks for more than 16."""

# --- Inputs in 8 bits: an operator, opaque to compilers, which would make two passes of it. ---


def kernels(index: int) -> ModuleType | None:
    """The module `triton_quantised` where it works on GPU `index`; None where torch has to do it."""
    return checked("compressor.lower.triton_quantised", index, "inputs are quantised by torch")


def _rows(
    x: Tensor, whole: bool, gelu: str, by_row: Tensor | None, by_column: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`gelu_quantised` of x (rows, in), or of what `rescaled` makes of it, in int8 where `whole`, else in fp8."""
    dtype = torch.int8 if whole else torch.float8_e4m3fn
    if (by_row is None) != (by_column is None) or (by_row is None and bias is not None):
        raise CompressorError("scales by row and by column go together, and a bias only with them")
    if x.is_cuda:
        on_gpu = kernels(x.get_device())
        if on_gpu is not None and on_gpu.takes(x):
            found: tuple[Tensor, Tensor] = on_gpu.quantised(x, dtype, gelu, by_row, by_column, bias)
            return found
    if by_row is not None:
        assert by_column is not None
        x = rescaled(x, by_row, by_column, bias, torch.float32)
    return gelu_quantised(x.contiguous(), dtype, gelu)


def _fake_rows(
    x: Tensor, whole: bool, gelu: str, by_row: Tensor | None, by_column: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.int8 if whole else torch.float8_e4m3fn)
    return codes, x.new_empty((x.shape[0], 1), dtype=torch.float32)


define(
    "quantised_rows(Tensor x, bool whole, str gelu, Tensor? by_row, Tensor? by_column, Tensor? bias) -> (Tensor, Tensor)",
    _fake_rows,
    _rows,
)

# --- Layers. ---


class QuantisedLinear(nn.Module):
    """x (..., in) -> (..., out), for inference, in 8-bit products.

    Each token and each output channel has its own scale: out = (codes of x) (codes of weight)^T scale_x scale_weight + bias.
    """

    scale: Tensor
    bias: Tensor | None
    scales_itself = False
    """Whether `scaled` is overridden: where the kernel of the product applies the scales and the bias."""

    def __init__(self, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("scale", scale.flatten())
        self.rescale = fused(rescaled)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    @abstractmethod
    def out(self) -> int:
        """Output channels."""

    @abstractmethod
    def product(self, codes: Tensor) -> Tensor:
        """codes (tokens, in) of `dtype` times the weight's codes: (tokens, out)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype. Raises CompressorError where gradients are wanted, or the model was cast."""
        refuse_gradients(x)
        return self.scaled(*self.codes_of(x), x.dtype).reshape(*x.shape[:-1], self.out)

    def codes_of(self, x: Tensor, gelu: str = "", *scales: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes (tokens, in) and scales (tokens, 1) of x (..., in), or of its GELU; with `scales` (by token, by channel, a bias), of
        what these make of x. Raises CompressorError where the model was cast."""
        if self.scale.dtype != torch.float32:
            raise was_cast()
        rows, given = x.reshape(-1, x.shape[-1]), scales or (None, None, None)
        found: tuple[Tensor, Tensor] = torch.ops.compressor.quantised_rows(rows, self.dtype == torch.int8, gelu, *given)
        return found

    def scaled(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The product with both scales and the bias: codes (tokens, in) with `scale` (tokens, 1) -> (tokens, out) in `dtype`."""
        out: Tensor = self.rescale(self.product(codes), scale, self.scale, self.bias, dtype)
        return out


class QuantisedPair(nn.Module):
    """Linear, GELU, Linear in 8-bit products: x (..., in) -> (..., out), for inference.

    What lies between the products is one pass: the first one's scales and bias, the GELU, the codes for the second.
    """

    def __init__(self, first: QuantisedLinear, gelu: str, second: QuantisedLinear) -> None:
        super().__init__()
        self.first, self.gelu, self.second = first, gelu, second

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype. Raises CompressorError where gradients are wanted, or the model was cast."""
        refuse_gradients(x)
        first, second = self.first, self.second
        codes, scale = first.codes_of(x)
        if first.scales_itself:
            codes, scale = second.codes_of(first.scaled(codes, scale, x.dtype), self.gelu)
        else:
            codes, scale = second.codes_of(first.product(codes), self.gelu, scale, first.scale, first.bias)
        return second.scaled(codes, scale, x.dtype).reshape(*x.shape[:-1], second.out)


class Conv1x1(nn.Module):
    """x ([batch,] in, height, width) -> ([batch,] out, height, width) through `linear`, a product for every pixel."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.movedim(-3, -1))
        return out.movedim(-1, -3)


def rescaled(out: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """out (tokens, out) times the scales `rows` (tokens, 1) and `columns` (out,), plus bias (out,), in `dtype`."""
    scaled = out.float() * rows * columns
    return (scaled if bias is None else scaled + bias.float()).to(dtype)


@cache
def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as one kernel where Triton is there to compile it; one operator after the other costs what 8 bits gain."""
    if torch.cuda.is_available() and find_spec("triton") is not None:
        compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
        return compiled
    return function


def by_products(unit: Unit, made: Callable[[nn.Linear | nn.Conv2d], nn.Module]) -> nn.Module:
    """The unit with each layer as `made` makes it: a module that takes (..., in)."""
    layers = [made(layer) for layer in unit.layers]
    if isinstance(unit.module, nn.Sequential):
        first, second = layers
        if isinstance(first, QuantisedLinear) and isinstance(second, QuantisedLinear):
            return QuantisedPair(first, unit.activation.approximate, second)
        return nn.Sequential(first, nn.GELU(unit.activation.approximate), second)
    return Conv1x1(layers[0]) if isinstance(unit.module, nn.Conv2d) else layers[0]


def no_product(layer: nn.Conv2d) -> str | None:
    """Why a convolution is no product for every pixel; None where it is."""
    if layer.kernel_size != (1, 1):
        return (
            f"a kernel of {layer.kernel_size} stays dense: laying its input out as a matrix costs more than 2:4 saves "
            "below about 850 output channels"
        )
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups"
    if layer.stride != (1, 1) or layer.padding not in ((0, 0), "same", "valid"):
        return f"stride {layer.stride}, padding {layer.padding}: only stride 1 without padding is a product"
    return None


def too_exact(unit: Unit) -> str | None:
    """Why products that give 16 bits are no form of `unit`; None where they are one."""
    if unit.dtype in (torch.bfloat16, torch.float16):
        return None
    return f"8-bit products give bfloat16, less than {unit.dtype} promises: lower with dtype=torch.bfloat16"


def matrix(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The weight (out, in), without negative zeros: packers have taken them for entries to keep, which makes three of four."""
    return layer.weight.detach().flatten(1) + 0.0


class _Dense(QuantisedLinear):
    """With a dense weight: `torch._int_mm`, and `torch._scaled_mm`, which scales and adds the bias by itself."""

    codes: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> None:
        codes, scale = quantised(matrix(layer), dtype)
        super().__init__(scale, layer.bias, dtype)
        # As bytes: a cast of the model must not touch them.
        self.register_buffer("codes", codes.view(torch.uint8))

    @property
    def out(self) -> int:
        return self.codes.shape[0]

    def product(self, codes: Tensor) -> Tensor:
        rows = codes.shape[0]
        if rows < _LEAST_ROWS:
            codes = F.pad(codes, (0, 0, 0, _LEAST_ROWS - rows))
        return torch._int_mm(codes, self.codes.view(self.dtype).t()).narrow(0, 0, rows)


class _DenseFp8(_Dense):
    scales_itself = True

    def scaled(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        if self.bias is not None and self.bias.dtype != dtype:
            raise was_cast()
        if not codes.shape[0]:
            return codes.new_empty((0, self.out), dtype=dtype)
        out = torch._scaled_mm(
            codes,
            self.codes.view(self.dtype).t(),
            scale_a=scale,
            scale_b=self.scale.unsqueeze(0),
            bias=None if self.bias is None else self.bias.bfloat16(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return out.to(dtype)


@cache
def digest() -> str:
    """Of what brings inputs to 8 bits, on which the times of all these backends depend."""
    found = hashlib.sha256()
    for name in ("quantised.py", "triton_quantised.py"):
        found.update((Path(__file__).parent / name).read_bytes())
    return found.hexdigest()[:8]


def products_of(dtype: torch.dtype) -> str:
    """How 8-bit products of `dtype` are called: int8 or fp8. Raises CompressorError where there are none."""
    if dtype not in LARGEST:
        raise CompressorError(f"no 8-bit products in {dtype}", "It is torch.int8 or torch.float8_e4m3fn.")
    return "int8" if dtype == torch.int8 else "fp8"


class DenseQuantised(Backend):
    """Dense products of `dtype`, int8 or float8_e4m3fn, on NVIDIA GPUs: what 2:4 in 8 bits has to beat."""

    skips_zeros = False
    quantises = True
    _multiple = 16

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.products = dtype, products_of(dtype)
        self.name = f"dense-{self.products}"

    @property
    def version(self) -> str:  # type: ignore[override]
        return digest()

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"these 8-bit products are those of NVIDIA GPUs, the model is on {device}"
        if torch.version.hip is not None:
            return "this torch is for AMD GPUs, where these products were never tried"
        capability, least = torch.cuda.get_device_capability(device), (8, 0) if self.dtype == torch.int8 else (8, 9)
        if capability < least:
            here, first = (".".join(map(str, one)) for one in (capability, least))
            return f"compute capability {here} has no {self.products} of this kind: {first} and later have"
        return None

    def refusal(self, unit: Unit) -> str | None:
        if reason := too_exact(unit):
            return reason
        for layer in unit.layers:
            if isinstance(layer, nn.Conv2d) and (reason := no_product(layer)):
                return reason
            out, inner = layer.weight.shape[:2]
            if out % self._multiple or inner % self._multiple:
                return f"a weight of {out} x {inner}: both must be multiples of {self._multiple}"
        return None

    def build(self, unit: Unit) -> nn.Module:
        if reason := self.refusal(unit):
            raise CompressorError(f"{unit.name} has no form in {self.products}: {reason}")
        made = _Dense if self.dtype == torch.int8 else _DenseFp8
        return by_products(unit, lambda layer: made(layer, self.dtype))


def dense_int8() -> DenseQuantised:
    """Dense products in int8, on GPUs: what 2:4 in 8 bits has to beat."""
    return DenseQuantised(torch.int8)


def dense_fp8() -> DenseQuantised:
    """Dense products in fp8, on GPUs: what 2:4 in 8 bits has to beat."""
    return DenseQuantised(torch.float8_e4m3fn)
