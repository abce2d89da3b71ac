"""Lowering a finished run: what the commands write, and that it belongs to the run's weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from compressor import CompressorError, Plan, registry, saving
from compressor.report import schema
from compressor.weights import weights_sha256

pytestmark = pytest.mark.xdist_group("speed")
"""The runs of this file are lowered once, not once for each worker."""


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory, cli: Any) -> Path:
    """The directory of a small run with `--lower`. To be read only; copy it to change it."""
    out = tmp_path_factory.mktemp("lowered") / "run"
    outcome = cli.run(out, "--pattern", "4:2:4", "--lower", "--set", "evaluate.latency_batch=4")
    assert outcome.code == 0, outcome.err
    return out


@pytest.fixture
def copied(lowered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lowered, tmp_path / "run"))


def read(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "report.json").read_text())
    jsonschema.validate(loaded, schema())
    return loaded


def test_quality_and_speed_are_of_the_same_weights(lowered: Path) -> None:
    report = read(lowered)
    final = report["rows"][-1]
    model = saving.load(lowered / "model")
    assert report["lowering"]["weights_sha256"] == final["weights_sha256"] == weights_sha256(model)
    assert final["quality"][0]["value"] > 0
    entries = {(row["name"], e["backend"]): e for row in report["rows"] for e in row["latency"]}
    assert {("dense", "eager"), ("dense", "prepacked"), ("sparsedm", "eager"), ("sparsedm", "lowered")} <= set(entries)
    speed = entries["sparsedm", "lowered"]
    dense = min((entries["dense", name] for name in ("eager", "prepacked")), key=lambda e: e["median_ms"])
    assert speed["against"] == dense["backend"] and speed["batch"] == 4
    assert speed["speedup_vs_dense"] == pytest.approx(dense["median_ms"] / speed["median_ms"])


def test_the_plan_lies_beside_the_report_and_has_every_layer(lowered: Path) -> None:
    plan = Plan.read(lowered)
    assert plan.model_dump(mode="json") == read(lowered)["lowering"]
    names = {name for layer in plan.layers for name in layer.weights}
    model = registry.adapter("uvit-digits").build()
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    assert names == {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}


def test_what_there_is_to_note_of_the_kernels_is_said_by_the_run_too(cli: Any, copied: Path) -> None:
    plan = Plan.read(copied)
    plan.model_copy(update={"notes": (*plan.notes, "the kernels run on one thread")}).save(copied / "lowering.json")
    outcome = cli("resume", copied)
    assert outcome.code == 0 and "note: the kernels run on one thread" in outcome.err
    assert "note:" not in cli("resume", copied, "--quiet").err
    (copied / "lowering.json").write_text("{}")  # the run is finished and shown all the same
    outcome = cli("resume", copied)
    assert outcome.code == 0 and "note: " in outcome.err


def test_projections_are_fused_where_a_command_asks_for_it(cli: Any, tmp_path: Path) -> None:
    """The UNet's attention has three layers for queries, keys and values."""
    out = tmp_path / "run"
    small = ("--steps", "1", "--quick", "--set", "evaluate.latency_batch=2", "--set", "evaluate.latency_rounds=1")
    assert cli.run(out, "--model", "ddpm-digits", "--pattern", "8:2:4", *small).code == 0
    outcome = cli("lower", out, "--fuse-projections", "--json")
    assert outcome.code == 0, outcome.err
    plan = Plan.read(out)
    assert plan.fused and all(len(group) == 3 for group in plan.fused)
    found = read(out)["lowering"]
    assert [tuple(layer["fused"]) for layer in found["layers"] if layer["fused"]] == list(plan.fused)
    assert "to_q + to_k + to_v" in (out / "report.html").read_text().replace("<wbr>", "")


def test_a_run_is_lowered_within_the_errors_that_it_was_given(cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wanted = ("--pattern", "4:2:4", "--max-error", "0.05", "--no-fuse-projections")
    refused = cli.trial(out, *wanted)
    assert refused.code == 2 and "lowering.max_error is of lowered models" in refused.err and not out.exists()
    outcome = cli.trial(out, *wanted, "--lower", "--steps", "0")
    assert outcome.code == 0, outcome.err
    search = Plan.read(out).search
    assert search is not None and search.max_error == 0.05 and not Plan.read(out).fused
    assert read(out)["recipe"]["lowering"] == {"tolerance": None, "max_error": 0.05, "fuse_projections": False}


def test_macs_lowered_are_those_that_kernels_leave(lowered: Path) -> None:
    report, plan = read(lowered), Plan.read(lowered)
    final = report["rows"][-1]
    assert final["macs_effective"] <= final["macs_lowered"] <= final["macs_dense"]
    assert (final["macs_lowered"] < final["macs_dense"]) == bool(plan.skipping())


def test_the_page_shows_speed_and_a_bar_for_every_layer(lowered: Path) -> None:
    page, text = (lowered / "report.html").read_text(), (lowered / "report.md").read_text()
    plan = Plan.read(lowered)
    assert page.count('class="bar before"') == len(plan.layers)
    for place in (page, text):
        assert "in_blocks.0.mlp" in place and "batch 4, float32, cpu" in place
        assert "over prepacked" in place or "over eager" in place
    assert "were not lowered" not in page


def test_lower_prints_the_plan_and_repeats_it_in_json(copied: Path, cli: Any) -> None:
    outcome = cli("lower", copied, "--batch", "2")
    assert outcome.code == 0, outcome.err
    assert "in_blocks.0.attn.qkv and 4 more" in outcome.out and "whole model" in outcome.out
    again = cli("lower", copied, "--batch", "2", "--json")
    assert json.loads(again.out)["input_shapes"][0] == [2, 1, 8, 8]
    batches = {e["batch"] for row in read(copied)["rows"] for e in row["latency"]}
    assert batches == {2, 4}


def test_a_tolerance_lets_8_bit_kernels_be_tried(copied: Path, cli: Any) -> None:
    for more, tried in (((), False), (("--tolerance", "0.05"), True)):
        assert cli("lower", copied, *more).code == 0
        times = [c.median_ms for one in Plan.read(copied).layers for c in one.candidates if c.backend == "vnm-int8"]
        assert any(time is not None for time in times) == tried
    assert cli("lower", copied, "--tolerance", "0").code == 2


def test_an_error_of_the_whole_model_lets_8_bit_kernels_be_tried(copied: Path, cli: Any) -> None:
    outcome = cli("lower", copied, "--max-error", "0.05")
    assert outcome.code == 0 and "error of the whole model" in outcome.err, outcome.err
    plan = Plan.read(copied)
    assert plan.search is not None and plan.search.max_error == 0.05
    assert all(form.error is not None and form.error <= 0.05 for form in plan.forms)
    assert any(c.backend == "vnm-int8" for one in plan.layers for c in one.candidates)
    assert cli("bench", copied, "--max-error", "2").code == 2


@pytest.mark.usefixtures("few_bits_fast")
def test_dense_weights_in_few_bits_stand_beside_those_in_float(copied: Path, cli: Any) -> None:
    command = ("bench", copied, "--batches", "2", "--max-error", "0.05", "--no-compiled", "--no-onnx", "--json")
    outcome = cli(*command)
    assert outcome.code == 0, outcome.err
    entries = {(one["row"], one["backend"]): one for one in json.loads(outcome.out)}
    dense = {backend: one for (row, backend), one in entries.items() if row == "dense"}
    assert {"eager", "prepacked", "prepacked, few bits"} <= set(dense)
    assert dense["prepacked"]["error"] < 1e-4
    assert 1e-3 < dense["prepacked, few bits"]["error"] < 0.05
    # what is exact is held against what is exact, and the lowered form against all that kept to the same error
    for (_, backend), one in entries.items():
        rivals = dense if backend in ("lowered", "prepacked, few bits") else {"eager", "prepacked"} & set(dense)
        assert one["against"] == min(rivals, key=lambda name: dense[name]["median_ms"])
    assert "prepacked, few bits" in (copied / "report.md").read_text()


@pytest.mark.slow
def test_lower_again_replaces_its_own_figures(copied: Path, cli: Any) -> None:
    before = [len(row["latency"]) for row in read(copied)["rows"]]
    assert cli("lower", copied, "--fresh").code == 0
    assert [len(row["latency"]) for row in read(copied)["rows"]] == before


@pytest.mark.slow
def test_bench_times_several_batches_and_precisions(
    copied: Path, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))  # with times of other tests there is one form more
    outcome = cli("bench", copied, "--batches", "1,3", "--no-compiled", "--no-onnx", "--dtype", "bfloat16", "--json")
    assert outcome.code == 0, outcome.err
    entries = json.loads(outcome.out)
    assert {(e["batch"], e["dtype"]) for e in entries} == {(1, "bfloat16"), (3, "bfloat16")}
    assert {e["backend"] for e in entries} == {"eager", "prepacked", "lowered"}
    report = read(copied)
    assert report["lowering"]["dtype"] == "bfloat16"
    assert {e["dtype"] for row in report["rows"] for e in row["latency"]} == {"float32", "bfloat16"}


@pytest.mark.parametrize("dense", [True, False])
def test_what_cannot_be_exported_is_left_out_with_its_reason(
    copied: Path, cli: Any, monkeypatch: pytest.MonkeyPatch, dense: bool
) -> None:
    from compressor.export import engines, onnx

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise CompressorError("the graph differs from PyTorch")

    monkeypatch.setattr(engines if dense else onnx, "export_onnx", failing)
    outcome = cli("bench", copied, "--no-compiled", "--batches", "2")
    assert outcome.code == 0, outcome.err
    name = "ONNX Runtime" if dense else "ONNX Runtime, gathered"
    assert f"{name} was left out: the graph differs from PyTorch" in outcome.err
    assert "prepacked" in outcome.out


def test_plain_2_4_says_that_a_cpu_gains_nothing_and_what_would(finished: Path, tmp_path: Path, cli: Any) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    outcome = cli("lower", run)
    assert outcome.code == 0, outcome.err
    report = read(run)
    plan = Plan.read(run)
    assert not plan.lowered and plan.choice.startswith(("eager", "dense"))
    assert "4:2:4" in " ".join(report["limitations"]) and "gains nothing from V = 1" in " ".join(report["limitations"])
    assert report["rows"][-1]["macs_lowered"] == report["rows"][-1]["macs_dense"]
    assert "gains nothing from V = 1" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("lower", "nowhere"), 2, "no such directory"),
        (("lower", "RUN", "--dtype", "float8"), 2, "float8"),
        (("lower", "RUN", "--batch", "0"), 2, "0"),
        (("bench", "RUN", "--batches", "1,x"), 2, "1,x"),
        (("bench", "RUN", "--batches", "0", "--no-onnx"), 2, "at least 1"),
        (("bench", "RUN", "--batches", ""), 2, "--batches"),
    ],
)
def test_bad_input_is_named(copied: Path, cli: Any, arguments: tuple[str, ...], code: int, message: str) -> None:
    before = (copied / "report.json").read_bytes()
    outcome = cli(*[copied if argument == "RUN" else argument for argument in arguments])
    assert outcome.code == code and message in outcome.err
    assert (copied / "report.json").read_bytes() == before


def test_a_run_that_is_not_finished_or_whose_files_changed_is_refused(copied: Path, cli: Any) -> None:
    report = read(copied)
    report["rows"][-1]["weights_sha256"] = "0" * 64
    (copied / "report.json").write_text(json.dumps(report))
    outcome = cli("lower", copied)
    assert outcome.code == 1 and "other weights" in outcome.err
    (copied / "report.json").unlink()
    outcome = cli("lower", copied)
    assert outcome.code == 1 and "no report.json" in outcome.err


def test_backends_are_listed(cli: Any) -> None:
    listed = cli("list", "backends")
    assert listed.code == 0
    assert all(name in listed.out for name in ("eager", "onednn", "vnm", "gathered"))
