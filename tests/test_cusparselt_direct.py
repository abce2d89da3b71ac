"""cuSPARSELt called directly: planned once, bias and GELU by the library, all destroyed. The bindings are imitated, by addresses."""

from __future__ import annotations

import copy
import gc
import sys
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from imitated import BF16, CUDA, FP16, error, normal, sparse_, unit
from imitated_nvmath import ENUMS, SIGNATURES, SIZES, Bindings, install
from torch import nn

from compressor import CompressorError, registry
from compressor.lower import cusparselt, cusparselt_direct, cusparselt_library
from compressor.lower.cusparselt import CuSparseLtDirect
from compressor.lower.cusparselt_tuning import Algorithm, Tuned


def forget() -> None:
    for cached in ("bindings", "_cusparse", "_number", "_handle"):
        getattr(cusparselt_direct, cached).cache_clear()


@pytest.fixture
def bindings(library, monkeypatch):
    forget()
    yield install(monkeypatch, library)
    gc.collect()
    forget()


def alive(bindings: Bindings, kind: str) -> int:
    gc.collect()
    return sum(one["kind"] == kind for one in bindings.alive.values())


# --- Where it is there. ---


def test_it_is_registered_and_needs_nvmath(machine, library, monkeypatch):
    assert isinstance(registry.backend("cusparselt-direct"), CuSparseLtDirect)
    machine((9, 0), 801, loaded=801)
    if find_spec("nvmath") is None:
        assert "diffusion-compressor[cusparselt]" in str(CuSparseLtDirect().unavailable(CUDA))
    forget()
    install(monkeypatch, library, (0, 8, 1))
    assert CuSparseLtDirect().unavailable(CUDA) is None
    machine((7, 5), 801, loaded=801)
    assert "no sparse tensor cores" in str(CuSparseLtDirect().unavailable(CUDA))
    forget()


@pytest.mark.parametrize(
    ("own", "loaded", "words"),
    [
        ((0, 10, 0), 801, "nvmath-python has loaded cuSPARSELt 0.10.0, torch 0.8.1"),
        ((0, 7, 1), 701, "0.7.1 cannot destroy all that it makes: install 0.8.0 or later"),
        ((0, 10, 0), 1000, None),
    ],
)
def test_the_two_must_have_loaded_the_same_file(machine, library, monkeypatch, own, loaded, words):
    machine((9, 0), 801, loaded=loaded)
    forget()
    install(monkeypatch, library, own)
    found = CuSparseLtDirect().unavailable(CUDA)
    assert found is None if words is None else words in str(found)
    forget()


def test_bindings_that_find_no_library_are_a_reason(machine, library, monkeypatch):
    machine((9, 0), 801, loaded=801)
    forget()
    made = install(monkeypatch, library)
    monkeypatch.setattr(made, "get_property", lambda part: 1 / 0)
    assert "finds no cuSPARSELt: division by zero" in str(CuSparseLtDirect().unavailable(CUDA))
    forget()


def test_versions_beyond_0_9_are_written_as_they_are_called():
    assert [cusparselt_library.dotted(one) for one in (502, 801, 1000, 1_000_000)] == [
        "0.5.2",
        "0.8.1",
        "0.10.0",
        "1.0.0",
    ]
    assert cusparselt_library.numbered(0, 10, 1) == 1001 and cusparselt_library.numbered(0, 8, 1) == 801


@pytest.mark.skipif(find_spec("nvmath") is None, reason="nvmath-python is not installed")
def test_the_imitation_has_what_the_real_bindings_have():
    real: Any = cusparselt_direct.bindings()
    for name, members in ENUMS.items():
        assert {one: int(getattr(real, name)[one]) for one in members} == members
    for name, arguments in SIGNATURES.items():
        given = getattr(real, name).__doc__.splitlines()[0].split("(")[1].split(")")[0]
        assert len([one for one in given.split(",") if one.strip()]) == arguments, name
    for name, size in SIZES.items():
        of = real.MatmulDescAttribute if name in real.MatmulDescAttribute.__members__ else real.MatmulAlgAttribute
        ask = (
            real.get_matmul_desc_attribute_dtype
            if of is real.MatmulDescAttribute
            else real.get_matmul_alg_attribute_dtype
        )
        assert ask(int(of[name]))().itemsize == size, name
    assert (int(cusparselt_direct._cusparse().Order.COL), int(cusparselt_direct._cusparse().Order.ROW)) == (1, 2)
    operation = cusparselt_direct._cusparse().Operation
    assert (int(operation.NON_TRANSPOSE), int(operation.TRANSPOSE)) == (0, 1)
    assert (cusparselt_direct._number(BF16), cusparselt_direct._number(FP16)) == (14, 2)
    assert issubclass(real.cuSPARSELtError, Exception)


# --- What it computes. ---


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("split", [(1, -1), (-1, -1)])
def test_a_linear_is_the_dense_one(bindings, monkeypatch, dtype, bias, transposed, split):
    how = Algorithm(2, *split, transposed)
    monkeypatch.setattr(cusparselt, "tuned", lambda *_: Tuned(how, Algorithm(transposed=transposed)))
    layer = sparse_(nn.Linear(64, 32, bias=bias))
    lowered = CuSparseLtDirect().build(unit(layer, (3, 7, 64), dtype=dtype))
    bindings.library.calls.clear()
    for shape in ((3, 7, 64), (24, 64), (8, 64), (0, 64)):
        x = normal(*shape, dtype=dtype)
        out = lowered(x)
        assert out.shape == (*shape[:-1], 32) and out.dtype == dtype and out.is_contiguous()
        if out.numel():
            wanted = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
            assert error(out, wanted) < 4e-3
    assert bindings.library.calls == []  # torch's operator was not asked


def test_split_k_by_kernels_is_told_to_the_library(bindings, monkeypatch):
    bindings.library.capability = (8, 0)
    monkeypatch.setattr(cusparselt, "tuned", lambda *_: Tuned(Algorithm(1, 4, 2)))
    lowered = CuSparseLtDirect().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    assert lowered is not None  # its plans live as long
    chosen = [one["attributes"] for one in bindings.alive.values() if one["kind"] == "selection"]
    assert {"CONFIG_ID": 1, "SPLIT_K": 4, "SPLIT_K_MODE": 2} in chosen


def test_segment_k_is_told_to_the_library(bindings):
    lowered = CuSparseLtDirect().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    assert lowered is not None
    chosen = [one["attributes"] for one in bindings.alive.values() if one["kind"] == "selection"]
    assert {"CONFIG_ID": 3, "SPLIT_K": -1} in chosen  # its mode is the library's own


def test_a_split_that_the_gpu_does_not_have_is_not_planned(bindings, monkeypatch):
    monkeypatch.setattr(cusparselt, "tuned", lambda *_: Tuned(Algorithm(1)))
    plans = cusparselt_direct.Plans()
    before = len(bindings.alive)
    with pytest.raises(CompressorError, match=r"has no plan for \(8, 64\) to 32 channels: .*splitK"):
        plans.fitted(normal(8, 64, dtype=BF16), 32, None, Algorithm(1, 2, 1))
    assert len(bindings.alive) == before + 1  # the handle: what was made on the way is destroyed


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_pair_has_its_gelu_by_the_library(bindings, approximate):
    first, second = sparse_(nn.Linear(64, 128)), sparse_(nn.Linear(128, 64))
    pair = nn.Sequential(first, nn.GELU(approximate), second).to(BF16)
    lowered = CuSparseLtDirect().build(unit(pair, (8, 64)))
    assert [type(one).__name__ for one in lowered] == ["SparseLinear", "SparseLinear"]
    for rows in (8, 16):
        x = normal(rows, 64, dtype=BF16)
        assert error(lowered(x), copy.deepcopy(pair).double()(x.double())) < 1e-2


def test_a_gelu_that_the_library_does_not_have_stays_between(bindings):
    bindings.refuses_gelu = True
    pair = nn.Sequential(sparse_(nn.Linear(64, 128)), nn.GELU("tanh"), sparse_(nn.Linear(128, 64))).to(BF16)
    lowered = CuSparseLtDirect().build(unit(pair, (8, 64)))
    assert [type(one).__name__ for one in lowered] == ["SparseLinear", "GELU", "SparseLinear"]
    x = normal(8, 64, dtype=BF16)
    assert error(lowered(x), copy.deepcopy(pair).double()(x.double())) < 1e-2


def test_a_gelu_that_is_not_applied_is_found_out(bindings):
    bindings.ignores.add("ACTIVATION_GELU")
    pair = nn.Sequential(sparse_(nn.Linear(64, 128)), nn.GELU("tanh"), sparse_(nn.Linear(128, 64))).to(BF16)
    lowered = CuSparseLtDirect().build(unit(pair, (8, 64)))
    assert [type(one).__name__ for one in lowered] == ["SparseLinear", "GELU", "SparseLinear"]


def test_a_bias_that_is_not_added_is_found_out(bindings):
    bindings.ignores.add("BIAS_POINTER")
    with pytest.raises(CompressorError, match="another bias than it is given"):
        CuSparseLtDirect().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    pair = nn.Sequential(sparse_(nn.Linear(64, 128)), nn.GELU(), sparse_(nn.Linear(128, 64))).to(BF16)
    with pytest.raises(CompressorError, match="another bias than it is given"):
        CuSparseLtDirect().build(unit(pair, (8, 64)))


def test_what_has_no_plan_goes_through_torch(bindings, monkeypatch):
    pair = nn.Sequential(sparse_(nn.Linear(64, 128)), nn.GELU("tanh"), sparse_(nn.Linear(128, 64))).to(BF16)
    lowered = CuSparseLtDirect().build(unit(pair, (8, 64)))

    def broken(*given):
        raise bindings.cuSPARSELtError("no more")

    monkeypatch.setattr(bindings, "matmul_plan_init", broken)
    bindings.library.calls.clear()
    x = normal(16, 64, dtype=BF16)
    assert error(lowered(x), copy.deepcopy(pair).double()(x.double())) < 1e-2
    assert [call["tokens"] for call in bindings.library.calls] == [16, 16]


# --- How long plans live. ---


def test_a_product_is_planned_once(bindings):
    lowered = CuSparseLtDirect().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    before = bindings.planned
    for _ in range(3):
        lowered(normal(8, 64, dtype=BF16))
    assert bindings.planned == before
    lowered(normal(16, 64, dtype=BF16))
    assert bindings.planned == before + 1


def test_all_that_was_made_is_destroyed(bindings):
    lowered = CuSparseLtDirect().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    for rows in range(8, 80, 8):
        lowered(normal(rows, 64, dtype=BF16))
    assert alive(bindings, "plan") == alive(bindings, "matmul") == alive(bindings, "selection") == 4  # the latest ones
    assert alive(bindings, "matrix") == 12
    del lowered
    assert {kind: alive(bindings, kind) for kind in ("plan", "selection", "matmul", "matrix", "handle")} == {
        **dict.fromkeys(("plan", "selection", "matmul", "matrix"), 0),
        "handle": 1,
    }


def test_a_plan_that_a_graph_recorded_is_kept(bindings):
    lowered: Any = CuSparseLtDirect().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    recorded = lowered.packed.plans.of(normal(8, 64, dtype=BF16), 32, lowered.packed.bias, Algorithm(3, -1, -1))
    recorded.recorded = True
    for rows in range(16, 88, 8):
        lowered(normal(rows, 64, dtype=BF16))
    assert recorded.made and recorded in lowered.packed.plans.kept.values()
    assert len(lowered.packed.plans.kept) == 5


def test_a_bias_that_moved_gets_a_plan_of_its_own(bindings):
    lowered: Any = CuSparseLtDirect().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    x = normal(8, 64, dtype=BF16)
    before = lowered(x)
    lowered.packed.bias = lowered.packed.bias + 1
    assert error(lowered(x), before.double() + 1) < 4e-3


def test_copies_have_plans_of_their_own(bindings):
    lowered: Any = CuSparseLtDirect().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    x = normal(8, 64, dtype=BF16)
    before = lowered(x)
    other = copy.deepcopy(lowered)
    assert other.packed.plans.number != lowered.packed.plans.number
    del lowered
    gc.collect()
    assert torch.equal(other(x), before)


def test_what_is_exported_or_pickled_runs_where_its_plans_are_not(bindings, monkeypatch, tmp_path):
    pair = nn.Sequential(sparse_(nn.Linear(64, 128)), nn.GELU("tanh"), sparse_(nn.Linear(128, 64))).to(BF16)
    lowered: Any = CuSparseLtDirect().build(unit(pair, (8, 64)))
    x = normal(8, 64, dtype=BF16)
    with torch.no_grad():
        wanted = lowered(x)
        torch.save(lowered, tmp_path / "lowered.pt")
        assert error(torch.load(tmp_path / "lowered.pt", weights_only=False)(x), wanted.double()) < 1e-2
        exported = torch.export.export(lowered, (x,)).module()
        numbers = [one.packed.plans.number for one in lowered]
        for others in (
            {},
            dict(zip(numbers, [cusparselt_direct.Plans(), cusparselt_direct.Plans("none")], strict=True)),
        ):
            monkeypatch.setattr(cusparselt_direct, "_held", others)  # those of another process
            assert error(exported(x), wanted.double()) < 1e-2


@pytest.mark.slow
def test_it_works_under_compile_and_export(bindings):
    pair = nn.Sequential(sparse_(nn.Linear(64, 128)), nn.GELU(), sparse_(nn.Linear(128, 64))).to(BF16)
    lowered: Any = CuSparseLtDirect().build(unit(pair, (8, 64)))
    weight = lowered[1].packed
    plans = weight.plans
    arguments = (normal(8, 128, dtype=BF16), weight.packed, weight.bias, 64, [3, -1, -1, 1], plans.number, plans.gelu)
    torch.library.opcheck(torch.ops.compressor.cslt_planned, arguments, test_utils=("test_schema", "test_faketensor"))
    compiled: Any = torch.compile(lowered, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (8, 5, 24):
        x = normal(rows, 64, dtype=BF16)
        with torch.no_grad():
            assert torch.equal(compiled(x), lowered(x))
    torch.compiler.reset()


def test_gradients_and_casts_are_refused(bindings):
    lowered = CuSparseLtDirect().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    with pytest.raises(CompressorError, match="for inference"):
        lowered(normal(8, 64, dtype=BF16).requires_grad_())
    with pytest.raises(CompressorError, match="was cast"):
        copy.deepcopy(lowered).float()(normal(8, 64, dtype=BF16))
    with pytest.raises(CompressorError, match="a weight of 24 x 64"):
        CuSparseLtDirect().build(unit(nn.Linear(64, 24), (4, 64)))


def test_a_layer_that_ends_after_the_library_says_nothing(bindings, monkeypatch):
    lowered: Any = CuSparseLtDirect().build(unit(sparse_(nn.Linear(64, 32)), (8, 64)))
    for plan in lowered.packed.plans.kept.values():
        plan.made = [(lambda made: sys.exit("gone") if made < 0 else 1 / 0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del lowered, plan
        gc.collect()
