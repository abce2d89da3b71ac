"""Numbers and facts for people: how a report's values are written, and the sentence at its top."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from compressor.report.content import (
    DENSE,
    EAGER,
    LOWERED,
    ONE_SHOT,
    PIPELINE,
    PIPELINE_LOWERED,
    Latency,
    Report,
    Row,
    TrainSummary,
)

NONE = "—"


class Measured(Protocol):
    """A number with its interval: quality, a floor."""

    @property
    def value(self) -> float: ...

    @property
    def ci95(self) -> tuple[float, float] | None: ...


def headline(report: Report) -> str:
    """What the run found, in one sentence made from the report's facts."""
    final = report.final
    what = f"{final.name} on {report.model}"
    if report.pattern:
        what = f"{final.name} at {report.pattern} on {report.model}"
    if not final.quality:
        error, alike = final.drift_by("prediction_error"), final.drift_by("ssim")
        if alike is not None and error is not None:  # paired: held against the dense model, picture by picture
            return (
                f"{what}: {percent(error.value)} prediction error on calls that it did not see, and pictures with SSIM "
                f"{number(alike.value)} to the dense model's from the same noise.{_gain(final)}"
            )
        return f"{what}: quality was not measured.{_gain(final)}"
    others = [
        f"{number(row.quality[0].value)} {name}"
        for name in (DENSE, ONE_SHOT)
        if (row := report.row(name)) is not None and row is not final and row.quality
    ]
    against = f", against {' and '.join(others)}" if others else ""
    return (
        f"{what}: {final.quality[0].metric} {with_interval(final.quality[0])}{against}; lower is better.{_gain(final)}"
    )


def _gain(row: Row) -> str:
    """The sentence on speed, where a lowered model has some."""
    entry = row.standing
    if entry is None or entry.backend != LOWERED or _verdict(row, entry):
        return ""
    return f" Lowered, it runs {entry.speedup_vs_dense:.2f}x as fast as dense at its best ({entry.against})."


def columns(report: Report) -> list[tuple[str, str, list[str]]]:
    """The table, a measure at a time: (title, explanation, one text per row of the report)."""
    table: list[tuple[str, str, Callable[[Row], str]]] = []
    if report.metric:
        table.append(
            (
                report.metric.name,
                "lower is better; 95% interval",
                lambda r: with_interval(r.quality[0]) if r.quality else NONE,
            )
        )
    table += [
        (
            "prediction error",
            "mean square difference from dense, relative",
            lambda r: _drift(r, "prediction_error", percent),
        ),
        ("sample RMSE", "from dense, same noise; pixels in [-1, 1]", lambda r: _drift(r, "sample_rmse", number)),
    ]
    further: dict[str, tuple[str, str, Callable[[float], str]]] = {
        "ssim": ("SSIM", "with dense's pictures, same noise; 1 is the same", number),
        "latent_error": ("latent error", "after the last step, same noise; relative to dense", percent),
    }
    for metric, (title, about, text) in further.items():
        if any(row.drift_by(metric) for row in report.rows):
            table.append((title, about, lambda r, m=metric, t=text: _drift(r, m, t)))  # type: ignore[misc]
    for name in dict.fromkeys(entry.name for row in report.rows for entry in row.scores):
        table.append((name, "pictures with their prompts, higher is better; 95% interval", partial(_score, name=name)))
    table += [
        ("density", "kept share of the pruned weights", lambda r: percent(r.density)),
        ("parameters", "nonzero of all", lambda r: f"{count(r.nonzero_params)} of {count(r.params)}"),
        ("file", "saved weights", lambda r: size(r.size_bytes)),
        ("MACs, dense", "every multiplication; one sample, one pass", lambda r: count(r.macs_dense)),
        ("MACs, effective", "zeros not counted", lambda r: count(r.macs_effective)),
        ("MACs, lowered", "without what a kernel really skips", lambda r: count(r.macs_lowered)),
        ("latency", "median; IQR: interquartile range", _latency),
        ("speed-up", "measured against dense, same run", _speedup),
    ]
    if any(row.of_pipeline for row in report.rows):
        table.append(("whole pipeline", "one picture; median, and against dense", _pipeline))
    table.append(("fine-tuning", "steps, seconds", lambda r: _training(r.train)))
    return [(title, about, [text(row) for row in report.rows]) for title, about, text in table]


def number(value: float) -> str:
    """Three significant digits; all of those before the point."""
    if value == 0:
        return "0"
    rounded = f"{value:.2e}"
    exponent = int(rounded.partition("e")[2])
    return rounded if exponent < -3 else f"{value:,.{max(0, 2 - exponent)}f}"


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{number(100 * value)}%"


def count(value: float) -> str:
    """A count with a letter: 599 k, 10.3 M, 12.2 G."""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:  # what rounds to 1,000 k is 1 M
            return f"{number(value / factor)} {letter}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Bytes, in powers of 1000."""
    text = count(value)
    return f"{text}B" if text[-1].isalpha() else f"{text} B"


def with_interval(entry: Measured) -> str:
    """A metric's value, with its interval where there is one."""
    if not entry.ci95:
        return number(entry.value)
    low, high = entry.ci95
    return f"{number(entry.value)} [{number(low)}, {number(high)}]"


def _drift(row: Row, metric: str, text: Callable[[float], str]) -> str:
    entry = row.drift_by(metric)
    return NONE if entry is None else text(entry.value)


def _score(row: Row, name: str) -> str:
    entry = next((entry for entry in row.scores if entry.name == name), None)
    return NONE if entry is None else with_interval(entry)


def _latency(row: Row) -> str:
    if (entry := row.standing) is None:
        return NONE
    setting = f"{entry.backend}, {entry.dtype}, batch {entry.batch}"
    return f"{number(entry.median_ms)} ms (IQR {number(entry.iqr_ms)}; {setting})"


def _pipeline(row: Row) -> str:
    if (entry := row.of_pipeline) is None:
        return NONE
    over = "" if row.name == DENSE else f"; {entry.speedup_vs_dense:.2f}x" + _verdict(row, entry)
    how = "" if entry.backend == PIPELINE else "; lowered"
    return f"{number(entry.median_ms)} ms (IQR {number(entry.iqr_ms)}{how}){over}"


def sampler_line(report: Report) -> str:
    """How samples were drawn."""
    recipe = report.recipe
    if recipe.get("pipeline"):
        record = recipe["record"]
        steps = f"{record['steps']} steps" if record["steps"] else "its own number of steps"
        return (
            f"{report.sampler}, {steps}, {record['unseen']} pictures that were not learned from, seed {record['seed']}"
        )
    if "evaluate" not in recipe:
        return report.sampler
    settings = recipe["evaluate"]
    return (
        f"{report.sampler}, {settings['sampler_steps']} steps, {settings['samples']} samples, seed {settings['seed']}"
    )


def _training(train: TrainSummary) -> str:
    return f"{train.steps:,} in {train.seconds:.0f} s" if train.steps else NONE


def _verdict(row: Row, entry: Latency) -> str:
    if not entry.is_gain:
        return ", no gain"
    return "" if row.macs_lowered < row.macs_dense else ", the same kernels: noise"


def _speedup(row: Row) -> str:
    if (entry := row.standing) is None or row.name == DENSE:
        return NONE
    against = "" if entry.against == EAGER else f" over {entry.against} dense"
    return f"{entry.speedup_vs_dense:.2f}x" + against + _verdict(row, entry)


def lowering_sentence(report: Report) -> str:
    """What lowering came to: the form that was chosen, and how many layers run on which backend."""
    plan = report.lowering
    if plan is None:
        return ""
    runs: dict[str, int] = {}
    for layer in plan.layers:
        runs[layer.choice] = runs.get(layer.choice, 0) + max(1, len(layer.weights))
    layers = ", ".join(f"{n} on {backend}" for backend, n in sorted(runs.items(), key=lambda item: -item[1]))
    how = "Of its layers," if plan.choice.startswith(LOWERED) else "Timed alone, its layers were fastest:"
    error = next((form.error for form in plan.forms if form.name == plan.choice), None)
    parity = f" Its output differs from the dense arithmetic by {error:.1e}, relative." if error is not None else ""
    return (
        f"The model runs as \u201c{plan.choice}\u201d: {plan.reason}. {how} {layers}.{parity} "
        f"Measured on {plan.setting.hardware} with {plan.setting.threads} threads."
    )


SPEEDS = ("form", "median", "error", "over eager dense", "over the best dense form")
"""The columns of `speeds`, after the weights."""


def speeds(report: Report) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Every latency of a lowered run, a setting at a time: (setting, lines of weights and `SPEEDS`).

    The speed-ups are over the dense model in eager mode, and over its fastest form that is no less exact. Engines stand with float32,
    whatever their precision.
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
        lines: list[tuple[str, ...]] = []
        for row, entry in entries:
            whole = entry.backend in (PIPELINE, PIPELINE_LOWERED)
            over_eager = f"{base.median_ms / entry.median_ms:.2f}x" if base and not whole else NONE
            over = f"{entry.speedup_vs_dense:.2f}x over {entry.against}"
            time = f"{number(entry.median_ms)} ms (IQR {number(entry.iqr_ms)})"
            error = NONE if entry.error is None else f"{entry.error:.1e}"
            lines.append((row.name, entry.backend, time, error, over_eager, over))
        found.append((f"batch {batch}, {dtype}, {device}", lines))
    return found


TRADE_OFFS = ("weights", "form", "cache", "steps", "median", "speed-up", "RMSE", "SSIM")
"""The columns of `trade_offs`."""


def trade_offs(report: Report) -> list[tuple[str, ...]]:
    """The lines of a pipeline's trade-offs, as in `TRADE_OFFS`; the speed-up is over the first, which all are held against."""
    return [
        (
            entry.row,
            entry.form,
            entry.cache or NONE,
            NONE if entry.steps is None else str(entry.steps),
            f"{number(entry.median_ms)} ms (IQR {number(entry.iqr_ms)})",
            f"{report.trade_offs[0].median_ms / entry.median_ms:.2f}x",
            number(entry.sample_rmse),
            number(entry.ssim),
        )
        for entry in report.trade_offs
    ]


def trade_off_points(report: Report) -> list[tuple[str, float, float, None]]:
    """The trade-offs as points of a chart: the name, the time in milliseconds, the RMSE."""
    return [
        (
            ", ".join(part for part in (entry.row, entry.cache, entry.steps and f"{entry.steps} steps") if part),
            entry.median_ms,
            entry.sample_rmse,
            None,
        )
        for entry in report.trade_offs
    ]


def layer_speeds(report: Report) -> list[dict[str, Any]]:
    """How each layer of a lowered run runs, for the chart: its times, and widths of bars in per cent of the slowest."""
    plan = report.lowering
    if plan is None:
        return []
    found: list[dict[str, Any]] = []
    for layer in plan.layers:
        times = {c.backend: c.median_ms for c in layer.candidates if c.median_ms is not None}
        eager, chosen = times.get(EAGER), times.get(layer.choice)
        if eager is None or chosen is None:
            continue
        shape = ", ".join(" × ".join(map(str, sizes)) for sizes in layer.shapes)
        refused = "; ".join(f"{c.backend}: {c.refused}" for c in layer.candidates if c.refused)
        found.append(
            {
                "name": layer.name or "the whole model",
                "shape": shape,
                "pattern": ", ".join(sorted({p or "dense" for p in layer.patterns})) or "—",
                "choice": layer.choice,
                "sparse": layer.skips_zeros,
                "eager_ms": eager,
                "chosen_ms": chosen,
                "reason": layer.reason + (f" ({refused})" if refused else ""),
            }
        )
    slowest = max((line["eager_ms"] for line in found), default=1.0)
    for line in found:
        line["eager_width"] = round(100 * line["eager_ms"] / slowest, 2)
        line["chosen_width"] = round(100 * line["chosen_ms"] / slowest, 2)
    return found


FILTERS: dict[str, Callable[..., str]] = {
    "number": number,
    "percent": percent,
    "count": count,
    "size": size,
    "with_interval": with_interval,
}
