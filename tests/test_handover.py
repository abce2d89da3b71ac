"""What a run hands on: nothing is read, hashed, prepared or rendered a second time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import compressor.report as report_package
from compressor import comparison, files, registry, weights
from compressor.plugins.magnitude import Magnitude
from compressor.runs import inputs, start
from compressor.saving import model as saved_models


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A file of the bundled model's weights."""
    path = tmp_path / "pretrained.safetensors"
    adapter = registry.adapter("uvit-digits")
    save_file({name: value.contiguous() for name, value in adapter.load(None).state_dict().items()}, path)
    return path


def counted(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, key: Callable[..., Any]) -> Counter[Any]:
    """How often `where.name` is called from now on, by what `key` makes of its arguments and its result."""
    calls: Counter[Any] = Counter()
    original = getattr(where, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls[key(result, *args)] += 1
        return result

    monkeypatch.setattr(where, name, counting)
    return calls


def test_a_lowered_run_reads_hashes_prepares_and_renders_once(
    cli: Any, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = counted(monkeypatch, weights, "load_file", lambda _, path, *__: Path(path).name)
    loaded = counted(monkeypatch, saved_models, "load_file", lambda _, path, *__: Path(path).name)
    hashes = counted(monkeypatch, weights, "state_sha256", lambda digest, *_: digest)
    saved = counted(monkeypatch, saved_models, "state_sha256", lambda digest, *_: digest)
    prepared = counted(monkeypatch, Magnitude, "prepare", lambda *_: "prepare")
    rendered = counted(monkeypatch, report_package, "_written", lambda *_: "render")
    out = tmp_path / "run"
    outcome = cli.trial(
        *(out, "--lower", "--method", "magnitude", "--pattern", "4:2:4", "--weights", pretrained),
        *("--steps", "2", "--set", "evaluate.latency_batch=2"),
    )
    assert outcome.code == 0, outcome.err
    assert read[pretrained.name] == 1
    assert not loaded  # the finished model is handed over, not read back
    rows = files.read_json(out / "report.json")["rows"]
    of_rows = {row["name"]: (hashes + saved)[row["weights_sha256"]] for row in rows}
    assert of_rows == {"dense": 1, "one-shot": 1, "magnitude": 1}
    assert prepared == {"prepare": 1}
    assert rendered == {"render": 1}
    assert files.read_json(out / "report.json")["lowering"]["weights_sha256"] == rows[-1]["weights_sha256"]
    assert not (out / "one-shot").exists()


def test_a_comparison_is_planned_on_one_model_and_one_set_of_data(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    for index in range(6):
        Image.new("L", (8, 8), 40 * index).save(tmp_path / f"{index}.png")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(6):
        (tmp_path / f"{index}.png").rename(folder / f"{index}.png")
    decoded = counted(monkeypatch, start, "read_data", lambda *_: "data")
    read = counted(monkeypatch, weights, "load_file", lambda _, path, *__: Path(path).name)
    common = {"weights": str(pretrained), "data": str(folder), "evaluate": {"samples": 0}}
    wanted = comparison.planned(["magnitude", "sparsedm", "structured"], [], None, common, seeds=1)
    assert list(wanted.recipes) == ["magnitude", "sparsedm", "structured"]
    assert read[pretrained.name] == 1 and decoded == {"data": 1}


def test_other_files_of_the_same_weights_are_the_same_model(pretrained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(load_file(pretrained), other)
    recipe = tmp_path / "second.yaml"
    recipe.write_text(f"method: magnitude\nweights: {other}\nevaluate:\n  samples: 0\n", encoding="utf-8")
    first = tmp_path / "first.yaml"
    first.write_text(f"method: sparsedm\nweights: {pretrained}\nevaluate:\n  samples: 0\n", encoding="utf-8")
    wanted = comparison.planned([], [first, recipe], None, {}, seeds=1)
    assert list(wanted.recipes) == ["first", "second"]


def test_a_resumed_run_finds_its_one_shot_and_without_it_prepares_anew(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = inputs.resolve(
        {
            "method": "magnitude",
            "train": {"steps": 2, "batch_size": 8},
            "evaluate": {"samples": 0, "latency_rounds": 0},
        },
        "here",
    )
    from compressor.runs.one_shot import FOLDER, one_shot
    from compressor.runs.run import train

    found = inputs.load_inputs(recipe)
    (tmp_path / "run").mkdir()
    for _ in train(found, tmp_path / "run"):
        pass
    prepared = counted(monkeypatch, Magnitude, "prepare", lambda *_: "prepare")
    kept = one_shot(found, tmp_path / "run" / FOLDER)
    assert not prepared
    (tmp_path / "run" / FOLDER / "state.json").write_text("{}", encoding="utf-8")
    anew = one_shot(found, tmp_path / "run" / FOLDER)
    assert prepared == {"prepare": 1}
    assert weights.weights_sha256(kept.model) == weights.weights_sha256(anew.model)
    assert kept.patterns == anew.patterns and list(kept.layers) == list(anew.layers)


def test_a_method_cannot_take_the_name_of_another_row(cli: Any, tmp_path: Path) -> None:
    source = "from compressor.plugins.magnitude import Magnitude\n\n\nclass dense(Magnitude):\n    pass\n"
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    outcome = cli.trial(tmp_path / "run", "--pruner", f"{tmp_path / 'mine.py'}:dense")
    assert outcome.code == 2 and "cannot be called" in outcome.err
    assert not (tmp_path / "run").exists()
