"""`make cycles`, in small: that nothing is left over, and that it would be seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cycles import LARGEST, Held, grown, play


@pytest.mark.parametrize(
    ("each", "grows", "left"),
    [
        ({}, False, set()),
        ({"memory": 40_000}, True, set()),  # in 500 cycles of 300 MB: five parts in a hundred
        ({"memory": 4_000}, False, set()),
        ({"files": 1}, False, {"files"}),
        ({"threads": 1, "tasks": 1}, False, {"threads", "tasks"}),
        ({"children": 1}, False, {"children"}),
    ],
)
def test_growth_is_told_from_noise(each: dict[str, int], grows: bool, left: set[str]) -> None:
    first = Held(300_000_000, 12, 3, 9, 0)
    noise = [0, 1_000_000, 300_000]
    held = []
    for number in range(500):
        of_cycle = replace(first, **{name: getattr(first, name) + number * more for name, more in each.items()})
        held.append(replace(of_cycle, memory=of_cycle.memory + noise[number % 3]))
    share, more = grown(held)
    assert (share >= LARGEST) == grows and set(more) == left


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="what a process holds is read from /proc")
def test_a_few_cycles_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", "")  # put back afterwards: the cycles set their own
    held = play(7, seed=0)
    assert grown(held)[1] == {}
