"""Curves as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Line = tuple[str, Sequence[float]]
_COLOURS = ("#2563eb", "#d97706", "#059669")


def curves(steps: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Line]]]:
    """What a run's metrics show: (title, label of the vertical axis, named lines), nothing for a run without steps."""
    if not steps:
        return []
    losses: list[Line] = [("noise", _column(steps, "noise_loss"))]
    if steps[0]["teacher_loss"] is not None:
        losses = [("total", _column(steps, "loss")), *losses, ("teacher", _column(steps, "teacher_loss"))]
    return [
        ("Losses", "mean square error", losses),
        ("Mask flips", "share of entries per step", [("flip rate", _column(steps, "flip_rate"))]),
        ("Learning rate", "learning rate", [("learning rate", _column(steps, "lr"))]),
    ]


def _column(steps: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [math.nan if step[name] is None else step[name] for step in steps]


def line_chart(lines: Sequence[Line], label: str) -> str:
    """An SVG of the lines over the optimizer steps: raw values faint, a running mean over a fiftieth of them strong."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": label, "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.0, 2.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for (name, values), colour in zip(lines, _COLOURS, strict=False):
            at = list(range(1, len(values) + 1))
            window = max(1, len(values) // 50)
            axes.plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(at, _running_mean(values, window), color=colour, linewidth=1.6, label=name)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        if not any(value <= 0 for _, values in lines for value in values) and len(lines) > 1:
            axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", alpha=0.25, linewidth=0.6)
        if len(lines) > 1:
            axes.legend(frameon=False)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the charts share a page, where an id may occur once
    svg = re.sub(r' xmlns:xlink="[^"]*"', "", svg).replace("xlink:href", "href")
    return _themed(svg)


def _themed(svg: str) -> str:
    """Black becomes the page's text colour, and the size that of the page's column."""
    svg = svg.replace("#000000", "currentColor")
    return re.sub(
        r'(<svg )[^>]*?(viewBox="[^"]*")[^>]*>', r'\1\2 role="img" xmlns="http://www.w3.org/2000/svg">', svg, count=1
    )


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window - 1` before it, of those that are finite.

    A run survives a step whose loss is not finite, and its curve must too.
    """
    means, total, known = [], 0.0, 0
    for index, value in enumerate(values):
        for entry, sign in ((value, 1), (values[index - window] if index >= window else math.nan, -1)):
            if math.isfinite(entry):
                total, known = total + sign * entry, known + sign
        means.append(total / known if known else math.nan)
    return means
