"""The GPU benchmark, as far as it goes without a GPU."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from compressor import NM

# --- Tables of several comparisons. ---


def comparison_of(hardware: str, **values: dict[int, float]) -> dict[str, Any]:
    """A slim report with these values of each entry by seed."""
    entries = [
        {
            "label": label,
            "method": label,
            "settings": {},
            "pattern": "2:4",
            "recipe_train": dict.fromkeys(
                ("steps", "batch_size", "accumulate", "lr", "warmup", "schedule", "dtype"), 1
            ),
            "cells": [{"seed": seed, "value": value, "drift": {"ssim": value / 10}} for seed, value in own.items()],
        }
        for label, own in values.items()
    ]
    return {
        "title": hardware,
        "entries": entries,
        "model": "m",
        "weights_sha256": "0",
        "sampler": "s",
        "match": {"by": "macs"},
        "evaluate": {"samples": 8, "latency_rounds": 0},
        "metric": {"name": "fd", "extractor_sha256": "1"},
        "data": {"sha256": "2"},
        "environment": {"hardware": hardware, "versions": {"torch": "2"}},
    }


def test_comparisons_of_one_evaluation_and_budget_make_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(GPU.parent)
    merged = importlib.import_module("merged").merged
    first, second = comparison_of("GPU", a={0: 1.0, 1: 3.0}), comparison_of("CPU", b={0: 5.0}, a={2: 5.0})
    found = merged(first, second)
    a, b = found["entries"]
    assert [cell["seed"] for cell in a["cells"]] == [0, 1, 2] and a["quality"]["mean"] == 3.0 and a["quality"]["n"] == 3
    assert a["drift"]["ssim"]["mean"] == pytest.approx(0.3) and b["quality"]["ci95"] is None
    assert found["environment"]["hardware"] == "GPU and CPU" and found["seeds"] == [0, 1, 2]
    assert [cell["seed"] for cell in first["entries"][0]["cells"]] == [0, 1]  # what is given stays
    others: list[tuple[str, Any, str]] = [
        ("evaluate", {"samples": 9}, "another evaluation"),
        ("weights_sha256", "3", "another weights_sha256"),
        ("entries", comparison_of("", a={1: 2.0})["entries"], "a seed stands twice"),
    ]
    for name, value, words in others:
        with pytest.raises(ValueError, match=words):
            merged(first, {**second, name: value})
    second["entries"][0]["recipe_train"]["steps"] = 2
    with pytest.raises(ValueError, match="another budget"):
        merged(first, second)


# --- The benchmark, as far as it goes without a GPU. ---


GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"
SHARED = ("subjects", "lines", "blocks", "lowering")
"""Those that others import, the first ones first."""


@cache
def script(name: str) -> Any:
    for other in SHARED[: SHARED.index(name) if name in SHARED else None]:
        script(other)
    spec = importlib.util.spec_from_file_location(name, GPU / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # by which the scripts find each other
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return script("subjects")


@pytest.fixture(scope="module")
def measuring(benchmark) -> Any:
    return script("lowering")


@pytest.fixture(scope="module")
def report() -> Any:
    return script("report")


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


def test_the_benchmark_refuses_to_measure_without_a_gpu(measuring, benchmark, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = CliRunner().invoke(measuring.main, ["--out", str(tmp_path / "out.jsonl")])
    assert done.exit_code == 1 and "no CUDA GPU" in done.output and not (tmp_path / "out.jsonl").exists()
    assert CliRunner().invoke(measuring.main, ["--cells", "uvit 1"]).exit_code == 2
    assert CliRunner().invoke(benchmark.main, ["--models", "uvit"]).exit_code == 2


@pytest.mark.slow
def test_a_session_writes_every_form_and_goes_on_where_it_ended(measuring, report, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "compiled", lambda model, mode="": model)
    out, page, plot = tmp_path / "out.jsonl", tmp_path / "gpu.md", tmp_path / "gpu.svg"
    call = ["--imitate", "--cells", "dit-xl 64", "--backends", "cusparselt,cusparselt-int8", "--out", str(out)]
    script("imitation")
    done = CliRunner().invoke(measuring.main, call, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = out.read_text(encoding="utf-8").splitlines()
    forms = {line["form"]: line for line in map(json.loads, lines) if "form" in line}
    sparse, eight = "cusparselt everywhere, compiled", "cusparselt-int8 and dense-int8 everywhere, compiled"
    assert {"dense", "dense, compiled", "dense, autotuned", "dense-int8, compiled", sparse, eight} <= set(forms)
    assert "dense-int8, compiled" in forms[eight]["against"]
    assert set(forms[sparse]["against"]) <= {"dense", "dense, compiled", "dense, autotuned"}
    assert forms[sparse]["error"] < 0.02 < 10 * forms[eight]["error"]
    products = [one for line in map(json.loads, lines) for one in line.get("products", ())]
    assert len({tuple(one["at"]) for one in products}) == len(products) > 3
    fused = next(one for one in products if one["at"][0].endswith("attn1.to_q.product"))
    assert len(fused["at"]) == 2 and fused["shapes"][0][1:] == [192, 64]
    assert {"eager", "dense-int8", "cusparselt", "cusparselt-int8"} <= set(fused["ms"])
    assert forms["dense"]["peak_gib"] is None and json.loads(lines[0])["about"]["code"] == script("lines").code()
    last = max(at for at, line in enumerate(lines) if f'"form": "{eight}"' in line)
    kept = [*lines[:last], lines[last][:40]]
    out.write_text("\n".join(kept), encoding="utf-8")  # it ended there, in the middle of a line
    assert CliRunner().invoke(measuring.main, call, catch_exceptions=False).exit_code == 0
    again = out.read_text(encoding="utf-8").splitlines()
    assert again[: len(kept)] == kept
    assert [json.loads(line)["form"] for line in again[len(kept) :] if '"form"' in line] == [eight]
    assert json.loads(again[-1])["complete"]["backends"] == ["cusparselt", "cusparselt-int8"]
    assert CliRunner().invoke(measuring.main, call, catch_exceptions=False).exit_code == 0
    assert out.read_text(encoding="utf-8").splitlines() == again  # all is there
    told = ["--lines", str(out), "--training", str(tmp_path / "none"), "--page", str(page), "--plot", str(plot)]
    assert CliRunner().invoke(report.main, told, catch_exceptions=False).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "**imitation**" in text and "| dit-xl, 64 | int8 |" in text and "<svg" in plot.read_text(encoding="utf-8")
    assert CliRunner().invoke(report.main, [*told[:1], str(tmp_path / "none"), *told[2:]]).exit_code == 0
    assert report.NOTHING in page.read_text(encoding="utf-8")


@pytest.fixture
def kept(tmp_path) -> Any:
    """Makes the lines of a file as a session on some GPU would."""
    scripts = script("lines")

    def made(gpu: str = "NVIDIA H200", code: str = "1", path: str = "a.jsonl", **versions: str) -> Any:
        about = {"hardware": f"{gpu}, 8 threads", "platform": code, "code": code, "imitation": False}
        about["versions"] = {"torch": "2.11.0", "cuda": "13.0", "cusparselt": "0.8.0", "torchao": "0.18.0", **versions}
        return scripts.Lines(tmp_path / path, about)

    return made


def test_a_file_is_of_one_gpu_and_its_libraries(kept):
    lines = kept()
    lines.add({"cell": "c 1", "form": "dense", "median_ms": 1.0})
    lines.add({"cell": "c 1", "form": "2:4", "failed": "no room"})
    for other in ({"gpu": "NVIDIA H100"}, {"torch": "2.12.0"}, {"cusparselt": "0.8.1"}, {"torchao": "0.19"}):
        with pytest.raises(click.ClickException, match="measured elsewhere, or with other versions"):
            kept(**other)
    assert set(kept().done("c 1")) == {"dense", "2:4"}
    again = kept(code="2", torch="2.11.0+cu130")  # another kernel, other code, and torch with the name of its build
    assert set(again.done("c 1")) == {"dense"}  # what failed may have been mended
    again.add({"cell": "c 1", "form": "dense", "median_ms": 2.0})
    assert kept(code="2", torch="2.11.0+cu130").done("c 1")["dense"]["median_ms"] == 2.0
    abouts = [line for line in lines.path.read_text(encoding="utf-8").splitlines() if '"about"' in line]
    assert [json.loads(line)["about"]["code"] for line in abouts] == ["1", "2"]


def test_a_form_that_ends_its_process_twice_is_left(kept):
    for ended in (False, False, True):
        lines = kept()
        assert lines.ended("c 1", "2:4") is ended and not lines.ended("c 1", "dense")
        lines.add({"cell": "c 1", "begun": "2:4"})
    assert not kept(code="2").ended("c 1", "2:4")
    kept().add({"cell": "c 1", "form": "2:4", "median_ms": 1.0})
    assert not kept().ended("c 1", "2:4")


def test_a_form_whose_time_was_over_is_tried_again(kept, measuring, tmp_path, monkeypatch):
    for _ in range(4):
        lines = kept()
        assert not lines.ended("c 1", "2:4")
        lines.add({"cell": "c 1", "begun": "2:4"})
        lines.add({"cell": "c 1", "stopped": "2:4"})
    script("imitation")

    def told_to_end(*_: Any) -> Any:
        raise SystemExit(143)

    monkeypatch.setattr(measuring.Cell, "error", told_to_end)
    out = tmp_path / "out.jsonl"
    call = ["--imitate", "--whole", "--cells", "dit-xl 64", "--backends", "cusparselt", "--out", str(out)]
    assert CliRunner().invoke(measuring.main, call).exit_code == 143
    assert json.loads(out.read_text(encoding="utf-8").splitlines()[-1])["stopped"] == "dense"


def test_both_sides_have_the_same_layers_in_8_bits(measuring, monkeypatch):
    """Of a model some of whose layers are not 2:4: those are on the dense kernel, as in the dense form."""
    script("imitation")
    cell = measuring.Cell("c", None, 1, None)
    monkeypatch.setattr(
        cell, "units", lambda takes: [SimpleNamespace(at=at) for at in LAYERS[takes.name]], raising=False
    )
    assert cell.choices("dense-fp8") == {"ff": "dense-fp8", "skip": "dense-fp8"}
    assert cell.choices("cusparselt-fp8") == {"ff": "cusparselt-fp8", "skip": "dense-fp8"}
    assert cell.choices("cusparselt") == {"ff": "cusparselt"}


LAYERS = {"dense-fp8": ("ff", "skip"), "cusparselt-fp8": ("ff",), "cusparselt": ("ff",)}


def test_what_is_complete_covers_what_asks_for_no_more(kept):
    asked = {"backends": ["a", "b"], "autotune": False, "alone": True, "forms": ""}
    kept().add({"cell": "c 1", "complete": asked})
    lines = kept()
    for part in ({"backends": ["a"]}, {"alone": False}, {"forms": "dense"}):
        assert lines.complete("c 1", {**asked, **part})
    for more in ({"backends": ["a", "c"]}, {"autotune": True}):
        assert not lines.complete("c 1", {**asked, **more})
    assert not lines.complete("c 2", asked) and not kept(code="2").complete("c 1", asked)


def test_gpus_have_tables_of_their_own(report, kept, tmp_path):
    for gpu, faster in (("NVIDIA H100", 1.0), ("NVIDIA H200", 2.0)):
        lines = kept(gpu, path=f"{gpu[-4:]}.jsonl")
        for one in (line("dense", 10 / faster, False), line("2:4", 8 / faster, True, dense=1.25 * faster)):
            lines.add(one)
    call = ["--lines", str(tmp_path / "H100.jsonl"), "--lines", str(tmp_path / "H200.jsonl"), "--training", "none"]
    call += ["--page", str(tmp_path / "page.md"), "--plot", str(tmp_path / "plot.svg")]
    assert CliRunner().invoke(report.main, call, catch_exceptions=False).exit_code == 0
    first, second = (tmp_path / "page.md").read_text(encoding="utf-8").split("NVIDIA H200")
    assert "dense | 10.00 | 2:4 | 8.00 | 1.25x" in first and "dense | 5.00 | 2:4 | 4.00 | 2.50x" in second


def test_blocks_are_compiled_and_not_the_layers_in_them(measuring, monkeypatch):
    seen, compiled = [], []

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.LayerNorm(4), nn.ModuleList([nn.Linear(4, 4), nn.Dropout()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.stride())
            return self.out[0](self.norm(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blocks = nn.Linear(4, 4), nn.ModuleList([Block(), Block()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.first(x)

    monkeypatch.setattr(nn.Module, "compile", lambda self, **how: compiled.append(type(self)))
    script("blocks").compiled(Model())(torch.randn(2, 4, 3).transpose(1, 2))
    assert compiled == [Block, Block] and len(set(seen)) == 1  # else the first would be compiled for itself


def test_what_masks_cost_is_told_with_its_goal(report):
    about = {"versions": {"torch": "2.13"}, "hardware": "one GPU", "imitation": False}
    line = {"cell": "dit-xl 128", "form": "compiled", "about": about, "dense ms": 200.0, "kernels": True}
    good, bad = {"masked ratio": 1.019, "by torch ratio": 1.07}, {"masked ratio": 1.021, "by torch ratio": 1.07}
    assert "| dit-xl, 128 | compiled | 200.0 | 1.019x | 1.070x | goal met |" in report.trained([{**line, **good}])
    text = report.trained(
        [{**line, **bad, "kernels": False}, {"cell": "a 1", "form": "f", "about": about, "failed": "no room"}]
    )
    assert (
        "1.021x | 1.070x | above the goal of 1.02x; without Triton |" in text and "| a, 1 | f | | | | no room |" in text
    )
    assert "imitation" in report.trained([{**line, **good, "about": {**about, "imitation": True}}])


@pytest.mark.slow
def test_masked_steps_are_measured_and_told(report, tmp_path):
    out, page = tmp_path / "training.jsonl", tmp_path / "gpu.md"
    call = ["--imitate", "--cells", "dit-xl 128,uvit-s 128", "--forms", "as written", "--out", str(out)]
    training = script("training")
    done = CliRunner().invoke(training.main, call, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    where, *lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert where["about"]["imitation"] and [line["cell"] for line in lines] == ["dit-xl 128", "uvit-s 128"]
    assert all(line["masked ratio"] > 0 and line["dense ms"] > 0 for line in lines)
    assert CliRunner().invoke(training.main, call, catch_exceptions=False).exit_code == 0  # all is there
    assert len(out.read_text(encoding="utf-8").splitlines()) == 3
    told = [
        "--lines",
        str(tmp_path / "none"),
        "--training",
        str(out),
        "--page",
        str(page),
        "--plot",
        str(tmp_path / "p.svg"),
    ]
    assert CliRunner().invoke(report.main, told, catch_exceptions=False).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "**imitation**" in text and "| dit-xl, 128 | as written |" in text and report.NOTHING not in text
    if not torch.cuda.is_available():
        assert CliRunner().invoke(training.main, ["--out", str(tmp_path / "no")]).exit_code == 1


@pytest.mark.slow
def test_a_form_that_fails_is_one_result_among_others(measuring, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    made = script("imitation")
    whole = made.imitated

    @contextmanager
    def broken(module: Any) -> Any:
        with whole(module):
            monkeypatch.setattr(module, "compiled", _broken)
            yield

    monkeypatch.setattr(made, "imitated", broken)
    call = ["--imitate", "--cells", "dit-xl 64", "--backends", "cusparselt", "--out", str(out)]
    assert CliRunner().invoke(measuring.main, call, catch_exceptions=False).exit_code == 0
    forms = {
        line["form"]: line for line in map(json.loads, out.read_text(encoding="utf-8").splitlines()) if "form" in line
    }
    assert "no compiler" in forms["dense, autotuned"]["failed"]
    assert "median_ms" in forms["cusparselt everywhere, compiled"]


def test_a_form_is_profiled_once(kept, monkeypatch):
    profiler = script("by_kernel")
    cell = SimpleNamespace(name="c 1", dense=None, cast=(), prepare=lambda: None, fits=lambda backend: False)
    monkeypatch.setattr(profiler, "Cell", lambda *_: cell)
    monkeypatch.setattr(profiler, "SUBJECTS", {"c": lambda: None})
    monkeypatch.setattr(profiler, "compiled", lambda model: model)
    monkeypatch.setattr(profiler, "by_kernel", lambda form, inputs: [{"us": 1.0}])
    for _ in range(2):
        profiler.profiled("c", 1, kept(), torch.device("cpu"))
    assert [one["form"] for one in kept().all] == ["dense", "dense, compiled"]


def _broken(model: Any, mode: str = "") -> Any:
    if mode:
        raise RuntimeError("no compiler")
    return model


def line(
    form: str, ms: float, sparse: bool, iqr: float = 0.1, sustained: float | None = None, **against: float
) -> dict[str, Any]:
    return {
        **{"cell": "dit-xl 64", "form": form, "precision": "bfloat16", "sparse": sparse, "error": 1e-3},
        **{"median_ms": ms, "iqr_ms": iqr, "sustained_ms": sustained or ms},
        "against": {name: {"ratio": ratio, "wins": 1, "rounds": 1} for name, ratio in against.items()},
    }


def test_what_is_slower_than_bfloat16_is_no_gain(report):
    dense, wide = line("dense-int8", 15, False), line("dense", 10, False)
    sparse = line("2:4", 12, True, **{"dense-int8": 1.25, "dense": 0.83})
    others = [{**one, "precision": "int8"} for one in (dense, sparse)]
    said = "| 1.25x | 0.83x | 1.0e-03, 1.0e-03 | gains, and is slower than bfloat16: stay dense |"
    assert said in report.table([wide, line("slow", 11, True, dense=0.9), *others])
    assert said in report.table([wide, *others])  # where nothing sparse was timed in bfloat16


@pytest.mark.parametrize(
    ("dense", "sparse", "said"),
    [
        (line("dense", 10, False), line("2:4", 7, True, dense=1.4), "goal met"),
        (line("dense", 10, False), line("2:4", 8, True, dense=1.25), "gains, below the goal of 1.33x"),
        (line("dense", 10, False), line("2:4", 10, True, dense=1.01), "no difference beyond noise"),
        (line("dense", 10, False, iqr=2), line("2:4", 8, True, dense=1.25), "no difference beyond noise"),
        (line("dense", 10, False), line("2:4", 12, True, dense=0.83), "2:4 is slower: stay dense"),
        (
            line("dense", 10, False),
            line("2:4", 7, True, sustained=9.0, dense=1.4),
            "goal met; 1.11x when run for seconds",
        ),
    ],
)
def test_verdicts(report, dense, sparse, said):
    assert report.verdict("bfloat16", dense, sparse) == said
    assert said in report.table([dense, line("slower", 20, False), sparse])


def test_the_first_session_prints_its_calls():
    text = (GPU / "first.sh").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(GPU / "first.sh")], check=False).returncode == 0
    assert subprocess.run([str(GPU / "first.sh")], check=False, capture_output=True).returncode == 2
    steps = re.findall(r'^    "(\d+) (\S.*)"$', text.replace("$WHOLE", "lowering.py --whole --cells"), re.M)
    assert len(steps) > 15
    for _, call in steps:
        name, *options = call.split()
        main = script(name.removesuffix(".py")).main
        with main.make_context(name, [word.replace(",", " ") for word in options]) as context:  # every option is there
            cells = context.params["cells"]
        assert not cells or (
            cells.rsplit(" ", 1)[0] in {*script("subjects").SUBJECTS} and cells.rsplit(" ", 1)[1].isdecimal()
        )


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


# --- The others. ---

SCRIPTS = sorted(path for path in GPU.parent.rglob("*.py") if path.name != "imitation.py")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(GPU.parent).as_posix())
def test_a_benchmark_finds_what_it_imports(path: Path) -> None:
    """They are run once in a while, and what they are made of moves."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        beside = path.with_name(f"{node.module}.py")
        for name in [alias.name for alias in node.names]:
            if beside in SCRIPTS:  # several folders have a script of one name: none is imported
                assert re.search(rf"^(def|class) {name}\b|^{name}\b.*=", beside.read_text(encoding="utf-8"), re.M), name
            elif node.module.partition(".")[0] == "compressor" and not hasattr(
                importlib.import_module(node.module), name
            ):
                importlib.import_module(f"{node.module}.{name}")
