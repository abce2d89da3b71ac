"""The report's table of further measures: those in `quality` after the first."""

from __future__ import annotations

from compressor.report.content import Report
from compressor.report.numbers import NONE, with_interval

_ABOUT = {
    "kid": "kernel distance; 95% interval",
    "precision": "share of samples that lie among real images",
    "recall": "share of real images that lie among samples",
    "density": "how densely real images lie around samples; 1 is alike",
    "coverage": "share of real images with a sample near by",
    "sfd": "Fréchet distance of spatial features",
    "kid_unseen": "kernel distance from real images that nothing was trained on; 95% interval",
    "copying": "how likely a sample is nearer to training images than a held-out one is; 0.5 is alike, 1 are copies",
    "sfid": "Fréchet distance of spatial features",
}
_LOWER = ("kid", "sfd", "sfid", "kid_unseen")
_HIGHER = ("precision", "recall", "density", "coverage")


def further(report: Report) -> list[tuple[str, str, list[str]]]:
    """The table, a measure at a time: (title, explanation, one text per row of the report). Empty where there is none."""
    found = [{entry.metric: entry for entry in row.quality[1:]} for row in report.rows]
    return [
        (name, _ABOUT.get(_measure(name), ""), [with_interval(row[name]) if name in row else NONE for row in found])
        for name in dict.fromkeys(name for row in found for name in row)
    ]


def direction(report: Report) -> str:
    """The sentence that says which of the further measures are better low, and which high."""
    names = [name for name, _, _ in further(report) if _measure(name) in _ABOUT]
    low = [name for name in names if _measure(name) in _LOWER]
    high = [name for name in names if _measure(name) in _HIGHER]
    parts = [f"{way} is better for {', '.join(group)}" for way, group in (("Lower", low), ("higher", high)) if group]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _measure(name: str) -> str:
    return name.partition("-")[0]
