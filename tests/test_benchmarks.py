"""The GPU benchmark, as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from compressor import NM

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
