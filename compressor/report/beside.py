"""The reports of finished runs side by side: nothing is trained or measured again, and only what can be compared is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compressor import files
from compressor.errors import UsageError
from compressor.report import template, timings, words
from compressor.report.content import DENSE, Report
from compressor.report.further import further
from compressor.report.in_short import against, glossary
from compressor.report.numbers import NONE

_ONE_EACH = "One training each: whether another seed would say the same, `compressor compare` measures."


@dataclass(frozen=True)
class Beside:
    """Runs side by side: a text for each of `names` in every line of `columns` (title, explanation, texts)."""

    names: tuple[str, ...]
    columns: tuple[tuple[str, str, tuple[str, ...]], ...]
    verdict: tuple[str, ...]
    refused: tuple[str, ...]
    """Why quality is not compared; nothing where it is."""
    metric: str | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def beside(reports: Mapping[str, Report]) -> Beside:
    """The finished models of `reports`, by the names of their runs, after the dense model where all started from the same one.

    Measures of quality, and of the difference from the dense model, are left out where model, weights, data or the way of measuring
    differ: `refused` says what.
    """
    refused = tuple(_differing(reports))
    shared = {row.weights_sha256 if (row := report.dense) else None for report in reports.values()}
    first = next(iter(reports.values()))
    with_dense = len(shared) == 1 and first.dense is not None and first.dense is not first.final and not refused
    tables = [_column(first, DENSE)] if with_dense else []
    tables += [_column(report, report.method) for report in reports.values()]
    quality = {title for report in reports.values() for title in _of_quality(report)}
    titles = {title: about for table in tables for title, (about, text) in table.items() if text != NONE}
    return Beside(
        names=((DENSE,) if with_dense else ()) + tuple(reports),
        columns=tuple(
            (title, about, tuple(table[title][1] if title in table else NONE for table in tables))
            for title, about in titles.items()
            if not (refused and title in quality)
        ),
        verdict=() if refused else tuple(_verdict(reports)),
        refused=refused,
        metric=first.metric.name if first.metric and not refused else None,
    )


_TAKEN = ("run.json", "recipe.yaml", "report.json", files.MANIFEST)
"""What is in the folder of a run, of a comparison, or of a saved model."""
_PAGES = {"report.md": "# Runs side by side", "report.html": "runs side by side</p>"}
"""The pages that are written, with what tells one from another's."""


def refuse_other_pages(out: Path) -> None:
    """Raise UsageError where `out` is a file, holds a run, or has pages of these names that are not of runs side by side."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "Choose a folder with --out.")
    if taken := [name for name in _TAKEN if (out / name).exists()]:
        raise UsageError(f"{out} has {taken[0]}: it holds a run, whose report would be lost", "Choose another --out.")
    for name, said in _PAGES.items():
        page = out / name
        if page.exists() and not (page.is_file() and said in page.read_text(encoding="utf-8", errors="replace")):
            raise UsageError(f"{page} is there already, and is not of runs side by side", "Choose another --out.")


def write(found: Beside, out: Path) -> None:
    """Write report.md and report.html into the folder `out`, which is made. Raises UsageError as `refuse_other_pages`."""
    refuse_other_pages(out)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"found": found, "glossary": glossary(found.metric, [title for title, _, _ in found.columns])}
    for kind in ("md", "html"):
        files.write_text(out / f"report.{kind}", template(f"beside.{kind}").render(**facts) + "\n")


def _column(report: Report, row: str) -> dict[str, tuple[str, str]]:
    """What the report says of one row: (explanation, text) by title."""
    at = [entry.name for entry in report.rows].index(row)
    lines = [*words.columns(report, each_batch=True), *further(report)]
    facts = [
        ("method", "", row if row == DENSE else report.method),
        ("pattern", "", NONE if row == DENSE else report.pattern or NONE),
        ("seed", "of the training", NONE if row == DENSE else str(report.seed)),
    ]
    lines = [(title, about, [text] * (at + 1)) for title, about, text in facts] + lines
    return {title: (about, cells[at]) for title, about, cells in lines}


def _of_quality(report: Report) -> list[str]:
    """The titles of what holds only for one model, data and way of measuring."""
    own = [report.metric.name] if report.metric else []
    return [
        *own,
        *(title for title, _, _ in further(report)),
        *(entry.name for row in report.rows for entry in row.scores),
        "prediction error",
        "sample RMSE",
        "SSIM",
        "latent error",
    ]


_SAME: Mapping[str, Callable[[Report], Any]] = {
    "models": lambda report: report.model,
    "dense weights": lambda report: report.dense.weights_sha256[:12] if report.dense else "none",
    "data": lambda report: f"{report.data.name} {report.data.sha256[:12]}",
    "metrics": lambda report: (
        f"{report.metric.name} {report.metric.extractor_sha256[:12]}" if report.metric else "none"
    ),
    "scores": lambda report: (
        ", ".join(f"{entry.name} {entry.extractor_sha256[:12]}" for entry in report.final.scores) or "none"
    ),
    "samplers": lambda report: report.sampler,
    "numbers of samples": lambda report: report.final.quality[0].samples if report.final.quality else 0,
    "numbers of sampler steps": lambda report: report.final.quality[0].sampler_steps if report.final.quality else 0,
}
"""What must be the same for quality to be compared."""


def _differing(reports: Mapping[str, Report]) -> list[str]:
    found = []
    for what, value in _SAME.items():
        values = {name: value(report) for name, report in reports.items()}
        if len(set(values.values())) > 1:
            found.append(f"{what} differ: " + ", ".join(f"{own} in {name}" for name, own in values.items()))
    return found


def _verdict(reports: Mapping[str, Report]) -> list[str]:
    (name, first), *others = reports.items()
    if not first.final.quality:
        return ["Quality was not measured."]
    metric = first.final.quality[0].metric
    found = [
        f"{other}: {metric} {against(report.final.quality[0], first.final.quality[0], name)}."
        for other, report in others
        if report.final.quality
    ]
    ratios = {other: timings.sizes([report.final]) for other, report in reports.items()}
    if any(ratios.values()):
        found.append(
            "Times are of different occasions: compare the speed-ups, each of which was timed beside its own dense model."
        )
    return [*found, _ONE_EACH]
