"""The report: `report.json`, which `compressor.runs` writes, as Markdown and as one self-contained page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from compressor import files, validation
from compressor.errors import OF_COMPARISON, CompressorError, how_to_finish, printable
from compressor.foreign.bounded import MOST_PICTURE_BYTES, read_bytes
from compressor.report import charts, words
from compressor.report.compared import ComparisonReport
from compressor.report.content import Report
from compressor.report.further import direction, further
from compressor.report.in_short import glossary, summary
from compressor.report.numbers import count, number, percent, size, with_interval
from compressor.report.timings import SPEEDS, speeds

SIDE_BY_SIDE = "side-by-side.png"
"""In a run's `samples/`, where its variants drew the same pictures."""

__all__ = ["read_comparison", "read_report", "render", "schema"]


def schema() -> dict[str, Any]:
    """The JSON schema of `report.json`, of runs and of comparisons."""
    loaded: dict[str, Any] = json.loads(_resource("schema.json"))
    return loaded


def read_report(path: Path) -> Report:
    """The report of a run, from its file. Raises CompressorError, with the field at fault, where it is not one."""
    try:
        return validation.from_file(Report, path, "a report", "Run the recipe again.")
    except CompressorError:
        if (path.parent / "cells").is_dir():
            raise CompressorError(f"{path}: the report of a comparison, not of a run", OF_COMPARISON) from None
        raise


def read_comparison(path: Path) -> ComparisonReport:
    """As `read_report`, of a comparison."""
    return validation.from_file(ComparisonReport, path, "a report of a comparison", "Run the same command again.")


def render(run: str | Path) -> None:
    """Write `report.md` and `report.html` of the run directory from its report, metrics and samples.

    The same files give the same bytes. Raises CompressorError where `report.json` is missing or not a report.
    """
    run = Path(run)
    path = run / "report.json"
    if not path.is_file():
        raise CompressorError(f"{path}: no such file", how_to_finish(run))
    page, text = _written(run, read_report(path), read_metrics(run / "metrics.jsonl"))
    files.write_text(run / "report.md", text)
    files.write_text(run / "report.html", page)  # last: with it, a run is finished


def _written(run: Path, report: Report, steps: list[dict[str, Any]]) -> tuple[str, str]:
    """The page and the Markdown."""
    pictures = {row.name: name for row in report.rows if (name := _picture(run, row.name)) is not None}
    columns, layer_speeds = words.columns(report), words.layer_speeds(report)
    facts = {
        "report": report,
        "headline": words.headline(report),
        "summary": summary(report),
        "columns": columns,
        "glossary": glossary(report.metric.name if report.metric else None, [title for title, _, _ in columns]),
        "further": further(report),
        "direction": direction(report),
        "lowering": report.lowering,
        "lowering_sentence": words.lowering_sentence(report),
        "speeds": speeds(report),
        "speed_columns": SPEEDS,
        "trade_offs": words.trade_offs(report),
        "trade_off_columns": words.TRADE_OFFS,
        "layer_speeds": layer_speeds,
        "refusals": words.refusals(layer_speeds),
        "dense_reasons": words.dense_reasons(report.layers),
        "pruned": [layer for layer in report.layers if layer.reason is None],
        "skipped": [layer for layer in report.layers if layer.reason is not None],
    }
    facts["sampler_line"] = words.sampler_line(report)
    sheet = run / "samples" / SIDE_BY_SIDE
    errors = [(row.name, entry.by_time) for row in report.rows if (entry := row.drift_by("latent_error")) is not None]
    lines = [
        (name, [1 - left for left, _ in by_time], [error for _, error in by_time])
        for name, by_time in errors
        if by_time
    ]
    latent = charts.curve_chart(lines, "share of the steps that is done", "latent error") if lines else None
    points = words.trade_off_points(report)
    traded = charts.scatter_chart(points, "time of one picture, ms", "RMSE from the first") if points else None
    page, text = template("run.html"), template("run.md")
    data = {name: data_uri(run / "samples" / file) for name, file in pictures.items()}
    curves = [(title, Markup(charts.line_chart(lines, label))) for title, label, lines in charts.curves(steps)]
    paired = {
        "side_by_side": data_uri(sheet) if sheet.is_file() else None,
        "latent_curve": Markup(latent) if latent is not None else None,
        "trade_off_chart": Markup(traded) if traded is not None else None,
    }
    html = page.render(**facts, **paired, pictures=data, curves=curves)
    return html + "\n", text.render(
        **facts, pictures=pictures, side_by_side=SIDE_BY_SIDE if sheet.is_file() else None
    ) + "\n"


def template(name: str) -> Template:
    """The template of that name beside this file: of a page where it ends in ".html", else of Markdown."""
    return environment_of(html=name.endswith(".html")).get_template(name)


def environment_of(html: bool) -> Environment:
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_upright if html else _plain,
    )
    environment.filters.update(_FILTERS)
    environment.filters["breakable"] = breakable
    environment.filters["marked"] = marked
    if not html:
        environment.filters["breakable"] = environment.filters["marked"] = str
        environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment


_FILTERS: dict[str, Callable[..., str]] = {
    "number": number,
    "percent": percent,
    "count": count,
    "size": size,
    "with_interval": with_interval,
}


def breakable(name: object) -> Markup:
    """A layer's name for a page: it may go on in a new line after a dot, and nowhere else."""
    return Markup(".<wbr>").join(str(name).split("."))


def marked(sentence: str) -> Markup:
    """A sentence for a page: what is between `backticks` is code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(sentence))))


def _upright(value: Any) -> str:
    """A value in a page, without letters that turn the direction of writing round, or that nobody sees: names may come from others."""
    kind = Markup if isinstance(value, Markup) else str
    return kind("\n".join(printable(line) for line in str(value).split("\n")))


def _plain(value: Any) -> str:
    """A value in Markdown: on one line, and no tag, link or picture. Names may come from files of others, and a page that loads a
    picture from somewhere, or that has a link which runs a script, is not what a reader of a report expects."""
    text = printable(" ".join(str(value).splitlines())).replace("<", "&lt;")
    return re.sub(r"\](?=[(:\[])", "]\\\\", text)


_MOST_BYTES = 2**30  # a hundred bytes a step


def read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    needed = ("loss", "noise_loss", "teacher_loss", "lr", "flip_rate")
    try:
        steps = [
            json.loads(line) for line in read_bytes(path, _MOST_BYTES).decode("utf-8").splitlines() if line.strip()
        ]
        return [{name: step[name] for name in needed} for step in steps]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CompressorError(
            f"{path}: not the record of a step on every line: {error!r}", "The file is damaged."
        ) from error


def _picture(run: Path, row: str) -> str | None:
    name = f"{words.file_name(row)}.png"
    return name if (run / "samples" / name).is_file() else None


def data_uri(path: Path) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(read_bytes(path, MOST_PICTURE_BYTES)).decode("ascii"))


def _resource(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
