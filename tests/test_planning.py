"""`compressor plan`: what it foretells is what a run then finds."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from compressor import CompressorError, files
from compressor.runs import estimate


@pytest.mark.parametrize("method", ["sparsedm", pytest.param("structured", marks=pytest.mark.slow), "dense-continued"])
def test_costs_are_those_of_the_run(cli, tmp_path, method):
    planned = cli("plan", "--method", method, "--steps", "3", "--set", "train.batch_size=8", "--no-lower", "--json")
    assert planned.code == 0, planned.err
    facts = json.loads(planned.out)
    ran = cli.trial(tmp_path / "run", "--method", method, "--steps", "3")
    assert ran.code == 0, ran.err
    rows = files.read_json(tmp_path / "run" / "report.json")["rows"]
    for key in ("params", "size_bytes", "macs_dense", "macs_effective"):
        assert facts["before"][key] == rows[0][key]
        assert facts["after"][key] == pytest.approx(rows[-1][key], rel=1e-3)
    assert facts["fine_tuning"]["steps"] == 3
    assert facts["fine_tuning"]["seconds"] == pytest.approx(3 * facts["fine_tuning"]["seconds_per_step"])
    evaluation = facts["evaluation"]
    drawn = 2 if method == "dense-continued" else 3  # which begins with the dense model's own weights
    assert (evaluation["rows"], evaluation["samples"], evaluation["sampler_steps"]) == (drawn, 898, 25)
    assert len({row["weights_sha256"] for row in rows}) == drawn
    assert evaluation["seconds"] == evaluation["sampling_seconds"] + evaluation["latency_seconds"] > 0
    assert facts["seconds"] == facts["fine_tuning"]["seconds"] + evaluation["seconds"]
    assert facts["lowering"] is None
    masked = [layer for layer in facts["layers"] if layer["pattern"]]
    assert len(masked) == (20 if method == "sparsedm" else 0)


def test_it_says_what_lowering_gains_and_which_layers_stay_dense(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    outcome = cli("plan", "--steps", "0", "--pattern", "4:2:4", "--ignore", "*.fc1")
    assert outcome.code == 0, outcome.err
    assert "15 of 25 layers get a mask" in outcome.out and "ignored by a rule" in outcome.out
    assert "as fast as the best dense form" in outcome.out and "fine-tuning" not in outcome.out
    assert "evaluation: 2 rows of 898 samples in 25 steps" in outcome.out and "in all: about" in outcome.out
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"]  # nothing else is written


def test_it_lowers_as_run_would(cli, tmp_path, monkeypatch):
    """With the errors, the fused projections and the precision of the recipe, on the command line and in a file."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    given: list[dict[str, Any]] = []

    def lowering(model, example, **how):
        given.append(how)
        raise CompressorError("enough")
        yield

    monkeypatch.setattr(estimate, "lowering", lowering)
    (tmp_path / "recipe.yaml").write_text("lowering:\n  tolerance: 0.1\n")
    flags = ("--max-error", "0.05", "--fuse-projections", "--dtype", "bfloat16")
    assert cli("plan", "--steps", "0", "--config", tmp_path / "recipe.yaml", *flags).code == 1
    assert cli("plan", "--steps", "0", "--set", "max_error=0.02").code == 1
    names = ("tolerance", "max_error", "fuse_projections", "dtype")
    assert [tuple(how[name] for name in names) for how in given] == [
        (0.1, 0.05, True, torch.bfloat16),
        (None, 0.02, None, None),
    ]


def test_what_run_would_refuse_is_refused(cli):
    assert cli("plan", "--pattern", "2:7").code == 2
    assert cli("plan", "--max-error", "2").code == 2
    assert cli("plan", "--method", "sparsedm", "--pruner", "x.py:X").code == 2
