"""The GPU backends: 2:4 weights on NVIDIA's sparse tensor cores, through cuSPARSELt as torch ships it.

A weight (out, in) is packed once, unpacked again to see that nothing was lost, and multiplied by an algorithm that was
searched for this very product (see `cusparselt_tuning`). Any V:2:4 is 2:4. Tokens are padded where the library wants a
multiple of 8 (16 for 8-bit types); the bias is added by the library. Two more backends compose 2:4 with int8 and fp8:
they quantise weights per output channel and inputs per token, so what they give differs by more than rounding.

torch keeps one cuSPARSELt handle for a thread, tied to the GPU that was current when it first ran: use one GPU per process.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.lower import cusparselt_direct, cusparselt_library
from compressor.lower.backend import Backend, Unit, other_input, refuse_gradients, was_cast
from compressor.lower.cusparselt_direct import Plans
from compressor.lower.cusparselt_tuning import (
    Algorithm,
    Product,
    Tuned,
    mixed_dtype,
    multiply,
    search_together,
    tuned,
)
from compressor.lower.operators import define
from compressor.lower.quantised import QuantisedLinear, by_products, digest, matrix, no_product, products_of, too_exact
from compressor.sparsity.codes import quantised
from compressor.sparsity.pattern import NM, Pattern

_PATTERN = NM(2, 4)
_ERROR = 1e-2  # relative, of a plan against torch's call: roundings of 16 bits
_CHECKED = 1024  # columns of a weight that are unpacked at a time; a multiple of 16

# --- The operator: one argument list for every version of torch, and opaque to compilers. ---


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, algorithm: Sequence[int]) -> Tensor:
    if not x.shape[0]:
        return _fake_linear(x, packed, bias, out, algorithm)
    return multiply(packed.view(x.dtype), x.contiguous(), bias, Algorithm.of(algorithm))


def _fake_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out: int, algorithm: Sequence[int]) -> Tensor:
    return x.new_empty((x.shape[0], out), dtype=mixed_dtype(x.dtype) or x.dtype)


define("cslt_linear(Tensor x, Tensor packed, Tensor? bias, int out, int[] algorithm) -> Tensor", _fake_linear, _linear)

# --- Weights. ---


class Packed(nn.Module):
    """A 2:4 weight (out, in) of a 16-bit or 8-bit dtype, packed, with the algorithm that multiplies `tokens` rows by it.

    Raises CompressorError where the library packs it into something else.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, tokens: int, plans: Plans | None = None) -> None:
        super().__init__()
        self.plans: Plans | None = None  # until what torch's operators give has been checked
        self.out, self.inner = weight.shape
        self.dtype = weight.dtype
        self.multiple = _multiple_of(weight.dtype)
        product = _product_of(tokens, self.out, self.inner, weight.dtype, bias is not None)
        self.tokens = product.tokens
        self.told = False  # that another number of tokens came
        self.tuned: Tuned = tuned(product, weight.device.index or 0)
        packed = torch._cslt_compress(weight.contiguous())
        # As bytes: they hold indices besides numbers, and a cast of the model must not touch them.
        self.register_buffer("packed", packed.view(torch.uint8))
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._verify(weight)
        if plans is not None:
            self._plan(plans, weight)

    def forward(self, rows: Tensor) -> Tensor:
        """rows (tokens, in) -> (tokens, out): bfloat16 for 8-bit rows, else of their dtype."""
        refuse_gradients(rows)
        if rows.dtype != self.dtype or rows.shape[-1] != self.inner:
            found = f"{rows.dtype} of shape {tuple(rows.shape)}"
            raise other_input(found, f"{self.dtype} with {self.inner} channels")
        if self.bias is not None and self.bias.dtype != self.dtype:
            raise was_cast()
        if not torch.compiler.is_compiling():
            self._tell(rows.shape[0])
        return self._product(rows)

    def _product(self, rows: Tensor) -> Tensor:
        tokens = rows.shape[0]
        padded = _padded(rows, -tokens % self.multiple)
        # What was searched for one number of tokens need not exist for another.
        algorithm = self.tuned.algorithm if padded.shape[0] == self.tokens else self.tuned.otherwise
        given = (padded, self.packed, self.bias, self.out, algorithm.numbers)
        operators: Any = torch.ops.compressor
        plans = self.plans
        out: Tensor = (
            operators.cslt_linear(*given) if plans is None else operators.cslt_planned(*given, plans.number, plans.gelu)
        )
        return out[:tokens]

    def _plan(self, plans: Plans, weight: Tensor) -> None:
        """Take `plans` from here on, after the same checks, and one of the GELU. Raises CompressorError where one fails."""
        rows = torch.randn(self.tokens, self.inner, generator=torch.Generator().manual_seed(0)).to(weight)
        wanted = self._product(rows).float()
        if plans.gelu is not None:
            self.plans = Plans()
            self._verify(weight)
            wanted = F.gelu(wanted, approximate=plans.gelu)
        plans.fitted(rows, self.out, self.bias, self.tuned.algorithm)
        self.plans = plans
        if plans.gelu is None:
            self._verify(weight)
        error = float((self._product(rows).float() - wanted).norm() / wanted.norm().clamp_min(1e-30))
        if not error <= _ERROR:
            raise CompressorError(f"{_library_is()}, planned, is off by {error:.1e}", _OTHER)

    def _tell(self, tokens: int) -> None:
        """Warn once where the algorithm that was searched is not the one that runs."""
        if self.told or not tokens or tokens + -tokens % self.multiple == self.tokens or self.tuned.median_ms is None:
            return
        self.told = True
        warnings.warn(
            f"a lowered layer was tuned for {self.tokens} rows and got {tokens}: it takes the library's default algorithm, which may "
            "be slower than dense. Lower the model for the size that it is used with.",
            stacklevel=3,
        )

    def extra_repr(self) -> str:
        note = f", {self.tuned.note}" if self.tuned.note else ""
        return f"{self.inner}, {self.out}, {self.dtype}, algorithm {self.tuned.algorithm}{note}"

    def _verify(self, weight: Tensor) -> None:
        """Multiply by the identity, in both ways that `forward` has: every output is one entry of the weight, exactly. And zeros,
        with one bias and another: every row is the bias, exactly, the one of this call."""
        bias, self.bias = self.bias, None
        for tokens in sorted({self.tokens, _CHECKED}):
            for start in range(0, self.inner, min(tokens, _CHECKED)):
                count = min(tokens, _CHECKED, self.inner - start)
                identity = torch.zeros(count, self.inner, device=weight.device)
                identity[torch.arange(count), torch.arange(start, start + count)] = 1
                found = self._product(_padded(identity.to(self.dtype), tokens - count))[:count].float()
                if not torch.equal(found, weight[:, start : start + count].t().float()):
                    raise CompressorError(f"{_library_is()} does not give a weight back as it was packed", _OTHER)
            zeros = torch.zeros(tokens, self.inner, device=weight.device).to(self.dtype)
            for own in () if bias is None else (bias, bias.flip(0) + 1, bias):
                self.bias = own.contiguous()
                if not torch.equal(self._product(zeros), own.expand(tokens, -1)):
                    raise CompressorError(f"{_library_is()} adds another bias than it is given", _OTHER)
            self.bias = None
        self.bias = bias


def _multiple_of(dtype: torch.dtype) -> int:
    """What the library wants numbers of tokens to be multiples of."""
    return 16 if dtype.itemsize == 1 else 8


def _product_of(tokens: int, out: int, inner: int, dtype: torch.dtype, bias: bool) -> Product:
    """The product that is run for so many tokens."""
    padded = tokens + -tokens % _multiple_of(dtype)
    return Product(padded, out, inner, str(dtype).removeprefix("torch."), bias)


_OTHER = "It would compute something else: use another version of torch."


def _library_is() -> str:
    return f"cuSPARSELt {cusparselt_library.described()}".strip()


def _padded(rows: Tensor, missing: int) -> Tensor:
    """rows (tokens, in) with `missing` more rows of zeros."""
    if not missing:
        return rows
    return F.pad(rows.contiguous().view(torch.uint8), (0, 0, 0, missing)).view(rows.dtype)  # float8 has no padding


class SparseLinear(nn.Module):
    """x (..., in) -> (..., out), for inference."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, tokens: int, plans: Plans | None = None) -> None:
        super().__init__()
        self.packed = Packed(matrix(layer), layer.bias, tokens, plans)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.packed(x.reshape(-1, x.shape[-1]))
        return out.reshape(*x.shape[:-1], self.packed.out)


class QuantisedSparseLinear(QuantisedLinear):
    """x (..., in) -> (..., out), for inference, in 2:4 products of 8 bits: `dtype` is int8 or float8_e4m3fn."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, tokens: int, dtype: torch.dtype) -> None:
        codes, scale = quantised(matrix(layer), dtype)
        super().__init__(scale, layer.bias, dtype)
        self.packed = Packed(codes, None, tokens)

    @property
    def out(self) -> int:
        return self.packed.out

    def product(self, codes: Tensor) -> Tensor:
        found: Tensor = self.packed(codes)
        return found


# --- The backends. ---


class CuSparseLt(Backend):
    """2:4 weights in bfloat16 and float16 on the sparse tensor cores of NVIDIA GPUs.

    float16 was once reported to end in illegal instructions on Hopper. No source was found, and the search for algorithms would tell:
    it tries them in another process.
    """

    name = "cusparselt"

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"cuSPARSELt runs on NVIDIA GPUs, the model is on {device}"
        return cusparselt_library.missing(device)

    def remark(self, device: torch.device) -> str | None:
        return cusparselt_library.remark(device)

    @property
    def version(self) -> str:  # type: ignore[override]
        return cusparselt_library.described()

    def refusal(self, unit: Unit) -> str | None:
        return self._wrong_dtype(unit) or no_sparse_product(unit, self._multiple, self._multiple)

    def left(self, pattern: Pattern) -> float:
        return max(pattern.density, 0.5)  # the hardware multiplies two of four, also where 1:4 and 2:8 keep fewer

    def build(self, unit: Unit) -> nn.Module:
        if reason := self.refusal(unit):
            raise CompressorError(f"{unit.name} has no form on sparse tensor cores: {reason}")
        return by_products(unit, lambda layer: self._linear(layer, unit.tokens))

    def prepare(self, units: Sequence[Unit]) -> None:
        """Search all their algorithms in one process."""
        found = [self._product(unit, layer) for unit in units for layer in unit.layers]
        search_together(found, units[0].device.index or 0)

    def _product(self, unit: Unit, layer: nn.Linear | nn.Conv2d) -> Product:
        out, inner = layer.weight.shape[:2]
        return _product_of(unit.tokens, out, inner, unit.dtype, layer.bias is not None)

    _multiple = 16

    def _wrong_dtype(self, unit: Unit) -> str | None:
        if unit.dtype in (torch.bfloat16, torch.float16):
            return None
        return f"sparse tensor cores take {unit.dtype} as 1:2 in reduced precision, if at all: lower with dtype=torch.bfloat16"

    def _linear(self, layer: nn.Linear | nn.Conv2d, tokens: int) -> nn.Module:
        return SparseLinear(layer, tokens)


class CuSparseLtDirect(CuSparseLt):
    """The same products, planned once through nvmath-python, a GELU between two of them by the library too.

    16 bits alone. For int8 the library could scale output channels, but not tokens: a pass over the result would stay.
    """

    name = "cusparselt-direct"

    def unavailable(self, device: torch.device) -> str | None:
        return super().unavailable(device) or cusparselt_direct.missing()

    def build(self, unit: Unit) -> nn.Module:
        if isinstance(unit.module, nn.Sequential) and self.refusal(unit) is None:
            first, second = unit.layers
            with suppress(CompressorError):  # the library has no GELU for every type: it stays between then
                fused = SparseLinear(first, unit.tokens, Plans(unit.activation.approximate))
                return nn.Sequential(fused, self._linear(second, unit.tokens))
        return super().build(unit)

    def _linear(self, layer: nn.Linear | nn.Conv2d, tokens: int) -> nn.Module:
        return SparseLinear(layer, tokens, Plans())


class CuSparseLtQuantised(CuSparseLt):
    """2:4 composed with 8-bit products: `dtype` is int8 or float8_e4m3fn.

    Weights are quantised per output channel, inputs per token as they come. What that changes is no rounding error of the
    layer's own precision, so it is for those who ask for it.
    """

    quantises = True
    _multiple = 32

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.products = dtype, products_of(dtype)
        self.name = f"cusparselt-{self.products}"

    @property
    def version(self) -> str:  # type: ignore[override]
        return f"{super().version} {digest()}".strip()

    def unavailable(self, device: torch.device) -> str | None:
        return super().unavailable(device) or cusparselt_library.missing_8_bits(device, self.dtype)

    def _wrong_dtype(self, unit: Unit) -> str | None:
        return too_exact(unit)

    def _product(self, unit: Unit, layer: nn.Linear | nn.Conv2d) -> Product:
        out, inner = layer.weight.shape[:2]
        return _product_of(unit.tokens, out, inner, self.dtype, False)

    def _linear(self, layer: nn.Linear | nn.Conv2d, tokens: int) -> nn.Module:
        return QuantisedSparseLinear(layer, tokens, self.dtype)


def int8() -> CuSparseLtQuantised:
    """2:4 weights in int8 on NVIDIA GPUs, by cuSPARSELt."""
    return CuSparseLtQuantised(torch.int8)


def fp8() -> CuSparseLtQuantised:
    """2:4 weights in fp8 on NVIDIA GPUs, by cuSPARSELt."""
    return CuSparseLtQuantised(torch.float8_e4m3fn)


def no_sparse_product(unit: Unit, rows: int, columns: int) -> str | None:
    """Why the unit's layers are no products of 2:4 weights (out, in) with `out` a multiple of `rows` and `in` of `columns`; None where
    they are."""
    for pattern, layer in zip(unit.patterns, unit.layers, strict=True):
        if isinstance(layer, nn.Conv2d) and (reason := no_product(layer)):
            return reason
        if pattern is None:
            return "its weight obeys no N:M pattern"
        if pattern.grouped is None or not _implies_2_4(pattern.grouped):
            return f"{pattern}: sparse tensor cores take rows of 2:4, as in 2:4 and 4:2:4"
        out, inner = layer.weight.shape[:2]
        if out % rows or inner % columns:
            wanted = (
                f"both must be multiples of {rows}"
                if rows == columns
                else f"multiples of {rows} and {columns} are needed"
            )
            return f"a weight of {out} x {inner}: {wanted}"
    return None


def _implies_2_4(pattern: NM) -> bool:
    """Whether four neighbours hold two nonzero entries at most, whatever the rows share."""
    return (pattern.m % 4 == 0 and pattern.n <= 2) or (pattern.n, pattern.m) == (1, 2)
