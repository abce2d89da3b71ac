"""Intervals over seeds: Student's t, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import mean, stdev

from compressor.report.compared import Difference, Summary


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


def summary(values: Sequence[float], comparisons: int = 1) -> Summary:
    """`mean`, `ci95` of the mean over seeds (None with fewer than two, and where all are the same) and `n`.

    With several `comparisons` the interval is Bonferroni's: all of them hold together with 95%.
    """
    interval = None
    if len(set(values)) > 1:
        half = t_quantile(1 - 0.025 / comparisons, len(values) - 1) * stdev(values) / math.sqrt(len(values))
        interval = (mean(values) - half, mean(values) + half)
    return Summary(mean=mean(values), ci95=interval, n=len(values))


def differences(values: Mapping[str, Mapping[int, float]]) -> list[Difference]:
    """Of every two entries, the mean difference over the seeds that both have, with an interval that holds for all pairs at once.

    `values` has each entry's value by seed. `significant` is None where there are fewer than two common seeds, and where seeds make
    no difference.
    """
    names = list(values)
    pairs = [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]]
    found = []
    for a, b in pairs:
        common = sorted(set(values[a]) & set(values[b]))
        if not common:
            continue
        entry = summary([values[a][seed] - values[b][seed] for seed in common], len(pairs))
        significant = None if entry.ci95 is None else not entry.ci95[0] <= 0 <= entry.ci95[1]
        found.append(Difference(**dict(entry), a=a, b=b, significant=significant))
    return found
