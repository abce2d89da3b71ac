"""What earlier code left still loads, is shown and goes on: `before/` was written by version 0.1.0 before its modules moved.

`run` is `--steps 60 --set evaluate.samples=16 …`, `lowered` a run of 4:2:4 with `--lower`, `comparison` magnitude and sparsedm
over two seeds of 4 steps; all of uvit-digits, on a CPU with AVX2.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from compressor import comparison
from compressor import recipe as recipes
from compressor.comparison import jobs
from compressor.comparison.page import render as render_comparison
from compressor.errors import CompressorError
from compressor.report import read_comparison, read_report, render
from compressor.runs import facts
from compressor.runs.inputs import load_inputs, resolve

BEFORE = Path(__file__).parent / "before"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BEFORE, tmp_path / "before"))


@pytest.mark.parametrize("name", ["run", "lowered"])
def test_a_report_reads_and_says_what_its_file_says(old: Path, name: str) -> None:
    stored = json.loads((old / name / "report.json").read_text(encoding="utf-8"))
    report = read_report(old / name / "report.json")
    assert (
        [row.name for row in report.rows]
        == [row["name"] for row in stored["rows"]]
        == ["dense", "one-shot", "sparsedm"]
    )
    assert report.final.weights_sha256 == stored["rows"][-1]["weights_sha256"]
    assert report.final.quality[0].value == stored["rows"][-1]["quality"][0]["value"]
    render(old / name)
    assert "sparsedm" in (old / name / "report.html").read_text(encoding="utf-8")


def test_a_comparison_reads_and_is_shown(old: Path) -> None:
    stored = json.loads((old / "comparison" / "report.json").read_text(encoding="utf-8"))
    report = read_comparison(old / "comparison" / "report.json")
    assert (report.title, report.failed) == (stored["title"], {})
    render_comparison(old / "comparison")
    assert "magnitude" in (old / "comparison" / "report.md").read_text(encoding="utf-8")


def test_a_run_would_resume_with_the_same_recipe_weights_and_data(old: Path) -> None:
    before = json.loads((old / "run" / "run.json").read_text(encoding="utf-8"))
    path = old / "run" / "recipe.yaml"
    inputs = load_inputs(resolve(recipes.read(path), str(path)))
    identity = inputs.identity(evaluated=True)
    assert identity == {key: before[key] for key in identity}
    facts.refuse_other(before, inputs, path)
    other = inputs.recipe.model_copy(update={"checkpoint_every": 7})
    with pytest.raises(CompressorError, match="the recipe changed"):
        facts.refuse_other(before, replace(inputs, recipe=other), path)


COMMON = {
    "steps": 4,
    "evaluate": {"measures": [], "latency_rounds": 0, "sampler_steps": 2, "bootstrap": 2},
}


def test_a_comparison_goes_on_with_the_samples_that_it_had(old: Path) -> None:
    out = old / "comparison"
    (out / "cells" / "magnitude-seed-0" / "row.json").write_text("{}", encoding="utf-8")
    before = comparison.evaluated_before(out)
    planned = comparison.planned(["magnitude", "sparsedm"], [], None, COMMON, seeds=2, before=before)
    assert planned.recipes["magnitude"].evaluate.samples == 16
    jobs._refuse_others(planned, out)
    other = comparison.planned(["magnitude", "sparsedm"], [], None, COMMON, seeds=2)
    with pytest.raises(CompressorError, match=r"evaluate\.samples: 16, now 898"):
        jobs._refuse_others(other, out)
