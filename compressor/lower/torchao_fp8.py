"""2:4 in fp8 on Hopper by torchao's CUTLASS kernel, which scales tokens and channels and adds the bias itself.

With cuSPARSELt the result of an 8-bit product is read and written once more to be scaled. Source: torchao 0.18.0, `torchao/ops.py` and
the checks in its `rowwise_scaled_linear_sparse_cutlass.cuh`.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError, first_line
from compressor.lower.backend import Backend, Unit, was_cast
from compressor.lower.cusparselt import no_sparse_product
from compressor.lower.quantised import QuantisedLinear, by_products, digest, matrix, too_exact
from compressor.sparsity.codes import quantised

_PRODUCT = "torchao::rowwise_scaled_linear_sparse_cutlass_f8f8"
_INSTALL = 'pip install "diffusion-compressor[torchao]"'
_DTYPE = torch.float8_e4m3fn
_OUT, _IN = 64, 128
"""Sides that its packer need not pad."""
_CHECKED = 1024


class SparseFp8(QuantisedLinear):
    """x (..., in) -> (..., out), for inference. Raises CompressorError where the kernel does not give weights and bias back."""

    packed: Tensor
    meta: Tensor
    scales_itself = True

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        codes, scale = quantised(matrix(layer), _DTYPE)
        super().__init__(scale, layer.bias, _DTYPE)
        operators: Any = torch.ops.torchao
        packed, meta = operators.to_sparse_semi_structured_cutlass_sm9x_f8(codes)
        # As bytes: a cast of the model must not touch them.
        self.register_buffer("packed", packed.view(torch.uint8))
        self.register_buffer("meta", meta)
        self._verify(codes, layer.weight.dtype)

    @property
    def out(self) -> int:
        return self.packed.shape[0]

    def product(self, codes: Tensor) -> Tensor:
        """codes (tokens, in) times the weight's codes: (tokens, out) in bfloat16."""
        ones = torch.ones_like(self.scale)
        return self._multiplied(codes, codes.new_ones(codes.shape[0], dtype=torch.float32), ones, None, torch.bfloat16)

    def scaled(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        if self.bias is not None and self.bias.dtype != dtype:
            raise was_cast()
        return self._multiplied(codes, scale.flatten(), self.scale, self.bias, dtype)

    def _multiplied(
        self, codes: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if not codes.shape[0]:
            return codes.new_empty((0, self.out), dtype=dtype)
        operators: Any = torch.ops.torchao
        out: Tensor = operators.rowwise_scaled_linear_sparse_cutlass_f8f8(
            codes.contiguous(), rows.contiguous(), self.packed.view(_DTYPE), self.meta, columns, bias, dtype
        )
        return out

    def _verify(self, codes: Tensor, dtype: torch.dtype) -> None:
        """Multiply by the identity: every output is one code, exactly. And zeros, with one bias and another."""
        inner = codes.shape[1]
        for start in range(0, inner, _CHECKED):
            count = min(_CHECKED, inner - start)
            identity = torch.zeros(count, inner, device=codes.device)
            identity[torch.arange(count), torch.arange(start, start + count)] = 1
            found = self.product(identity.to(_DTYPE))
            if not torch.equal(found.float(), codes[:, start : start + count].t().float()):
                raise CompressorError("torchao's kernel does not give a weight back as it was packed", _OTHER)
        zeros, one = torch.zeros(8, inner, device=codes.device).to(_DTYPE), torch.ones(8, device=codes.device)
        for own in () if self.bias is None else (self.bias, self.bias.flip(0) + 1, self.bias):
            if not torch.equal(self._multiplied(zeros, one, self.scale, own.contiguous(), dtype), own.expand(8, -1)):
                raise CompressorError("torchao's kernel adds another bias than it is given", _OTHER)


_OTHER = "It would compute something else: use another version of torchao."


class TorchaoFp8(Backend):
    """2:4 composed with fp8 on Hopper. Weights are quantised per output channel, inputs per token as they come."""

    name = "torchao-fp8"
    quantises = True
    products = "fp8"

    @property
    def version(self) -> str:  # type: ignore[override]
        with suppress(PackageNotFoundError):
            return f"{version('torchao')} {digest()}"
        return ""

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"torchao's sparse fp8 kernel runs on NVIDIA GPUs, the model is on {device}"
        if torch.version.hip is not None:
            return "this torch is for AMD GPUs, where this kernel does not exist"
        if (capability := torch.cuda.get_device_capability(device))[0] != 9:
            return f"torchao's sparse fp8 kernel is for Hopper (9.0), this is compute capability {capability[0]}.{capability[1]}"
        if find_spec("torchao") is None:
            return f"torchao is not installed here: {_INSTALL}"
        try:
            import_module("torchao")
        except Exception as error:
            return f"torchao cannot be imported: {first_line(error)}"
        if not _has_kernel():
            return "torchao's kernels did not load: install the version for this torch"
        return None

    def refusal(self, unit: Unit) -> str | None:
        return too_exact(unit) or no_sparse_product(unit, _OUT, _IN)

    def build(self, unit: Unit) -> nn.Module:
        if reason := self.refusal(unit):
            raise CompressorError(f"{unit.name} has no form in sparse fp8: {reason}")
        return by_products(unit, SparseFp8)


def _has_kernel() -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(_PRODUCT, "CUDA"))
    except RuntimeError:  # no such operator
        return False
