"""Timing side by side: callables take turns, so that what else the machine does meets them all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

import torch

_Key = TypeVar("_Key")
WARM_UP = 3
"""Rounds before those that count."""
_AWAKE = 0.2
"""Seconds of turns before those that count, on a GPU: at rest its clocks are low, and they rise slowly."""
_SHORT = 0.002  # seconds; shorter calls are repeated within a turn, so that the clock and its own cost do not count


@dataclass(frozen=True)
class Times:
    """The median and the interquartile range of a call's times, in milliseconds, and its seconds per call by round."""

    median_ms: float
    iqr_ms: float
    seconds: tuple[float, ...] = ()


def side_by_side(
    calls: Mapping[_Key, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = WARM_UP
) -> dict[_Key, Times]:
    """The times of each of `calls`, which take turns (`interleaved`)."""
    seconds = interleaved(list(calls.values()), rounds, device, warm_up)
    return {key: Times(median_ms(own), iqr_ms(own), tuple(own)) for key, own in zip(calls, seconds, strict=True)}


def interleaved(
    calls: Sequence[Callable[[], object]], rounds: int, device: torch.device, warm_up: int = WARM_UP
) -> list[list[float]]:
    """Seconds per call of each of `calls`, one number per round. The order of turns alternates from round to round."""
    if device.type == "cuda":
        _wake(calls, device)
    repeats = [1] * len(calls)
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + warm_up):
        order = list(range(len(calls)))
        for index in order if turn % 2 else reversed(order):
            began = time.perf_counter()
            for _ in range(repeats[index]):
                calls[index]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = (time.perf_counter() - began) / repeats[index]
            if turn >= warm_up:
                times[index].append(seconds)
            elif turn == warm_up - 1:
                repeats[index] = max(1, min(100, int(_SHORT / max(seconds, 1e-7))))
    return times


def _wake(calls: Sequence[Callable[[], object]], device: torch.device) -> None:
    """Keep a GPU busy for `_AWAKE` seconds with all of `calls`."""
    end = time.perf_counter() + _AWAKE
    while calls and time.perf_counter() < end:
        for call in calls:
            call()
        torch.cuda.synchronize(device)


def ratio_interval(slower: Times, faster: Times) -> tuple[float, float] | None:
    """An interval that holds the median of `slower` over `faster` with at least 95%, from the rounds in which both took turns.

    Its ends are two of the paired ratios: how many of them lie below the median is a coin toss for each, whatever their distribution,
    as long as rounds do not depend on each other. None where the rounds are not paired or too few, below six.
    """
    if len(slower.seconds) != len(faster.seconds):
        return None
    ratios = sorted(a / b for a, b in zip(slower.seconds, faster.seconds, strict=True) if b > 0)
    n = len(ratios)
    outside, below = 0.0, 0
    while below < n // 2 and 2 * (outside + math.comb(n, below) / 2**n) <= 0.05:
        outside += math.comb(n, below) / 2**n
        below += 1
    return (ratios[below - 1], ratios[n - below]) if below else None


def median_ms(times: Sequence[float]) -> float:
    """The median of seconds, in milliseconds."""
    return 1000 * median(times)


def iqr_ms(times: Sequence[float]) -> float:
    """The interquartile range of seconds, in milliseconds."""
    if len(times) < 2:
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return 1000 * (high - low)
