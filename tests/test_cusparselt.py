"""2:4 on GPUs: what is refused, and the algebra of the lowered layers, without a GPU: the library is imitated."""

from __future__ import annotations

import copy
import os
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from imitated import BF16, CUDA, FP8, FP16, error, normal, sparse_, unit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from compressor import NM, CompressorError, registry
from compressor.discovery import load
from compressor.lower import cusparselt, cusparselt_library
from compressor.lower.cusparselt import CuSparseLt, CuSparseLtQuantised, fp8, int8
from compressor.lower.cusparselt_tuning import Algorithm, Product, Tuned, multiply
from compressor.lower.quantised import rescaled
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.codes import quantised

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
        ((9, 0), 502, "9.0 needs cuSPARSELt 0.6.0 or later, this process has 0.5.2", "0.6.0", "0.6.0"),
        ((9, 0), 600, None, None, "fp8 needs cuSPARSELt 0.6.2"),
        ((9, 0), 801, None, None, None),
        ((10, 3), 1000, None, "10.3: cuSPARSELt lists no int8", None),
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


def test_the_version_is_that_of_the_loaded_file(machine):
    machine((9, 0), 502, loaded=600)  # torch's header is older than what is loaded
    assert CuSparseLt().unavailable(CUDA) is None and CuSparseLt().version == "0.6.0"
    machine((9, 0), 801, loaded=502)
    assert "0.5.2" in str(CuSparseLt().unavailable(CUDA))
    machine((9, 0), 801)
    assert CuSparseLt().version == "0.8.1 (header)"
    machine((9, 0), None)
    assert CuSparseLt().version == ""


@pytest.mark.parametrize("answer", [0, 1])
def test_the_loaded_file_is_asked_and_none_is_loaded_for_that(monkeypatch, answer):
    modes = []

    class File:
        def __init__(self, name, mode):
            assert name == "libcusparseLt.so.0"
            modes.append(mode)

        def cusparseLtGetProperty(self, part, value):
            value._obj.value = (0, 8, 1)[part]
            return answer

    monkeypatch.setattr(cusparselt_library.ctypes, "CDLL", File)
    assert cusparselt_library._loaded() == (801 if answer == 0 else None)
    assert all(mode & os.RTLD_NOLOAD for mode in modes)


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch for CUDA loads it, with or without a GPU")
def test_no_file_is_loaded_by_torch_without_cuda():
    assert cusparselt_library._loaded() is None


@pytest.mark.parametrize(("capability", "slow"), [((9, 0), True), ((8, 9), True), ((8, 0), False), ((10, 0), False)])
def test_the_slow_version_is_told(machine, capability, slow):
    machine(capability, 801, loaded=800)
    assert ("0.8.1" in str(CuSparseLt().remark(CUDA))) == slow
    machine(capability, 800, loaded=801)
    assert CuSparseLt().remark(CUDA) is None


def test_an_older_torch_is_refused(machine, monkeypatch):
    machine((9, 0), 801)
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu130")
    assert "2.10" in str(CuSparseLt().unavailable(CUDA))


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
        ((9, 0), FP16, None, None),  # the search, in another process, decides
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
    assert set(made) == {"cusparselt", "cusparselt-direct", "cusparselt-int8", "cusparselt-fp8"}
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
    assert (lowered.gelu if backend.quantises else lowered[1].approximate) == approximate
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
        (24, 3, -1, -1),
        (24, 3, -1, -1),
        (8, 0, 1, -1),
    ]


def test_how_a_sum_is_split_is_told_to_the_library(library, monkeypatch):
    """Below Hopper a sum may be split in one kernel or in two, which the mode says."""
    library.capability = (8, 0)
    algorithm = Algorithm(alg_id=2, split_k=4, split_k_mode=1)
    monkeypatch.setattr(cusparselt, "tuned", lambda product, index: Tuned(algorithm, algorithm))
    lowered = CuSparseLt().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    library.calls.clear()
    lowered(normal(8, 64, dtype=BF16))
    assert [(call["alg_id"], call["split_k"], call["mode"]) for call in library.calls] == [(2, 4, 1)]


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


@pytest.mark.parametrize("backend", [CuSparseLt(), int8()], ids=lambda backend: backend.name)
def test_all_products_of_a_model_are_searched_at_once(library, monkeypatch, backend):
    asked: list[Product] = []
    together: list[list[Product]] = []
    monkeypatch.setattr(cusparselt, "tuned", lambda product, index: asked.append(product) or Tuned(Algorithm()))
    monkeypatch.setattr(cusparselt, "search_together", lambda products, index: together.append(list(products)))
    pair = nn.Sequential(sparse_(nn.Linear(64, 128)), nn.GELU(), sparse_(nn.Linear(128, 64, bias=False)))
    units = [unit(pair, (3, 7, 64)), unit(sparse_(nn.Conv2d(64, 32, 1)), (2, 64, 3, 3))]
    backend.prepare(units)
    for one in units:
        backend.build(one)
    assert together == [asked] and len(asked) == 3


def test_lowering_prepares_every_backend_once_for_the_layers_that_it_takes(monkeypatch):
    from compressor.errors import UsageError
    from compressor.lower import Backend, lower

    class Asked(Backend):
        name = "asked"
        said: Any = None

        def __init__(self) -> None:
            self.units: list[Any] = []

        def unavailable(self, device):
            return None

        def refusal(self, given):
            return "it is odd" if given.input_shape[-1] % 2 else None

        def prepare(self, units):
            self.units.append([one.input_shape for one in units])
            if self.said is not None:
                raise self.said

        def build(self, given):
            return given.module

    for said in (None, RuntimeError("no"), SystemExit(1)):
        backend = Asked()
        backend.said = said
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
        lower(model, torch.zeros(4, 5), [backend], cache=False)
        assert backend.units == [[(4, 8)]]  # two that are alike are one
    backend.said = UsageError("COMPRESSOR_SEARCH_SECONDS is 'soon'", "")
    with pytest.raises(UsageError, match="soon"):
        lower(model, torch.zeros(4, 5), [backend], cache=False)


def test_a_gpu_is_woken_before_anything_counts(monkeypatch):
    from compressor.cost import timing

    now, calls = [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def call() -> None:
        calls.append(now[0])
        now[0] += 0.03 if now[0] < 0.2 else 0.01  # slow until its clocks are up

    (seconds,) = timing.interleaved([call], 3, CUDA, warm_up=0)
    assert len(calls) == 7 + 3 and seconds == pytest.approx([0.01] * 3)
    timing.interleaved([], 3, CUDA)
    now[0], calls[:] = 0.0, []
    timing.interleaved([call], 3, torch.device("cpu"), warm_up=0)
    assert len(calls) == 3


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


@pytest.mark.parametrize("fault", ["none", "stale", "doubled"])
def test_a_bias_that_is_not_added_as_given_is_found_out(library, monkeypatch, fault):
    layer = sparse_(nn.Linear(64, 32)).to(BF16)
    first: dict[Any, Tensor] = {}
    multiplied = library.sparse_mm

    def faulty(packed, right, bias=None, **more):
        if bias is not None:
            # plans that are kept by shape remember the pointer
            stale = first.setdefault(tuple(packed.shape), bias.clone())
            bias = {"none": None, "stale": stale, "doubled": bias * 2}[fault]
        return multiplied(packed, right, bias=bias, **more)

    monkeypatch.setattr(torch, "_cslt_sparse_mm", faulty)
    with pytest.raises(CompressorError, match="another bias than it is given"):
        CuSparseLt().build(unit(layer, (8, 64)))
    assert CuSparseLt().build(unit(sparse_(nn.Linear(64, 32, bias=False)).to(BF16), (8, 64))) is not None


@pytest.mark.parametrize("backend", [CuSparseLt(), int8(), fp8()], ids=lambda backend: backend.name)
def test_gradients_are_refused(library, backend):
    lowered = backend.build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    x = normal(8, 64, dtype=BF16).requires_grad_()
    with pytest.raises(CompressorError, match="for inference"):
        lowered(x)
    with torch.no_grad():
        assert lowered(x).shape == (8, 32)


@pytest.mark.parametrize("backend", [int8(), fp8()], ids=lambda backend: backend.name)
def test_scales_that_were_cast_are_refused(library, backend):
    lowered = backend.build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    with pytest.raises(CompressorError, match="was cast"):
        copy.deepcopy(lowered).half()(normal(8, 64, dtype=BF16))


def test_other_numbers_of_tokens_are_told_once(library, monkeypatch):
    monkeypatch.setattr(cusparselt, "tuned", lambda *_: Tuned(Algorithm(3), Algorithm(), 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered = CuSparseLt().build(unit(sparse_(nn.Linear(64, 32)), (3, 7, 64)))
        lowered(normal(24, 64, dtype=BF16))
    with pytest.warns(UserWarning, match="tuned for 24 rows and got 8"):
        lowered(normal(8, 64, dtype=BF16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered(normal(8, 64, dtype=BF16))


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
    assert torch.equal(cast.packed.packed, lowered.packed.packed) and cast.packed.packed.dtype == torch.uint8
    assert torch.equal(cast.to(BF16)(x), before)


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.int8, FP8])
@pytest.mark.parametrize("bias", [True, False])
def test_the_real_operator_takes_what_it_is_given(dtype, bias):
    """torch's own check of the call, with tensors that say they are on a GPU: names, dtypes, shapes. (The copy of a result that is not
    transposed would need a real one.)"""
    out_dtype = BF16 if dtype.itemsize == 1 else dtype
    with FakeTensorMode():
        packed = torch.empty(32, 64 * 9 // 16, device="cuda", dtype=dtype)
        x = torch.empty(24, 64, device="cuda", dtype=dtype)
        added = torch.empty(32, device="cuda", dtype=out_dtype) if bias else None
        for algorithm in (Algorithm(0), Algorithm(2, -1, -1), Algorithm(2, 4, 1)):
            out = multiply(packed, x, added, algorithm)
            assert out.shape == (24, 32) and out.dtype == out_dtype and out.is_contiguous()


@pytest.mark.parametrize(("capability", "refused"), [((9, 0), (3, 2, 1)), ((8, 0), (3, -1, -1))])
def test_a_split_that_a_gpu_refuses_is_not_hidden(library, monkeypatch, capability, refused):
    library.capability = capability
    monkeypatch.setattr(cusparselt, "tuned", lambda *_: Tuned(Algorithm(*refused)))
    with pytest.raises(AssertionError, match="split-K is not supported"):
        CuSparseLt().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))


def test_the_operator_works_under_compile_and_export(library):
    layer = sparse_(nn.Linear(64, 32))
    lowered = CuSparseLt().build(unit(layer, (8, 64)))
    operator = torch.ops.compressor.cslt_linear
    weight: Any = lowered.packed
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


def test_backends_load_where_they_are_installed():
    names = registry.names("backends")
    if "cusparselt" not in names:
        pytest.skip("this installation is older than the backend: pip install -e .")
    assert load("backends", "cusparselt") is CuSparseLt
