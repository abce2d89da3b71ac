"""Progress events, as `run.execute` yields them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run is: `done` of `total` units of `stage`; `note` is what there is to say about it."""

    stage: str
    done: int
    total: int
    note: str = ""
