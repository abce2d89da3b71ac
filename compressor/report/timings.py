"""Speed in words: every ratio is of one batch size, has its interval where it was paired, and is a gain only beyond the noise."""

from __future__ import annotations

from collections.abc import Iterable

from compressor.report.content import (
    DENSE,
    EAGER,
    LOWERED,
    PIPELINE,
    PIPELINE_LOWERED,
    Latency,
    Report,
    Row,
)
from compressor.report.numbers import NONE, number, times

_SKIPPING = (LOWERED, PIPELINE_LOWERED)
_GATHERED = ", gathered"
"""How the form of an engine ends whose products leave zeros out."""


def sizes(rows: Iterable[Row]) -> list[int]:
    """The batch sizes that `rows` were timed with, pipelines left out."""
    return sorted({entry.batch for row in rows for entry in row.latency if not _whole(entry)})


def at(report: Report, row: Row, batch: int) -> Latency | None:
    """The latency that stands for `row` at this batch size. That of the dense row is what the finished model's is held against."""
    if row.name == DENSE and row is not report.final:
        final = report.final.standing_at(batch)
        same = [
            e for e in row.latency if final and (e.backend, e.batch, e.device) == (final.against, batch, final.device)
        ]
        if final is not None and same:  # the same form may be there in two precisions
            return min(same, key=lambda entry: abs(entry.median_ms - final.speedup_vs_dense * final.median_ms))
    return row.standing_at(batch)


def skips(report: Report, row: Row, entry: Latency) -> bool:
    """Whether these weights in this form are less work than the dense model: a ratio of the others is chance."""
    if entry.backend == LOWERED and not entry.of_plan and any(other.of_plan for other in row.latency):
        return True  # the plan of another batch, whose multiplications nobody counted: its interval decides
    own = row.macs_lowered if entry.backend in _SKIPPING or entry.backend.endswith(_GATHERED) else row.macs_dense
    return own < (report.dense or row).macs_dense


def ratio(entry: Latency, less_work: bool, over: str = "") -> str:
    """The speed-up over the dense form `over` with its interval; what lies within the noise is called so.

    Without `less_work` a ratio above 1 is chance, and is not shown; one below says that the dense model has a better kernel.
    """
    if not less_work and not entry.is_loss:
        return "no gain: skips no zeros"
    text = times(entry.speedup_vs_dense)
    if entry.speedup_ci95 is not None:
        text += " [{:.2f}, {:.2f}]".format(*entry.speedup_ci95)
    return text + over + verdict(entry)


def verdict(entry: Latency) -> str:
    """What the ratio means, after a comma; nothing for a gain."""
    return "" if entry.is_gain else ", slower" if entry.is_loss else ", within noise"


def measures(report: Report, each_batch: bool = False) -> list[tuple[str, str, list[str]]]:
    """The latency and the speed-up of each row, a batch size at a time: (title, explanation, one text per row)."""
    found, batches = [], sizes(report.rows)
    for batch in batches:
        entries = [at(report, row, batch) for row in report.rows]
        which = f", batch {batch}" if each_batch or len(batches) > 1 else ""
        times = [NONE if entry is None else time_of(entry, before(report, entry)) for entry in entries]
        found.append((f"latency{which}", "median; IQR: range of the middle half of the rounds", times))
        gains = [
            NONE if entry is None or row.name == DENSE else ratio(entry, skips(report, row, entry), _over(entry))
            for row, entry in zip(report.rows, entries, strict=True)
        ]
        about = "against dense in the same rounds; 95% interval"
        found.append((f"speed-up{which}", about, gains))
    return found or [("latency", "was not measured", [NONE] * len(report.rows))]


def before(report: Report, entry: Latency) -> str:
    """ ", timed before" where the finished model was timed anew since: machines differ from one hour to the next."""
    final = report.final.standing_at(entry.batch)
    return ", timed before" if final is not None and entry.timed < final.timed else ""


def time_of(entry: Latency, when: str = "") -> str:
    """The time with its spread and setting."""
    setting = f"{entry.backend}, {entry.dtype}, batch {entry.batch}{when}"
    return f"{number(entry.median_ms)} ms (IQR {number(entry.iqr_ms)}; {setting})"


def pipeline(report: Report, row: Row) -> str:
    """The time of the whole pipeline with the row's weights."""
    if (entry := row.of_pipeline) is None:
        return NONE
    over = "" if row.name == DENSE else "; " + ratio(entry, skips(report, row, entry))
    how = "" if entry.backend == PIPELINE else "; lowered"
    return f"{number(entry.median_ms)} ms (IQR {number(entry.iqr_ms)}{how}){over}"


def _over(entry: Latency) -> str:
    return "" if entry.against == EAGER else f" over {entry.against} dense"


def _whole(entry: Latency) -> bool:
    return entry.backend in (PIPELINE, PIPELINE_LOWERED)


SPEEDS = ("form", "median", "error", "over eager dense", "over the best dense form")
"""The columns of `speeds`, after the weights."""


def speeds(report: Report) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Every latency of a lowered run, a setting at a time: (setting, lines of weights and `SPEEDS`).

    The speed-ups are over the dense model in eager mode, and over its fastest form that is no less exact, in whatever engine, of those
    that took turns with it: forms of an earlier timing say so. Engines stand with float32, whatever their precision.
    """
    if report.lowering is None:
        return []
    settings: dict[tuple[str, int, str], list[tuple[Row, Latency]]] = {}
    for row in report.rows:
        if row.name not in (DENSE, report.method):  # the others were timed before, at another time
            continue
        for entry in row.latency:
            dtype = "float32" if entry.of_engine else entry.dtype
            settings.setdefault((entry.device, entry.batch, dtype), []).append((row, entry))
    found = []
    for (device, batch, dtype), entries in sorted(settings.items(), key=lambda item: (item[0][2], item[0][1])):
        base = next((e for row, e in entries if row.name == DENSE and e.backend == EAGER), None)
        last = max((e.timed for _, e in entries if not _whole(e)), default=0)
        lines: list[tuple[str, ...]] = []
        for row, entry in entries:
            name = entry.backend if entry.timed == last or _whole(entry) else f"{entry.backend}, timed before"
            time = f"{number(entry.median_ms)} ms (IQR {number(entry.iqr_ms)})"
            error = NONE if entry.error is None else f"{entry.error:.1e}"
            lines.append((row.name, name, time, error, *_ratios(report, row, entry, base)))
        found.append((f"batch {batch}, {dtype}, {device}", lines))
    return found


def _ratios(report: Report, row: Row, entry: Latency, base: Latency | None) -> tuple[str, str]:
    """Over eager dense, and over the best dense form. A form of the dense weights is another kernel, and may well be faster."""
    dense = row.name == DENSE
    if not dense and not skips(report, row, entry):
        return NONE, ratio(entry, False)
    beside = base is not None and base.timed == entry.timed and not _whole(entry)
    eager = times(base.median_ms / entry.median_ms) if base and beside else NONE
    if dense and entry.against == entry.backend and entry.speedup_vs_dense == 1:
        return eager, "the best dense form"
    return eager, ratio(entry, True, f" over {entry.against}")
