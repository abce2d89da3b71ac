"""Numbers and facts for people: how a report's values are written, and the sentence at its top."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from compressor.report import timings
from compressor.report.content import DENSE, EAGER, FEW_BITS, LOWERED, ONE_SHOT, Layer, Report, Row, TrainSummary
from compressor.report.numbers import NONE, count, number, percent, seconds, size, times, with_interval


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
                f"{number(alike.value)} to the dense model's from the same noise.{_gain(report, final)}"
            )
        told = "" if error is None else f"{percent(error.value)} prediction error; "
        return f"{what}: {told}quality was not measured.{_gain(report, final)}"
    others = [
        f"{number(row.quality[0].value)} {name}"
        for name in (DENSE, ONE_SHOT)
        if (row := report.row(name)) is not None and row is not final and row.quality
    ]
    against = f", against {' and '.join(others)}" if others else ""
    return f"{what}: {final.quality[0].metric} {with_interval(final.quality[0])}{against}; lower is better.{_gain(report, final)}"


def _gain(report: Report, row: Row) -> str:
    """The sentence on speed, where a lowered model has some."""
    entry = row.standing
    if entry is None or entry.backend != LOWERED or not entry.is_gain or not timings.skips(report, row, entry):
        return ""
    return f" Lowered, it runs {times(entry.speedup_vs_dense)} as fast as dense at its best ({entry.against})."


def columns(report: Report, each_batch: bool = False) -> list[tuple[str, str, list[str]]]:
    """The table, a measure at a time: (title, explanation, one text per row of the report). Titles of times name the batch size where
    there are several, or with `each_batch`."""
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
    ]
    found = [(title, about, [text(row) for row in report.rows]) for title, about, text in table]
    found += timings.measures(report, each_batch)
    if any(row.of_pipeline for row in report.rows):
        pipelines = [timings.pipeline(report, row) for row in report.rows]
        found.append(("whole pipeline", "one picture; median, and against dense", pipelines))
    return [*found, ("fine-tuning", "steps, seconds", [_training(row.train) for row in report.rows])]


def _drift(row: Row, metric: str, text: Callable[[float], str]) -> str:
    entry = row.drift_by(metric)
    return NONE if entry is None else text(entry.value)


def _score(row: Row, name: str) -> str:
    entry = next((entry for entry in row.scores if entry.name == name), None)
    return NONE if entry is None else with_interval(entry)


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
    skipped = f", {train.skipped:,} of them skipped" if train.skipped else ""
    return f"{train.steps:,} in {seconds(train.seconds)}{skipped}" if train.steps else NONE


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
            times(report.trade_offs[0].median_ms / entry.median_ms),
            number(entry.sample_rmse),
            number(entry.ssim),
        )
        for entry in report.trade_offs
    ]


def trade_off_points(report: Report) -> list[tuple[str, float, float, None]]:
    """The trade-offs as points of a chart: the name, the time in milliseconds, the RMSE."""
    return [
        (
            ", ".join(part for part in (entry.row, few, entry.cache, entry.steps and f"{entry.steps} steps") if part),
            entry.median_ms,
            entry.sample_rmse,
            None,
        )
        for entry in report.trade_offs
        for few in ["few bits" if entry.form.endswith(FEW_BITS) else None]
    ]


def layer_name(name: str, fused: Sequence[str]) -> str:
    """A lowered layer as it is told: its `name`, or those of the layers that are one product, the first with its path."""
    parent = name.rpartition(".")[0]
    return " + ".join([name or "the whole model", *(other.removeprefix(f"{parent}.") for other in fused[1:])])


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
        refused = [f"{c.backend}: {c.refused}" for c in layer.candidates if c.refused]
        found.append(
            {
                "name": layer_name(layer.name, layer.fused),
                "shape": shape,
                "pattern": ", ".join(sorted({p or "dense" for p in layer.patterns})) or "—",
                "choice": layer.choice,
                "sparse": layer.skips_zeros,
                "eager_ms": eager,
                "chosen_ms": chosen,
                "reason": layer.reason,
                "refused": refused,
            }
        )
    slowest = max((line["eager_ms"] for line in found), default=1.0)
    for line in found:
        line["eager_width"] = round(100 * line["eager_ms"] / slowest, 2)
        line["chosen_width"] = round(100 * line["chosen_ms"] / slowest, 2)
    return found


def refusals(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Why backends were left out of `layer_speeds`, each reason once: (backend and reason, the layers that it holds for)."""
    found: dict[str, list[str]] = {}
    for line in lines:
        for refusal in line["refused"]:
            found.setdefault(refusal, []).append(line["name"])
    return [(refusal, _layers_of(names, len(lines))) for refusal, names in found.items()]


def dense_reasons(layers: Sequence[Layer]) -> list[tuple[str, str]]:
    """Why layers are dense, each reason once: (reason, the layers)."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.reason is not None:
            found.setdefault(layer.reason, []).append(layer.name)
    return [(reason, _layers_of(names, len(layers))) for reason, names in found.items()]


def _layers_of(names: Sequence[str], of: int) -> str:
    if len(names) == of:
        return f"all {of} layers" if of > 1 else names[0]
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def file_name(row: str) -> str:
    """The stem of a row's picture."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", row)
