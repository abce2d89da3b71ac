"""Depth pruning: the blocks that matter least go, one after the other, and the shallower model works, reloads and resumes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import compressor
from compressor import CompressorError
from compressor.adapter import with_rules
from compressor.cost.macs import layer_macs
from compressor.data.batches import as_batches
from compressor.files import read_json
from compressor.plugins.depth import Depth, _Error, find_blocks, survey_blocks
from compressor.sparsity.surgery import Bypass
from compressor.testing import families

FAMILIES = families()


class Residual(nn.Module):
    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale = scale

    def forward(self, x, *, times=None):
        return x + self.scale * self.layers(x)


class Stack(nn.Module):
    """Four blocks; the second does least and the third next to least; of the last, something is read outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(16, scale) for scale in (1.0, 0.01, 0.1, 1.0))
        self.heads = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x, times=None)
        return self.heads[0](x) + self.blocks[3].scale


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack()


def prepared(pruner, model, adapter, samples):
    return pruner.prepare(model, adapter, as_batches(samples, 16, 0)).surgery.removed


def test_blocks_are_found_with_what_they_save(stack, adapter):
    found = find_blocks(stack, adapter)
    assert found == {f"blocks.{i}": 2 * 16 * 64 for i in range(3)}  # of the last one, something is read elsewhere


def test_a_block_that_saves_nothing_stays(stack, adapter, samples):
    class Silent(Residual):
        def forward(self, x, *, times=None):
            return x * self.scale  # its layers are there, and nobody calls them

    stack.blocks[1] = Silent(16, 0.99)
    assert find_blocks(stack, adapter) == {f"blocks.{i}": 2 * 16 * 64 for i in (0, 2)}
    assert prepared(Depth(macs=0.7), stack, adapter, samples) == ("blocks.2",)


def test_the_least_error_goes_first(stack, adapter, samples):
    whole = layer_macs(stack, adapter)[0]
    one, two = (1 - n * 2 * 16 * 64 / whole for n in (1, 2))
    assert prepared(Depth(macs=one), stack, adapter, samples) == ("blocks.1",)
    assert prepared(Depth(macs=two), stack, adapter, samples) == ("blocks.1", "blocks.2")
    assert prepared(Depth(macs=(one + 2) / 3), stack, adapter, samples) == ()  # nearer than one block fewer
    assert prepared(Depth(macs=(2 * one + 1) / 3), stack, adapter, samples) == ("blocks.1",)


def test_a_model_that_writes_to_its_inputs_is_asked_the_same_each_time(stack, adapter, samples):
    class Writing(Stack):
        def forward(self, x):
            return super().forward(x.mul_(2.0))

    class Plain(Stack):
        def forward(self, x):
            return super().forward(x * 2.0)

    found = []
    for kind in (Plain, Writing):
        model = kind()
        model.load_state_dict(stack.state_dict())
        errors = _Error(model, adapter, as_batches(samples, 16, 0), 2, survey_blocks(model, adapter))
        found.append([errors((f"blocks.{n}",)) for n in (0, 1, 2)])
    assert found[0] == found[1]


def test_random_draws_by_its_seed_alone(stack, adapter, samples):
    found = [prepared(Depth(macs=0.7, score="random", seed=seed), stack, adapter, samples) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1] and len(set(found)) > 1


def test_a_block_stays_where_all_of_its_layers_are_ignored(stack, adapter, samples):
    ruled = with_rules(adapter, None, ("blocks.1", "blocks.2.layers.0"))
    assert list(find_blocks(stack, ruled)) == ["blocks.0", "blocks.2"]
    assert prepared(Depth(macs=0.75), stack, ruled, samples) == ("blocks.2",)


def test_a_model_without_blocks_and_a_share_out_of_reach_are_refused(stack, model, adapter, samples):
    with pytest.raises(CompressorError, match="no block"):
        prepared(Depth(), model, adapter, samples)
    with pytest.raises(CompressorError, match=r"5% .* cannot be reached, only 27%"):
        prepared(Depth(macs=0.05), stack, adapter, samples)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_works_without_each_block(family):
    adapter, model = FAMILIES[family]
    before = copy.deepcopy(model)
    blocks = find_blocks(model, adapter)
    assert blocks and all(saved > 0 for saved in blocks.values())
    whole = layer_macs(model, adapter)[0]
    for name, saved in blocks.items():
        shorter = copy.deepcopy(model)
        compressor.Surgery(removed=(name,)).apply(shorter)
        assert layer_macs(shorter, adapter)[0] == whole - saved
        assert isinstance(shorter.get_submodule(name), Bypass)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_diffusion_transformer_keeps_the_block_that_its_output_reads():
    adapter, model = FAMILIES["DiT"]
    assert "transformer_blocks.0" not in find_blocks(model, adapter)


def test_a_run_that_removed_nothing_says_so(cli, tmp_path):
    for macs, said in ((0.99, True), (0.8, False)):
        out = tmp_path / str(macs)
        call = (out, "--model", "uvit-digits", "--method", "depth", "--steps", "0", "--set", f"settings.macs={macs}")
        assert cli.trial(*call).code == 0
        assert ("Nothing was removed" in " ".join(read_json(out / "report.json")["limitations"])) is said


def test_a_run_is_smaller_faster_by_its_macs_and_reloads_without_pickle(cli, tmp_path):
    outcome = cli.trial(
        *(tmp_path / "run", "--model", "uvit-digits", "--method", "depth", "--steps", "2", "--set", "settings.macs=0.8")
    )
    assert outcome.code == 0, outcome.err
    rows = read_json(tmp_path / "run" / "report.json")["rows"]
    dense, final = rows[0], rows[-1]
    for key in ("params", "nonzero_params", "size_bytes"):
        assert final[key] < 0.9 * dense[key]
    assert final["macs_dense"] == pytest.approx(0.8 * dense["macs_dense"], rel=0.05)
    loaded = compressor.load(tmp_path / "run")
    assert sum(p.numel() for p in loaded.parameters()) == final["params"]
    assert sum(isinstance(module, Bypass) for module in loaded.modules()) == 1
    assert {path.suffix for path in (tmp_path / "run" / "model").iterdir()} == {".json", ".safetensors"}


def test_the_dense_model_teaches():
    assert Depth().objective == compressor.Objective(noise=1.0, teacher=1.0)
    assert Depth(teacher=0.5).objective.teacher == 0.5
    assert Depth(teacher_only=True).objective == compressor.Objective(noise=0.0, teacher=1.0)


@pytest.mark.parametrize("bad", [{"macs": 0.0}, {"macs": 1.5}, {"timesteps": 0}, {"teacher": -1.0}, {"score": "l1"}])
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(CompressorError, match=f"depth: {next(iter(bad))}"):
        Depth(**bad)


def test_blocks_are_not_chosen_by_answers_that_are_not_finite(stack, adapter, samples):
    broken = samples[:16].clone()
    broken[3, 3] = float("nan")
    with pytest.raises(CompressorError, match="answers are not finite"):
        compressor.prune(stack, Depth(macs=0.6, timesteps=2), adapter=adapter, data=[broken], steps=0)
