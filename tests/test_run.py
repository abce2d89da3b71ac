"""What a run leaves behind: a directory whose files agree with each other, and which can be repeated bit for bit."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import weakref
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

import compressor
from compressor import recipe, registry
from compressor.runs import inputs, rows
from compressor.runs import run as runs
from compressor.weights import weights_sha256

SCHEMA = json.loads((Path(compressor.__file__).parent / "report" / "schema.json").read_text())
FILES = ("recipe.yaml", "run.json", "metrics.jsonl", "report.json", "report.md", "report.html")


def report_of(out):
    return json.loads((out / "report.json").read_text())


def metrics_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights_of(out):
    return (out / "model" / "model.safetensors").read_bytes()


def arrays_of(out):
    """The saved weights, read without this toolkit, from what docs/design.md says of the format alone."""
    config = json.loads((out / "model" / "config.json").read_text())
    arrays = load_arrays(out / "model" / "model.safetensors")
    for name in config.get("packed", []):
        n, m = map(int, config["patterns"][name].split(":"))
        values, index = arrays.pop(f"{name}.values"), arrays.pop(f"{name}.index")
        width = (m - 1).bit_length()
        stream = np.unpackbits(index, bitorder="little")[: values.size * width].reshape(-1, width)
        groups = np.zeros((values.size // n, m), values.dtype)
        places = (stream @ (1 << np.arange(width))).reshape(-1, n)
        np.put_along_axis(groups, places, values.reshape(-1, n), axis=1)
        arrays[name] = groups.reshape(len(values), -1)
    return arrays


def begun(out, changes, events=1):
    """A run that stopped after so many events, as if its process had died."""
    progress = runs.execute(inputs.load_inputs(inputs.resolve(changes, "test")), out)
    for _ in range(events):
        next(progress)
    progress.close()


@pytest.fixture(scope="module")
def repeated(finished, cli, tmp_path_factory):
    """The run again, from the recipe that it left."""
    out = tmp_path_factory.mktemp("repeated") / "run"
    outcome = cli("run", "--config", finished / "recipe.yaml", "--out", out)
    assert outcome.code == 0, outcome.err
    return out


# --- The directory. ---


def test_a_run_leaves_every_file_and_no_other(finished):
    assert {path.name for path in finished.iterdir() if not path.name.startswith(".")} == {*FILES, "model", "samples"}
    assert {path.name for path in (finished / "model").iterdir()} == {
        "config.json",
        "manifest.json",
        "model.safetensors",
    }
    assert {path.name for path in (finished / "samples").iterdir()} == {"dense.png", "one-shot.png", "sparsedm.png"}
    assert {path.name for path in finished.iterdir() if path.name.startswith(".")} <= {".lock"}


def test_the_files_are_readable_by_others(finished):
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in finished.rglob("*") if path.name != ".lock")


def test_metrics_has_a_line_per_step(finished):
    lines = metrics_of(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "noise_loss", "teacher_loss", "lr", "grad_norm", "flip_rate", "steps"} <= lines[0].keys()


def test_run_json_says_what_the_numbers_depend_on(finished):
    found = json.loads((finished / "run.json").read_text())
    dense = registry.adapter("uvit-digits").load(None)
    assert found["weights_sha256"] == weights_sha256(dense)
    assert found["data_sha256"] == registry.images("digits").sha256
    assert found["seed"] == 0
    assert found["versions"]["torch"] == torch.__version__
    assert found["hardware"]
    assert found["train"]["steps"] == 4


def test_the_recipe_is_resolved(finished):
    found = recipe.read(finished / "recipe.yaml")
    assert found["data"] == "digits"  # the model's own default
    assert found["train"]["steps"] == 4
    assert found.keys() == recipe.Recipe.model_fields.keys()
    assert found["train"].keys() == compressor.Training.model_fields.keys()


def test_the_html_report_is_one_self_contained_file(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert "sparsedm" in text
    assert re.findall(r"""(?:src|href)=["']?(?!data:|#|https?:)[\w./-]+""", text) == []
    assert re.findall(r"""(?:src=|@import|url\()["']?https?:""", text) == []


def test_report_writes_the_pages_again(finished, cli, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for name in ("report.md", "report.html"):
        (tmp_path / "run" / name).unlink()
    outcome = cli("report", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run" / "report.md").is_file()
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == before


# --- The report. ---


def test_the_report_obeys_its_schema(finished):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(report_of(finished))


def test_the_rows_are_dense_one_shot_and_the_method(finished):
    report = report_of(finished)
    assert (report["method"], report["model"], report["pattern"], report["seed"]) == (
        "sparsedm",
        "uvit-digits",
        "2:4",
        0,
    )
    assert [row["name"] for row in report["rows"]] == ["dense", "one-shot", "sparsedm"]
    assert [row["train"]["steps"] for row in report["rows"]] == [0, 0, 4]
    assert report["rows"][0]["density"] == 1
    assert len({row["weights_sha256"] for row in report["rows"]}) == 3
    assert report["rows"][0]["weights_sha256"] == report["weights_sha256"]


def test_every_row_is_measured(finished):
    for row in report_of(finished)["rows"]:
        assert [q["metric"] for q in row["quality"]] == [
            "fd-digits",
            *(f"{measure}-digits" for measure in ("kid", "precision", "recall", "density", "coverage", "sfd")),
        ]
        assert {(q["samples"], q["sampler_steps"], q["seed"]) for q in row["quality"]} == {(16, 2, 1234)}
        low, high = row["quality"][0]["ci95"]
        assert low <= high
        assert {d["metric"] for d in row["drift"]} == (
            set() if row["name"] == "dense" else {"prediction_error", "sample_rmse"}
        )
        assert all(d["value"] > 0 for d in row["drift"])
        assert row["latency"][0]["median_ms"] > 0


def test_costs_count_zeros_but_claim_no_speed_up(finished):
    dense, one_shot, final = report_of(finished)["rows"]
    assert dense["macs_effective"] == dense["macs_lowered"] == dense["macs_dense"]
    for row in (one_shot, final):
        assert row["density"] == 0.5
        assert row["macs_lowered"] == row["macs_dense"] == dense["macs_dense"]
        assert row["macs_effective"] < dense["macs_effective"]
        assert row["nonzero_params"] < dense["nonzero_params"] <= row["params"] == dense["params"]


def test_counts_are_those_of_the_saved_weights(finished):
    arrays = arrays_of(finished)
    row = report_of(finished)["rows"][-1]
    assert row["params"] == sum(array.size for array in arrays.values())
    assert row["nonzero_params"] == sum(np.count_nonzero(array) for array in arrays.values())


def test_every_layer_is_listed_with_its_pattern_or_the_reason(finished):
    layers = {layer["name"]: layer for layer in report_of(finished)["layers"]}
    pruned = {name for name, layer in layers.items() if layer["pattern"]}
    blocks = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    parts = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert pruned == {f"{block}.{part}.weight" for block in blocks for part in parts}
    assert all((layer["reason"] is None) == (name in pruned) for name, layer in layers.items())
    assert layers["out_blocks.0.skip_linear.weight"]["reason"] == "not among the targets"


def test_every_targeted_weight_is_2_4_along_its_input_channels(finished):
    pruned = [layer["name"] for layer in report_of(finished)["layers"] if layer["pattern"] == "2:4"]
    assert pruned
    state = {name: value.numpy() for name, value in compressor.load(finished).state_dict().items()}
    for name, weights in itertools.product(pruned, (state, arrays_of(finished))):
        outputs, channels = weights[name].shape
        groups = (weights[name] != 0).reshape(outputs, channels // 4, 4).sum(-1)
        assert groups.max() <= 2, name
        assert (groups == 2).mean() > 0.99, name


def test_every_targeted_weight_is_packed(finished):
    pruned = {layer["name"] for layer in report_of(finished)["layers"] if layer["pattern"]}
    config = json.loads((finished / "model" / "config.json").read_text())
    assert set(config["packed"]) == set(config["patterns"]) == pruned
    stored = load_arrays(finished / "model" / "model.safetensors").keys()
    assert not stored & pruned
    assert {f"{name}.{part}" for name in pruned for part in ("values", "index")} < stored


# --- Loading it. ---


@pytest.mark.parametrize("part", ["", "model"])
def test_a_run_loads_as_the_very_weights_of_its_report(finished, part):
    model = compressor.load(finished / part)
    assert not model.training
    assert weights_sha256(model) == report_of(finished)["rows"][-1]["weights_sha256"]
    saved = arrays_of(finished)
    assert saved.keys() == model.state_dict().keys()
    assert all(value.numpy().tobytes() == saved[name].tobytes() for name, value in model.state_dict().items())


def test_a_loaded_model_predicts(finished):
    adapter, model = registry.adapter("uvit-digits"), compressor.load(finished)
    with torch.no_grad():
        assert adapter.predict(model, adapter.example_inputs(2)).shape == (2, 1, 8, 8)


# --- Repeating it. ---


def test_its_recipe_repeats_a_run_bit_for_bit(finished, repeated):
    assert weights_of(repeated) == weights_of(finished)
    assert (repeated / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert (repeated / "recipe.yaml").read_bytes() == (finished / "recipe.yaml").read_bytes()


def test_a_repeated_run_reports_the_same_quality(finished, repeated):
    for first, second in zip(report_of(finished)["rows"], report_of(repeated)["rows"], strict=True):
        assert first["quality"] == second["quality"]
        assert first["drift"] == second["drift"]


def test_another_seed_gives_other_weights(finished, cli, tmp_path):
    outcome = cli.trial(tmp_path / "other", "--seed", 1)
    assert outcome.code == 0, outcome.err
    assert weights_of(tmp_path / "other") != weights_of(finished)
    assert [line["loss"] for line in metrics_of(tmp_path / "other")] != [line["loss"] for line in metrics_of(finished)]
    assert report_of(tmp_path / "other")["seed"] == 1


# --- Other methods and edges. ---


def test_no_steps_is_one_shot_pruning(cli, tmp_path):
    outcome = cli.trial(tmp_path / "run", "--steps", 0)
    assert outcome.code == 0, outcome.err
    _dense, one_shot, final = report_of(tmp_path / "run")["rows"]
    assert final["weights_sha256"] == one_shot["weights_sha256"]
    assert "drift of one-shot" in outcome.err and "drift of sparsedm" not in outcome.err  # the same weights, once
    assert (final["drift"], final["quality"]) == (one_shot["drift"], one_shot["quality"])
    assert metrics_of(tmp_path / "run") == []
    jsonschema.Draft202012Validator(SCHEMA).validate(report_of(tmp_path / "run"))


@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_holds_no_model_longer_than_it_needs_it(cli, tmp_path, monkeypatch, steps):
    """What it trained with is gone when the model is written; weights that were not trained are there once."""
    begun, ended = [], []
    start, commit, judged = inputs.Inputs.fine_tuning, runs._commit_model, rows._judged

    def started(self, previous):
        run = start(self, previous)
        begun.append(weakref.ref(run))
        return run

    def committed(*given):
        ended.append([one() for one in begun])
        return commit(*given)

    def seen(judge, variants, samples):
        ended.append(len({id(variant.model) for variant in variants}))
        return judged(judge, variants, samples)

    monkeypatch.setattr(inputs.Inputs, "fine_tuning", started)
    monkeypatch.setattr(runs, "_commit_model", committed)
    monkeypatch.setattr(rows, "_judged", seen)
    outcome = cli.trial(tmp_path / "run", "--steps", steps)
    assert outcome.code == 0, outcome.err
    assert ended == [[None], 2 if steps == 0 else 3]


def test_magnitude_keeps_the_largest_weights_and_only_those(cli, tmp_path):
    outcome = cli.trial(tmp_path / "run", "--method", "magnitude", "--pattern", "1:4")
    assert outcome.code == 0, outcome.err
    report = report_of(tmp_path / "run")
    assert (report["method"], report["pattern"], report["rows"][-1]["density"]) == ("magnitude", "1:4", 0.25)
    before = load_file(registry.adapter("uvit-digits").weights)["mid_block.mlp.fc1.weight"]
    after = torch.from_numpy(arrays_of(tmp_path / "run")["mid_block.mlp.fc1.weight"])
    largest = before.abs().reshape(len(before), -1, 4).argmax(-1)
    assert torch.equal((after != 0).reshape(len(before), -1, 4).int().argmax(-1), largest)


def test_dense_continued_prunes_nothing(cli, tmp_path):
    outcome = cli.trial(tmp_path / "run", "--method", "dense-continued")
    assert outcome.code == 0, outcome.err
    report = report_of(tmp_path / "run")
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    assert report["pattern"] is None
    assert [row["name"] for row in report["rows"]] == ["dense", "one-shot", "dense-continued"]
    assert {row["density"] for row in report["rows"]} == {1.0}
    assert report["rows"][-1]["weights_sha256"] != report["weights_sha256"]
    assert not compressor.load(tmp_path / "run").training


def test_a_rule_that_picks_layers_is_followed_to_the_end(cli, tmp_path):
    outcome = cli.trial(
        tmp_path / "run", "--targets", "re:mid_block", "--ignore", "mid_block.attn", "--ignore", "nowhere"
    )
    assert outcome.code == 0, outcome.err
    layers = report_of(tmp_path / "run")["layers"]
    assert {layer["name"] for layer in layers if layer["pattern"]} == {
        "mid_block.mlp.fc1.weight",
        "mid_block.mlp.fc2.weight",
    }
    assert {layer["reason"] for layer in layers if "mid_block.attn" in layer["name"]} == {"ignored by a rule"}
    assert "'nowhere' matches no layer" in outcome.err  # a warning


@pytest.mark.parametrize("changed", ["weights", "data"])
def test_a_run_is_not_resumed_on_other_files(cli, tmp_path, changed):
    state = load_file(registry.adapter("uvit-digits").weights)
    digits = registry.images("digits")
    files = {"weights": tmp_path / "w.safetensors", "data": tmp_path / "d.npz"}
    save_file(state, files["weights"])
    np.savez(files["data"], images=digits.pixels.numpy())
    begun(tmp_path / "run", {"steps": 4, "train": {"batch_size": 8}, **{key: str(path) for key, path in files.items()}})
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    if changed == "weights":
        state["norm.bias"][0] += 1
        save_file(state, files["weights"])
    else:
        np.savez(files["data"], images=digits.pixels.numpy()[::-1])
    outcome = cli("resume", tmp_path / "run")
    assert outcome.code == 1
    assert f"the {changed} changed" in outcome.err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_the_size_in_the_report_is_that_of_the_file(finished):
    dense, one_shot, final = report_of(finished)["rows"]
    assert final["size_bytes"] == (finished / "model" / "model.safetensors").stat().st_size
    assert one_shot["size_bytes"] == final["size_bytes"]
    weights = registry.adapter("uvit-digits").load(None).state_dict()
    assert 0 <= dense["size_bytes"] - sum(value.nbytes for value in weights.values()) < 200 * len(weights)
    # of every pruned weight, half the values of four bytes go, and a place of two bits comes for each that stays
    gone = sum(weights[layer["name"]].nbytes for layer in report_of(finished)["layers"] if layer["pattern"])
    assert gone * (1 - 0.53125) - 5000 < dense["size_bytes"] - final["size_bytes"] < gone * (1 - 0.53125)
