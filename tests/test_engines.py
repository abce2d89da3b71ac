"""Other engines as opponents: the model in ONNX Runtime and OpenVINO, in each precision."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path

import pytest
import torch

from compressor import registry
from compressor.export import engines
from compressor.export.onnx import random_inputs
from compressor.report.content import ONNX, OPENVINO
from compressor.seeds import generator


class Stack(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> tuple[int | None, int]:
    found = Stack()
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

    def broken(path, adapter):
        raise CompressorError("NNCF: no such operator")

    monkeypatch.setattr(engines, "_openvino_int8", broken)
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
