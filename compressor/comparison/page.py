"""The report of a comparison: report.json, report.csv, report.md and report.html from its finished cells."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from compressor import files
from compressor.comparison import words
from compressor.comparison.differing import alike, differing
from compressor.comparison.entries import Cell, Comparison
from compressor.comparison.statistics import differences, summary
from compressor.comparison.worker import RUN, read_row
from compressor.errors import CompressorError, printable
from compressor.report import charts, data_uri, read_comparison, read_metrics, template
from compressor.report.compared import CellResult, ComparisonReport, DenseRow, Entry, Judged, LearningRates, Match
from compressor.report.content import DataFacts, Environment, Latency
from compressor.report.in_short import glossary

_LAST = ("latency_ms", "latency_iqr_ms", "latency_backend", "steps", "seconds", "lr", "weights_sha256")
_COSTS = ("params", "nonzero_params", "size_bytes", "macs_dense", "macs_effective", "density")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a comparison in the folder `out` came to: the folder of each finished cell, latencies by label, the learning rates
    chosen by label, what failed and why by the name of the cell, and the machine."""

    wanted: Comparison
    out: Path
    done: Sequence[tuple[Cell, Path]]
    times: Mapping[str, Sequence[Latency]]
    rates: Mapping[str, float]
    failed: Mapping[str, str]
    facts: Environment


def written(outcome: Outcome) -> None:
    """Write the report of what is finished."""
    files.write_json(outcome.out / "report.json", build(outcome).as_json())
    render(outcome.out)


def build(outcome: Outcome) -> ComparisonReport:
    """The content of report.json."""
    wanted = outcome.wanted
    recipe, data = wanted.inputs.recipe, wanted.inputs.data
    judged = read_row(outcome.out / "dense")
    rows = [(cell, read_row(folder)) for cell, folder in outcome.done]
    places = [row.environment for _, row in rows if row.environment is not None]
    differ = any(place != places[0] for place in places)
    entries = []
    for label in wanted.recipes:
        if own := [(cell, row) for cell, row in rows if cell.label == label]:
            entries.append(_entry(label, own, outcome.times.get(label, ()), differ))
    measured = any(entry.quality for entry in entries)
    values = {
        entry.label: {cell.seed: score for cell in entry.cells if (score := _score(cell, measured)) is not None}
        for entry in entries
    }
    report = ComparisonReport(
        schema_version=1,
        kind="comparison",
        title=wanted.title,
        model=wanted.inputs.model_name,
        seeds=tuple(wanted.seeds),
        weights_sha256=judged.row.weights_sha256,
        data=DataFacts(name=data.name, sha256=data.sha256, samples=len(data)),
        sampler=wanted.inputs.adapter.sampler,
        metric=judged.metric,
        match=Match(by=wanted.match, settings={label: dict(own) for label, own in wanted.matched.items()}),
        learning_rates=LearningRates(grid=tuple(wanted.rates), chosen=dict(outcome.rates)),
        dense=DenseRow(
            **{**dict(judged.row), "latency": tuple(outcome.times.get("dense", ()))}, by_steps=judged.by_steps
        ),
        entries=tuple(entries),
        compared_by=judged.metric.name if measured and judged.metric else "prediction_error",
        differences=tuple(differences({label: own for label, own in values.items() if own})),
        failed=dict(outcome.failed),
        environment=outcome.facts,
        evaluate=recipe.evaluate.model_dump(mode="json"),
        differing=differing(wanted),
        max_error=wanted.max_error,
        limitations=(),
    )
    return report.model_copy(update={"limitations": words.limitations(report)})


def _score(cell: CellResult, measured: bool) -> float | None:
    """What a cell is compared by: its metric, or its drift where no metric was measured."""
    if measured:
        return cell.quality[0].value if cell.quality else None
    return next((drift.value for drift in cell.drift if drift.metric == "prediction_error"), None)


def _entry(label: str, own: Sequence[tuple[Cell, Judged]], latency: Sequence[Latency], differ: bool) -> Entry:
    """The entry `label`. `differ`: whether cells of the comparison were made in different surroundings, which each then tells."""
    recipe, first = own[0][0].recipe, own[0][1]
    costs = [{key: getattr(judged.row, key) for key in _COSTS} for _, judged in own]
    bare = next((judged for _, judged in own if judged.one_shot is not None), first)
    cells = [
        CellResult(
            seed=cell.seed,
            folder=f"cells/{cell.name}",
            weights_sha256=judged.row.weights_sha256,
            quality=judged.row.quality,
            drift=judged.row.drift,
            train=judged.row.train,
            by_steps=judged.by_steps,
            costs={} if costs[index] == costs[0] else costs[index],
            **_place(judged, differ),
        )
        for index, (cell, judged) in enumerate(own)
    ]
    scores = [cell.quality[0].value for cell in cells if cell.quality]
    if len({cell.weights_sha256 for cell in cells}) == 1:  # the same model with every seed
        scores = scores[:1]
    drifts: dict[str, list[float]] = {}
    for cell in cells:
        for drift in cell.drift:
            drifts.setdefault(drift.metric, []).append(drift.value)
    counts = [count for count in cells[0].by_steps if all(count in cell.by_steps for cell in cells)]
    return Entry(
        label=label,
        method=recipe.method if recipe.pruner is None else recipe.pruner,
        pattern=_pattern(first),
        settings=dict(recipe.settings),
        recipe_train=recipe.train.model_dump(mode="json"),
        quality=summary(scores) if scores else None,
        drift={metric: summary(values) for metric, values in drifts.items()},
        by_steps={count: summary([cell.by_steps[count].value for cell in cells]) for count in counts},
        one_shot=bare.one_shot,
        **costs[0],
        latency=tuple(latency),
        layers=bare.layers,
        sensitivity=bare.sensitivity,
        cells=tuple(cells),
    )


def _place(judged: Judged, differ: bool) -> dict[str, Any]:
    """Where a cell was made, where computers shared the comparison, or its cells `differ` in that."""
    host = {} if judged.host is None else {"host": judged.host}
    told = judged.environment is not None and (differ or host)
    return {**host, **({"environment": judged.environment} if told else {})}


def _pattern(judged: Judged) -> str | None:
    patterns = judged.patterns
    if patterns is None:  # rows from before they were kept
        patterns = tuple(layer.pattern for layer in judged.layers if layer.pattern)
    return ", ".join(sorted(set(patterns))) or None


def render(out: Path) -> None:
    """Write report.md, report.csv and report.html from report.json, metrics and samples. The same files give the same bytes.

    Raises CompressorError where report.json is missing or not a comparison's.
    """
    for name, page in _pages(read_comparison(out / "report.json"), out).items():
        files.write_text(out / name, page)


def _pages(report: ComparisonReport, out: Path) -> dict[str, str]:
    """Every page by its file's name."""
    columns = words.columns(report)
    shown = {
        "report": report,
        "headline": words.headline(report),
        "summary": words.summary(report),
        "rows": words.rows(report),
        "columns": columns,
        "glossary": glossary(report.metric.name if report.metric else None, [*columns, "speed-up"]),
        "pairs": words.pairs(report),
        "alike": alike(report),
        "by_steps": words.by_steps(report),
        "layers": words.layers(report),
    }
    pictures = {"dense": out / "dense" / "samples.png"}
    pictures |= {e.label: out / _inner(e.cells[0].folder) / "samples.png" for e in report.entries}
    found = {label: path for label, path in pictures.items() if path.is_file()}
    html = template("comparison.html").render(
        **shown,
        pictures={label: data_uri(path) for label, path in found.items()},
        charts=[(title, about, Markup(chart)) for title, about, chart in _charts(report, out)],
    )
    named = {label: path.relative_to(out).as_posix() for label, path in found.items()}
    markdown = template("comparison.md").render(**shown, pictures=named)
    return {"report.csv": _csv(report), "report.md": markdown + "\n", "report.html": html + "\n"}


def _charts(report: ComparisonReport, out: Path) -> list[tuple[str, str, str]]:
    """(title, explanation, SVG): what was paid for the quality, then how it came about."""
    found = []
    for title, about, across, points in words.trade_offs(report):
        if report.metric and len(points) > 1:
            found.append((title, about, charts.scatter_chart(points, across, report.metric.name)))
    if lines := words.error_by_time(report):
        about = "relative to the dense model's; time 0 is the image, 1 the noise"
        found.append(("Prediction error by time", about, charts.curve_chart(lines, "time", "prediction error")))
    losses, flips = [], []
    for entry in report.entries:
        steps = read_metrics(out / _inner(entry.cells[0].folder) / RUN / "metrics.jsonl")
        losses.append((entry.label, [_number(step["noise_loss"]) for step in steps]))
        rates = [_number(step["flip_rate"]) for step in steps]
        flips.append((entry.label, rates if any(rates) else []))
    if any(values for _, values in losses):
        found.append(("Noise loss", "first seed; running means", charts.line_chart(losses, "mean square error", True)))
    if any(values for _, values in flips):
        found.append(
            ("Mask flips", "share of entries per step; first seed", charts.line_chart(flips, "flip rate", True))
        )
    return found


def _inner(folder: str) -> str:
    """The folder of a cell as the report names it. Raises CompressorError where it is not one of the comparison's own."""
    if re.fullmatch(r"cells/(?!\.)[^/\\\0]+", folder) is None:
        raise CompressorError(f"report.json: {folder!r} is not the folder of a cell", "Run the same command again.")
    return folder


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _csv(report: ComparisonReport) -> str:
    """One line per cell."""
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")

    def write(cells: Sequence[Any]) -> None:
        table.writerow([_literal(cell) for cell in cells])

    metric = report.metric.name if report.metric else "metric"
    drifts = sorted({entry.metric for e in report.entries for cell in e.cells for entry in cell.drift})
    write(["label", "method", "pattern", "seed", metric, f"{metric} low", f"{metric} high", *drifts, *_COSTS, *_LAST])
    for entry in report.entries:
        for cell in entry.cells:
            time = entry.latency[-1] if entry.latency and cell is entry.cells[0] else None
            quality = cell.quality[0] if cell.quality else None
            interval = quality.ci95 if quality is not None and quality.ci95 else ("", "")
            drift = {d.metric: d.value for d in cell.drift}
            train = cell.train
            write(
                [
                    *(entry.label, entry.method, entry.pattern or "", cell.seed),
                    *("" if quality is None else quality.value, *interval),
                    *(drift.get(name, "") for name in drifts),
                    *(cell.costs.get(key, getattr(entry, key)) for key in _COSTS),
                    *(("", "", "") if time is None else (time.median_ms, time.iqr_ms, time.backend)),
                    *(train.steps, train.seconds, entry.recipe_train["lr"], cell.weights_sha256),
                ]
            )
    return lines.getvalue()


def _literal(cell: Any) -> Any:
    """A cell of a CSV file: text that a spreadsheet would calculate gets an apostrophe, which says that it is text."""
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") else text
    return text
