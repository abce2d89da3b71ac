"""What runs on a GPU runs on an imitated one: nothing mixes devices, or waits where a graph is recorded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="torch 2.10 ended in a segmentation fault"
)
TESTS = Path(__file__).parent
NEEDS_ONE = ("linear_is_the_dense", "keeps_its_numbers", "search_finds", "by_the_kernel", "planned", "masked_step")
"""The first two take long on a CPU."""

REFUSED = """
import gpu_imitated, pytest, torch
x = torch.ones(2, 3, device="cuda")
assert x.device == torch.ones(2).to("cuda").device == (x + 1).device != x.cpu().device
with pytest.raises(RuntimeError, match="same device"):
    x + torch.ones(3)
with pytest.raises(TypeError, match="numpy"):
    x.numpy()
from compressor.lower.graphs import Captured
from compressor import CompressorError
for waits in (lambda y: y * float(y.sum()), lambda y: y + torch.ones(3).to("cuda"), lambda y: y.cpu()):
    with pytest.raises(CompressorError, match="capturing"):
        Captured(waits, x)
inner = gpu_imitated._own["quantised_rows"]
gpu_imitated._own["quantised_rows"] = lambda y, *rest: inner(y * y.max().item(), *rest)
with pytest.raises(CompressorError, match="capturing"):
    Captured(lambda y: torch.ops.compressor.quantised_rows(y, True, "", None, None, None), x)
calls = []
double = Captured(lambda y: [calls.append(1), 2 * y][1], x)
before = len(calls)
assert torch.equal(double(3 * x).cpu(), torch.full((2, 3), 6.0)) and len(calls) == before
"""

MEASURED = """
import gpu_imitated, sys
sys.path.insert(0, "benchmarks/gpu")
import lowering, training
from compressor.lower import cusparselt
from compressor.lower.cusparselt_tuning import Algorithm, Tuned
from imitation import small
cusparselt.tuned, cusparselt.search_together = lambda *_: Tuned(Algorithm()), lambda *_: None
lowering.SUBJECTS.update(small())
lowering.ROUNDS, lowering.SUSTAINED_S, training.ROUNDS, training.MODELS["uvit-s"] = 2, 0.01, 2, "uvit-digits"
backends = "cusparselt,cusparselt-fp8,cusparselt-int8"
to = ["--out", sys.argv[1]]
lowering.main.main(["--backends", backends, "--cells", "dit-xl 64", *to], standalone_mode=False)
training.main.main(["--cells", "uvit-s 8", *to], standalone_mode=False)
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, "PYTHONPATH": str(TESTS)}
    return subprocess.run(
        [sys.executable, *arguments], env=surroundings, capture_output=True, text=True, check=False, cwd=TESTS.parent
    )


def test_the_imitation_refuses_what_a_gpu_does():
    done = python("-c", REFUSED)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_tests_of_a_gpu_run_on_an_imitated_one():
    some = " and ".join(f"not {name}" for name in NEEDS_ONE)
    files = [str(TESTS / name) for name in ("test_gpu.py", "test_optimizers.py")]
    call = ["-p", "gpu_imitated", "-p", "no:cacheprovider", "-n", "0", "-v", "-m", "gpu", "-k", some, *files]
    done = python("-m", "pytest", *call)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 20, done.stdout


@pytest.mark.slow
def test_what_measures_on_a_gpu_runs_on_an_imitated_one(tmp_path):
    done = python("-c", MEASURED, str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name, least in (("lowering", 9), ("training", 2)):
        text = (tmp_path / f"{name}_h200.jsonl").read_text(encoding="utf-8")
        forms = [line for line in map(json.loads, text.splitlines()) if "form" in line]
        assert len(forms) >= least and not [line for line in forms if "failed" in line], text
