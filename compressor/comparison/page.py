"""The report of a comparison: report.json, report.csv, report.md and report.html from its finished cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from compressor import files
from compressor.comparison import words
from compressor.comparison.entries import Cell, Comparison
from compressor.comparison.statistics import differences, summary
from compressor.comparison.worker import RUN, read_row
from compressor.report import charts, data_uri, environment_of, read_metrics, report_of, resource

_LAST = ("latency_ms", "latency_iqr_ms", "latency_backend", "steps", "seconds", "lr", "weights_sha256")
_COSTS = ("params", "nonzero_params", "size_bytes", "macs_dense", "macs_effective", "density")


def written(
    wanted: Comparison,
    cells: Sequence[Cell],
    folders: Sequence[Path],
    out: Path,
    times: Mapping[str, list[dict[str, Any]]],
    rates: Mapping[str, float],
    failed: Mapping[str, str],
    facts: Mapping[str, Any],
) -> None:
    """Write the report of what is finished."""
    done = [(cell, folder) for cell, folder in zip(cells, folders, strict=True) if (folder / "row.json").is_file()]
    report = build(wanted, done, out, times, rates, failed, facts)
    files.write_json(out / "report.json", report)
    render(out)


def build(
    wanted: Comparison,
    done: Sequence[tuple[Cell, Path]],
    out: Path,
    times: Mapping[str, list[dict[str, Any]]],
    rates: Mapping[str, float],
    failed: Mapping[str, str],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json."""
    recipe = wanted.inputs.recipe
    judged = read_row(out / "dense")
    dense = {**judged["row"], "latency": times.get("dense", []), "by_steps": judged["by_steps"]}
    entries = []
    for label in wanted.recipes:
        own = [(cell, folder) for cell, folder in done if cell.label == label]
        if own:
            entries.append(_entry(label, own, times.get(label, [])))
    measured = any(entry["quality"] for entry in entries)
    values = {
        entry["label"]: {
            cell["seed"]: score for cell in entry["cells"] if (score := _score(cell, measured)) is not None
        }
        for entry in entries
    }
    report = {
        "schema_version": 1,
        "kind": "comparison",
        "title": wanted.title,
        "model": recipe.model,
        "seeds": list(wanted.seeds),
        "weights_sha256": dense["weights_sha256"],
        "data": {
            "name": wanted.inputs.data.name,
            "sha256": wanted.inputs.data.sha256,
            "samples": len(wanted.inputs.data),
        },
        "sampler": wanted.inputs.adapter.sampler,
        "metric": judged["metric"],
        "match": {"by": wanted.match, "settings": {label: dict(own) for label, own in wanted.matched.items()}},
        "learning_rates": {"grid": list(wanted.rates), "chosen": dict(rates)},
        "dense": dense,
        "entries": entries,
        "compared_by": judged["metric"]["name"] if measured else "prediction_error",
        "differences": differences({label: own for label, own in values.items() if own}),
        "failed": dict(failed),
        "environment": {key: facts[key] for key in ("versions", "hardware", "platform")},
        "evaluate": recipe.evaluate.model_dump(mode="json"),
        "limitations": [],
    }
    report["limitations"] = words.limitations(report)
    return report


def _score(cell: Mapping[str, Any], measured: bool) -> float | None:
    """What a cell is compared by: its metric, or its drift where no metric was measured."""
    if measured:
        return float(cell["quality"][0]["value"]) if cell["quality"] else None
    return next((float(d["value"]) for d in cell["drift"] if d["metric"] == "prediction_error"), None)


def _entry(label: str, own: Sequence[tuple[Cell, Path]], latency: list[dict[str, Any]]) -> dict[str, Any]:
    contents = [read_row(folder) for _, folder in own]
    recipe, first = own[0][0].recipe, contents[0]
    bare = next((content for content in contents if "one_shot" in content), first)
    cells = [
        {
            "seed": cell.seed,
            "folder": f"cells/{cell.name}",
            **{key: content["row"][key] for key in ("weights_sha256", "quality", "drift", "train")},
            "by_steps": content["by_steps"],
        }
        for (cell, _), content in zip(own, contents, strict=True)
    ]
    scores = [cell["quality"][0]["value"] for cell in cells if cell["quality"]]
    if len({cell["weights_sha256"] for cell in cells}) == 1:  # the same model with every seed
        scores = scores[:1]
    drifts: dict[str, list[float]] = {}
    for cell in cells:
        for entry in cell["drift"]:
            drifts.setdefault(entry["metric"], []).append(entry["value"])
    counts = [count for count in cells[0]["by_steps"] if all(count in cell["by_steps"] for cell in cells)]
    steps = {count: summary([cell["by_steps"][count]["value"] for cell in cells]) for count in counts}
    return {
        "label": label,
        "method": recipe.method if recipe.pruner is None else recipe.pruner,
        "pattern": _pattern(first),
        "settings": dict(recipe.settings),
        "recipe_train": recipe.train.model_dump(mode="json"),
        "quality": summary(scores) if scores else None,
        "drift": {metric: summary(values) for metric, values in drifts.items()},
        "by_steps": steps,
        "one_shot": bare.get("one_shot"),
        **{key: first["row"][key] for key in _COSTS},
        "latency": latency,
        "layers": bare.get("layers", []),
        "sensitivity": bare.get("sensitivity", {}),
        "cells": cells,
    }


def _pattern(content: Mapping[str, Any]) -> str | None:
    patterns = content.get("patterns", [layer["pattern"] for layer in content.get("layers", []) if layer["pattern"]])
    return ", ".join(sorted(set(patterns))) or None


def render(out: Path) -> None:
    """Write report.md, report.csv and report.html from report.json, metrics and samples. The same files give the same bytes.

    Raises CompressorError where report.json is missing or not a comparison's.
    """
    path = out / "report.json"
    report = files.read_json(path)
    with report_of(path):
        pages = _pages(report, out)
    for name, page in pages.items():
        files.write_text(out / name, page)


def _pages(report: Mapping[str, Any], out: Path) -> dict[str, str]:
    """Every page by its file's name."""
    shown = {
        "report": report,
        "headline": words.headline(report),
        "rows": words.rows(report),
        "columns": words.columns(report),
        "pairs": words.pairs(report),
        "by_steps": words.by_steps(report),
        "layers": words.layers(report),
    }
    page = environment_of(html=True).from_string(resource("comparison.html"))
    text = environment_of(html=False).from_string(resource("comparison.md"))
    pictures = {"dense": out / "dense" / "samples.png"}
    pictures |= {e["label"]: out / e["cells"][0]["folder"] / "samples.png" for e in report["entries"]}
    found = {label: path for label, path in pictures.items() if path.is_file()}
    html = page.render(
        **shown,
        pictures={label: data_uri(path) for label, path in found.items()},
        charts=[(title, about, Markup(chart)) for title, about, chart in _charts(report, out)],
        css=Markup(resource("style.css")),
    )
    markdown = text.render(**shown, pictures={label: path.relative_to(out).as_posix() for label, path in found.items()})
    return {"report.csv": _csv(report), "report.md": markdown + "\n", "report.html": html + "\n"}


def _charts(report: Mapping[str, Any], out: Path) -> list[tuple[str, str, str]]:
    """(title, explanation, SVG): what was paid for the quality, then how it came about."""
    found = []
    for title, about, across, points in words.trade_offs(report):
        if len(points) > 1:
            found.append((title, about, charts.scatter_chart(points, across, report["metric"]["name"])))
    if lines := words.error_by_time(report):
        about = "relative to the dense model's; time 0 is the image, 1 the noise"
        found.append(("Prediction error by time", about, charts.curve_chart(lines, "time", "prediction error")))
    losses, flips = [], []
    for entry in report["entries"]:
        steps = read_metrics(out / entry["cells"][0]["folder"] / RUN / "metrics.jsonl")
        losses.append((entry["label"], [_number(step["noise_loss"]) for step in steps]))
        rates = [_number(step["flip_rate"]) for step in steps]
        flips.append((entry["label"], rates if any(rates) else []))
    if any(values for _, values in losses):
        found.append(("Noise loss", "first seed; running means", charts.line_chart(losses, "mean square error", True)))
    if any(values for _, values in flips):
        found.append(
            ("Mask flips", "share of entries per step; first seed", charts.line_chart(flips, "flip rate", True))
        )
    return found


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _csv(report: Mapping[str, Any]) -> str:
    """One line per cell."""
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    metric = report["metric"]["name"] if report["metric"] else "metric"
    drifts = sorted({entry["metric"] for e in report["entries"] for cell in e["cells"] for entry in cell["drift"]})
    table.writerow(
        ["label", "method", "pattern", "seed", metric, f"{metric} low", f"{metric} high", *drifts, *_COSTS, *_LAST]
    )
    for entry in report["entries"]:
        for cell in entry["cells"]:
            time = entry["latency"][-1] if entry["latency"] and cell is entry["cells"][0] else None
            quality = cell["quality"][0] if cell["quality"] else None
            interval = quality["ci95"] if quality is not None and quality["ci95"] else ("", "")
            drift = {d["metric"]: d["value"] for d in cell["drift"]}
            train = cell["train"]
            table.writerow(
                [
                    *(entry["label"], entry["method"], entry["pattern"] or "", cell["seed"]),
                    *("" if quality is None else quality["value"], *interval),
                    *(drift.get(name, "") for name in drifts),
                    *(entry[key] for key in _COSTS),
                    *(("", "", "") if time is None else (time["median_ms"], time["iqr_ms"], time["backend"])),
                    *(train["steps"], train["seconds"], entry["recipe_train"]["lr"], cell["weights_sha256"]),
                ]
            )
    return lines.getvalue()
