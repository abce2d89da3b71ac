"""How a report's numbers are written for people."""

from __future__ import annotations

import math
from typing import Protocol

from compressor.report.content import GAIN

NONE = "—"


class Measured(Protocol):
    """A number with its interval: quality, a floor."""

    @property
    def value(self) -> float: ...

    @property
    def ci95(self) -> tuple[float, float] | None: ...


def number(value: float) -> str:
    """Three significant digits; all of those before the point."""
    if value == 0:
        return "0"
    if not math.isfinite(value):  # a product of what a file of others says may be infinite
        return f"{value:.0f}"
    rounded = f"{value:.2e}"
    exponent = int(rounded.partition("e")[2])
    return rounded if exponent < -3 else f"{value:,.{max(0, 2 - exponent)}f}"


def percent(value: float) -> str:
    """A share in per cent; what is less than all is not rounded to it."""
    text = number(100 * value)
    digits = 0
    while text.startswith("100") and 0 < value < 1 and digits < 9:
        digits += 1
        text = f"{100 * value:.{digits}f}"
    return f"{text}%"


def share(value: float) -> str:
    """A share in whole per cent; with three digits where those would say none, or all, of what is neither."""
    text = f"{value:.0%}"
    return percent(value) if value not in (0, 1) and text in ("0%", "100%") else text


def times(value: float) -> str:
    """A ratio of two times: 1.25x. What is no gain yet is not rounded to one, and little not to nothing."""
    if value < 0.095:
        return f"{number(value)}x"
    text = f"{value:.2f}x"
    return f"{math.floor(1000 * value) / 1000:.3f}x" if value < GAIN and text == f"{GAIN:.2f}x" else text


def seconds(value: float) -> str:
    """A time in seconds, whole from ten on."""
    return f"{value:,.0f} s" if value >= 10 or value == 0 else f"{number(value)} s"


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
