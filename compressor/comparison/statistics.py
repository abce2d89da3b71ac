"""Means over seeds, and paired differences, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from compressor.quality.intervals import mean_interval
from compressor.report.compared import Difference, Summary

_ROUNDING = 1e-12


def summary(values: Sequence[float], comparisons: int = 1) -> Summary:
    """`mean`, `ci95` of the mean over seeds (None with fewer than two, and where all are the same) and `n`.

    With several `comparisons` the interval is Bonferroni's: all of them hold together with 95%.
    """
    return Summary(mean=mean(values), ci95=mean_interval(values, comparisons), n=len(values))


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
        own = [values[a][seed] - values[b][seed] for seed in common]
        if max(own) - min(own) <= _ROUNDING * max(abs(values[name][seed]) for name in (a, b) for seed in common):
            own = own[:1] * len(own)  # the same, but for the last digits of what was subtracted
        entry = summary(own, len(pairs))
        significant = None if entry.ci95 is None else not entry.ci95[0] <= 0 <= entry.ci95[1]
        found.append(Difference(**dict(entry), a=a, b=b, significant=significant))
    return found
