"""Other engines as opponents: the model in ONNX Runtime and OpenVINO, in each precision."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compressor import registry
from compressor.export import engines
from compressor.export.onnx import random_inputs
from compressor.report.content import ONNX, OPENVINO, TENSORRT
from compressor.runs import speed
from compressor.seeds import generator


def signal_stack() -> tuple[int | None, int]:
    found = engines._Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found.at, found.size


@pytest.mark.slow
def test_every_engine_answers_as_pytorch_as_far_as_its_precision_goes(tmp_path, capfd):
    adapter = registry.adapter("uvit-digits").small()
    model = adapter.build().eval()
    before = signal_stack()
    found, left = engines.engines(model, adapter, tmp_path, openvino=True)
    assert signal_stack() == before  # OpenVINO would leave one of its own, and free it: then a signal ends the process
    assert capfd.readouterr().out == ""  # of NNCF's bars
    names = {one.name: one for one in found}
    assert {ONNX, f"{ONNX}, int8", OPENVINO, f"{OPENVINO}, int8"} <= names.keys()
    assert names.keys() | left.keys() == {*names, f"{OPENVINO}, bfloat16"}
    for batch in (1, 3):
        inputs = random_inputs(adapter.example_inputs(batch), adapter.num_classes, generator(batch))
        with torch.no_grad():
            wanted = adapter.predict(model, inputs)
        errors = {
            name: float((one.run(inputs) - wanted).square().mean().sqrt() / wanted.std()) for name, one in names.items()
        }
        assert signal_stack() == before
        for name, error in errors.items():
            assert error < {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.5}[names[name].dtype], name
        assert min(errors[f"{ONNX}, int8"], errors[f"{OPENVINO}, int8"]) > 10 * errors[OPENVINO]


@pytest.mark.slow
def test_an_engine_that_cannot_be_had_is_left_out_with_the_reason(tmp_path, monkeypatch):
    from compressor.errors import CompressorError

    def broken(path, adapter, out):
        raise CompressorError("NNCF: no such operator")

    monkeypatch.setattr(engines, "_quantise", broken)
    adapter = registry.adapter("uvit-digits").small()
    found, left = engines.engines(adapter.build().eval(), adapter, tmp_path, openvino=True)
    assert left[f"{OPENVINO}, int8"] == "NNCF: no such operator" and OPENVINO in {one.name for one in found}
    assert {one.name for one in engines.engines(adapter.build().eval(), adapter, tmp_path / "b")[0]} == {
        ONNX,
        f"{ONNX}, int8",
    }


@pytest.mark.slow
def test_a_speed_up_is_over_the_fastest_form_that_is_no_less_exact(finished, tmp_path, cli):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    outcome = cli("bench", run, "--batches", "1", "--no-compiled", "--json")
    assert outcome.code == 0, outcome.err
    entries = json.loads(outcome.out)
    dense = {one["backend"]: one for one in entries if one["row"] == "dense"}
    assert {"eager", "prepacked", ONNX, f"{ONNX}, int8", OPENVINO, f"{OPENVINO}, int8"} <= dense.keys()
    for one in entries:
        rivals = [other for other in dense.values() if other["error"] <= max(one["error"], 1e-4)]
        if one["row"] != "dense" and one["backend"].startswith(ONNX):
            rivals = [dense[ONNX]]
        best = min(rivals, key=lambda other: other["median_ms"])
        assert one["against"] == best["backend"]
        assert one["speedup_vs_dense"] == pytest.approx(best["median_ms"] / one["median_ms"])
    assert dense[f"{OPENVINO}, int8"]["dtype"] == "int8" and dense["eager"]["error"] == 0
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "OpenVINO, int8" in text and "| weights | form | median | error |" in text


TORCH_TENSORRT = '''
"""The signature of torch_tensorrt.compile 2.14, and those of the dynamo frontend's settings that are used here."""
import torch
calls = []
def compile(module, ir="default", inputs=None, arg_inputs=None, kwarg_inputs=None, enabled_precisions=None, **kwargs):
    assert ir == "dynamo" and inputs is None and set(kwargs) <= {"sparse_weights", "immutable_weights"}
    assert not module.training and all(isinstance(one, torch.Tensor) for one in arg_inputs)
    if any(parameter.dtype not in (torch.float16,) for parameter in module.parameters()):
        raise RuntimeError("weakly typed")
    program = torch.export.export(module, tuple(arg_inputs))
    calls.append(kwargs)
    return program.module()
'''


def test_tensorrt_is_an_opponent_where_it_is_installed(tmp_path, monkeypatch):
    from compressor.errors import CompressorError

    adapter = registry.adapter("uvit-digits").small()
    model, example = adapter.build().eval(), adapter.example_inputs(2)
    with pytest.raises(CompressorError, match="not installed here") as missing:
        engines.tensorrt(model, adapter, example, sparse=True)
    assert "pip install torch-tensorrt" in missing.value.hint
    (tmp_path / "torch_tensorrt.py").write_text(TORCH_TENSORRT)
    monkeypatch.syspath_prepend(tmp_path)
    import torch_tensorrt

    made = [engines.tensorrt(model, adapter, example, sparse=sparse) for sparse in (False, True)]
    assert [one["sparse_weights"] for one in torch_tensorrt.calls] == [False, True]
    assert all(one["immutable_weights"] for one in torch_tensorrt.calls)  # what can be refitted relies on no zeros
    assert [(one.name, one.dtype) for one in made] == [(TENSORRT, "float16")] * 2
    inputs = random_inputs(example, adapter.num_classes, generator(1))
    with torch.no_grad():
        wanted = adapter.predict(model, inputs)
        found = made[1].run(inputs)
    assert found.dtype == torch.float32 and float((found - wanted).square().mean().sqrt() / wanted.std()) < 1e-2
    monkeypatch.setattr(torch_tensorrt, "compile", lambda *_, **__: 1 / 0)
    with pytest.raises(CompressorError, match=r"torch-tensorrt: .*division"):
        engines.tensorrt(model, adapter, example, sparse=True)


@pytest.fixture(autouse=True)
def without_tensorrt():
    yield
    sys.modules.pop("torch_tensorrt", None)


def test_a_run_on_a_gpu_has_tensorrt_beside_it_or_says_why_not(monkeypatch):
    run = SimpleNamespace(
        adapter=None,
        dense_row=SimpleNamespace(name="dense"),
        report=SimpleNamespace(final=SimpleNamespace(name="sparsedm")),
        dense=torch.nn.Identity(),
        sparse=torch.nn.Identity(),
    )
    assert speed._tensorrt_forms(run, None)[1] == {
        TENSORRT: "torch-tensorrt is not installed here. Install the version for your torch: pip install torch-tensorrt"
    }
    monkeypatch.setattr(engines, "tensorrt", lambda model, *rest: engines.Engine(TENSORRT, "float16", model))
    forms, left = speed._tensorrt_forms(run, None)
    assert [(one.row, one.backend, one.run) for one in forms] == [
        ("dense", TENSORRT, run.dense),
        ("sparsedm", TENSORRT, run.sparse),
    ]
    assert left == {}
