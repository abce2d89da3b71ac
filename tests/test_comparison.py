"""Comparisons: equal settings for all, costs matched, finished cells kept, failures named, and a report that says what is known."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from conftest import PATIENCE
from filelock import FileLock
from torchmetrics.functional.image import structural_similarity_index_measure

from compressor import CompressorError, comparison, files
from compressor.comparison import jobs, words, worker
from compressor.comparison.differing import alike, differing
from compressor.comparison.foretold import Outlook
from compressor.comparison.jobs import _write_match, refuse_used
from compressor.comparison.page import Outcome, _csv, build, render
from compressor.comparison.presets import presets
from compressor.comparison.statistics import differences, summary
from compressor.comparison.worker import _seen_of, read_row
from compressor.files import LOCK
from compressor.progress import Progress
from compressor.quality.intervals import t_quantile
from compressor.quality.similarity import ssim
from compressor.report import limitations, read_report, schema
from compressor.report.compared import ComparisonReport, Summary
from compressor.runs import latency, start

pytestmark = pytest.mark.xdist_group("comparison")
"""The comparison of this file is made once, not once for each worker."""

FEW = str(Path(__file__).with_name("few_digits.npz"))
TINY = (
    *("--data", FEW),
    *("--steps", "3", "--set", "train.batch_size=8", "--set", "train.warmup=0", "--set", "evaluate.samples=32"),
    *("--set", "evaluate.sampler_steps=2", "--set", "evaluate.bootstrap=5", "--set", "evaluate.latency_rounds=2"),
)


@pytest.fixture(scope="module")
def compared(tmp_path_factory, cli):
    """A finished comparison, and what its command said."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    outcome = cli(
        *("compare", "--methods", "dense-continued,structured,sparsedm", "--seeds", "2", "--out", out),
        *("--sampler-steps", "1", *TINY),
    )
    assert outcome.code == 0, outcome.err
    return out, outcome


def report_of(out):
    return files.read_json(out / "report.json")


def test_every_method_has_every_seed_and_the_same_budget(compared):
    report = report_of(compared[0])
    assert [entry["label"] for entry in report["entries"]] == ["dense-continued", "structured", "sparsedm"]
    for entry in report["entries"]:
        assert [cell["seed"] for cell in entry["cells"]] == [0, 1]
        assert {cell["train"]["steps"] for cell in entry["cells"]} == {3}
        assert entry["quality"]["n"] == 2 and entry["quality"]["ci95"] is not None
        first, second = (cell["weights_sha256"] for cell in entry["cells"])
        assert first != second
        assert {d["metric"] for d in entry["cells"][0]["drift"]} == {"prediction_error", "sample_rmse", "ssim"}
        assert list(entry["by_steps"]) == ["1"]
    rates = {json.dumps(entry["recipe_train"], sort_keys=True) for entry in report["entries"]}
    assert len(rates) == 1


def test_what_it_will_take_is_told_once_by_the_first_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    wanted = comparison.planned(
        ["magnitude", "sparsedm"], [], None, {"train": {"steps": 100}}, seeds=2, sampler_steps=(50,)
    )

    def events():
        yield Progress("dense: sample dense", 0, 898)
        now[0] += 10
        yield Progress("dense: sample dense", 898, 898)
        for step in range(20):
            for cell in ("magnitude-seed-0", "sparsedm-seed-0"):
                now[0] += 0.5
                yield Progress(f"{cell}: fine-tune", step, 100, unbroken=True)

    found = list(Outlook(wanted, wanted.cells({}), 2).told(events()))
    (told,) = [event for event in found if event.stage == "estimate"]
    # 4 trainings of 100 steps of 1 s, two at a time; 4 times 25 and 50 sampler steps, and twice 25 without training, of 10 s for 25
    assert told.note.startswith("about 4 min 30 s in all") and "400 steps together" in told.note and told.unbroken
    assert "one of magnitude-seed-0, 14 times 898 samples" in told.note
    assert len(found) == 2 + 40 + 1 and found.index(told) < 25


def test_a_cell_is_what_a_run_of_its_recipe_gives(compared, cli, tmp_path):
    out, _ = compared
    cell = report_of(out)["entries"][2]["cells"][1]
    outcome = cli("run", "--config", out / cell["folder"] / "run" / "recipe.yaml", "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    row = report_of(tmp_path / "run")["rows"][-1]
    assert row["weights_sha256"] == cell["weights_sha256"]
    assert row["quality"] == cell["quality"]
    plain = [{k: v for k, v in d.items() if k != "by_time"} for d in cell["drift"] if d["metric"] != "ssim"]
    assert row["drift"] == plain


def test_costs_are_matched(compared):
    report = report_of(compared[0])
    structured, sparse = report["entries"][1], report["entries"][2]
    assert structured["macs_effective"] == pytest.approx(sparse["macs_effective"], rel=0.05)
    assert report["match"]["settings"]["structured"]["macs"] == pytest.approx(
        sparse["macs_effective"] / report["dense"]["macs_dense"], abs=0.001
    )
    assert structured["params"] < 0.7 * report["dense"]["params"] and sparse["params"] == report["dense"]["params"]


def test_one_shot_layers_and_sensitivity_are_there_for_masks(compared):
    by_label = {entry["label"]: entry for entry in report_of(compared[0])["entries"]}
    masked = by_label["sparsedm"]
    assert masked["one_shot"]["train"]["steps"] == 0 and masked["one_shot"]["quality"]
    pruned = {layer["name"] for layer in masked["layers"] if layer["pattern"]}
    assert set(masked["sensitivity"]) == pruned and all(value > 0 for value in masked["sensitivity"].values())
    assert by_label["dense-continued"]["sensitivity"] == {}


def test_the_pages_say_what_the_figures_do(compared, cli):
    out, outcome = compared
    report, page = report_of(out), (out / "report.html").read_text(encoding="utf-8")
    text = (out / "report.md").read_text(encoding="utf-8")
    for entry in report["entries"]:
        assert entry["label"] in page and entry["label"] in text and entry["label"] in outcome.out
    assert page.count("<svg") == 6 and page.count("data:image/png") == 4
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)
    assert "fd-digits lies from" in outcome.out and "3 pairs" in page
    assert "Sparse weights were not lowered" in text and "intervals over so few are wide" in text
    before = {name: (out / name).read_bytes() for name in ("report.html", "report.md", "report.csv")}
    render(out)
    assert before == {name: (out / name).read_bytes() for name in before}
    again = cli("report", out)
    assert again.code == 0 and "fd-digits lies from" in again.out


def test_the_table_of_cells_is_complete(compared):
    out, _ = compared
    lines = list(csv.DictReader((out / "report.csv").read_text(encoding="utf-8").splitlines()))
    assert len(lines) == 6
    assert all(float(line["fd-digits"]) > 0 and line["weights_sha256"] for line in lines)
    for line in lines:
        row = read_row(out / "cells" / f"{line['label']}-seed-{line['seed']}").row
        assert all(float(line[key]) == getattr(row, key) for key in ("params", "nonzero_params", "macs_effective"))
    report = ComparisonReport.model_validate(report_of(out))
    entry = report.entries[1]
    cells = (entry.cells[0], entry.cells[1].model_copy(update={"costs": {"params": 7, "density": 0.25}}))
    other = report.model_copy(update={"entries": (entry.model_copy(update={"cells": cells}),)})
    first, second = csv.DictReader(_csv(other).splitlines())
    assert first["params"] == str(entry.params) and (second["params"], second["density"]) == ("7", "0.25")
    assert second["macs_effective"] == str(entry.macs_effective)


def test_the_folder_of_a_comparison_is_called_by_the_model_of_the_run_that_it_starts_from(cli, tmp_path, monkeypatch):
    def placed(out, *rest):
        raise CompressorError(f"placed in {out}")

    monkeypatch.setattr(comparison, "sharing", placed)
    monkeypatch.setattr(start, "model_of", lambda weights: {"model": "ddpm-digits"} if weights == "some-run" else {})
    assert "placed in runs/compare-ddpm-digits" in cli("compare", "--weights", "some-run").err
    assert "placed in runs/compare-uvit-digits" in cli("compare").err
    assert "placed in runs/compare-uvit" in cli("compare", "--weights", "some-run", "--model", "uvit").err


@pytest.mark.slow
def test_what_is_finished_is_kept_and_more_is_added(compared, cli):
    out, _ = compared
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/row.json")}
    outcome = cli(
        *("compare", "--methods", "structured,sparsedm,wanda", "--seeds", "1", "--out", out),
        *("--sampler-steps", "1", *TINY, "--set", "settings={}"),
    )
    assert outcome.code == 0, outcome.err
    after = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/row.json")}
    assert {path: after[path] for path in before} == before
    assert {path.parent.name for path in set(after) - set(before)} == {"wanda-seed-0"}


def test_cells_of_other_settings_are_refused(compared, cli):
    out, _ = compared
    outcome = cli("compare", "--methods", "obs,sparsedm", "--seeds", "1", "--out", out, *TINY, "--steps", "4")
    assert not (out / "cells" / "obs-seed-0").exists()  # all are looked at before anything is written
    assert "train.steps: 3, now 4" in outcome.err
    assert outcome.code == 1
    assert "was made with another train.steps" in outcome.err and "--overwrite" in outcome.err


@pytest.mark.slow
def test_failing_cells_and_a_process_that_dies_do_not_lose_the_others(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # which is not on the workers' path: a file of one's own is found by its own
    (tmp_path / "bad.py").write_text(
        "import os\nfrom dataclasses import dataclass\nfrom compressor import NM, Pattern, Pruner\n\n"
        "@dataclass(frozen=True)\nclass Bad(Pruner):\n    pattern: Pattern = NM(2, 4)\n\n"
        "    def masks(self, weights, progress, previous):\n"
        "        if previous:\n            raise RuntimeError('out of luck')\n"
        "        return self.pattern.masks(weights)\n\n"
        "@dataclass(frozen=True)\nclass Deadly(Bad):\n"
        "    def masks(self, weights, progress, previous):\n"
        "        if previous:\n            os.write(2, b'no memory left'), os._exit(9)\n"
        "        return self.pattern.masks(weights)\n",
        encoding="utf-8",
    )
    recipes = {"dying": "Deadly", "unlucky": "Bad"}
    for name, method in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(f"pruner: bad.py:{method}\n", encoding="utf-8")
    configs = [part for name in recipes for part in ("--config", tmp_path / f"{name}.yaml")]
    out = tmp_path / "out"
    outcome = cli("compare", "--methods", "magnitude", *configs, "--seeds", "1", "--out", out, *TINY)
    assert outcome.code == 1
    assert "failed: dying-seed-0: no memory left" in outcome.err
    assert "failed: unlucky-seed-0: RuntimeError: out of luck" in outcome.err
    report = report_of(out)
    assert [entry["label"] for entry in report["entries"]] == ["magnitude"]
    assert report["limitations"][0].startswith(
        "2 cells failed and are missing: dying-seed-0 (no memory left); unlucky-seed-0 (RuntimeError: out of luck, raised"
    )
    assert "out of luck" in (out / "report.html").read_text(encoding="utf-8")
    for page in ("report.html", "report.md"):
        assert "This report has no cell of dying and unlucky." in (out / page).read_text(encoding="utf-8")


@pytest.mark.slow
def test_learning_rates_are_searched_for_every_method_on_a_seed_of_its_own(cli, tmp_path):
    out = tmp_path / "out"
    outcome = cli(
        *("compare", "--methods", "sparsedm", "--seeds", "1", "--lr-grid", "1e-9,1e-3", "--out", out, *TINY),
        *("--steps", "12"),
    )
    assert outcome.code == 0, outcome.err
    report = report_of(out)
    assert len(list((out / "trials").iterdir())) == 2
    for entry in report["entries"]:
        assert report["learning_rates"]["chosen"][entry["label"]] == entry["recipe_train"]["lr"]
    trial = files.read_json(next((out / "trials").iterdir()) / "job.json")["recipe"]
    assert trial["train"]["seed"] == 1_000_000 and trial["evaluate"]["seed"] == 1235


@pytest.mark.slow
def test_interrupted_it_goes_on_with_the_rest_only(tmp_path):
    command = [
        *(sys.executable, "-m", "compressor.cli", "compare", "--methods", "magnitude,sparsedm", "--seeds", "1"),
        *("--out", str(tmp_path / "out"), *TINY, "--steps", "40"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    first = tmp_path / "out" / "cells" / "magnitude-seed-0" / "row.json"
    second = tmp_path / "out" / "cells" / "sparsedm-seed-0" / "run" / "metrics.jsonl"
    while process.poll() is None and not (first.is_file() and second.is_file()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, errors
    assert "stopped; continue with: the same command" in errors
    at = first.stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert first.stat().st_mtime_ns == at
    assert len((second).read_text(encoding="utf-8").splitlines()) == 40


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "getpgid"), reason="POSIX")
def test_workers_stop_when_the_one_that_started_them_is_killed(tmp_path):
    command = [
        *(sys.executable, "-m", "compressor.cli", "compare", "--methods", "sparsedm", "--seeds", "1"),
        *("--out", str(tmp_path / "out"), *TINY, "--steps", "100000"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "out" / "cells" / "sparsedm-seed-0" / "run" / "metrics.jsonl"
    holder = metrics.parent / ".lock-holder"
    while not (metrics.is_file() and holder.is_file()):
        assert process.poll() is None
        time.sleep(0.1)
    worker = int(holder.read_text(encoding="utf-8").split()[-1])
    process.kill()
    process.wait()
    for _ in range(int(10 * PATIENCE)):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker went on")


@pytest.mark.slow
def test_two_workers_and_a_comparison_without_a_metric(cli, tmp_path):
    out = tmp_path / "out"
    outcome = cli(
        *("compare", "--methods", "magnitude,sparsedm", "--seeds", "1", "--workers", "2", "--out", out, *TINY),
        *("--set", "evaluate.metric=null", "--set", "evaluate.latency_rounds=0"),
    )
    assert outcome.code == 0, outcome.err
    assert not (out / "latency.json").exists()  # and no model was loaded for it
    report = report_of(out)
    assert {entry["label"]: len(entry["cells"]) for entry in report["entries"]} == {"magnitude": 1, "sparsedm": 1}
    assert not any(entry["latency"] for entry in report["entries"])
    assert report["compared_by"] == "prediction_error" and "No verdict on uvit-digits" in outcome.out
    assert (out / "report.html").read_text(encoding="utf-8").count("<svg") == 3  # no quality to trade off


@pytest.mark.slow
def test_lowered_models_are_timed_too(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    outcome = cli(
        "compare", "--methods", "magnitude", "--pattern", "4:2:4", "--seeds", "1", "--lower", "--out", out, *TINY
    )
    assert outcome.code == 0, outcome.err
    report = report_of(out)
    assert [entry["backend"] for entry in report["dense"]["latency"]] == ["eager", "lowered"]
    assert report["entries"][0]["latency"][1]["against"] == "lowered" and report["max_error"] is None
    asked = []

    def lowering(*given, max_error, **more):
        asked.append(max_error)
        return latency_lowering(*given, max_error=max_error, **more)

    latency_lowering = latency.lowering
    monkeypatch.setattr(latency, "lowering", lowering)
    (tmp_path / "eight.yaml").write_text("method: sr-ste\nsettings: {quantise: int8}\n", encoding="utf-8")
    (tmp_path / "float.yaml").write_text("method: sr-ste\n", encoding="utf-8")
    configs = "--config", tmp_path / "eight.yaml", "--config", tmp_path / "float.yaml"
    options = *configs, "--pattern", "4:2:4", "--seeds", "1", "--lower", "--max-error", "0.0005", "--out", out, *TINY
    outcome = cli("compare", *options)
    assert outcome.code == 0, outcome.err
    report = report_of(out)
    assert asked == [0.0005] * 3 and report["max_error"] == 0.0005  # dense too
    assert all("error" not in entry["latency"][0] for entry in report["entries"])
    assert all(entry["latency"][1]["error"] < 0.001 for entry in report["entries"])
    assert cli("compare", *options).code == 0 and len(asked) == 3  # kept
    assert cli("compare", *[str(o) for o in options if o != "--lower"]).code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods", "magnitude,nonsense"), "unknown method 'nonsense'"),
        (("--methods", "magnitude,magnitude"), "compared twice"),
        (("--preset", "sparsedm-ablatoin"), "sparsedm-ablation"),
        (("--config", "dense.yaml"), "cannot be told from 'dense, the given model'"),
        (("--match", "mac"), "macs"),
        (("--seeds", "0"), "at least 1"),
        (("--lr-grid", "1e-3,x"), "not numbers above zero"),
        (("--lr-grid", "0"), "not numbers above zero"),
        (("--sampler-steps", "2.5"), "not numbers above zero"),
        (("--methods", "magnitude", "--sampler-steps", "10,5000"), "--sampler-steps 5000\nAllowed: 1 to 999"),
        (("--methods", "magnitude", "--seed", str(2**63 - 2)), f"--seed {2**63 - 2}\nGive one up to {2**63 - 3}"),
        (("--methods", "magnitude", "--pattern", "2:7"), "magnitude: 2:7"),
        (("--methods", "sparsedm", "--set", "settings.teachr=1"), "teacher"),
        (
            ("--methods", "sr-ste", "--model", "uvit", "--data", "digits", "--set", "from_scratch=true"),
            "one trained model",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(cli, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dense.yaml").write_text("method: magnitude\n", encoding="utf-8")
    outcome = cli("compare", "--out", tmp_path / "out", *arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "out").exists()


def test_methods_on_different_weights_or_data_are_no_comparison(cli, tmp_path):
    (tmp_path / "one.yaml").write_text("model: uvit-digits\n", encoding="utf-8")
    (tmp_path / "two.yaml").write_text("model: ddpm-digits\n", encoding="utf-8")
    outcome = cli(
        "compare", "--config", tmp_path / "one.yaml", "--config", tmp_path / "two.yaml", "--out", tmp_path / "o"
    )
    assert outcome.code == 2 and "have different weights" in outcome.err


def test_what_is_in_use_is_not_overwritten(cli, tmp_path):
    (tmp_path / "cells").mkdir()
    (tmp_path / "latency.json").write_text("{}", encoding="utf-8")
    with FileLock(tmp_path / LOCK):  # as another process would
        outcome = cli("compare", "--methods", "magnitude", "--out", tmp_path, "--overwrite", *TINY)
    assert outcome.code == 4 and "in use" in outcome.err
    assert (tmp_path / "latency.json").is_file() and (tmp_path / "cells").is_dir()


def test_a_search_of_rates_does_not_mix_with_cells_without(compared, cli):
    out, _ = compared
    outcome = cli("compare", "--methods", "sparsedm", "--seeds", "1", "--lr-grid", "1e-3", "--out", out, *TINY)
    assert outcome.code == 1 and "was made without --lr-grid" in outcome.err
    assert not (out / "trials").exists()


def test_a_flipped_bit_in_what_the_dense_model_drew_is_found(compared, tmp_path):
    dense = tmp_path / "dense"
    shutil.copytree(compared[0] / "dense", dense)
    assert _seen_of(dense).images is not None
    path = dense / "seen.safetensors"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CompressorError, match=r"seen\.safetensors: its bytes are not .*\nRemove .*row\.json: .* judged again"
    ):
        _seen_of(dense)


def test_a_damaged_row_says_what_to_do(tmp_path):
    for content in ("{}", '{"row": {}}', "{"):
        (tmp_path / "row.json").write_text(content, encoding="utf-8")
        with pytest.raises(CompressorError, match=r"Remove .*judged again"):
            read_row(tmp_path)


def test_a_row_of_another_cell_and_what_lost_its_job_are_told(compared, cli, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compared[0], out)
    first, second = (out / "cells" / f"sparsedm-seed-{seed}" for seed in (0, 1))
    again = ("compare", "--methods", "sparsedm", "--seeds", "2", "--sampler-steps", "1", "--out", out, *TINY)
    own = (second / "row.json").read_bytes()
    shutil.copy(first / "row.json", second / "row.json")
    outcome = cli(*again)
    assert outcome.code == 1
    assert "sparsedm-seed-1/row.json: it is of other weights than those in" in outcome.err
    (second / "row.json").write_bytes(own)
    (second / "job.json").unlink()
    outcome = cli(*again)
    assert outcome.code == 1 and "job.json: not a job\nRemove" in outcome.err
    assert not (second / "job.json").exists()


def test_entries_with_fewer_seeds_or_without_chance_are_said_to_be(compared):
    report = report_of(compared[0])
    report["seeds"] = [0, 1, 2]
    for entry in report["entries"]:
        entry["cells"] = [{**entry["cells"][0], "weights_sha256": f"{seed:064}"} for seed in report["seeds"]]
        entry["quality"]["n"] = 3
    said = " ".join(words.limitations(ComparisonReport.model_validate(report)))
    assert not re.search("Every seed gives|Not every seed", said)
    first, last = report["entries"][0], report["entries"][-1]
    first["cells"], first["quality"] = first["cells"][:1], {"mean": -1.0, "ci95": None, "n": 1}
    for cell in last["cells"]:
        cell["weights_sha256"] = "0" * 64
    found = " ".join(words.limitations(ComparisonReport.model_validate(report)))
    assert f"Not every seed is there of {first['label']}:" in found
    assert f"Every seed gives the same weights with {last['label']}:" in found
    first["macs_effective"] = 1  # a pruned one, of the lowest score
    typed = ComparisonReport.model_validate(report)
    assert f"({first['label']}, over 1 seed)" in words.headline(typed)
    assert any(cell.endswith(", n = 1") for _, _, cells in words.rows(typed) for cell in cells)


def test_a_sampler_that_diffusers_cannot_repeat_is_said_to_be_one(compared, finished):
    report = {**report_of(compared[0]), "sampler": "DDIM, quadratic spacing"}
    assert "spacing=trailing" in " ".join(words.limitations(ComparisonReport.model_validate(report)))
    run = read_report(finished / "report.json")
    assert "quadratic" not in " ".join(limitations.limitations(run)).lower()
    changed = run.model_copy(update={"sampler": "DDIM, quadratic spacing"})
    assert "--spacing trailing" in " ".join(limitations.limitations(changed))


def judged(means, told, seeds=3):
    """A comparison of pruned methods with these means, and whether pairs of them are told apart."""
    report = files.read_json(Path(__file__).parent / "before" / "comparison" / "report.json")
    entry = report["entries"][0]
    report["seeds"] = list(range(seeds))
    quality = {name: {"mean": mean, "ci95": [mean - 1, mean + 1], "n": seeds} for name, mean in means.items()}
    report["entries"] = [{**entry, "label": name, "quality": quality[name]} for name in means]
    pairs = [(a, b) for at, a in enumerate(means) for b in list(means)[at + 1 :]]
    report["differences"] = [
        {"a": a, "b": b, "mean": means[a] - means[b], "ci95": [-1, 1], "n": seeds, "significant": f"{a}{b}" in told}
        for a, b in pairs
    ]
    return ComparisonReport.model_validate(report)


@pytest.mark.parametrize(
    ("told", "said", "unsaid"),
    [
        ((), "No winner on uvit-digits: 0 of 3 differences between pruned methods are larger", "best of"),
        (("ab", "ac"), "a is the best of the pruned methods on uvit-digits: fd-digits 80.0 [79.0, 81.0]", "No "),
        (("ac",), "No single winner on uvit-digits: b cannot be told apart from a over 3 seeds. a beats c", "best of"),
        (("bc",), "No winner on uvit-digits: 3 seeds do not tell a, the lowest, from any other", "best of"),
    ],
)
def test_the_verdict_agrees_with_the_statistics(told, said, unsaid):
    report = judged({"b": 81.0, "a": 80.0, "c": 90.0}, {*told, *(pair[::-1] for pair in told)})
    text = words.headline(report)
    assert said in text and unsaid not in text and "lower is better; dense has 71.6" in text, text


def test_what_recipes_differ_in_besides_the_method_is_told(tmp_path, compared):
    own = {"a": {"train": {"lr": 1e-3}}, "b": {"train": {"lr": 1e-4, "times": "even"}, "loading": {"flip": True}}}
    paths = []
    for label, settings in own.items():
        paths.append(tmp_path / f"{label}.yaml")
        paths[-1].write_text(json.dumps({"method": "magnitude", "data": FEW, **settings}), encoding="utf-8")
    found = differing(comparison.planned([], paths, None, {}, seeds=1))
    assert found["train.lr"] == {"a": 1e-3, "b": 1e-4} and set(found) == {"train.lr", "train.times", "loading.flip"}
    assert "train.lr" not in differing(comparison.planned([], paths, None, {}, seeds=1, rates=[1e-3]))
    report = ComparisonReport.model_validate(report_of(compared[0]))
    assert not report.differing and "in the same order" in alike(report)
    typed = report.model_copy(update={"differing": found})
    said = " ".join(words.limitations(typed))
    assert "train.lr is 0.001 in a, 0.0001 in b; train.times is" in said and "in the same order" not in alike(typed)


def test_one_seed_gives_no_verdict_and_one_method_no_winner():
    assert words.headline(judged({"a": 8.0, "b": 9.0}, (), seeds=1)).startswith("No verdict on uvit-digits: one seed")
    assert "No other pruned method is there." in words.headline(judged({"a": 8.0}, ()))
    report = judged({"a": 8.0, "b": 9.0}, (), seeds=1)  # as a file of others may be: nothing that b is compared by
    lacking = tuple(entry.model_copy(update={"quality": None, "drift": {}}) for entry in report.entries)
    assert words.headline(report.model_copy(update={"entries": lacking, "compared_by": "prediction_error"}))


def test_who_loses_on_the_common_seeds_does_not_win_by_a_seed_that_the_other_lacks():
    means = {"a": {0: 1.0, 1: 1.1, 2: 9.0}, "b": {0: 2.0, 1: 2.15}, "c": {0: 8.0, 1: 8.2, 2: 20.0}}
    report = judged({name: sum(own.values()) / len(own) for name, own in means.items()}, ())
    found = [pair for pair in differences(means) if {pair.a, pair.b} != {"a", "c"}]
    assert [(pair.significant, pair.mean < 0) for pair in found] == [(True, True), (True, True)]
    text = words.headline(report.model_copy(update={"differences": tuple(found)}))
    assert text.startswith("No single winner") and "c cannot be told apart from a" in text and "a beats b" in text, text
    assert "lies from 2.08 (b)" in text


def test_cells_made_with_other_versions_say_so(compared, tmp_path):
    out = tmp_path / "out"
    for name in ("dense", "cells/sparsedm-seed-0", "cells/sparsedm-seed-1"):
        (out / name).mkdir(parents=True)
        shutil.copyfile(compared[0] / name / "row.json", out / name / "row.json")
    common = {"data": FEW, "steps": 3, "evaluate": {"samples": 32}}
    wanted = comparison.planned(["sparsedm"], [], None, common, seeds=2)
    done = [(cell, out / "cells" / cell.name) for cell in wanted.cells({})]
    facts = read_row(done[0][1]).environment
    assert facts is not None
    outcome = Outcome(wanted, out, done, {}, {}, {}, facts)
    assert all(cell.environment is None for cell in build(outcome).entries[0].cells)
    path = done[1][1] / "row.json"
    row = files.read_json(path)
    row["environment"]["versions"]["torch"] = "1.0"
    files.write_json(path, row)
    report = build(outcome)
    assert [cell.environment.versions["torch"] == "1.0" for cell in report.entries[0].cells] == [False, True]
    assert "Cells were made with different versions of torch" in " ".join(report.limitations)


def test_a_summary_of_a_comparison_claims_no_speed_within_the_noise():
    time = {"backend": "eager", "device": "cpu", "dtype": "float32", "batch": 4, "median_ms": 2.0, "iqr_ms": 0.1}
    for backend, interval, said in (
        ("eager", None, "no gain beyond the noise"),
        ("lowered", [0.9, 1.9], "no gain beyond the noise"),
        ("lowered", [1.1, 1.9], "Faster than dense: a"),
    ):
        report = judged({"a": 80.0}, ()).as_json()
        own = {**time, "backend": backend, "against": backend, "speedup_vs_dense": 1.4, "speedup_ci95": interval}
        report["entries"][0]["latency"] = report["dense"]["latency"] = [own]
        typed = ComparisonReport.model_validate(report)
        assert said.lower() in dict(words.summary(typed))["Speed"].lower()
        assert ": MyPruner." in dict(words.summary(ComparisonReport.model_validate(renamed(report))))["Speed"]
        [cell] = [cells[7] for label, _, cells in words.rows(typed) if label == "a"]
        assert ("1.40x" in cell) == (backend == "lowered") and ("within noise" in cell) == (interval == [0.9, 1.9])
    assert dict(words.summary(typed))["Against dense"].startswith("Worse beyond the seeds' noise: a")


def test_an_interval_of_few_draws_is_said_to_be_one():
    for draws, said in ((0, False), (2, True), (39, True), (40, False)):
        report = judged({"a": 80.0}, ()).as_json()
        report["evaluate"]["bootstrap"] = draws
        found = " ".join(words.limitations(ComparisonReport.model_validate(report)))
        assert (f"from {draws} draws of the bootstrap, too few for 95%" in found) == said


def test_what_failed_is_said_beside_the_verdict():
    report = judged({"a": 80.0, "b": 81.0}, ()).as_json()
    for failed, said in (
        (("a-seed-1",), "This report is without a-seed-1."),
        (("c-seed-0", "c-seed-1"), "This report has no cell of c."),
        (("c-seed-0", "b-seed-2"), "This report has no cell of c and is without b-seed-2."),
    ):
        typed = ComparisonReport.model_validate({**report, "failed": dict.fromkeys(failed, "why")})
        assert dict(words.summary(typed))["Failed"] == said
    assert "Failed" not in dict(words.summary(ComparisonReport.model_validate(report)))


def renamed(report):
    [entry] = report["entries"]
    return {**report, "entries": [{**entry, "label": "MyPruner"}]}


def test_what_is_said_against_dense_holds_for_all_methods_at_once():
    dense = judged({"a": 80.0}, ()).dense.quality[0].value
    said = {}
    for count in (1, 10):
        report = judged({f"m{at}": dense + 1.5 for at in range(count)}, ())  # intervals of 1 to each side
        said[count] = dict(words.summary(report))["Against dense"]
    assert said[1].startswith("Worse beyond the seeds' noise: m0") and said[10].startswith("Not told apart: m0")


def test_seeds_that_make_no_difference_give_no_interval():
    assert summary([2.0, 2.0, 2.0]) == Summary(mean=2.0, ci95=None, n=3)
    (pair,) = differences({"a": {0: 1.0, 1: 1.0}, "b": {0: 2.0, 1: 2.0}})
    assert pair.significant is None


def test_rounding_is_no_difference_between_seeds():
    """Shares of 100 pictures, always 0.1 apart: in binary the differences are not quite the same."""
    apart = {first / 100 - (first - 10) / 100 for first in range(10, 90)}
    assert len(apart) > 1
    for first in range(10, 90):
        values = {0: first / 100, 1: 0.75}
        (pair,) = differences({"a": values, "b": {0: (first - 10) / 100, 1: 0.65}})
        assert pair.ci95 is None and pair.significant is None and pair.mean == pytest.approx(0.1)
    (pair,) = differences({"a": {0: 1.0, 1: 1.0 + 1e-9}, "b": {0: 0.5, 1: 0.5}})
    assert pair.ci95 is not None and pair.significant


def test_two_labels_never_share_a_folder(cli, tmp_path):
    for name in ("4 of 8.yaml", "4_of_8.yaml"):
        (tmp_path / name).write_text("method: sparsedm\n", encoding="utf-8")
    configs = [part for name in ("4 of 8.yaml", "4_of_8.yaml") for part in ("--config", tmp_path / name)]
    outcome = cli("compare", *configs, "--out", tmp_path / "out")
    assert outcome.code == 2 and "'4_of_8' cannot be told from '4 of 8'" in outcome.err


def test_a_damaged_comparison_is_named(cli, tmp_path):
    (tmp_path / "report.json").write_text('{"kind": "comparison"}', encoding="utf-8")
    outcome = cli("report", tmp_path)
    assert outcome.code == 1 and f"{tmp_path / 'report.json'}: not a report" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear", encoding="utf-8")
    with pytest.raises(CompressorError, match=r"thesis\.tex"):
        refuse_used(tmp_path)
    assert (tmp_path / "thesis.tex").is_file()


def test_every_preset_can_be_planned():
    for name, preset in presets().items():
        wanted = comparison.planned([], [], name, {"train": {"steps": 1}}, seeds=2)
        assert list(wanted.recipes) == list(preset.entries)
        assert len(wanted.cells({})) == 2 * len(preset.entries)
        assert {recipe.train.steps for recipe in wanted.recipes.values()} == {1}


def test_density_and_latency_can_be_matched(monkeypatch):
    wanted = comparison.planned(["sparsedm", "structured", "depth"], [], None, {"pattern": "1:4"}, match="density")
    assert wanted.recipes["structured"].settings == {"density": 0.25}
    assert wanted.recipes["depth"].settings == {"macs": 0.25}  # of the blocks, as it were
    assert comparison.planned(["structured"], [], None, {}, match="none").matched == {}
    seen = []
    monkeypatch.setattr(
        "compressor.comparison.latency.macs_of_equal_latency", lambda masked, other: seen.append((masked, other)) or 0.7
    )
    wanted = comparison.planned(["structured", "sparsedm"], [], None, {}, match="latency")
    assert wanted.recipes["structured"].settings == {"macs": 0.7} and seen[0][0].method == "sparsedm"
    known = {wanted.mask: {"structured": {"macs": 0.6}}}
    again = comparison.planned(["structured", "sparsedm"], [], None, {}, match="latency", known=known)
    assert again.recipes["structured"].settings == {"macs": 0.6} and len(seen) == 1  # not measured a second time
    known = {wanted.mask: {"structured": {"macs": 0.6}}}
    other = comparison.planned(["structured", "sparsedm"], [], None, {"pattern": "1:4"}, match="latency", known=known)
    assert other.recipes["structured"].settings == {"macs": 0.7} and len(seen) == 2  # of another mask
    own = comparison.planned(["structured", "sparsedm"], [], None, {"settings": {}}, match="macs")
    assert 0.5 < own.recipes["structured"].settings["macs"] < 0.6


def test_a_rate_is_tried_against_what_the_dense_model_says_on_the_same_noise(tmp_path):
    common = {
        **{"data": FEW, "train": {"steps": 1, "batch_size": 4}},
        "evaluate": {"samples": 8, "sampler_steps": 1, "metric": None, "latency_rounds": 0},
    }
    wanted = comparison.planned(["dense-continued"], [], None, common, seeds=1, rates=(1e-9,))
    jobs._write_job(tmp_path / "dense", jobs._dense(wanted), ())
    folders = [tmp_path / "dense", *(jobs._folder(wanted, cell, tmp_path) for cell in wanted.trials())]
    loaded = None
    for folder in folders:
        loaded = worker._done(folder, loaded, lambda text: None, None)
    [drift] = read_row(folders[1]).row.drift
    assert drift.metric == "prediction_error" and drift.value < 1e-6  # a model that has hardly moved


class Made:
    """A crew whose jobs leave an empty row, but for the trials of magnitude in a folder called `bad`."""

    def __init__(self, *_):
        self.given = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def carry_out(self, folders):
        for folder in folders:
            if not folder.name.startswith("magnitude-seed-1000000") or "bad" not in folder.parts:
                (folder / "row.json").write_text("{}", encoding="utf-8")
        yield from ()


def test_a_method_whose_trials_failed_is_not_trained_at_a_rate_that_was_not_searched(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(jobs, "Crew", Made)
    monkeypatch.setattr(jobs, "written", shown.append)
    monkeypatch.setattr(jobs, "_latencies", lambda *_: iter(()))
    monkeypatch.setattr(
        jobs,
        "_best_rates",
        lambda trials, folders: {
            c.label: 1e-3 for c, f in zip(trials, folders, strict=True) if (f / "row.json").is_file()
        },
    )

    def done(name, *methods):
        wanted = comparison.planned(list(methods), [], None, {"data": FEW, "steps": 1}, seeds=1, rates=(1e-3,))
        list(jobs.conduct(wanted, tmp_path / name))
        return shown[-1]

    outcome = done("bad", "magnitude", "obs")
    assert [cell.label for cell, _ in outcome.done] == ["obs"]
    assert outcome.failed["magnitude-seed-0"] == "none of its learning rates could be tried"
    assert not (tmp_path / "bad" / "cells" / "magnitude-seed-0").exists()
    with pytest.raises(CompressorError, match="every trial failed"):
        done("bad", "magnitude")
    for methods in (
        ("magnitude", "obs"),
        ("obs",),
        ("magnitude", "obs"),
    ):  # the last call knows what the first one chose
        assert len(done("good", *methods).done) == len(methods)


def test_times_of_another_machine_are_not_kept_beside_the_name_of_this_one(tmp_path, monkeypatch):
    measured = []

    def timed(found, models, lowered, max_error):
        measured.append(list(models))
        yield Progress("latency", 0, 1)
        return {name: [] for name in models}

    monkeypatch.setattr(jobs, "timed", timed)
    wanted = comparison.planned(["magnitude"], [], None, {"data": FEW, "evaluate": {"samples": 8}}, seeds=1)
    for _ in range(2):
        list(jobs._latencies(wanted, [], [], tmp_path))
    assert measured == [["dense"]]
    here = jobs.environment
    monkeypatch.setattr(jobs, "environment", lambda device: {**here(device), "hardware": "another"})
    list(jobs._latencies(wanted, [], [], tmp_path))
    assert len(measured) == 2


def test_what_is_named_twice_is_done_once():
    wanted = comparison.planned(
        ["magnitude"], [], None, {}, seeds=1, rates=(1e-3, 0.001, 2e-3), sampler_steps=(10, 10, 5)
    )
    assert wanted.rates == (1e-3, 2e-3) and wanted.sampler_steps == (10, 5)
    assert len({cell.name for cell in wanted.trials()}) == len(wanted.trials()) == 2
    alike = comparison.planned(["magnitude"], [], None, {}, seeds=1, rates=(1e-3, 1.0000001e-3))
    assert len(alike.trials()) == 1  # both would be trained in one folder


def test_what_was_measured_for_a_match_is_kept_beside_that_of_other_methods(tmp_path):
    one = comparison.planned(["magnitude"], [], None, {}, match="none", seeds=1)
    for label, mask in (("structured", "2:4"), ("depth", "2:4"), ("depth", "1:4")):
        _write_match(replace(one, matched={label: {"macs": 0.6}}, mask=mask), tmp_path)
    of_each = {"structured": {"macs": 0.6}, "depth": {"macs": 0.6}}
    assert comparison.matched_before(tmp_path) == {"2:4": of_each, "1:4": {"depth": {"macs": 0.6}}}


@pytest.mark.parametrize(
    ("device", "seen", "workers", "expected"),
    [
        ("auto", None, 0, ["0", "1", "2"]),
        ("cuda", None, 4, ["0", "1", "2", "0"]),
        ("auto", "5,3,GPU-x", 0, ["5", "3", "GPU-x"]),
        ("cuda:1", None, 0, [None]),
        ("cpu", None, 2, [None, None]),
    ],
)
def test_workers_are_given_a_gpu_each(monkeypatch, device, seen, workers, expected):
    given = comparison.planned(["magnitude"], [], None, {"train": {"device": "cpu"}}, seeds=1)
    recipe = given.inputs.recipe
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"device": device})})
    wanted = replace(given, inputs=replace(given.inputs, recipe=recipe))
    found = torch.device("cpu") if device == "cpu" else torch.device("cuda")
    monkeypatch.setattr(jobs, "resolve_device", lambda name: found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    if seen is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert jobs._devices(wanted, workers) == expected


# --- The figures. ---


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.995, 9, 3.24984), (0.9995, 30, 3.64596)],
)
def test_quantiles_of_student(probability, freedom, expected):
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-4)


def test_quantiles_near_one():
    assert t_quantile(1 - 0.025 / 66, 1) == pytest.approx(math.tan(math.pi * (0.5 - 0.025 / 66)), rel=1e-3)


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 3, generator=rng, dtype=torch.float64).tolist()
    covered = sum(low <= 0 <= high for low, high in (summary(values).ci95 for values in draws))
    assert 0.93 < covered / 2000 < 0.97


def test_differences_are_paired_by_seed():
    found = differences({"a": {0: 1.0, 1: 11.0, 2: 5.0}, "b": {0: 2.0, 1: 12.1, 2: 6.05, 3: 0.0}, "c": {9: 1.0}})
    assert [(pair.a, pair.b, pair.n) for pair in found] == [("a", "b", 3)]
    assert found[0].mean == pytest.approx(-1.05) and found[0].significant is True
    assert differences({"a": {0: 1.0}, "b": {0: 2.0}})[0].significant is None


@pytest.mark.parametrize("shape", [(3, 1, 16, 16), (2, 3, 32, 24)])
def test_similarity_is_what_torchmetrics_has(shape):
    rng = torch.Generator().manual_seed(0)
    a = torch.rand(shape, generator=rng) * 2 - 1
    b = (a + 0.3 * torch.randn(shape, generator=rng)).clamp(-1, 1)
    _, full = structural_similarity_index_measure(a, b, data_range=2.0, reduction="none", return_full_image=True)
    inside = full[..., 5:-5, 5:-5].flatten(1).mean(1)  # torchmetrics pads; here the window stays inside
    torch.testing.assert_close(ssim(a, b).float(), inside, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ssim(a, a), torch.ones(shape[0], dtype=torch.float64))


def test_the_report_obeys_the_schema_and_its_rows_are_those_of_a_run(compared):
    report, described = report_of(compared[0]), schema()
    jsonschema.validate(report, described)
    for row in (entry["one_shot"] for entry in report["entries"]):
        jsonschema.validate(row, {**described["$defs"]["Row"], "$defs": described["$defs"]})
        assert any("by_time" in drift for drift in row["drift"]) and "ssim" in {
            drift["metric"] for drift in row["drift"]
        }
    assert ComparisonReport.model_validate(report).as_json() == report
