"""Curves as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from itertools import chain, cycle, repeat
from typing import Any, ParamSpec

from compressor.errors import printable

_FIRST = "#6b7280"
_P = ParamSpec("_P")
Line = tuple[str, Sequence[float]]
_STYLE: Any = {"svg.fonttype": "none", "font.size": 10, "font.family": "sans-serif"}
_COLOURS = (
    *("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#65a30d", "#92400e", "#475569"),
    *("#1e40af", "#f59e0b", "#10b981"),
)


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


def _styled(chart: Callable[_P, str]) -> Callable[_P, str]:
    """`chart`, drawn in this module's style whatever matplotlib's settings are."""

    @wraps(chart)
    def drawn(*args: _P.args, **kwargs: _P.kwargs) -> str:
        from matplotlib import rc_context

        with rc_context(_STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser's font has the letters
            return chart(*args, **kwargs)

    return drawn


@_styled
def line_chart(lines: Sequence[Line], label: str, many: bool = False) -> str:
    """An SVG of the lines over the optimizer steps: raw values faint, a running mean over a fiftieth of them strong.

    With `many` lines, the means alone, over a tenth, and the names below.
    """
    figure, axes = _figure(label, (4.0, 2.6))
    for (name, values), (colour, dashes, _) in zip(lines, _looks(), strict=False):
        if not values:  # a line that is not there keeps its colour
            continue
        at = list(range(1, len(values) + 1))
        window = max(1, len(values) // (10 if many else 50))
        if not many:
            axes.plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(at, _running_mean(values, window), dashes, color=colour, linewidth=1.6, label=_literal(name))
    axes.set_xlabel("optimizer step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if not any(value <= 0 for _, values in lines for value in values) and len(lines) > 1:
        _logarithmic(axes)
    if many:
        _legend_below(figure, axes)
    elif len(lines) > 1:
        axes.legend(frameon=False)
    return _svg(figure, label)


@_styled
def curve_chart(lines: Sequence[tuple[str, Sequence[float], Sequence[float]]], across: str, label: str) -> str:
    """An SVG of named lines (horizontal values, vertical values); the vertical axis is logarithmic where that is possible."""
    figure, axes = _figure(label, (4.0, 2.6))
    for (name, at, values), (colour, dashes, marker) in zip(lines, _looks(), strict=False):
        axes.plot(at, values, dashes, color=colour, linewidth=1.4, marker=marker, markersize=2.5, label=_literal(name))
    if all(value > 0 for _, _, values in lines for value in values):
        _logarithmic(axes)
    axes.set_xlabel(across)
    _legend_below(figure, axes)
    return _svg(figure, across + label)


@_styled
def scatter_chart(points: Sequence[tuple[str, float, float, Sequence[float] | None]], across: str, label: str) -> str:
    """An SVG of named points (horizontal, vertical, interval of the vertical); those that no other beats in both are ringed.

    Less is better on both axes. The first is the one that all others come from.
    """
    figure, axes = _figure(label, (4.0, 2.8))
    axes.grid(True, axis="x", alpha=0.25, linewidth=0.6)
    for (name, x, y, interval), (colour, _, marker) in zip(points, chain([(_FIRST, "-", "o")], _looks()), strict=False):
        beaten = any(a <= x and b <= y and (a < x or b < y) for _, a, b, _ in points)
        axes.plot([x], [y], marker, color=colour, markersize=6, label=_literal(name))
        if not beaten:
            axes.plot([x], [y], "o", markersize=11, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=1.1)
        if interval is not None:
            axes.plot([x, x], list(interval), color=colour, linewidth=1.1, alpha=0.7)
    heights = [y for _, _, y, _ in points]
    if min(heights) > 0 and max(heights) > 5 * min(heights):
        _logarithmic(axes)
    shown = [v for _, _, y, interval in points for v in ((y,) if interval is None else (y, *interval)) if v > 0]
    if shown and min(heights) > 0:  # a wide interval of two seeds shall not squeeze the points
        axes.set_ylim(max(min(shown), min(heights) / 2) * 0.9, min(max(shown), max(heights) * 2) * 1.1)
    axes.set_xlim(0, 1.05 * max(x for _, x, _, _ in points))
    axes.set_xlabel(across)
    _legend_below(figure, axes)
    return _svg(figure, across + label)


def _literal(name: str) -> str:
    """`name` as it is: matplotlib hides what begins with an underscore, and sets what is between dollars."""
    name = printable(name).replace("$", r"\$")
    return name if not name.startswith("_") else "\u200b" + name


def _looks() -> Iterator[tuple[str, str, str]]:
    """(colour, line style, marker), endlessly: where the colours begin again, lines are dashed and markers square."""
    solid, dashed = (zip(_COLOURS, repeat(line), repeat(marker)) for line, marker in (("-", "o"), ("--", "s")))
    return cycle(chain(solid, dashed))


def _logarithmic(axes: Any) -> None:
    """Make the vertical axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylabel(f"{axes.get_ylabel()} (log scale)")
    low, high = axes.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5) if high > 10 * low else (2, 3, 5, 7)))
    axes.yaxis.set_minor_formatter(plain if high < 200 * low else NullFormatter())


def _figure(label: str, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", alpha=0.25, linewidth=0.6)
    return figure, axes


def _legend_below(figure: Any, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    columns = 1 if max(map(len, names), default=0) > 24 else 2
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(names) // columns))  # the axes keep their height
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _svg(figure: Any, salt: str) -> str:
    from matplotlib import rc_context

    drawn = io.StringIO()
    with rc_context({"svg.hashsalt": salt}):
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

    A run survives a step whose loss is not finite, or is huge, and its curve must too.
    """
    finite = [math.isfinite(value) for value in values]
    totals = _running_sum([value if known else 0.0 for value, known in zip(values, finite, strict=True)], window)
    counts = _running_sum(list(map(float, finite)), window)
    return [total / count if count else math.nan for total, count in zip(totals, counts, strict=True)]


def _running_sum(values: Sequence[float], window: int) -> list[float]:
    """The sum of each value and up to `window - 1` before it. What has left is not subtracted, since its rounding would stay: sums go
    from each multiple of `window` on, and up to the next."""
    ends = list(values)
    for index in range(len(values) - 2, -1, -1):
        if (index + 1) % window:
            ends[index] += ends[index + 1]
    sums, total = [], 0.0
    for index, value in enumerate(values):
        total = value if index % window == 0 else total + value
        first = index - window + 1
        sums.append(total if first <= 0 or first % window == 0 else ends[first] + total)
    return sums
