"""Intervals of a mean: Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import mean, stdev


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """The t at which Student's distribution with `freedom` degrees has the cumulative `probability`, above 0.5 and below 1.

    With t = sqrt(freedom) tan(angle), its density is a power of a cosine, which is integrated by Simpson's rule.
    """
    if not 0.5 < probability < 1 or freedom < 1:
        raise ValueError((probability, freedom))

    def area(angle: float, pieces: int = 400) -> float:
        width = angle / pieces
        values = [math.cos(i * width) ** (freedom - 1) for i in range(pieces + 1)]
        return width / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))

    wanted = (2 * probability - 1) * area(math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if area(middle) < wanted else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def mean_interval(values: Sequence[float], comparisons: int = 1) -> tuple[float, float] | None:
    """The 95% interval of the mean that `values` are drawn around; None with fewer than two, and where all are the same.

    With several `comparisons` it is Bonferroni's: all of them hold together with 95%.
    """
    if len(set(values)) < 2:
        return None
    half = t_quantile(1 - 0.025 / comparisons, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half
