"""2:4 on GPUs: what is refused, the algebra of the lowered layers, the search for algorithms, and recorded forwards.

Most of it runs without a GPU: the library's two operators are replaced by ones that keep its contract and check it.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import compressor
from compressor import NM, CompressorError
from compressor.discovery import load
from compressor.errors import UsageError
from compressor.lower import Unit, cusparselt, cusparselt_tuning, graphs
from compressor.lower import cusparselt_worker as worker
from compressor.lower.cusparselt import CuSparseLt, CuSparseLtQuantised, fp8, int8, quantised, rescaled
from compressor.lower.cusparselt_tuning import Algorithm, Product, Tuned, candidates, searched, split_arguments, tuned
from compressor.lower.graphs import Graphed, captured
from compressor.sparsity.clustered import Clustered

CUDA = torch.device("cuda", 0)
TWO_OF_FOUR = NM(2, 4)
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sparse_(layer: nn.Linear | nn.Conv2d, pattern: NM = TWO_OF_FOUR) -> Any:
    with torch.no_grad():
        layer.weight.copy_(pattern.mask(normal(*layer.weight.shape)).apply(layer.weight))
    return layer


def unit(
    module: nn.Module,
    shape: tuple[int, ...],
    pattern: NM | None = TWO_OF_FOUR,
    dtype: torch.dtype = BF16,
    device: torch.device = CUDA,
) -> Unit:
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return Unit("layer", module.to(dtype), shape, dtype, device, (pattern,) * len(layers))


def error(out: Tensor, wanted: Tensor) -> float:
    out, wanted = out.detach().double(), wanted.detach().double()
    return float((out - wanted).norm() / wanted.norm())


# --- The library, imitated. ---


class Library:
    """Packs as cuSPARSELt does in effect: the first two entries of four whose bits are not all zero; the rest is lost."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.fault: Callable[[Tensor], Tensor] = lambda out: out

    def compress(self, weight: Tensor) -> Tensor:
        assert weight.dim() == 2 and weight.is_contiguous()
        out, inner = weight.shape
        side = 32 if weight.dtype.itemsize == 1 else 16
        assert out % side == 0 and inner % side == 0
        groups = weight.float().view(out, inner // 4, 4)
        kept = (groups != 0) | groups.signbit()
        places = kept.to(torch.int8).argsort(dim=2, descending=True, stable=True)[..., :2].sort(dim=2).values
        values = groups.gather(2, places)
        return torch.cat([values.flatten(1), places.flatten(1).float()], dim=1).to(weight.dtype)

    def sparse_mm(
        self,
        packed: Tensor,
        right: Tensor,
        bias: Tensor | None = None,
        alpha: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
        alg_id: int = 0,
        split_k: int = 1,
        split_k_mode: int = -1,
    ) -> Tensor:
        self.calls.append({"tokens": right.shape[1], "alg_id": alg_id, "split_k": split_k, "mode": split_k_mode})
        eight = packed.dtype.itemsize == 1
        assert packed.dtype == right.dtype and right.dim() == 2 and alpha is None
        assert right.t().is_contiguous() and not right.is_contiguous()
        assert right.shape[1] > 0 and right.shape[1] % (16 if eight else 8) == 0
        assert (out_dtype == BF16) if eight else (out_dtype is None)
        assert bias is None or (bias.dtype == packed.dtype and bias.shape == packed.shape[:1])
        out, inner = packed.shape
        values, places = packed.float().view(out, 2, inner // 4, 2).unbind(1)
        dense = torch.zeros(out, inner // 4, 4).scatter_(2, places.long(), values).flatten(1)
        result = dense @ right.float()
        if bias is not None:
            result = result + bias.float()[:, None]
        result = self.fault(result.t()).t().to(out_dtype or packed.dtype)
        return result.t().contiguous() if transpose_result else result.contiguous()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(torch, "_cslt_compress", made.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", made.sparse_mm)
    monkeypatch.setattr(cusparselt, "tuned", lambda product, index: Tuned(Algorithm(3, 2, 1)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return made


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine((9, 0), 801)`: a GPU of that compute capability, and torch with that cuSPARSELt (None: without)."""

    def made(capability: tuple[int, int], version: int | None, current: int = 0, hip: str | None = None) -> None:
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: version is not None)
        monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.version, "hip", hip)

    return made


# --- What is refused, and why. ---


@pytest.mark.parametrize(
    ("capability", "version", "sixteen", "integer", "floating"),
    [
        ((7, 5), 801, "7.5 has no sparse tensor cores", "7.5 has no", "7.5 has no"),
        ((8, 0), 400, None, None, "8.0 has no fp8"),
        ((8, 0), 300, "needs cuSPARSELt 0.4.0", "needs cuSPARSELt 0.4.0", "needs cuSPARSELt 0.4.0"),
        ((8, 6), 801, None, None, "8.6 has no fp8"),
        ((8, 9), 701, None, None, "fp8 needs cuSPARSELt 0.8.0"),
        ((8, 9), 801, None, None, None),
        ((9, 0), 502, "9.0 needs cuSPARSELt 0.6.0 or later, this torch has 0.5.2", "0.6.0", "0.6.0"),
        ((9, 0), 600, None, None, "fp8 needs cuSPARSELt 0.6.2"),
        ((9, 0), 801, None, None, None),
        ((10, 0), 602, "needs cuSPARSELt 0.7.0", "needs cuSPARSELt 0.7.0", "needs cuSPARSELt 0.7.0"),
        ((12, 0), 801, None, None, None),
        ((9, 0), None, "this torch has no cuSPARSELt", "this torch has no", "this torch has no"),
    ],
)
def test_gpus_and_versions(machine, capability, version, sixteen, integer, floating):
    machine(capability, version)
    for backend, reason in ((CuSparseLt(), sixteen), (int8(), integer), (fp8(), floating)):
        found = backend.unavailable(CUDA)
        assert (found is None) if reason is None else (found is not None and reason in found), (backend.name, found)


def test_only_the_current_gpu_of_an_nvidia_machine_is_used(machine):
    machine((9, 0), 801)
    assert "the model is on cpu" in str(CuSparseLt().unavailable(torch.device("cpu")))
    assert "set_device(1)" in str(CuSparseLt().unavailable(torch.device("cuda", 1)))
    assert CuSparseLt().unavailable(torch.device("cuda")) is None
    machine((9, 0), 801, hip="6.4")
    assert "AMD" in str(CuSparseLt().unavailable(CUDA))


@pytest.mark.parametrize("backend", [CuSparseLt(), int8(), fp8()], ids=lambda backend: backend.name)
@pytest.mark.parametrize(
    ("module", "pattern", "reason"),
    [
        (nn.Linear(64, 32), NM(2, 4), None),
        (nn.Linear(64, 32), NM(2, 4, 4), None),
        (nn.Linear(64, 32), Clustered(2, 4, 4), None),
        (nn.Linear(64, 32), Clustered(4, 8, 4), "4c:4:8: sparse"),
        (nn.Linear(64, 32), NM(1, 4), None),
        (nn.Linear(64, 32), NM(1, 2), None),
        (nn.Linear(64, 32), NM(2, 8, 2), None),
        (nn.Linear(64, 32), NM(4, 8), "4:8: sparse tensor cores take rows of 2:4"),
        (nn.Linear(64, 32), NM(3, 4), "3:4: sparse"),
        (nn.Linear(64, 32), None, "obeys no N:M pattern"),
        (nn.Linear(64, 24), NM(2, 4), "a weight of 24 x 64"),
        (nn.Linear(72, 32), NM(2, 4), "a weight of 32 x 72"),
        (nn.Conv2d(64, 32, 1), NM(2, 4), None),
        (nn.Conv2d(64, 32, 3, padding=1), NM(2, 4), "below about 850 output channels"),
        (nn.Conv2d(64, 32, 1, stride=2), NM(2, 4), "only stride 1"),
        (nn.Conv2d(64, 32, 1, padding=1), NM(2, 4), "only stride 1"),
        (nn.Conv2d(64, 64, 1, groups=2), NM(2, 4), "2 groups"),
        (nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), NM(2, 4), None),
        (nn.Sequential(nn.Linear(64, 100), nn.GELU(), nn.Linear(100, 64)), NM(2, 4), "a weight of 100 x 64"),
    ],
)
def test_layers(machine, backend, module, pattern, reason):
    machine((9, 0), 801)
    found = backend.refusal(unit(copy.deepcopy(module), (2, 4, 64), pattern))
    assert (found is None) if reason is None else (found is not None and reason in found), found


def test_8_bit_sides_are_multiples_of_32(machine):
    machine((9, 0), 801)
    layer = unit(nn.Linear(64, 48), (4, 64))
    assert CuSparseLt().refusal(layer) is None
    assert "multiples of 32" in str(int8().refusal(layer)) and "multiples of 32" in str(fp8().refusal(layer))


@pytest.mark.parametrize(
    ("capability", "dtype", "reason", "reason8"),
    [
        ((9, 0), BF16, None, None),
        ((9, 0), FP16, "illegal instructions on Hopper", None),
        ((8, 0), FP16, None, None),
        ((12, 0), FP16, None, None),
        ((9, 0), torch.float32, "lower with dtype=torch.bfloat16", "less than torch.float32 promises"),
        ((8, 0), torch.float64, "lower with dtype=torch.bfloat16", "less than torch.float64 promises"),
    ],
)
def test_dtypes(machine, capability, dtype, reason, reason8):
    machine(capability, 801)
    layer = unit(nn.Linear(64, 32), (4, 64), dtype=dtype)
    for backend, wanted in ((CuSparseLt(), reason), (int8(), reason8)):
        found = backend.refusal(layer)
        assert (found is None) if wanted is None else (found is not None and wanted in found), found


def test_what_is_refused_cannot_be_built(machine):
    machine((9, 0), 801)
    with pytest.raises(CompressorError, match="a weight of 24 x 64"):
        CuSparseLt().build(unit(nn.Linear(64, 24), (4, 64)))
    with pytest.raises(CompressorError, match="8-bit"):
        CuSparseLtQuantised(torch.int16)


def test_the_backends_are_registered_by_their_names():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    entries = project["project"]["entry-points"]["compressor.backends"]
    made = {name: text for name, text in entries.items() if text.startswith("compressor.lower.cusparselt")}
    assert set(made) == {"cusparselt", "cusparselt-int8", "cusparselt-fp8"}
    for name, text in made.items():
        assert getattr(cusparselt, text.partition(":")[2])().name == name


# --- The algebra of the lowered layers. ---

SHAPES = [(64,), (8, 64), (5, 64), (1, 64), (2, 257, 64), (2, 3, 5, 64), (0, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_linear_takes_any_tokens(library, monkeypatch, shape, bias, transposed):
    monkeypatch.setattr(
        cusparselt, "tuned", lambda *_: Tuned(Algorithm(1, transposed=transposed), Algorithm(0, 1, -1, transposed))
    )
    layer = sparse_(nn.Linear(64, 32, bias=bias), NM(2, 4, 4)).to(BF16)
    lowered = CuSparseLt().build(unit(layer, (8, 64)))
    x = normal(*shape, dtype=BF16)
    out = lowered(x)
    assert out.shape == (*shape[:-1], 32) and out.dtype == BF16 and out.is_contiguous()
    if out.numel():
        assert error(out, F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)) < 4e-3


def test_inputs_that_do_not_lie_row_by_row_are_laid_out_anew(library):
    layer = sparse_(nn.Linear(64, 32)).to(BF16)
    lowered = CuSparseLt().build(unit(layer, (8, 64)))
    for x in (normal(64, 8, dtype=BF16).t(), normal(8, 128, dtype=BF16)[:, ::2], normal(64, 5, dtype=BF16).t()):
        assert error(lowered(x), F.linear(x.double(), layer.weight.double(), layer.bias.double())) < 4e-3


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("backend", [CuSparseLt(), int8(), fp8()], ids=lambda backend: backend.name)
def test_a_pair_has_its_gelu_between(library, backend, approximate):
    torch.manual_seed(0)
    first, second = sparse_(nn.Linear(64, 128)), sparse_(nn.Linear(128, 64))
    pair = nn.Sequential(first, nn.GELU(approximate), second).to(BF16)
    lowered = backend.build(unit(pair, (3, 7, 64)))
    x = normal(3, 7, 64, dtype=BF16)
    assert lowered[1].approximate == approximate
    allowed = {"cusparselt": 1e-2, "cusparselt-int8": 3e-2, "cusparselt-fp8": 0.1}[backend.name]
    assert error(lowered(x), copy.deepcopy(pair).double()(x.double())) < allowed


@pytest.mark.parametrize("shape", [(2, 64, 6, 6), (64, 5, 3), (1, 64, 1, 1)])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_1x1_convolution_is_a_product_for_every_pixel(library, shape, form):
    layer = sparse_(nn.Conv2d(64, 32, 1)).to(BF16)
    lowered = CuSparseLt().build(unit(layer, (2, 64, 6, 6)))
    x = normal(*shape, dtype=BF16)
    x = x.contiguous(memory_format=form) if len(shape) == 4 else x
    wanted = F.conv2d(x.double(), layer.weight.double(), layer.bias.double())
    out = lowered(x)
    assert out.shape == wanted.shape and error(out, wanted) < 4e-3


def test_the_algorithm_that_was_searched_runs_for_its_tokens_alone(library):
    lowered = CuSparseLt().build(unit(sparse_(nn.Linear(64, 32)), (3, 7, 64)))
    library.calls.clear()
    for rows in (21, 24, 8):
        lowered(normal(rows, 64, dtype=BF16))
    assert [(call["tokens"], call["alg_id"], call["split_k"], call["mode"]) for call in library.calls] == [
        (24, 3, 2, 1),
        (24, 3, 2, 1),
        (8, 0, 1, -1),
    ]


def test_the_search_is_asked_for_what_will_run(library, monkeypatch):
    asked: list[Product] = []
    monkeypatch.setattr(cusparselt, "tuned", lambda product, index: asked.append(product) or Tuned(Algorithm()))
    CuSparseLt().build(unit(sparse_(nn.Linear(64, 32)), (3, 7, 64)))
    CuSparseLt().build(unit(sparse_(nn.Conv2d(64, 32, 1, bias=False)), (2, 64, 3, 3)))
    int8().build(unit(sparse_(nn.Linear(64, 32)), (3, 7, 64)))
    assert asked == [
        Product(24, 32, 64, "bfloat16", True),
        Product(24, 32, 64, "bfloat16", False),
        Product(32, 32, 64, "int8", False),
    ]


def test_negative_zeros_are_no_entries(library):
    layer = nn.Linear(64, 32).to(BF16)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-0.0, -0.0, 1.5, -2.0]).repeat(32, 16))
    library_says = library.compress(layer.weight)
    assert not library_says[:, :32].any()  # this packer keeps the two negative zeros
    x = normal(4, 64, dtype=BF16)
    for backend in (CuSparseLt(), int8(), fp8()):
        lowered = backend.build(unit(layer, (4, 64)))
        assert error(lowered(x), F.linear(x.double(), layer.weight.double(), layer.bias.double())) < 0.1


def test_a_packer_that_loses_an_entry_is_found_out(library):
    layer = sparse_(nn.Linear(2048, 32)).to(BF16)
    with torch.no_grad():
        layer.weight[31, 2044:] = 1.0  # more than it can hold, in the last group of all
    with pytest.raises(CompressorError, match="does not give a weight back"):
        CuSparseLt().build(unit(layer, (4, 2048)))


@pytest.mark.parametrize("broken", [3, 0])
def test_an_algorithm_that_is_wrong_is_found_out(library, broken):
    layer = sparse_(nn.Linear(64, 32)).to(BF16)

    def fault(out: Tensor) -> Tensor:
        if library.calls[-1]["alg_id"] == broken:
            out = out.clone()
            out[0, 0] += 0.01
        return out

    library.fault = fault
    with pytest.raises(CompressorError, match="does not give a weight back"):
        CuSparseLt().build(unit(layer, (8, 64)))


def test_a_lowered_layer_survives_copies_and_refuses_casts(library):
    layer = sparse_(nn.Linear(64, 32))
    lowered = CuSparseLt().build(unit(layer, (8, 64)))
    x = normal(8, 64, dtype=BF16)
    before = lowered(x)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    assert torch.equal(lowered(x), before) and torch.equal(copy.deepcopy(lowered)(x), before)
    with pytest.raises(CompressorError, match=r"takes torch.bfloat16 with 64 channels"):
        lowered(x.float())
    with pytest.raises(CompressorError, match="64 channels"):
        lowered(normal(8, 32, dtype=BF16))
    cast = copy.deepcopy(lowered).float()
    with pytest.raises(CompressorError, match="was cast"):
        cast(x)
    assert torch.equal(cast.weight.packed, lowered.weight.packed) and cast.weight.packed.dtype == torch.uint8
    assert torch.equal(cast.to(BF16)(x), before)


def test_the_operator_works_under_compile_and_export(library):
    layer = sparse_(nn.Linear(64, 32))
    lowered = CuSparseLt().build(unit(layer, (8, 64)))
    operator = torch.ops.compressor.cslt_linear
    weight: Any = lowered.weight
    arguments = (normal(8, 64, dtype=BF16), weight.packed, weight.bias, 32, [0, 1, -1, 1])
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled: Any = torch.compile(lowered, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (8, 5, 24):
        x = normal(rows, 64, dtype=BF16)
        with torch.no_grad():
            assert torch.equal(compiled(x), lowered(x))
    torch.compiler.reset()


# --- 8 bits. ---


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.int8, 1.3e-2), (FP8, 4e-2)])
def test_codes_times_scales_are_nearly_the_rows(dtype, allowed):
    rows = normal(64, 256, dtype=BF16) * torch.logspace(-6, 6, 64)[:, None].to(BF16)
    rows[0] = 0
    rows[:, 3] = 0
    codes, scale = quantised(rows, dtype)
    assert codes.dtype == dtype and scale.shape == (64, 1) and scale.dtype == torch.float32
    assert not codes.float()[:, 3].any() and not codes.float()[0].any()
    assert (codes.float()[1:].abs().amax(1) == (127 if dtype == torch.int8 else 448)).all()
    for row in range(1, 64):
        assert error(codes[row].float() * scale[row], rows[row]) < allowed


def test_not_a_number_stays_one():
    rows = normal(4, 64)
    rows[1, 5] = torch.nan
    rows[2, 5] = torch.inf
    codes, scale = quantised(rows, torch.int8)
    out = rescaled(codes.float().sum(1, keepdim=True), scale, torch.ones(1), None, BF16)
    assert out.isfinite().flatten().tolist() == [True, False, False, True]


@pytest.mark.parametrize("backend", [int8(), fp8()], ids=lambda backend: backend.name)
@pytest.mark.parametrize("shape", [(16, 64), (5, 64), (2, 257, 64), (0, 64)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_quantised_linear_is_nearly_the_layer(library, backend, shape, dtype):
    torch.manual_seed(0)
    layer = sparse_(nn.Linear(64, 32)).to(dtype)
    lowered = backend.build(unit(layer, (16, 64), dtype=dtype))
    x = normal(*shape, dtype=dtype)
    out = lowered(x)
    assert out.shape == (*shape[:-1], 32) and out.dtype == dtype
    if out.numel():
        wanted = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        assert 1e-3 < error(out, wanted) < (2e-2 if backend.name == "cusparselt-int8" else 6e-2)


def test_backends_that_quantise_say_so():
    assert int8().quantises and fp8().quantises and not getattr(CuSparseLt(), "quantises", False)


# --- Algorithms. ---

TORCH_2_5 = frozenset({"alg_id"})
TORCH_2_6 = frozenset({"alg_id", "split_k", "split_k_one_kernel"})
TORCH_2_13 = frozenset({"alg_id", "split_k", "split_k_mode"})


def test_the_operator_of_this_torch_has_the_arguments_that_are_given():
    assert {"bias", "out_dtype", "transpose_result", "alg_id"} <= cusparselt_tuning.operator_arguments()
    assert cusparselt_tuning.operator_arguments() & {"split_k_mode", "split_k_one_kernel"}
    assert [a.name for a in torch.ops.aten._cslt_compress.default._schema.arguments] == ["input"]


@pytest.mark.parametrize(
    ("names", "algorithm", "wanted"),
    [
        (TORCH_2_5, Algorithm(7), {}),
        (TORCH_2_6, Algorithm(7, 2, 1), {"split_k": 2, "split_k_one_kernel": True}),
        (TORCH_2_6, Algorithm(7, 4, 2), {"split_k": 4, "split_k_one_kernel": False}),
        (TORCH_2_13, Algorithm(7), {}),
        (TORCH_2_13, Algorithm(7, 4, 2), {"split_k": 4, "split_k_mode": 2}),
        (TORCH_2_13, Algorithm(7, -1, -1), {"split_k": -1, "split_k_mode": -1}),
    ],
)
def test_splits_are_told_as_the_version_wants_them(names, algorithm, wanted):
    assert split_arguments(algorithm, names) == wanted


def test_splits_that_a_version_does_not_know_are_refused():
    with pytest.raises(CompressorError, match="cannot split"):
        split_arguments(Algorithm(7, 2, 1), TORCH_2_5)
    with pytest.raises(CompressorError, match="cannot split"):
        split_arguments(Algorithm(7, -1, -1), TORCH_2_6)


@pytest.mark.parametrize(("names", "count"), [(TORCH_2_5, 5), (TORCH_2_6, 35), (TORCH_2_13, 40)])
def test_candidates_are_all_different_and_begin_with_the_default(names, count):
    found = candidates(5, names)
    assert found[0] == Algorithm() and len(set(found)) == len(found) == count
    assert all(split_arguments(algorithm, names) is not None for algorithm in found)
    assert all(Algorithm.parse(str(algorithm)) == algorithm for algorithm in found)
    assert [a.split_k for a in found[:5]] == [1] * 5


# --- The search in another process. ---

PRODUCT = Product(24, 32, 64, "bfloat16", True)
A, B, C = "0,1,-1,1", "1,1,-1,1", "2,2,1,1"


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`act(script)`: workers run `script`, in which `say` writes an event, `request` is what was asked, `runs` how often before."""
    tuned.cache_clear()
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cusparselt_tuning, "_START", 5.0)
    setting = cusparselt_tuning.Setting(device="cuda", hardware="a GPU", threads=1, versions={"torch": "2.13.0"})
    monkeypatch.setattr(cusparselt_tuning, "_setting", lambda index: setting)
    log = tmp_path / "log"

    def acted(script: str) -> Path:
        log.write_text("")
        head = (
            "import json, os, sys, time\n"
            "request = json.load(sys.stdin)\n"
            f"runs = len(open({str(log)!r}).readlines())\n"
            f"open({str(log)!r}, 'a').write(json.dumps(request) + '\\n')\n"
            "def say(event, algorithm, **more): print(json.dumps(dict(event=event, algorithm=algorithm, **more)), flush=True)\n"
            "def right(algorithm, ms): say('trying', algorithm); say('timed', algorithm, ms=ms)\n"
        )
        monkeypatch.setattr(cusparselt_tuning, "_command", lambda: [sys.executable, "-c", head + script])
        return log

    yield acted
    tuned.cache_clear()


def requests(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_the_fastest_right_algorithm_is_taken_and_kept_on_disk(act):
    log = act(f"right({A!r}, 2.0); right({B!r}, 1.0); say('trying', {C!r}); say('failed', {C!r}, why='wrong')")
    found = tuned(PRODUCT, 0)
    assert found == Tuned(Algorithm(1), Algorithm(), 1.0)
    (request,) = requests(log)
    assert Product(**request["product"]) == PRODUCT and request["skip"] == [] and request["device"] == 0
    tuned.cache_clear()
    assert tuned(PRODUCT, 0) == found and len(requests(log)) == 1
    assert tuned(Product(32, 32, 64, "bfloat16", True), 0) == found and len(requests(log)) == 2


def test_the_last_timing_side_by_side_counts(act):
    act(f"right({A!r}, 2.0); right({B!r}, 1.0); say('final', {B!r}, ms=3.0); say('final', {A!r}, ms=2.5)")
    assert tuned(PRODUCT, 0) == Tuned(Algorithm(), Algorithm(), 2.5)


def test_what_an_earlier_worker_timed_counts_too(act):
    act(
        f"if runs == 0: right({A!r}, 1.0); say('trying', {B!r}); sys.exit(3)\nright({C!r}, 2.0); say('final', {C!r}, ms=2.0)"
    )
    assert tuned(PRODUCT, 0).algorithm == Algorithm()


def test_a_default_that_is_wrong_runs_for_no_tokens(act):
    act(f"say('trying', {A!r}); say('failed', {A!r}, why='wrong'); right({B!r}, 1.0)")
    assert tuned(PRODUCT, 0) == Tuned(Algorithm(1), Algorithm(1), 1.0)


def test_what_else_is_printed_does_not_count(act):
    act(
        "print('loading...'); print('[1, 2]'); print('{\"event\": ')\n"
        f"right({A!r}, 2.0); right('; rm', 0.1); right('1,2', 0.1)\n"
        f"say('timed', {B!r}, ms=float('nan')); say('timed', {B!r}, ms=-1.0); say('timed', {B!r}, ms='fast')\n"
        f'say(\'timed\', 7, ms=0.1); sys.stdout.write(\'{{"event": "timed", "algorithm"\')'
    )
    assert searched(PRODUCT, 0) == ({A: 2.0}, None)


def test_an_algorithm_that_kills_the_worker_is_stepped_over(act):
    log = act(
        f"if runs == 0: right({A!r}, 2.0); say('trying', {B!r}); sys.exit('illegal instruction')\nright({C!r}, 1.0)"
    )
    times, note = searched(PRODUCT, 0)
    assert times == {A: 2.0, C: 1.0}
    assert note is not None and B in note and "illegal instruction" in note
    first, second = requests(log)
    assert (first["skip"], first["found"]) == ([], False) and (second["skip"], second["found"]) == ([A, B], True)


def test_a_worker_killed_by_a_signal_names_its_algorithm(act):
    act(f"if runs == 0: say('trying', {A!r}); os.kill(os.getpid(), 9)\nright({B!r}, 1.0)")
    found = tuned(PRODUCT, 0)
    assert found.algorithm == found.otherwise == Algorithm(1) and "code -9" in str(found.note)


def test_workers_that_always_die_end_the_search(act):
    log = act("say('trying', f'{runs},1,-1,1'); sys.exit(3)")
    with pytest.raises(
        CompressorError, match=r"no algorithm of cuSPARSELt gives \(24, 64\) x \(64, 32\) in bfloat16 right"
    ):
        tuned(PRODUCT, 0)
    assert len(requests(log)) == cusparselt_tuning._WORKERS


def test_nothing_right_is_an_error_that_says_why(act):
    act(f"say('trying', {A!r}); say('failed', {A!r}, why='ArithmeticError: its error is 0.5')")
    with pytest.raises(CompressorError, match=r"its error is 0\.5"):
        tuned(PRODUCT, 0)


def test_a_search_that_does_not_start_leaves_the_default_and_a_note(act, monkeypatch):
    log = act("sys.exit('no CUDA-capable device is detected')")
    found = tuned(PRODUCT, 0)
    assert found.algorithm == Algorithm() and found.median_ms is None
    assert "not tuned" in str(found.note) and "no CUDA-capable device" in str(found.note)
    assert [request["ask"] for request in requests(log)] == [True, False]
    monkeypatch.setattr(cusparselt_tuning, "_command", lambda: ["/nowhere/python"])
    tuned.cache_clear()
    assert "could not be started" in str(tuned(PRODUCT, 0).note)  # and nothing was kept on disk


def test_a_worker_that_hangs_is_ended_and_what_it_said_counts(act, monkeypatch):
    monkeypatch.setattr(cusparselt_tuning, "_START", 1.5)
    monkeypatch.setenv(cusparselt_tuning.SECONDS_VARIABLE, "0.5")
    log = act(f"right({A!r}, 2.0); say('trying', {B!r}); time.sleep(60)")
    times, note = searched(PRODUCT, 0)
    assert times == {A: 2.0} and note is not None and "took more than" in note and len(requests(log)) == 1


def test_a_damaged_file_is_searched_again(act, tmp_path):
    log = act(f"right({A!r}, 2.0)")
    tuned(PRODUCT, 0)
    (file,) = (tmp_path / "cache").rglob("*.json")
    for text in ("{", json.dumps({**json.loads(file.read_text()), "median_ms": {"fastest": 1.0}})):
        file.write_text(text)
        tuned.cache_clear()
        assert tuned(PRODUCT, 0).algorithm == Algorithm()
    assert len(requests(log)) == 3


@pytest.mark.parametrize("text", ["soon", "-1", "0", "inf"])
def test_seconds_are_a_number(act, monkeypatch, text):
    monkeypatch.setenv(cusparselt_tuning.SECONDS_VARIABLE, text)
    with pytest.raises(UsageError, match="COMPRESSOR_SEARCH_SECONDS"):
        searched(PRODUCT, 0)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_real_worker_starts_and_says_that_there_is_no_gpu():
    request = {"product": vars(PRODUCT), "device": 0, "seconds": 1.0, "skip": [], "found": False, "ask": True}
    lines, ended = cusparselt_tuning._worker(request, 120.0)
    assert lines == [] and ended is not None and "no CUDA GPU" in ended


class Trial:
    """A trial in which algorithm 1 is wrong, 2 is fastest, and `deadly` kills the GPU."""

    def __init__(self, deadly: int | None = None, transposed: bool = True) -> None:
        self.deadly, self.transposed, self.alive = deadly, transposed, True

    def milliseconds(self, algorithms: list[Algorithm], replays: int) -> list[float]:
        for algorithm in algorithms:
            if algorithm.alg_id == self.deadly:
                self.alive = False
                raise RuntimeError("CUDA error: an illegal instruction was encountered")
            if algorithm.alg_id == 1 or (algorithm.transposed and not self.transposed):
                raise ArithmeticError("its error is 0.5\nmore")
        return [float(algorithm.split_k + 4 - algorithm.alg_id) for algorithm in algorithms]

    def still_alive(self) -> None:
        if not self.alive:
            raise worker.Poisoned("gone")


def events(trial: Any, **more: Any) -> list[tuple[Any, Any]]:
    given = {"seconds": 60.0, "limit": 3, "skip": [], "found": False, **more}
    return [(line["event"], line["algorithm"]) for line in worker.search(trial, **given)]


def test_the_worker_announces_tries_and_times_the_best_again(monkeypatch):
    monkeypatch.setattr(worker, "operator_arguments", lambda: TORCH_2_5)
    assert events(Trial()) == [
        *[("trying", "0,1,-1,1"), ("timed", "0,1,-1,1")],
        *[("trying", "1,1,-1,1"), ("failed", "1,1,-1,1")],
        *[("trying", "2,1,-1,1"), ("timed", "2,1,-1,1")],
        *[("final", "2,1,-1,1"), ("final", "0,1,-1,1")],
    ]
    assert events(Trial(), skip=["0,1,-1,1", "2,1,-1,1"], found=True) == [
        ("trying", "1,1,-1,1"),
        ("failed", "1,1,-1,1"),
    ]
    assert events(Trial(), seconds=-1.0) == []


def test_the_worker_copies_results_only_where_nothing_else_is_right(monkeypatch):
    monkeypatch.setattr(worker, "operator_arguments", lambda: TORCH_2_5)
    said = events(Trial(transposed=False))
    assert [algorithm for event, algorithm in said if event == "timed"] == ["0,1,-1,0", "2,1,-1,0"]


def test_the_worker_dies_with_the_culprit_as_its_last_word(monkeypatch):
    monkeypatch.setattr(worker, "operator_arguments", lambda: TORCH_2_5)
    search = worker.search(Trial(deadly=2), 60.0, 3, [], False)  # type: ignore[arg-type]
    said = [next(search) for _ in range(5)]
    with pytest.raises(worker.Poisoned):
        next(search)
    assert said[-1] == {"event": "trying", "algorithm": "2,1,-1,1"}


def test_the_trial_finds_wrong_results_and_stale_memory(library):
    trial = worker.Trial(PRODUCT, torch.device("cpu"))
    trial.check(Algorithm())
    for fault in (lambda out: out * 1.02, lambda out: out.index_fill(0, torch.tensor([5]), torch.nan)):
        library.fault = fault
        with pytest.raises(ArithmeticError, match="its error is"):
            trial.check(Algorithm())


@pytest.mark.parametrize(("dtype", "sides"), [("bfloat16", 16), ("int8", 32), ("float8_e4m3fn", 32)])
def test_the_trial_is_right_for_every_dtype(library, dtype, sides):
    product = Product(16, sides, 2 * sides, dtype, dtype == "bfloat16")
    worker.Trial(product, torch.device("cpu")).check(Algorithm(transposed=False))


# --- Recorded forwards. ---


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Recordings without a GPU: a replay writes into the outputs of the recording. What is listed is how often it replayed."""
    replays: list[int] = []

    def recorded(run: Callable[[], Any], device: Any, warm_up: int) -> tuple[Callable[[], None], Any]:
        outputs = run()
        replays.append(0)
        mine = len(replays) - 1

        def replay() -> None:
            replays[mine] += 1
            for old, new in zip(tree_leaves(outputs), tree_leaves(run()), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return replay, outputs

    monkeypatch.setattr(graphs, "_recorded", recorded)
    monkeypatch.setattr(graphs, "_device", lambda tensors: CUDA if tensors else None)
    return replays


class Net(nn.Module):
    title = "net"

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor, scale: float = 1.0, y: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += 1
        return {"out": self.layer(x) * scale + (0 if y is None else y)}


def test_a_recording_copies_what_goes_in_and_what_comes_out(recorder):
    example = torch.ones(2)
    forward = captured(lambda inputs: {"twice": inputs["x"] * 2, "n": 3}, {"x": example})
    first = forward({"x": torch.full((2,), 5.0)})
    second = forward({"x": torch.full((2,), 7.0)})
    assert first["twice"].tolist() == [10, 10] and second["twice"].tolist() == [14, 14] and second["n"] == 3
    x = torch.full((2,), 3.0)
    forward({"x": x})["twice"].zero_()
    assert x.tolist() == [3, 3] and example.tolist() == [1, 1] and recorder == [3]


def test_a_module_is_recorded_for_a_few_shapes_and_right_for_all(recorder):
    net = Net().requires_grad_(False)
    wrapped = Graphed(net)
    for batch in (1, 2, 3, 4, 5, 6, 1, 5):
        x = normal(batch, 4, seed=batch)
        assert torch.equal(wrapped(x, 2.0)["out"], net(x, 2.0)["out"])
    assert recorder == [2, 1, 1, 1]
    x = normal(1, 4, seed=9)
    assert torch.equal(wrapped(x, 3.0)["out"], net(x, 3.0)["out"])
    assert torch.equal(wrapped(x, y=x)["out"], net(x, y=x)["out"])
    assert recorder == [2, 1, 1, 1]


def test_other_values_than_tensors_are_part_of_what_was_recorded(recorder):
    net = Net().requires_grad_(False)
    wrapped = Graphed(net)
    x = normal(2, 4)
    for scale in (1.0, 2.0, 1.0):
        assert torch.equal(wrapped(x, scale)["out"], net(x, scale)["out"])
    assert torch.equal(wrapped(x, y=x)["out"], net(x, y=x)["out"])
    assert recorder == [2, 1, 1]


def test_gradients_and_autocast_are_not_recorded(recorder):
    wrapped = Graphed(Net())
    x = normal(2, 4).requires_grad_()
    wrapped(x)["out"].sum().backward()
    assert x.grad is not None and recorder == []
    with torch.autocast("cuda", dtype=BF16, enabled=False):
        wrapped(x.detach())
    assert recorder == [1]


def test_copies_and_moves_record_anew(recorder):
    wrapped = Graphed(Net().requires_grad_(False)).eval()
    x = normal(2, 4)
    wrapped(x)
    twin = copy.deepcopy(wrapped)
    assert not twin.training and torch.equal(twin(x)["out"], wrapped(x)["out"]) and recorder == [2, 1]
    assert twin.layer.weight is not wrapped.layer.weight
    assert torch.equal(wrapped.float()(x)["out"], twin(x)["out"]) and recorder == [2, 2, 1]
    double = wrapped.double()
    assert double is wrapped and double(x.double())["out"].dtype == torch.float64 and recorder[3:] == [1]


def test_a_wrapper_has_the_attributes_of_its_module(recorder):
    wrapped = Graphed(Net())
    assert wrapped.title == "net" and wrapped.layer is wrapped.module.layer
    assert len(list(wrapped.parameters())) == 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing


def test_what_cannot_be_recorded_says_so_once(recorder, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    works = graphs._recorded
    monkeypatch.setattr(graphs, "_recorded", fails)
    wrapped = Graphed(Net())
    with torch.no_grad():
        with pytest.raises(CompressorError, match="cannot be recorded as a CUDA graph: RuntimeError: operation not"):
            wrapped(normal(2, 4))
        monkeypatch.setattr(graphs, "_recorded", works)
        wrapped(normal(2, 4))
        monkeypatch.setattr(graphs, "_recorded", fails)
        x = normal(3, 4)
        assert torch.equal(wrapped(x)["out"], wrapped.module(x)["out"]) and recorder == [1]


def test_outputs_that_would_be_overwritten_are_refused(recorder):
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    with pytest.raises(CompressorError, match="gave Box"):
        captured(Box, torch.ones(2))


def test_without_a_gpu_everything_runs_as_it_did():
    wrapped = Graphed(Net())
    with torch.no_grad():
        wrapped(normal(2, 4))
    assert wrapped.module.calls == 1 and wrapped._recordings == {}
    with pytest.raises(CompressorError, match="on one GPU"):
        captured(lambda x: x, torch.ones(2))


# --- On a GPU. ---


def on_gpu(module: nn.Module, dtype: torch.dtype = BF16) -> nn.Module:
    reason = CuSparseLt().unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    return module.to("cuda", dtype)


class TestOnGpu:
    """With the real library."""

    pytestmark = gpu

    @pytest.mark.parametrize("rows", [8, 5, 257, 2056])
    @pytest.mark.parametrize(("out", "inner"), [(512, 2048), (2048, 512), (16, 16), (1152, 4608)])
    @pytest.mark.parametrize("bias", [True, False])
    def test_a_linear_is_the_dense_one(self, rows, out, inner, bias):
        layer: Any = on_gpu(sparse_(nn.Linear(inner, out, bias=bias)))
        lowered = CuSparseLt().build(unit(layer, (rows, inner)))
        for tokens in (rows, rows + 3):
            x = normal(tokens, inner, dtype=BF16).cuda()
            wanted = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
            assert error(lowered(x), wanted) < 1e-2

    @pytest.mark.parametrize(("backend", "allowed"), [(int8(), 2e-2), (fp8(), 6e-2)], ids=["int8", "fp8"])
    def test_8_bits_are_near_the_dense_layer(self, backend, allowed):
        if reason := backend.unavailable(torch.device("cuda")):
            pytest.skip(reason)
        layer: Any = on_gpu(sparse_(nn.Linear(512, 2048)))
        lowered = backend.build(unit(layer, (1028, 512)))
        x = normal(1028, 512, dtype=BF16).cuda()
        assert error(lowered(x), F.linear(x.double(), layer.weight.double(), layer.bias.double())) < allowed

    def test_the_search_finds_a_right_algorithm_and_no_fault(self, monkeypatch, tmp_path):
        on_gpu(nn.Linear(16, 16))
        monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))
        tuned.cache_clear()
        found = tuned(Product(2056, 2048, 512, "bfloat16", True), 0)
        assert found.median_ms is not None and found.note is None

    def test_a_lowered_layer_replays_in_a_graph_and_compiles(self):
        layer: Any = on_gpu(sparse_(nn.Linear(512, 2048)))
        lowered = CuSparseLt().build(unit(layer, (2, 257, 512)))
        compiled: Any = torch.compile(lowered, fullgraph=True)
        wrapped = Graphed(lowered)
        with torch.no_grad():
            for seed in range(3):
                x = normal(2, 257, 512, dtype=BF16, seed=seed).cuda()
                assert torch.equal(wrapped(x), lowered(x)) and torch.equal(compiled(x), lowered(x))
        assert len(wrapped._recordings) == 1
        torch.compiler.reset()

    def test_a_model_lowered_on_a_gpu_keeps_its_numbers(self):
        adapter = compressor.registry.adapter("uvit-cifar10")
        torch.manual_seed(0)
        model = on_gpu(adapter.build().eval(), torch.float32)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name):
                with torch.no_grad():
                    module.weight.copy_(NM(2, 4).mask(module.weight.abs()).apply(module.weight))
        inputs = tuple(x.cuda() if isinstance(x, Tensor) else x for x in adapter.example_inputs(16))
        result = compressor.lower(model, inputs, ["eager", "cusparselt"], BF16, adapter=adapter, cache=False)
        measured = [layer.candidate("cusparselt") for layer in result.plan.layers if "2:4" in layer.patterns]
        assert measured and all(c is not None and c.median_ms is not None for c in measured)
        x = (torch.randn(16, 3, 32, 32, device="cuda"), *inputs[1:])
        with torch.no_grad():
            assert error(adapter.predict(result.model, x), adapter.predict(model, x)) < 0.1


def test_backends_load_where_they_are_installed():
    names = compressor.registry.names("backends")
    if "cusparselt" not in names:
        pytest.skip("this installation is older than the backend: pip install -e .")
    assert load("backends", "cusparselt") is CuSparseLt


# --- The benchmark, as far as it goes without a GPU. ---


@pytest.fixture(scope="module")
def benchmark() -> Any:
    path = Path(__file__).parent.parent / "benchmarks" / "gpu" / "lowering.py"
    spec = importlib.util.spec_from_file_location("gpu_lowering", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_lowering"] = module
    spec.loader.exec_module(module)
    return module


def test_the_dry_run_lists_what_qualifies(benchmark, capsys):
    benchmark.dry_run(["uvit-s"], [1, 64])
    text = capsys.readouterr().out
    # 257 tokens of width 512, 13 blocks: qkv, proj and the pair; the 6 skips and the first and last layers are dense.
    assert "13 x 1536x512                         input (1, 257, 512)               0.40 GFLOP  loses" in text
    assert "13 x 2048x512 + 512x2048              input (64, 257, 512)             68.99 GFLOP  1.2x to 1.3x" in text
    assert (
        "6 x 512x1024                         input (64, 257, 1024)            17.25 GFLOP  its weight obeys no N:M"
        in text
    )
    assert "Nothing above was measured" in text


def test_the_expectations_are_ordered(benchmark):
    assert [benchmark.expected(g) for g in (0, 9.9, 10, 39, 80, 1e6)] == [
        *["loses", "loses", "breaks even", "1.2x to 1.3x", "1.5x to 1.65x", "1.5x to 1.65x"]
    ]


def test_the_benchmark_refuses_to_measure_without_a_gpu(benchmark, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = CliRunner().invoke(benchmark.main, ["--out", str(tmp_path / "out.json")])
    assert done.exit_code == 1 and "no CUDA GPU" in done.output and not (tmp_path / "out.json").exists()
    assert CliRunner().invoke(benchmark.main, ["--models", "uvit"]).exit_code == 2


def test_the_benchmark_measures_sparse_models_without_zero_layers(benchmark):
    from compressor.model_zoo.uvit.sizes import digits

    subject = benchmark.uvit(digits())
    model = benchmark.made_sparse(subject, torch.device("cpu"))
    names = benchmark.sparse_names(model, subject)
    assert len(names) == 20 and not any("skip" in name for name in names)
    for name in names:
        NM(2, 4).verify(model.get_submodule(name).weight)
    assert all(bool(parameter.any()) for parameter in model.parameters() if parameter.dim() > 1)
    with torch.no_grad():
        assert benchmark.Tensors(model)(*subject.inputs(2)).shape == (2, 1, 8, 8)
