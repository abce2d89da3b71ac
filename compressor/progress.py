"""Progress events, as `run.execute` yields them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run is: `done` of `total` units of `stage`; `note` is what there is to say about it.

    `seconds` is how long the whole stage is expected to take, None where nobody knows.
    """

    stage: str
    done: int
    total: int
    note: str = ""
    seconds: float | None = None
