"""Dense 8-bit products: the opponents of 2:4 in 8 bits. Their operators run on CPUs too, so the arithmetic is tried for real."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from imitated import BF16, CUDA, FP16, error, normal, unit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import compressor
from compressor import Backend, CompressorError, Plan
from compressor.lower import Unit, cusparselt, forms, quantised
from compressor.lower.backend import Kind
from compressor.lower.contest import Contest
from compressor.lower.dense import DenseGelu, LinearGelu
from compressor.lower.job import prepared
from compressor.lower.quantised import DenseQuantised, dense_fp8, dense_int8


def no_scales_per_token() -> bool:
    """Whether torch's fp8 products lack them on CPUs, as those of 2.10 and 2.11 do."""
    codes, scale = torch.ones(16, 32).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale, scale.t(), out_dtype=BF16)
    except RuntimeError:
        return True
    return False


FP8 = pytest.param(
    dense_fp8(),
    marks=pytest.mark.skipif(no_scales_per_token(), reason="torch has no scales per token on CPUs"),
    id="dense-fp8",
)
BACKENDS = pytest.mark.parametrize("backend", [pytest.param(dense_int8(), id="dense-int8"), FP8])


def allowed(backend: Any) -> float:
    return 2e-2 if backend.products == "int8" else 6e-2


@BACKENDS
@pytest.mark.parametrize("shape", [(40, 64), (5, 64), (64,), (2, 257, 64), (0, 64)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_is_nearly_the_layer(backend, shape, dtype, bias):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=bias).to(dtype)
    made = backend.build(unit(layer, (40, 64), None, dtype))
    x = normal(*shape, dtype=dtype)
    out = made(x)
    assert out.shape == (*shape[:-1], 32) and out.dtype == dtype
    if out.numel():
        wanted = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        assert 1e-3 < error(out, wanted) < allowed(backend)


@BACKENDS
def test_pairs_and_1x1_convolutions(backend):
    torch.manual_seed(0)
    pair: Any = nn.Sequential(nn.Linear(64, 128), nn.GELU("tanh"), nn.Linear(128, 64)).to(BF16)
    x = normal(3, 7, 64, dtype=BF16)
    assert error(backend.build(unit(pair, (3, 7, 64), None))(x), copy.deepcopy(pair).double()(x.double())) < 0.1
    conv: Any = nn.Conv2d(64, 32, 1).to(BF16)
    x = normal(2, 64, 6, 6, dtype=BF16)
    made = backend.build(unit(conv, (2, 64, 6, 6), None))
    assert error(made(x), F.conv2d(x.double(), conv.weight.double(), conv.bias.double())) < allowed(backend)


@BACKENDS
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_what_lies_between_two_products_is_one_pass(backend, approximate, monkeypatch):
    calls: list[tuple[str, bool]] = []
    real = quantised.gelu_quantised
    monkeypatch.setattr(
        quantised,
        "gelu_quantised",
        lambda x, dtype, gelu: (calls.append((gelu, x.dtype == BF16)), real(x, dtype, gelu))[1],
    )
    torch.manual_seed(0)
    pair: Any = nn.Sequential(nn.Linear(64, 128), nn.GELU(approximate), nn.Linear(128, 64)).to(BF16)
    made = backend.build(unit(pair, (3, 7, 64), None))
    x = normal(3, 7, 64, dtype=BF16)
    assert error(made(x), copy.deepcopy(pair).double()(x.double())) < 0.1
    # a product that scales itself gives bfloat16; the other's whole numbers are scaled on the way to the codes
    assert calls == [("", True), (approximate, made.first.scales_itself)]
    for shape in ((0, 64), (64,)):
        assert made(normal(*shape, dtype=BF16)).shape == shape
    compiled: Any = torch.compile(made, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), made(x))
    torch.compiler.reset()
    with pytest.raises(CompressorError, match="for inference"):
        made(x.requires_grad_())
    with pytest.raises(CompressorError, match="was cast"):
        copy.deepcopy(made).half()(normal(3, 7, 64, dtype=FP16))


@BACKENDS
def test_the_real_operators_take_what_they_are_given_on_a_gpu(backend):
    """torch's own checks of shapes, dtypes and layouts, with tensors that say they are on a GPU."""
    layer = nn.Linear(64, 32, device="meta")
    with FakeTensorMode():
        for name, shape in (("weight", (32, 64)), ("bias", (32,))):
            setattr(layer, name, nn.Parameter(torch.empty(shape, device="cuda", dtype=BF16)))
        made = backend.build(Unit("layer", layer, (5, 64), BF16, CUDA, (None,)))
        out = made(torch.empty(5, 64, device="cuda", dtype=BF16))
        assert out.shape == (5, 32) and out.dtype == BF16 and out.device.type == "cuda"


def test_times_depend_on_what_brings_inputs_to_8_bits():
    """By every backend that uses it: kept times are of another kernel otherwise."""
    backends = [dense_int8(), dense_fp8(), cusparselt.int8(), cusparselt.fp8()]
    assert all(backend.version.split()[-1] == quantised.digest() for backend in backends)
    assert cusparselt.CuSparseLt().version == cusparselt.int8().version.rpartition(" ")[0]


@BACKENDS
def test_gradients_and_casts_are_refused(backend):
    made = backend.build(unit(nn.Linear(64, 32), (8, 64), None))
    with pytest.raises(CompressorError, match="for inference"):
        made(normal(8, 64, dtype=BF16).requires_grad_())
    with pytest.raises(CompressorError, match="was cast"):
        copy.deepcopy(made).half()(normal(8, 64, dtype=FP16))


@pytest.mark.parametrize(
    ("capability", "integer", "floating"),
    [
        ((7, 5), "7.5 has no int8", "7.5 has no fp8"),
        ((8, 0), None, "8.0 has no fp8"),
        ((8, 9), None, None),
        ((9, 0), None, None),
    ],
)
def test_which_gpus_have_them(machine, capability, integer, floating):
    machine(capability, None)  # the library of 2:4 is not needed
    for backend, reason in ((dense_int8(), integer), (dense_fp8(), floating)):
        found = backend.unavailable(CUDA)
        assert (found is None) if reason is None else (found is not None and reason in found), found
        assert "the model is on cpu" in str(backend.unavailable(torch.device("cpu")))


def test_what_is_refused():
    with pytest.raises(CompressorError, match="8-bit"):
        DenseQuantised(torch.int16)
    with pytest.raises(CompressorError, match="a weight of 24 x 64"):
        dense_int8().build(unit(nn.Linear(64, 24), (4, 64), None))
    assert "lower with dtype=torch.bfloat16" in str(
        dense_fp8().refusal(unit(nn.Linear(64, 32), (4, 64), None, torch.float32))
    )
    assert "stays dense" in str(dense_int8().refusal(unit(nn.Conv2d(64, 32, 3), (1, 64, 4, 4), None)))


# --- Dense in 16 bits with the GELU in the first product. Where this runs on a CPU, torch takes the exact GELU: near enough. ---


def feed_forward(gelu: str = "tanh", bias: bool = True) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128, bias=bias), nn.GELU(gelu), nn.Linear(128, 32))


@pytest.mark.parametrize("shape", [(3, 7, 64), (5, 64), (0, 64), (64,)])
def test_a_pair_with_its_gelu_in_a_product(shape):
    pair = feed_forward().to(BF16)
    made = DenseGelu().build(unit(pair, (3, 7, 64), None))
    x = normal(*shape, dtype=BF16)
    out = made(x)
    assert out.shape == (*shape[:-1], 32) and out.dtype == BF16
    if out.numel():
        assert error(out, copy.deepcopy(pair).double()(x.double())) < 1e-2
    with pytest.raises(CompressorError, match="for inference"):
        made(normal(5, 64, dtype=BF16).requires_grad_())
    before = made(x)
    assert not before.requires_grad
    with torch.no_grad():
        pair[0].weight.zero_()
        pair[2].weight.zero_()
    assert torch.equal(made(x), before)  # its weights are its own


def test_the_operator_with_a_gelu_takes_what_it_is_given_on_a_gpu():
    given = normal(5, 64, dtype=BF16), normal(128, 64, dtype=BF16), normal(128, dtype=BF16)
    torch.library.opcheck(torch.ops.compressor.linear_gelu, given, test_utils=("test_schema", "test_faketensor"))
    first = nn.Linear(64, 128, device="meta")
    with FakeTensorMode():
        for name, shape in (("weight", (128, 64)), ("bias", (128,))):
            setattr(first, name, nn.Parameter(torch.empty(shape, device="cuda", dtype=BF16)))
        out = LinearGelu(first)(torch.empty(3, 7, 64, device="cuda", dtype=BF16))
        assert out.shape == (3, 7, 128) and out.dtype == BF16 and out.device.type == "cuda"


def test_which_pairs_have_their_gelu_in_a_product(machine):
    machine((9, 0), None)
    backend = DenseGelu()
    assert backend.unavailable(CUDA) is None and "the model is on cpu" in str(backend.unavailable(torch.device("cpu")))
    assert not backend.skips_zeros and not backend.quantises and backend.takes == {Kind.PAIR}
    for pair, dtype, reason in (
        (feed_forward("none"), BF16, "the exact one"),
        (feed_forward(), torch.float32, "lower with dtype=torch.bfloat16"),
        (feed_forward(bias=False), FP16, "no bias"),
    ):
        wanted = unit(pair, (3, 64), None, dtype)
        assert reason in str(backend.refusal(wanted))
        with pytest.raises(CompressorError, match="has no GELU by cuBLASLt"):
            backend.build(wanted)


# --- Dense in 8 bits is the opponent, within the error that is allowed. ---

WIDTH = 32
X = torch.randn(4, 16, WIDTH, generator=torch.Generator().manual_seed(1))


class Off(nn.Module):
    """A layer's copy whose result is off by `error`."""

    def __init__(self, module: nn.Module, error: float) -> None:
        super().__init__()
        self.module, self.error = copy.deepcopy(module), error

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x) * (1 + self.error)
        return out


@dataclass(frozen=True)
class Plugin(Backend):
    """A backend whose layers are off by `error`."""

    name: str = ""
    skips_zeros: bool = False
    quantises: bool = False
    products: str | None = None
    error: float = 0.0

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refusal(self, unit: Unit) -> str | None:
        return None

    def build(self, unit: Unit) -> nn.Module:
        return Off(unit.module, self.error)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def backends(dense_error: float) -> list[str | Backend]:
    eight = Plugin("eight", quantises=True, products="int8", error=dense_error)
    return ["eager", Plugin("float"), eight, Plugin("zeros", skips_zeros=True)]


@pytest.mark.parametrize(("dense_error", "exact"), [(1e-3, 0), (0.02, 3)])
def test_the_dense_form_has_8_bits_as_far_as_the_error_allows(monkeypatch, dense_error, exact):
    monkeypatch.setattr(forms, "_fastest_dense", _takes("eight", "float"))
    plan = compressor.lower(Net(), X, backends(dense_error), tolerance=0.05, max_error=0.03, cache=False).plan
    assert len(plan.exact) == exact
    dense = plan.form("dense")
    assert dense is not None and dense.error is not None and dense.error <= 0.03
    assert dense.products == (() if exact else ("int8",))
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    chosen = again.model_copy(update={"choice": "dense"})
    applied = compressor.lower(Net(), X, backends(dense_error), tolerance=0.05, plan=chosen).model
    assert error(applied(X), Net()(X)) == pytest.approx(dense.error, rel=1e-3, abs=1e-9)


def _takes(eight: str, other: str) -> Any:
    def fastest(job: Any, layers: Any, bound: Any) -> dict[str, str]:
        return {layer.name: other if layer.name in bound.exact else eight for layer in layers}

    return fastest


def test_a_layer_that_is_to_be_exact_has_no_8_bits():
    plan = compressor.lower(Net(), X, backends(1e-3), tolerance=0.05, cache=False).plan
    job = prepared(Net(), X, backends(1e-3), None, None, True)
    names = [layer.name for layer in plan.layers]
    chosen = forms._fastest_dense(job, plan.layers, forms._Bound(tuple(names[:1])))
    assert chosen[names[0]] != "eight" and set(chosen) == set(names)


@pytest.mark.parametrize("products", [("int8",), ()])
def test_a_comparison_names_what_both_multiply_in(products):
    rounds = {"eager": (2.0,) * 60, "dense": (1.5,) * 60, "lowered": (1.0,) * 60}
    choice, reason = forms._chosen(Contest.of(rounds, {"lowered"}), {"dense": products, "lowered": ("int8",)})
    assert choice == "lowered" and reason.endswith(
        "(int8 against int8)" if products else "(int8 against none in few bits)"
    )


def test_a_dense_form_that_is_taken_says_what_it_multiplies_in():
    rounds = {"eager": (3.0,) * 60, "dense": (1.0,) * 60, "lowered": (1.0,) * 60}
    choice, reason = forms._chosen(Contest.of(rounds, {"lowered"}), {"dense": ("w8a8",), "lowered": ("w8a8",)})
    assert choice == "dense" and ": not taken; dense, in w8a8, has 3.00x the speed of eager" in reason
    del rounds["lowered"]
    choice, reason = forms._chosen(Contest.of(rounds, ()), {"dense": ("w8a8",)})
    assert choice == "dense" and reason.startswith("no layer gains") and reason.endswith("has 3.00x the speed of eager")
