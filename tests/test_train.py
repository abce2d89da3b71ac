"""Dense models from random weights, runs that start from them, and runs that are judged again."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import compressor
from compressor import recipe, registry, saving
from compressor.errors import CompressorError
from compressor.model_zoo.pictures import GROUPS, images
from compressor.model_zoo.pictures.make import Emoji
from compressor.runs import finish, inputs, start
from compressor.runs.directory import is_own, refuse_own_sources
from compressor.runs.run import execute

QUICK = ["train.batch_size=4", "train.warmup=0", "evaluate.samples=0", "evaluate.latency_rounds=0"]
SMALL = {
    "uvit": ["architecture.embed_dim=16", "architecture.depth=2", "architecture.num_heads=2"],
    "ddpm": [
        "architecture.block_out_channels=[8, 16]", "architecture.norm_num_groups=4", "architecture.layers_per_block=1",
        "architecture.down_block_types=[DownBlock2D, AttnDownBlock2D]", "architecture.attention_head_dim=8",
        "architecture.up_block_types=[AttnUpBlock2D, UpBlock2D]",
    ],
    "dit": ["architecture.num_attention_heads=2", "architecture.attention_head_dim=8", "architecture.num_layers=2"],
}  # fmt: skip


def options(*settings):
    return [part for one in (*QUICK, *settings) for part in ("--set", one)]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Twelve pictures of 16x16 in colour, with three classes."""
    path = tmp_path_factory.mktemp("colours") / "colours.npz"
    rng = np.random.default_rng(0)
    np.savez(path, images=rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8), labels=np.arange(12) % 3)
    return path


@pytest.fixture(
    scope="module",
    params=["uvit", pytest.param("ddpm", marks=pytest.mark.slow), pytest.param("dit", marks=pytest.mark.slow)],
)
def trained(request, tmp_path_factory, cli, colours):
    """A small model of each family, trained for three steps; (its name, its run)."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    done = cli(
        "train",
        "--model",
        request.param,
        "--data",
        colours,
        "--steps",
        "3",
        "--out",
        out,
        *options(*SMALL[request.param]),
    )
    assert done.code == 0, done.err
    return request.param, out


def test_a_new_model_takes_the_size_and_the_classes_of_its_data(trained):
    name, out = trained
    adapter = saving.adapter_at(out / "model")
    assert adapter.image_shape == (3, 16, 16) and adapter.num_classes == 3
    report = json.loads((out / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["dense-continued"] and report["model"] == name


def test_a_run_starts_from_a_trained_model(trained, tmp_path, cli, colours):
    name, out = trained
    pruned = tmp_path / "pruned"
    done = cli(
        "run", "--weights", out, "--data", colours, "--method", "magnitude", "--steps", "1", "--out", pruned, *options()
    )
    assert done.code == 0, done.err
    report = json.loads((pruned / "report.json").read_text())
    assert report["model"] == name
    assert report["weights_sha256"] == saving.read_config(out / "model").weights_sha256
    assert saving.read_config(pruned / "model").patterns


def test_samples_of_classes_that_one_asks_for_say_their_labels(trained, tmp_path, cli):
    _, out = trained
    drawn = ("sample", out, "--n", "5", "--steps", "2", "--batch", "3")
    done = cli(*drawn, "--class", "2", "--class", "0", "--out", tmp_path / "a")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["labels"] == [2, 0, 2, 2, 0]
    done = cli(*drawn, "--class", "3", "--out", tmp_path / "b")
    assert done.code == 2 and "no class 3" in done.err


def test_labels_that_are_told_are_those_that_the_model_was_asked_with(trained):
    _, out = trained
    adapter, model = saving.adapter_at(out / "model"), saving.load(out / "model")
    asked = []

    def remember(module, args, kwargs):
        asked.extend(
            value for value in (*args, *kwargs.values()) if torch.is_tensor(value) and value.dtype == torch.int64
        )

    model.register_forward_pre_hook(remember, with_kwargs=True)
    adapter.sample(model, 6, torch.Generator().manual_seed(3), 2)
    told = adapter.drawn_labels(6, torch.Generator().manual_seed(3))
    assert told.shape == (6,) and any(
        torch.equal(one[-6:], told) or torch.equal(one[:6], told) for one in asked if one.dim()
    )


def test_training_ends_alike_when_it_is_interrupted(tmp_path, colours):
    from compressor.runs import run as runs

    settings = {
        "model": "uvit", "data": str(colours), "from_scratch": True, "method": "dense-continued", "checkpoint_every": 2,
        "architecture": {"embed_dim": 16, "depth": 2, "num_heads": 2},
        "train": {"steps": 5, "batch_size": 4}, "evaluate": {"samples": 0, "latency_rounds": 0},
    }  # fmt: skip

    def begun():
        return inputs.load_inputs(inputs.resolve(settings, "test"))

    list(runs.execute(begun(), tmp_path / "whole"))
    events = runs.execute(begun(), tmp_path / "again")
    while not (tmp_path / "again" / "checkpoint-4").is_dir():
        next(events)
    events.close()
    again = inputs.resolve(recipe.read(tmp_path / "again" / "recipe.yaml"), "test")
    list(runs.execute(inputs.load_inputs(again), tmp_path / "again", resume=True))
    one, other = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "again"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": "w.safetensors"}, "weights would not be used"),
        ({"train": {"steps": 0}}, "would stay random"),
        ({"method": "sparsedm"}, "learns from the dense model"),
        ({"architecture": {"embed_dim": 30, "num_heads": 4}}, "architecture"),
        ({"architecture": {"num_classes": 2}}, "labels are 0 to 2"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, words, colours):
    given = recipe.merged(
        {"model": "uvit", "data": str(colours), "from_scratch": True, "method": "dense-continued"}, settings
    )
    with pytest.raises(CompressorError, match=words):
        inputs.load_inputs(inputs.resolve(given, "test"))


def test_pictures_without_a_model_are_not_made_to_fit_the_small_one(tmp_path, cli):
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (32, 32), (number, 9, 200)).save(tmp_path / f"{number}.png")
    done = cli("run", "--data", tmp_path)
    assert done.code == 2 and "no model was chosen" in done.err and "compressor train" in done.err


def test_a_model_that_lost_channels_is_no_start(tmp_path, cli):
    done = cli("run", "--method", "structured", "--steps", "0", "--out", tmp_path / "a", *options())
    assert done.code == 0, done.err
    done = cli("run", "--weights", tmp_path / "a", "--out", tmp_path / "b", *options())
    assert done.code == 2 and "no run starts from such a one" in done.err


def test_a_run_is_not_replaced_by_one_that_reads_it(trained, tmp_path, cli, colours):
    name, source = trained
    shutil.copytree(source, tmp_path / "run")
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    for weights in ("run", "run/model", "run/model/model.safetensors"):
        arguments = ("--weights", tmp_path / weights, "--model", name, "--data", colours, "--out", tmp_path / "run")
        done = cli("run", *arguments, "--overwrite")
        assert done.code == 2 and "would be removed before it is read again" in done.err, done.err
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    recipe = inputs.resolve({"data": "digits", "pruner": str(tmp_path / "run" / "mine.py:Mine")}, "test")
    refuse_own_sources(recipe, tmp_path / "run", is_own)  # a file of the user's beside the run's stays
    with pytest.raises(CompressorError, match=r"mine\.py:Mine lies in"):
        refuse_own_sources(recipe, tmp_path / "run", lambda name: True)
    refuse_own_sources(recipe, tmp_path / "run", None)


def test_a_run_does_not_write_into_the_pictures_that_it_reads(tmp_path, cli):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        Image.fromarray(np.full((8, 8), 100 * number, np.uint8)).save(photos / f"{number}.png")
    for command in ("run", "compare"):
        given = ("--model", "uvit-digits", "--data", photos, "--set", "evaluate.metric=null")
        done = cli(command, *given, "--out", photos / "runs" / "one")
        assert done.code == 2 and "lies in the data" in done.err, done.err
        assert (
            not (photos / "runs" / "one" / "recipe.yaml").exists() and not (photos / "runs" / "one" / "dense").exists()
        )
    settings = inputs.resolve({"model": "uvit-digits", "data": str(photos)}, "test")
    refuse_own_sources(settings, photos / ".runs" / "one", None)  # whose names the reader leaves out
    refuse_own_sources(settings, tmp_path, None)


def test_weights_of_another_model_are_refused(trained, colours):
    name, out = trained
    other = "dit" if name != "dit" else "uvit"
    with pytest.raises(CompressorError, match=f"holds {name}, not {other}"):
        start.opened(inputs.resolve({"model": other, "weights": str(out), "data": str(colours)}, "test"))


@pytest.fixture(scope="module")
def judged(tmp_path_factory, cli):
    """A finished run on digits that drew nothing."""
    out = tmp_path_factory.mktemp("judged") / "run"
    done = cli("run", "--steps", "2", "--method", "magnitude", "--out", out, *options())
    assert done.code == 0, done.err
    return out


def quality(out):
    return json.loads((out / "report.json").read_text())["rows"][-1]["quality"]


def test_a_run_is_judged_again_and_its_model_stays(judged, tmp_path, cli):
    out = tmp_path / "run"
    shutil.copytree(judged, out)
    model = (out / "model" / "model.safetensors").read_bytes()
    assert quality(out) == []
    few = ("--sampler-steps", "2", "--set", "evaluate.measures=[]", "--set", "evaluate.bootstrap=0")
    done = cli("evaluate", out, "--samples", "8", *few)
    assert done.code == 0, done.err
    (found,) = quality(out)
    assert (found["samples"], found["sampler_steps"]) == (8, 2)
    assert recipe.read(out / "recipe.yaml")["evaluate"]["samples"] == 8
    assert (out / "model" / "model.safetensors").read_bytes() == model

    done = cli("resume", out, "--set", "evaluate.samples=10")
    assert done.code == 0 and quality(out)[0]["samples"] == 10, done.err
    done = cli("evaluate", out, "--set", "train.lr=1")
    assert done.code == 2 and "no setting of `evaluate`" in done.err


def test_judging_again_that_is_broken_off_leaves_the_former_report_or_none(judged, tmp_path, cli, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(judged, out)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}

    def stopped(*_):
        raise KeyboardInterrupt

    command = ("evaluate", out, "--samples", "8", "--sampler-steps", "1", "--set", "evaluate.measures=[]")
    with monkeypatch.context() as patch:
        patch.setattr("compressor.runs.rows.weights_sha256", stopped)  # while it is measured
        assert cli(*command).code == 130
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    with monkeypatch.context() as patch:
        patch.setattr("compressor.runs.run.render", stopped)
        assert cli(*command).code == 130
    assert not (out / "report.html").exists() and finish.unfinished(out) is not None
    assert cli("resume", out).code == 0
    assert quality(out)[0]["samples"] == 8 == recipe.read(out / "recipe.yaml")["evaluate"]["samples"]
    assert finish.unfinished(out) is None


def test_a_run_that_is_not_finished_cannot_be_judged(tmp_path, cli):
    done = cli("evaluate", tmp_path, "--samples", "8")
    assert done.code == 2 and "no run has begun" in done.err


def test_the_same_command_starts_and_continues(tmp_path, cli):
    command = ("run", "--method", "magnitude", "--steps", "1", "--out", tmp_path / "run", "--resume", *options())
    for _ in range(2):
        done = cli(*command)
        assert done.code == 0, done.err
    assert "is finished" in done.err
    done = cli(*command, "--set", "train.lr=0.5")
    assert done.code == 2 and "train.lr is 0.001 there, not 0.5" in done.err


def test_held_out_pictures_are_no_variants_of_the_others():
    found = images()
    assert found.shape == (3, 32, 32) and len(found) + len(found.unseen) == 3641
    assert 0.08 < len(found.unseen) / 3641 < 0.15
    for part in (found, found.unseen):
        assert set(part.labels.tolist()) == set(range(len(GROUPS)))
    both = torch.cat([found.pixels, found.unseen.pixels]).flatten(1)
    assert len(torch.unique(both, dim=0)) == len(both)
    waves = [Emoji((0x1F44B, tone), 1, "") for tone in range(0x1F3FB, 0x1F400)]
    assert len({one.family for one in [*waves, Emoji((0x1F44B,), 1, "")]}) == 1
    runners = [(0x1F3C3,), (0x1F3C3, 0x200D, 0x2640, 0xFE0F), (0x1F3C3, 0x1F3FD, 0x200D, 0x2642, 0xFE0F)]
    assert len({Emoji(code, 1, "").family for code in runners}) == 1


def test_held_out_pictures_are_never_trained_on():
    prepared = inputs.load_inputs(
        inputs.resolve({"model": "uvit-pictures", "data": "pictures-32", "method": "magnitude"}, "test")
    )
    whole = len(prepared.data)
    steps = -(-whole // prepared.recipe.train.batch_size)
    seen = {picture.numpy().tobytes() for step in range(steps) for picture in prepared.batches.batch(step)[0]}
    unseen = {picture.numpy().tobytes() for picture in prepared.data.unseen.stream([torch.arange(459)]).__next__()[0]}
    assert whole == 3182 and len(unseen) == 459 and len(seen) > 0.99 * whole and not seen & unseen


# --- The weights of a run of uvit-pictures. ---


@pytest.mark.parametrize("whole", [True, False])
def test_the_weights_of_a_run_are_written_with_their_facts(tmp_path, monkeypatch, whole):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    run = tmp_path / "run"
    script = importlib.import_module("uvit_pictures")
    tiny = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
    given = {
        "model": "uvit",
        "data": "pictures-32",
        "architecture": tiny,
        "from_scratch": True,
        "method": "dense-continued",
    }
    short = {"steps": 3, "batch_size": 4, "optimizer": "muon", "times": "even", "ema": 0.5}
    unjudged = {"samples": 0, "latency_rounds": 0}
    recipe = inputs.resolve({**given, "train": short, "evaluate": unjudged, "checkpoint_every": 1}, "test")
    progress = execute(inputs.load_inputs(recipe), run)
    for _ in progress:
        if not whole and (run / "checkpoint-2").is_dir():
            progress.close()
    result = CliRunner().invoke(script.main, [str(run), "--out", str(tmp_path / "made")], catch_exceptions=False)
    facts = json.loads((tmp_path / "made" / "uvit-pictures.json").read_text(encoding="utf-8"))
    assert result.exit_code == 0 and facts["training"]["steps"] == (3 if whole else 2)
    assert facts["architecture"]["embed_dim"] == 16 and facts["training"]["optimizer"] == "muon"
    made = tmp_path / "made" / "uvit-pictures.safetensors"
    assert script.started_from(made) == {**facts, "file_sha256": hashlib.sha256(made.read_bytes()).hexdigest()}
    adapter = registry.adapter("uvit").opened(None, facts["architecture"])
    loaded = adapter.load(str(made))
    if whole:
        expected = compressor.load(run).state_dict()
    else:
        state = saving.load_state(run / "checkpoint-2")["run"]
        expected = {**state["model"], **state["average"]}
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name].half().to(value.dtype)), name
