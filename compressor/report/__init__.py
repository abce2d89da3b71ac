"""The report: `report.json`, which `compressor.runs` writes, as Markdown and as one self-contained page."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError
from markupsafe import Markup

from compressor import files
from compressor.errors import CompressorError
from compressor.report import charts, words
from compressor.report.further import direction, further

__all__ = ["render", "schema"]


def schema() -> dict[str, Any]:
    """The JSON schema of `report.json`."""
    loaded: dict[str, Any] = json.loads(resource("schema.json"))
    return loaded


def render(run: str | Path) -> None:
    """Write `report.md` and `report.html` of the run directory from its report, metrics and samples.

    The same files give the same bytes. Raises CompressorError where `report.json` is missing or not a report.
    """
    run = Path(run)
    path = run / "report.json"
    if not path.is_file():
        raise CompressorError(
            f"{path}: no such file", "Give the directory of a finished run; `compressor resume` finishes one."
        )
    report = files.read_json(path)
    if lost := [key for key in schema()["required"] if key not in report]:
        raise CompressorError(f"{path}: not a report: {', '.join(lost)} missing", "Run the recipe again.")
    steps = read_metrics(run / "metrics.jsonl")
    with report_of(path):
        page, text = _written(run, report, steps)
    files.write_text(run / "report.md", text)
    files.write_text(run / "report.html", page)  # last: with it, a run is finished


@contextmanager
def report_of(path: Path) -> Iterator[None]:
    """What cannot be rendered is a CompressorError that names the report at `path`."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, TemplateError) as error:
        raise CompressorError(f"{path}: not a report: {error!r}", "Run the same command again.") from error


def _written(run: Path, report: Mapping[str, Any], steps: list[dict[str, Any]]) -> tuple[str, str]:
    """The page and the Markdown."""
    pictures = {row["name"]: name for row in report["rows"] if (name := _picture(run, row["name"])) is not None}
    facts = {
        "report": report,
        "headline": words.headline(report),
        "columns": words.columns(report),
        "further": further(report),
        "direction": direction(report),
        "lowering": report.get("lowering"),
        "lowering_sentence": words.lowering_sentence(report),
        "speeds": words.speeds(report),
        "layer_speeds": words.layer_speeds(report),
        "pruned": [layer for layer in report["layers"] if layer["reason"] is None],
        "skipped": [layer for layer in report["layers"] if layer["reason"] is not None],
    }
    page = environment_of(html=True).from_string(resource("template.html"))
    data = {name: data_uri(run / "samples" / file) for name, file in pictures.items()}
    curves = [(title, Markup(charts.line_chart(lines, label))) for title, label, lines in charts.curves(steps)]
    text = environment_of(html=False).from_string(resource("template.md"))
    html = page.render(**facts, pictures=data, curves=curves, css=Markup(resource("style.css")))
    return html + "\n", text.render(**facts, pictures=pictures) + "\n"


def environment_of(html: bool) -> Environment:
    environment = Environment(
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=None if html else _plain,
    )
    environment.filters.update(words.FILTERS)
    if not html:
        environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment


def _plain(value: Any) -> str:
    """A value in Markdown: on one line, and no tag."""
    return " ".join(str(value).splitlines()).replace("<", "&lt;")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    needed = ("loss", "noise_loss", "teacher_loss", "lr", "flip_rate")
    try:
        steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [{name: step[name] for name in needed} for step in steps]
    except (ValueError, LookupError, TypeError) as error:
        raise CompressorError(
            f"{path}: not the record of a step on every line: {error!r}", "The file is damaged."
        ) from error


def _picture(run: Path, row: str) -> str | None:
    name = f"{files.file_name(row)}.png"
    return name if (run / "samples" / name).is_file() else None


def data_uri(path: Path) -> Markup:
    return Markup("data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii"))


def resource(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
