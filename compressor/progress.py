"""Progress events, as `run.execute` and other generators yield them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Progress:
    """Where a run is: `done` of `total` units of `stage`; `note` is what there is to say about it.

    `seconds` is how long the whole stage is expected to take, None where nobody knows. What follows an `unbroken` event goes on to
    the next one before it may be stopped, since something would be lost otherwise: a step that a checkpoint will hold.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    seconds: float | None = None
    unbroken: bool = False


def result_of(
    events: Generator[Progress, None, _Result], show: Callable[[Progress], object] = lambda event: None
) -> _Result:
    """What the generator `events` returns; each of its events goes to `show`."""
    while True:
        try:
            show(next(events))
        except StopIteration as finished:
            result: _Result = finished.value
            return result


def duration(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 3 min 20 s, 2 h 5 min."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
