"""Sparsity, caching and fewer steps, side by side on a pipeline's run."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import tiny_pipelines
import torch

import compressor
from compressor import files
from compressor.data.calls import Picture
from compressor.errors import UsageError
from compressor.pipelines.caching import CACHES, cached
from compressor.pipelines.opened import opened
from compressor.pipelines.recording import sample
from compressor.report import read_report
from compressor.runs.piped import adapter_of_calls
from compressor.runs.trade_offs import _try, cache_of


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_pipelines.made("flux", tmp_path_factory.mktemp("flux"))


def line(number: int) -> Picture:
    return Picture(
        arguments={"prompt": tiny_pipelines.PROMPTS[number], **tiny_pipelines.arguments("flux")}, seed=number
    )


@pytest.mark.parametrize(
    "text",
    [
        "first-block:threshold=100",
        "pyramid:spatial_attention_block_skip_range=2",
        "taylor:cache_interval=3:disable_cache_before_step=1",
        "first-block",
    ],
)
def test_a_cache_leaves_work_out_and_nothing_behind(pipe, text):
    found, calls = opened(pipe), 0
    block = (
        found.module.single_transformer_blocks[0].norm
        if text.startswith("first-block")
        else found.module.transformer_blocks[0].attn.to_out[0]
    )

    def count(*_):
        nonlocal calls
        calls += 1

    handle = block.register_forward_hook(count)
    plain = sample(found, line(0), 6).images
    whole, calls = calls, 0
    with cached(found, found.module, cache_of(text)):
        first = sample(found, line(0), 6).images
    fewer = calls
    with cached(found, found.module, cache_of(text)):  # a new picture begins with an empty cache
        again = sample(found, line(0), 6).images
    handle.remove()
    assert fewer < whole or text == "first-block"
    assert torch.equal(first, again)
    assert torch.equal(plain, sample(found, line(0), 6).images)
    assert (first - plain).abs().max() < 1


def test_every_cache_is_one_of_diffusers():
    for name in CACHES:
        cache_of(name)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("frist-block", "no cache 'frist-block'\nAvailable: faster, first-block, pyramid, taylor"),
        ("first-block:thresold=1", "cache first-block: no setting 'thresold'\nDid you mean 'threshold'"),
        ("first-block:threshold", "'threshold': not KEY=VALUE\nWrite it like"),
        ("first-block:threshold=[", "threshold"),
    ],
)
def test_a_cache_that_is_none_is_told_in_a_line(text, said):
    with pytest.raises(UsageError, match=said.partition("\n")[0]) as caught:
        cache_of(text)
    assert said.partition("\n")[2] in str(caught.value)


def test_a_model_without_caches_is_refused(tmp_path):
    found = opened(tiny_pipelines.made("sd", tmp_path))
    wanted = cached(found, found.module, cache_of("first-block"))
    with pytest.raises(UsageError, match="UNet2DConditionModel: diffusers has no caches for it"), wanted:
        pass


def test_a_pipeline_that_does_not_tell_a_cache_what_it_needs_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
    pipe = tiny_pipelines.made("flux", tmp_path)
    sizes = tiny_pipelines.arguments("flux")
    records = compressor.record(pipe, ["a", "b", "c"], tmp_path / "records", n=2, unseen=1, steps=2, **sizes)
    found = opened(pipe)
    (picture,) = adapter_of_calls(found, records).held_out
    cache = cache_of("first-block:threshold=0.1")
    with cached(found, found.module, cache):
        _try(found, [picture], 2, cache)
    monkeypatch.setattr(type(pipe.transformer), "cache_context", lambda *_: nullcontext())  # as Latte's pipeline
    with (
        cached(found, found.module, cache),
        pytest.raises(UsageError, match=r"cache first-block:threshold=0.1: (.|\n)*Leave --cache out"),
    ):
        _try(found, [picture], 2, cache)


@pytest.mark.slow
def test_a_report_has_weights_caches_and_steps_from_the_same_noise(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    folder = tiny_pipelines.saved("flux", tmp_path)
    short = ("record.n=2", "record.unseen=2", "record.steps=4", "evaluate.latency_rounds=0")
    outcome = cli(
        *("run", "--pipeline", folder, "--prompts", folder.with_suffix(".jsonl"), "--out", tmp_path / "run"),
        *("--method", "magnitude"),
        *("--steps", "0", *[part for one in short for part in ("--set", one)]),
    )
    assert outcome.code == 0, outcome.err
    bench = ("bench", tmp_path / "run", "--no-compiled", "--no-onnx")
    for wrong, said in (
        (("--cache", "second-block"), "no cache 'second-block'"),
        (("--steps", "0"), "not numbers above zero"),
        (("--batches", "4"), "a call as it was recorded"),
    ):
        refused = cli(*bench, *wrong)
        assert refused.code == 2 and said in refused.err
    assert not read_report(tmp_path / "run" / "report.json").trade_offs

    outcome = cli(*bench, "--steps", "2", "--cache", "first-block:threshold=0.5", "--json")
    assert outcome.code == 0, outcome.err
    trades = json.loads(outcome.out)["trade_offs"]
    cells = [(one["row"], one["cache"], one["steps"]) for one in trades]
    caches = (None, "first-block:threshold=0.5")
    assert cells == [(row, cache, n) for n in (4, 2) for cache in caches for row in ("dense", "magnitude")]
    assert trades[0]["sample_rmse"] == 0 and trades[0]["ssim"] == pytest.approx(1) and trades[0]["samples"] == 2
    # where nothing is left out, the sparse row is as far from dense as the run's own report has it
    report = read_report(tmp_path / "run" / "report.json")
    assert trades[1]["sample_rmse"] == pytest.approx(report.final.drift_by("sample_rmse").value, rel=1e-3)
    assert all(one["median_ms"] > 0 for one in trades) and trades[4]["sample_rmse"] > trades[2]["sample_rmse"]
    for page in ("report.html", "report.md"):
        text = (tmp_path / "run" / page).read_text(encoding="utf-8")
        assert "Sparsity, caching and steps" in text and "first-block:threshold=0.5" in text
    assert files.read_json(tmp_path / "run" / "report.json")["trade_offs"] == trades


@pytest.mark.slow
@pytest.mark.usefixtures("few_bits_fast")
def test_pictures_are_held_against_dense_weights_in_float(cli, tmp_path):
    """Where an error is allowed, the fastest dense form is in few bits: a row of its own, and no measure of the others."""
    folder = tiny_pipelines.saved("flux", tmp_path)
    short = ("record.n=2", "record.unseen=2", "record.steps=2", "evaluate.latency_rounds=0")
    given = ("run", "--pipeline", folder, "--prompts", folder.with_suffix(".jsonl"), "--out", tmp_path / "run")
    settings = [part for one in short for part in ("--set", one)]
    outcome = cli(*given, "--method", "magnitude", "--pattern", "4:2:4", "--steps", "0", *settings)
    assert outcome.code == 0, outcome.err
    bench = ("bench", tmp_path / "run", "--no-compiled", "--no-onnx", "--max-error", "0.1", "--steps", "1", "--json")
    outcome = cli(*bench)
    assert outcome.code == 0, outcome.err
    first, few, sparse, *_ = json.loads(outcome.out)["trade_offs"]
    assert [(one["row"], one["form"]) for one in (first, few)] == [
        ("dense", "prepacked"),
        ("dense", "prepacked, few bits"),
    ]
    assert sparse["row"] == "magnitude"
    assert first["sample_rmse"] < 1e-6 < few["sample_rmse"] < sparse["sample_rmse"]
    assert "dense, few bits" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")  # in the chart


def test_the_run_of_a_model_alone_has_no_caches(cli, finished):
    outcome = cli("bench", finished, "--no-compiled", "--no-onnx", "--steps", "3")
    assert outcome.code == 2 and "is not the run of a pipeline" in outcome.err
