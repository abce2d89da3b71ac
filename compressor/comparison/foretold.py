"""What a comparison will take, told when its first training has begun."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

from compressor.comparison.entries import Cell, Comparison
from compressor.progress import Progress, duration
from compressor.runs.pace import Clock


class Outlook:
    """Hears the progress of a comparison's processes, and says once what all will take: the trainings `left`, in so many `workers`.

    It follows from the first steps of the training that begins first and from the time of the dense model's samples, where they were
    drawn now: nothing is computed for it, and nothing of a method is run in this process, which has to outlive its failures.
    """

    def __init__(self, wanted: Comparison, left: Sequence[Cell], workers: int) -> None:
        self._wanted, self._left, self._workers = wanted, left, workers
        self._clocks: dict[str, Clock] = {}
        self._began: float | None = None
        self._row = 0.0
        self._said = False

    def told(self, events: Iterable[Progress]) -> Iterator[Progress]:
        """`events`, and the sentence among them."""
        for event in events:
            yield event
            self._hear(event)
            known = next(
                ((job, clock.seconds) for job, clock in self._clocks.items() if clock.seconds is not None), None
            )
            if known is not None and not self._said:
                self._said = True
                yield Progress("estimate", 1, 1, self._sentence(*known), unbroken=event.unbroken)

    def _hear(self, event: Progress) -> None:
        job, _, stage = event.stage.partition(": ")
        if (job, stage) == ("dense", "sample dense"):
            if not event.done:
                self._began = time.perf_counter()
            elif event.done == event.total and self._began is not None:
                self._row = time.perf_counter() - self._began
        elif stage == "fine-tune" and not self._said:
            self._clocks.setdefault(job, Clock()).tick(event.done)

    def _sentence(self, job: str, each: float) -> str:
        steps = sum(cell.recipe.train.steps for cell in self._left)
        settings = self._wanted.inputs.recipe.evaluate
        more = sum(self._wanted.sampler_steps) / settings.sampler_steps
        rows = sum((1 if cell.tuning else 1 + more) + cell.first for cell in self._left)
        total = (each * steps + self._row * rows) / max(1, min(self._workers, len(self._left)))
        parts = [f"{len(self._left)} trainings, {steps:,} steps together, each taken to last as long as one of {job}"]
        if self._row:
            parts.append(f"{rows:.0f} times {settings.drawn:,} samples")
        rest = (
            "loading, metrics and timing"
            if self._row or not settings.drawn
            else "loading, sampling, metrics and timing"
        )
        return f"about {duration(total)} in all, besides {rest}, begun trainings taken as new: {', '.join(parts)}"
