"""What the terminal shows: progress, tables, numbers for people. It builds; the commands print."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from compressor.errors import printable
from compressor.progress import Progress, duration

if TYPE_CHECKING:
    from compressor.lower.plan import Form, LayerPlan, Plan
    from compressor.report.content import Report, Row


_EVERY = 5.0  # seconds between lines of progress
_WORD = 20  # letters: longer words are names of layers and the like, which may go on in the next line


class Ticker:
    """Shows a run's progress on `console`: bars with the time left on a terminal, else a line every few seconds, whether or not
    there is news: a thread sees to it."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self._tasks: dict[str, Any] = {}
        self._began: dict[str, tuple[float, int]] = {}  # of each stage: when it was first seen, and how much was done
        self._last = 0.0
        self._shown: Progress | None = None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Ticker:
        if not self._quiet:
            (self._bars if self._console.is_terminal else self._heart).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._heart.is_alive():
            self._heart.join()
        if self._bars.live.is_started:
            self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Take note of one event."""
        if self._quiet or progress == self._shown:
            return
        if self._console.is_terminal:
            self._shown = progress
            stage, note = printable(progress.stage), printable(progress.note)
            if progress.seconds is not None and progress.done == 0:
                note = f"{note} about {duration(progress.seconds)}".strip()
            if stage not in self._tasks:
                self._tasks[stage] = self._bars.add_task(stage, total=progress.total, note=note)
            self._bars.update(self._tasks[stage], completed=progress.done, total=progress.total, note=note)
            return
        with self._lock:
            self._shown = progress
            now = time.monotonic()
            self._began.setdefault(progress.stage, (now, progress.done))
            if now - self._last >= _EVERY or progress.done in (0, progress.total):
                self._print(progress, now)

    def _beat(self) -> None:
        """Say every few seconds that work goes on, and for how long."""
        while not self._ended.wait(_EVERY / 5):
            with self._lock:
                now = time.monotonic()
                if self._shown is not None and now - self._last >= _EVERY:
                    self._print(self._shown, now)

    def _print(self, progress: Progress, now: float) -> None:
        self._last = now
        stage, note = printable(progress.stage), printable(progress.note)
        if progress.stage == "estimate":
            line = note
        else:
            line = f"{stage} {progress.done}/{progress.total}{self._left(progress, now)}  {note}"
        self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)

    def _left(self, progress: Progress, now: float) -> str:
        """How long the stage will still take; where nobody knows, how long it has taken."""
        if progress.done >= progress.total:
            return ""
        began, first = self._began[progress.stage]
        gone = now - began
        if progress.done > first:
            total = gone / (progress.done - first) * (progress.total - first)
        elif progress.seconds is not None:
            total = progress.seconds * (1 - first / progress.total)
        else:
            return f", {duration(gone)} so far" if gone >= 1 else ""
        return (
            f", {duration(total - gone)} left" if total > gone else f", {duration(gone - total)} longer than expected"
        )


def rows_table(report: Report) -> Table:
    """The report's rows: quality, drift, cost, and latency at one batch size."""
    from compressor.report.numbers import count, number, percent, seconds, share

    metric = report.metric.name if report.metric else None
    columns = ["row", *([metric, "95% interval"] if metric else []), "prediction error", "nonzero", "MACs effective"]
    lines, given = [], report.rows[0]  # which is dense, or the only one
    standing = report.final.standing
    for row in report.rows:
        cells = [row.name]
        if metric:
            entry = row.quality[0] if row.quality else None
            cells.append(number(entry.value) if entry else "—")
            cells.append(" – ".join(map(number, entry.ci95)) if entry and entry.ci95 else "—")
        error = row.drift_by("prediction_error")
        cells.append(percent(error.value) if error else "—")
        cells.append(percent(row.nonzero_params / given.params))
        cells.append(f"{count(row.macs_effective)} ({share(row.macs_effective / given.macs_dense)})")
        cells.append("—" if standing is None else _latency(report, row, standing.batch))
        cells.append(f"{row.train.steps:,} steps, {seconds(row.train.seconds)}" if row.train.steps else "—")
        lines.append(cells)
    batch = "" if standing is None else f", batch {standing.batch}"
    table = plain_table([*columns, f"latency{batch}", "fine-tuning"], lines)
    table.title = escape(printable(f"{report.model}, {report.pattern or 'no mask'}"))
    return table


def _latency(report: Report, row: Row, batch: int) -> str:
    from compressor.report import timings
    from compressor.report.numbers import number

    if (entry := timings.at(report, row, batch)) is None:
        return "—"
    gain = ""
    if entry.backend == "lowered":
        gain = f", {timings.ratio(entry, timings.skips(report, row, entry), f' over {entry.against}')}"
    return f"{number(entry.median_ms)} ms (IQR {number(entry.iqr_ms)}){gain}{timings.before(report, entry)}"


def plan_tables(plan: Plan) -> list[Table]:
    """A plan of lowering: layers that run alike on one line, with each backend's time, and the forms of the whole model."""
    from compressor.report.numbers import number
    from compressor.report.words import layer_name

    groups: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        groups.setdefault(f"{layer.shapes} {layer.patterns} {layer.kind} {layer.choice}", []).append(layer)
    lines = []
    for group in groups.values():
        first = group[0]
        shape = ", ".join("x".join(map(str, shape)) for shape in first.shapes)
        pattern = ", ".join(sorted({text or "dense" for text in first.patterns})) or "—"
        times = sorted((c.median_ms, c.backend) for c in first.candidates if c.median_ms)
        told = ", ".join(f"{name} {time:.3f}" for time, name in times) or "—"
        name = layer_name(first.name, first.fused) + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        lines.append((name, shape, pattern, first.choice, told, first.reason))
    layers = plain_table(("layer", "MxNxK", "pattern", "choice", "alone, ms", "why"), lines)
    forms = [
        (f.name, f"{number(f.median_ms)} ms", _gained(f, plan), "" if f.error is None else f"{f.error:.1e}")
        for f in plan.forms
    ]
    return [layers, plain_table(("whole model", "median", "over the best dense form", "error"), forms)]


def _gained(form: Form, plan: Plan) -> str:
    """The speed of `form` over the fastest dense one, and whether chance explains it."""
    from compressor.lower.contest import needed
    from compressor.report.numbers import times

    best = min((one for one in plan.forms if one.dense), key=lambda one: one.median_ms)
    beside = form.against.get(best.name)
    if form.name == best.name or beside is None:
        return times(form.speedup)
    sure = max(beside.wins, beside.rounds - beside.wins) >= needed(beside.rounds)
    return f"{times(form.speedup)}{'' if sure else ', within noise'}"


def plain_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """A table of text, which is shown as it is: neither markup nor escape codes of a name do anything. What is too long for a narrow
    terminal goes on in the next line instead of being cut; short names, in the first column, stay whole."""
    table = Table()
    for number, title in enumerate(columns):
        short = number == 0 and all(len(printable(text)) <= _WORD for text in (title, *(line[0] for line in lines)))
        table.add_column(escape(printable(title)), overflow="fold", no_wrap=short)
    for line in lines:
        table.add_row(*[escape(printable(cell)) for cell in line])
    return table


def fitted(table: Table, width: int) -> Table:
    """`table` in so few columns of a terminal that no word in a cell is broken; where they are too few for that, a block of titles and
    texts for each line."""
    columns = [[Text.from_markup(str(text)) for text in (column.header, *column.cells)] for column in table.columns]
    whole = [max(text.cell_len for text in column) for column in columns]
    room = width - 3 * len(columns) - 1
    if len(columns) < 3 or sum(whole) <= room:
        return table
    words = [
        max(cell_len(word) for text in column[1:] or column for word in text.plain.split(" ")) for column in columns
    ]
    least = [
        most if column.no_wrap else min(max(1, word), _WORD)
        for column, most, word in zip(table.columns, whole, words, strict=True)
    ]
    if (spare := room - sum(least)) >= 0:
        more = [own - needed for own, needed in zip(whole, least, strict=True)]
        for column, needed, rest in zip(table.columns, least, more, strict=True):
            column.width = needed + spare * rest // sum(more)
        return table
    lying = Table(title=table.title, show_header=False)
    for _ in range(2):
        lying.add_column(overflow="fold")
    for line in zip(*(column[1:] for column in columns), strict=True):
        for (title, *_), text in zip(columns, line, strict=True):
            lying.add_row(title, text)
        lying.add_section()
    return lying


def planning_lines(facts: Mapping[str, Any]) -> list[str]:
    """The sentences of `compressor plan`."""
    from compressor.report.numbers import count, number, share, size, times

    before, after = facts["before"], facts["after"]
    lines = [
        f"parameters: {count(before['params'])}, of which {count(after['nonzero_params'])} stay nonzero",
        f"file: {size(before['size_bytes'])} dense, {size(after['size_bytes'])} packed "
        f"({share(after['size_bytes'] / before['size_bytes'])})",
        f"multiply-accumulates per sample: {count(before['macs_dense'])} dense, {count(after['macs_effective'])} effective "
        f"({share(after['macs_effective'] / before['macs_dense'])})",
    ]
    if (lowering := facts["lowering"]) is not None:
        off = f"; its output is off by {lowering['error']:.1e}" if (lowering["error"] or 0) > 1e-4 else ""
        lines.append(
            f"speed on {lowering['hardware']}, batch {lowering['batch']}: {times(lowering['speedup_vs_dense'])} as fast as the best "
            f"dense form; {lowering['choice']}: {lowering['reason']}{off}"
        )
    if (training := facts["fine_tuning"]) is not None:
        lines.append(
            f"fine-tuning: {training['steps']:,} steps at {number(1000 * training['seconds_per_step'])} ms, about "
            f"{duration(training['seconds'])}"
        )
    if (judging := facts["evaluation"])["seconds"]:
        drawn = f"{judging['rows']} rows of {judging['samples']:,} samples in {judging['sampler_steps']} steps"
        parts = {drawn: judging["sampling_seconds"], "timing": judging["latency_seconds"]}
        lines.append(f"evaluation: {', '.join(f'{name} {duration(took)}' for name, took in parts.items() if took)}")
    besides = "loading and the metric" if judging["rows"] else "loading, and what a pipeline draws"
    lines.append(f"in all: about {duration(facts['seconds'])}, besides {besides}")
    return lines
