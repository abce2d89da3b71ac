"""Trackers beside `metrics.jsonl`: they get every step, and their failures never end a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from accelerate import tracking
from accelerate.tracking import GeneralTracker

from compressor.runs import trackers
from compressor.runs.directory import PROJECT, TRACKERS
from compressor.training.engine import Step

pytestmark = pytest.mark.slow  # whole runs, of three steps each
SMALL = ("--steps", "3", "--set", "evaluate.samples=0", "--set", "evaluate.latency_rounds=0")


class Fake(GeneralTracker):
    """A tracker of accelerate that keeps what it is told, and may fail from a step on."""

    name = "tensorboard"
    requires_logging_directory = True
    main_process_only = True
    made: ClassVar[list[Fake]] = []
    fails_at = 0

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.place, self.settings, self.lines, self.ended = Path(logging_dir), {}, [], False
        self.made.append(self)

    def start(self) -> None:
        if self.fails_at < 0:
            raise ConnectionError("no server\nat all")

    @property
    def tracker(self) -> Any:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if self.fails_at and step >= self.fails_at:
            raise SystemExit(3) if self.fails_at == 3 else ConnectionError("lost")
        self.lines.append((step, values))

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name == "tensorboard" or None)
    monkeypatch.setattr(Fake, "made", [])
    return Fake


def test_every_step_goes_to_the_tracker_and_to_the_metrics(cli: Any, tmp_path: Path, fake: type[Fake]) -> None:
    out = tmp_path / "run"
    assert cli("run", *SMALL, "--out", out, "--log-with", "tensorboard").code == 0
    [tracker] = fake.made
    kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in tracker.lines] == [1, 2, 3] == [line["step"] for line in kept] and tracker.ended
    assert [values["loss"] for _, values in tracker.lines] == [line["loss"] for line in kept]
    assert tracker.place == out / "trackers" and tracker.settings["train.steps"] == 3
    assert "log_with" not in (out / "recipe.yaml").read_text()


@pytest.mark.parametrize(("at", "said"), [(-1, "no server"), (2, "lost"), (3, "it wanted to end the program")])
def test_a_tracker_that_fails_ends_no_training_and_is_named_once(
    cli: Any, tmp_path: Path, fake: type[Fake], monkeypatch: pytest.MonkeyPatch, at: int, said: str
) -> None:
    monkeypatch.setattr(Fake, "fails_at", at)
    out = tmp_path / "run"
    outcome = cli("run", *SMALL, "--out", out, "--log-with", "tensorboard")
    assert outcome.code == 0, outcome.err
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3 and (out / "report.html").is_file()
    assert (out / "trackers" / "failed.txt").read_text() == f"tensorboard failed and gets no more steps: {said}\n"
    assert outcome.err.count("gets no more steps") == 1


def test_what_cannot_be_used_is_refused_before_anything_is_made(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name, code, said in (
        ("tensorboard", 1, "pip install 'diffusion-compressor[trackers]'"),
        ("wandb", 1, "pip install wandb"),
        ("tensorbord", 2, "tensorboard"),
    ):
        for command in (("run", *SMALL), ("train", "--model", "uvit", *SMALL)):
            outcome = cli(*command, "--out", tmp_path / "run", "--log-with", name)
            assert outcome.code == code and said in outcome.err, outcome.err
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_none_are_not_sent(tmp_path: Path, fake: type[Fake]) -> None:
    sent = trackers.Tracking(["tensorboard"], tmp_path, {"a": {"b": [1]}, "c": None})
    values = {
        "loss": float("nan"),
        "noise_loss": 1.0,
        "teacher_loss": None,
        "lr": 0.1,
        "grad_norm": 2.0,
        "flip_rate": 0.0,
    }
    assert sent.log(Step(step=1, steps=2, **values)) == [] and sent.finish() == []
    assert fake.made[0].lines == [(1, {"noise_loss": 1.0, "lr": 0.1, "grad_norm": 2.0, "flip_rate": 0.0})]
    assert fake.made[0].settings == {"a.b": "[1]"}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sent = trackers.Tracking(["tensorboard"], tmp_path, {"train": {"lr": 1e-3}})
    for number in (1, 2):
        step = Step(
            step=number,
            steps=2,
            loss=number / 4,
            noise_loss=0.1,
            teacher_loss=None,
            lr=0.1,
            grad_norm=1.0,
            flip_rate=0.0,
        )
        assert sent.log(step) == []
    assert sent.finish() == []
    read = EventAccumulator(str(tmp_path / TRACKERS / PROJECT))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 0.25), (2, 0.5)]
