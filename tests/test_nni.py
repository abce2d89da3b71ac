"""NNI's pruners: its own masks, or one line where it is not installed. With NNI: `make test-nni`."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import compressor
from compressor import CompressorError, Unstructured
from compressor.files import read_json
from compressor.plugins.nni import NNI
from compressor.testing import check_pruner

INSTALLED = importlib.util.find_spec("nni") is not None
needs_nni = pytest.mark.skipif(not INSTALLED, reason="needs NNI: make test-nni")


@pytest.mark.skipif(INSTALLED, reason="NNI is installed")
def test_without_nni_one_line_says_what_to_do(cli, tmp_path):
    outcome = cli.trial(tmp_path / "run", "--method", "nni")
    assert outcome.code == 1
    assert "needs NNI 3.0, which cannot be imported" in outcome.err and "diffusion-compressor[nni]" in outcome.err


@needs_nni
def test_level_keeps_the_largest_of_each_layer(model, adapter, samples):
    result = compressor.prune(model, NNI(Unstructured(0.25)), adapter=adapter, data=samples, steps=0)
    for name, mask in result.masks.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(mask.keep, Unstructured(0.25).mask(weight.abs()).keep)


@needs_nni
@pytest.mark.parametrize("algorithm", ["l1-norm", "l2-norm", "fpgm"])
def test_whole_channels_are_kept(algorithm, model, adapter, samples):
    result = compressor.prune(model, NNI(algorithm=algorithm), adapter=adapter, data=samples, steps=2, batch_size=8)
    for name, mask in result.masks.items():
        rows = mask.keep.float().mean(1)
        assert set(rows.tolist()) == {0.0, 1.0}
        weight = model.get_parameter(name).detach()
        if algorithm == "l1-norm":
            norms = weight.abs().sum(1)
            assert norms[rows == 1].min() >= norms[rows == 0].max()


@needs_nni
@pytest.mark.parametrize("name", ["uvit-digits", "ddpm-digits"])
def test_it_is_compared_like_any_other_method(name, cli, tmp_path):
    outcome = cli(
        *("compare", "--methods", "magnitude,nni", "--pattern", "unstructured:0.5", "--model", name, "--seeds", "1"),
        *("--steps", "2", "--set", "train.batch_size=8", "--set", "evaluate.samples=16", "--out", tmp_path / "out"),
        *("--set", "evaluate.sampler_steps=2", "--set", "evaluate.bootstrap=2", "--set", "evaluate.latency_rounds=0"),
    )
    assert outcome.code == 0, outcome.err
    report = read_json(tmp_path / "out" / "report.json")
    first, second = report["entries"]
    assert second["density"] == pytest.approx(0.5, abs=0.01)
    assert second["one_shot"]["weights_sha256"] == first["one_shot"]["weights_sha256"]  # level is magnitude


@needs_nni
def test_it_keeps_the_promises():
    check_pruner(NNI)


def test_the_pattern_is_a_share():
    with pytest.raises(CompressorError):
        compressor.registry.build_pruner(NNI, {"pattern": "2:4"})
