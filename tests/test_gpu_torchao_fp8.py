"""2:4 in fp8 by torchao's kernel: imitated behind torch's dispatcher, under torchao's own schemas."""

from __future__ import annotations

import copy
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from imitated import BF16, CUDA, FP8, FP16, error, normal, sparse_, unit
from torch import Tensor, nn

from compressor import NM, CompressorError, registry
from compressor.lower import quantised, torchao_fp8
from compressor.lower.torchao_fp8 import TorchaoFp8

SCHEMAS = (
    "rowwise_scaled_linear_sparse_cutlass_f8f8(Tensor input, Tensor input_scale, Tensor weight, Tensor weight_meta, "
    "Tensor weight_scale, Tensor? bias=None, ScalarType? out_dtype=None) -> Tensor",
    "to_sparse_semi_structured_cutlass_sm9x_f8(Tensor weight) -> (Tensor, Tensor)",
)
"""As torchao 0.18.0 declares them."""


class Kernel:
    """Keeps two of four values, and their places in the metadata; `fault` is what a faulty one would do to bias and result."""

    def __init__(self) -> None:
        self.calls = 0
        self.fault: Any = lambda out, bias: (out, bias)

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        assert weight.dtype == FP8 and weight.is_contiguous()
        out, inner = weight.shape
        groups = weight.float().view(out, inner // 4, 4)
        places = (groups != 0).to(torch.int8).argsort(dim=2, descending=True, stable=True)[..., :2].sort(dim=2).values
        kept = groups.gather(2, places).flatten(1).to(FP8)
        whole = (places[..., 0] + 4 * places[..., 1]).to(torch.uint8).view(out, inner // 8, 2)
        meta = torch.zeros(max(out, 64), max(inner // 8, 16), dtype=torch.uint8)
        meta[:out, : inner // 8] = whole[..., 0] + 16 * whole[..., 1]
        return kept, meta

    def multiply(self, x, x_scale, weight, meta, weight_scale, bias=None, out_dtype=None) -> Tensor:
        self.calls += 1
        out, half = weight.shape
        assert x.dtype == weight.dtype == FP8 and meta.dtype == torch.uint8 and x.is_contiguous()
        assert x.shape[-1] == 2 * half and x.shape[-1] % 32 == 0 and out % 8 == 0 and half % 8 == 0
        assert x_scale.dim() == x.dim() - 1 and x_scale.is_contiguous() and x_scale.shape == x.shape[:-1]
        assert x_scale.dtype == weight_scale.dtype == torch.float32 and weight_scale.numel() == out
        assert meta.shape == (max(out, 64), max(half // 4, 16)) and out_dtype in (BF16, FP16)
        assert bias is None or (bias.dtype == out_dtype and bias.shape == (out,) and bias.is_contiguous())
        codes = meta[:out, : half // 4]
        codes = torch.stack([codes % 16, codes // 16], 2).view(out, half // 2)
        places = torch.stack([codes % 4, codes // 4], 2).long()
        dense = torch.zeros(out, half // 2, 4).scatter_(2, places, weight.float().view(out, half // 2, 2)).flatten(1)
        result = (x.float() @ dense.t()) * x_scale[:, None] * weight_scale
        result, bias = self.fault(result, bias)
        return (result if bias is None else result + bias.float()).to(out_dtype)


def _faked(x, x_scale, weight, meta, weight_scale, bias=None, out_dtype=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


@pytest.fixture
def kernel(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("torchao's own kernels may be here")
    library = torch.library.Library("torchao", "FRAGMENT")
    made = Kernel()
    for schema, function in zip(SCHEMAS, (made.multiply, made.pack), strict=True):
        name = schema.partition("(")[0]
        known = hasattr(torch.ops.torchao, name)  # by torchao itself, where it was imported: without kernels, on a CPU
        if not known:
            library.define(schema)
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        if not known and function == made.multiply:
            torch.library.register_fake(f"torchao::{name}", _faked, lib=library)

    module = ModuleType("torchao")
    module.__spec__ = ModuleSpec("torchao", None)
    monkeypatch.setitem(sys.modules, "torchao", module)
    yield made
    library._destroy()


def test_where_it_is_there(machine, monkeypatch):
    backend = registry.backend("torchao-fp8")
    assert isinstance(backend, TorchaoFp8) and backend.quantises
    assert "the model is on cpu" in str(backend.unavailable(torch.device("cpu")))
    machine((8, 9), 801)
    assert "is for Hopper (9.0), this is compute capability 8.9" in str(backend.unavailable(CUDA))
    machine((9, 0), 801, hip="6")
    assert "AMD" in str(backend.unavailable(CUDA))
    machine((9, 0), None)
    if find_spec("torchao") is None:
        assert "diffusion-compressor[torchao]" in str(backend.unavailable(CUDA)) and backend.version == ""
    monkeypatch.setattr(torchao_fp8, "find_spec", lambda name: name)
    monkeypatch.setattr(torchao_fp8, "import_module", lambda name: 1 / 0)
    assert "cannot be imported: division by zero" in str(backend.unavailable(CUDA))
    monkeypatch.setattr(torchao_fp8, "import_module", lambda name: None)
    monkeypatch.setattr(torchao_fp8, "_has_kernel", lambda: False)
    assert "kernels did not load" in str(backend.unavailable(CUDA))
    monkeypatch.setattr(torchao_fp8, "version", lambda name: "0.18.0")
    assert backend.version.split() == ["0.18.0", quantised.digest()]


def test_with_its_kernels_it_is_there(machine, kernel):
    machine((9, 0), None)
    assert TorchaoFp8().unavailable(CUDA) is None


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_nearly_the_dense_one(kernel, dtype, bias):
    layer = sparse_(nn.Linear(128, 64, bias=bias))
    lowered = TorchaoFp8().build(unit(layer, (8, 128), dtype=dtype))
    before = kernel.calls
    for shape in ((8, 128), (2, 3, 128), (5, 128), (0, 128)):
        x = normal(*shape, dtype=dtype)
        out = lowered(x)
        assert out.shape == (*shape[:-1], 64) and out.dtype == dtype
        if out.numel():
            wanted = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
            assert error(out, wanted) < 0.06
    assert kernel.calls == before + 3  # one call each: nothing is scaled afterwards


def test_a_pair_and_a_1x1_convolution(kernel):
    pair = nn.Sequential(sparse_(nn.Linear(128, 256)), nn.GELU(), sparse_(nn.Linear(256, 128))).to(BF16)
    x = normal(8, 128, dtype=BF16)
    assert error(TorchaoFp8().build(unit(pair, (8, 128)))(x), copy.deepcopy(pair).double()(x.double())) < 0.1
    layer = sparse_(nn.Conv2d(128, 64, 1)).to(BF16)
    x = normal(2, 128, 3, 3, dtype=BF16)
    wanted = F.conv2d(x.double(), layer.weight.double(), layer.bias.double())
    assert error(TorchaoFp8().build(unit(layer, (2, 128, 3, 3)))(x), wanted) < 0.06


@pytest.mark.parametrize(
    ("module", "pattern", "dtype", "reason"),
    [
        (nn.Linear(128, 32), NM(2, 4), BF16, "a weight of 32 x 128: multiples of 64 and 128 are needed"),
        (nn.Linear(64, 64), NM(2, 4), BF16, "a weight of 64 x 64"),
        (nn.Linear(128, 64), NM(4, 8), BF16, "4:8: sparse tensor cores"),
        (nn.Linear(128, 64), NM(2, 4), torch.float32, "less than torch.float32 promises"),
        (nn.Conv2d(128, 64, 3), NM(2, 4), BF16, "stays dense"),
    ],
)
def test_what_it_does_not_take(module, pattern, dtype, reason):
    given = unit(module, (8, 128), pattern, dtype)
    assert reason in str(TorchaoFp8().refusal(given))
    with pytest.raises(CompressorError, match="no form in sparse fp8"):
        TorchaoFp8().build(given)


def test_a_packer_that_loses_an_entry_is_found_out(kernel):
    layer = sparse_(nn.Linear(2048, 64)).to(BF16)
    with torch.no_grad():
        layer.weight[63, 2044:] = 1.0
    with pytest.raises(CompressorError, match="does not give a weight back"):
        TorchaoFp8().build(unit(layer, (8, 2048)))


@pytest.mark.parametrize(
    "fault", [lambda out, bias: (out, None), lambda out, bias: (out, None if bias is None else 2 * bias)]
)
def test_a_bias_that_is_not_added_as_given_is_found_out(kernel, fault):
    kernel.fault = fault
    with pytest.raises(CompressorError, match="another bias than it is given"):
        TorchaoFp8().build(unit(sparse_(nn.Linear(128, 64)), (8, 128)))


def test_gradients_and_casts_are_refused(kernel):
    lowered = TorchaoFp8().build(unit(sparse_(nn.Linear(128, 64)), (8, 128)))
    with pytest.raises(CompressorError, match="for inference"):
        lowered(normal(8, 128, dtype=BF16).requires_grad_())
    with pytest.raises(CompressorError, match="was cast"):
        copy.deepcopy(lowered).half()(normal(8, 128, dtype=FP16))
    with pytest.raises(CompressorError, match="was cast"):
        lowered(normal(8, 128, dtype=FP16))


@pytest.mark.slow
def test_it_works_under_compile(kernel):
    lowered = TorchaoFp8().build(unit(sparse_(nn.Linear(128, 64)), (8, 128)))
    compiled: Any = torch.compile(lowered, backend="aot_eager", fullgraph=True)
    x = normal(8, 128, dtype=BF16)
    with torch.no_grad():
        assert torch.equal(compiled(x), lowered(x))
    torch.compiler.reset()
