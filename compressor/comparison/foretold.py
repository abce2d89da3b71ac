"""What a comparison will take, told before its first training."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from compressor.comparison.entries import Cell, Comparison
from compressor.comparison.worker import ROW, RUN
from compressor.progress import Progress, duration
from compressor.runs.estimate import probed
from compressor.runs.pace import evaluation_seconds


def foretold(wanted: Comparison, folders: Sequence[tuple[Cell, Path]], gpus: int) -> Generator[Progress, None, None]:
    """Say it, of the cells of `folders` that are not done, on so many `gpus` (0: the CPU, which its processes share).

    A few steps of the first entry are timed, and its sampling; the others are taken to cost as much, which is said.
    """
    left = [(cell, folder) for cell, folder in folders if not (folder / ROW).is_file()]
    if not left:
        return
    first = wanted.inputs
    label = next(iter(wanted.recipes))
    fine_tuning = None
    if any(cell.recipe.train.steps for cell, _ in left):
        fine_tuning = yield from probed(first.fine_tuning())
    yield Progress("probe", 0, 1, "how long a sample and a forward pass take")
    by_stage = evaluation_seconds(first)
    by_stage.pop("latency", None)
    row = next(iter(by_stage.values()), 0.0)
    more = sum(wanted.sampler_steps) / first.recipe.evaluate.sampler_steps
    training = 0.0 if fine_tuning is None else fine_tuning["seconds_per_step"]
    steps = sum(cell.recipe.train.steps for cell, _ in left)
    rows = sum((1 if cell.tuning else 1 + more) + cell.first for cell, _ in left)
    total = (training * steps + row * rows) / max(1, min(gpus, len(left)))
    begun = sum((folder / RUN).is_dir() for _, folder in left)
    parts = [
        f"{len(left)} trainings of {steps // len(left):,} steps, each step taken to last as long as one of {label}",
        f"{rows:.0f} times {first.recipe.evaluate.drawn:,} samples" if row else "",
        f"{begun} of them begun, taken as new" if begun else "",
    ]
    note = f"about {duration(total)} in all, besides loading, metrics and timing: {', '.join(filter(None, parts))}"
    yield Progress("estimate", 1, 1, note)
