"""What a run will take: told at its start, kept up to date while it works, and spent in proportion to data and cost."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from compressor.adapter import Adapter
from compressor.cli.tables import Ticker
from compressor.errors import CompressorError
from compressor.progress import Progress, duration
from compressor.quality.settings import CPU_MACS, FEWEST, PUBLISHED, Evaluation, of_budget, samples_for
from compressor.runs import pace
from compressor.runs.inputs import load_inputs, resolve
from compressor.runs.run import Interrupted


@pytest.mark.parametrize(
    ("budget", "real", "macs", "expected"),
    [
        ("auto", 1797, 0, 898),  # half of the real images, as the floor
        ("auto", 50_000, 0, 1024),
        ("auto", 48, 0, 24),
        ("auto", 4, 0, FEWEST),
        ("auto", 50_000, CPU_MACS / 100, 100),
        ("auto", 50_000, CPU_MACS, FEWEST),
        ("quick", 50_000, 0, 64),
        ("quick", 48, 0, 24),
        ("full", 1797, CPU_MACS, 1797),
        ("full", 1_000_000, CPU_MACS, PUBLISHED),
    ],
)
def test_samples_follow_the_data_and_their_cost(budget: Any, real: int, macs: float, expected: int) -> None:
    assert samples_for(budget, real, macs, on_gpu=False) == expected


def test_a_gpu_affords_more() -> None:
    assert samples_for("auto", 50_000, CPU_MACS, on_gpu=True) == 1000


def test_a_look_takes_few_steps_and_no_measures_but_what_the_user_says_stands() -> None:
    assert of_budget("quick", {"sampler_steps": 100})["sampler_steps"] == 25
    assert of_budget("quick", {"sampler_steps": 10})["sampler_steps"] == 10
    assert of_budget("auto", {"sampler_steps": 100}) == {}
    recipe = resolve({"budget": "quick", "sampler_steps": 7, "measures": ["kid"]}, "test")
    assert (recipe.evaluate.sampler_steps, recipe.evaluate.measures, recipe.evaluate.bootstrap) == (7, ["kid"], 50)


def test_the_number_of_samples_is_chosen_once_and_written_down(cli: Any, tmp_path: Path) -> None:
    settings = {"train": {"steps": 1}, "evaluate": {"latency_rounds": 0}}
    recipe = load_inputs(resolve(settings, "test")).recipe
    assert recipe.evaluate.samples == 898
    assert load_inputs(resolve({**settings, "evaluate": {"samples": 0}}, "test")).recipe.evaluate.samples == 0


# --- The estimate. ---


def small(**evaluate: Any) -> Any:
    measured = {"samples": 8, "sampler_steps": 4, "batch_size": 8, "latency_rounds": 2, **evaluate}
    return load_inputs(resolve({"train": {"steps": 20, "batch_size": 4}, "evaluate": measured}, "test"))


def slow_run(steps: int, each: float) -> Generator[Progress, None, None]:
    yield Progress("prepare", 0, 1)
    for step in range(steps):
        time.sleep(each)
        yield Progress("fine-tune", step + 1, steps)
    yield Progress("sample dense", 0, 8)
    yield Progress("latency", 0, 1)


def test_a_run_says_what_it_will_take_after_its_first_steps() -> None:
    events = list(pace.paced(small(), slow_run(20, 0.01)))
    told = [index for index, event in enumerate(events) if event.stage == "estimate"]
    assert len(told) == 1
    assert re.match(r"about \d+ s in all", events[told[0]].note)
    before = [event.done for event in events[: told[0]] if event.stage == "fine-tune"]
    assert before == list(range(1, 9)), "the estimate comes when the ninth step has just ended"
    expected = {event.stage: event.seconds for event in events if event.seconds is not None}
    assert expected.keys() == {"fine-tune", "sample dense", "latency"}
    assert 0.2 <= expected["fine-tune"] < 20 * 0.5
    assert all(seconds > 0 for seconds in expected.values())


def test_a_run_without_training_says_it_at_once() -> None:
    def events() -> Generator[Progress, None, None]:
        yield Progress("prepare", 0, 1)
        yield Progress("real images", 0, 1)

    stages = [event.stage for event in pace.paced(small(), events())]
    assert stages == ["probe", "prepare", "estimate", "real images"]


def test_what_stops_a_run_reaches_it() -> None:
    reached = []

    def events() -> Generator[Progress, None, None]:
        try:
            yield Progress("fine-tune", 1, 2)
        except Interrupted as interrupted:
            reached.append(interrupted.exit_code)
            raise

    paced = pace.paced(small(samples=0, latency_rounds=0), events())
    assert [next(paced).stage, next(paced).stage] == ["probe", "fine-tune"]
    with pytest.raises(Interrupted):
        paced.throw(Interrupted(143))  # type: ignore[attr-defined]
    assert reached == [143]


class Choosy(Adapter):
    """Samples in ten steps or more."""

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, torch.Tensor]:
        return batch, batch

    def predict(self, module: nn.Module, inputs: Any) -> torch.Tensor:
        return inputs

    def sample(self, module: nn.Module, n: int, rng: torch.Generator, steps: int) -> torch.Tensor:
        if steps < 10:
            raise CompressorError(f"{steps} steps are too few", "Take ten.")
        return torch.zeros(n, 1, 2, 2)


def test_a_sampler_that_wants_more_steps_is_tried_with_those_of_the_run() -> None:
    settings = Evaluation(samples=8, sampler_steps=12)
    assert pace.sampling_seconds(Choosy(), nn.Linear(1, 1), settings) > 0
    with pytest.raises(CompressorError, match="7 steps are too few"):
        pace.sampling_seconds(Choosy(), nn.Linear(1, 1), settings.model_copy(update={"sampler_steps": 7}))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# --- What is shown. ---


def shown(events: list[Progress], pause: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of a terminal that is none, where each event is followed by `pause` seconds of silence."""
    monkeypatch.setattr("compressor.cli.tables._EVERY", 0.1)
    text = io.StringIO()
    with Ticker(Console(file=text, width=200), quiet=False) as ticker:
        for event in events:
            ticker.show(event)
            time.sleep(pause)
    return text.getvalue().splitlines()


def test_a_silent_stage_keeps_saying_how_much_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown([Progress("sample dense", 0, 8, seconds=60.0)], 1.0, monkeypatch)
    assert len(lines) >= 2, "the first line is the event's, the others come by themselves"
    assert all(re.match(r"sample dense 0/8, (\d+ s|1 min) left$", line) for line in lines), lines


def test_a_stage_that_nobody_knows_says_how_long_it_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown([Progress("prepare", 0, 1)], 1.6, monkeypatch)
    assert lines[0] == "prepare 0/1"
    assert re.match(r"prepare 0/1, \d s so far$", lines[-1])


def test_a_stage_that_takes_longer_than_expected_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown([Progress("latency", 0, 1, seconds=0.01)], 0.5, monkeypatch)
    assert re.match(r"latency 0/1, \d s longer than expected$", lines[-1])


def test_the_estimate_is_shown_as_a_sentence_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown([Progress("estimate", 1, 1, "about 2 min in all")], 0.0, monkeypatch) == ["about 2 min in all"]


def test_a_resumed_stage_counts_from_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [Progress("fine-tune", 900, 1000), Progress("fine-tune", 901, 1000)]
    lines = shown(events, 0.3, monkeypatch)
    left = re.search(r"(\d+) (s|min)", lines[-1])
    assert left is not None and (left[2] == "min" or int(left[1]) >= 20), "a hundred steps of 0.3 s, not one"


def test_a_clock_begins_anew_where_a_run_goes_on() -> None:
    clock = pace.Clock()
    clock.tick(0)  # what is said before the first step, of a damaged checkpoint
    for step in range(500, 512):
        clock.tick(step)
    assert clock.seconds is not None and clock.seconds >= 0
    again = pace.Clock()
    for _ in range(20):
        again.tick(0)
    assert again.seconds is None
