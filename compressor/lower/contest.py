"""Which form is faster, told from rounds in which they took turns; a doubt is never decided against the dense one.

On a busy machine times have no shape that could be relied on. What else it does meets neighbours alike, though, so forms are compared
within single rounds: by how many rounds one won. Were it not faster, each would be won with a chance of a half at most, whatever
the times' distribution; that many wins must then be too unlikely (a sign test). While that is open, more rounds are measured, up to a
bound.

What no number of rounds evens out is that threads wait for each other: a form in which they meet more often loses more where other
programs take their cores. So there a gain has to be larger than such a machine makes up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import comb
from statistics import median

import torch

from compressor.cost.contention import Cores
from compressor.cost.timing import interleaved
from compressor.environment import usable_cores
from compressor.lower.plan import Against
from compressor.report.content import GAIN

Rounds = Mapping[str, tuple[float, ...]]
"""Milliseconds of each form, one number per round."""

BASE = "eager"
"""The form that is taken where no other is clearly faster: the dense one, as it is."""

_CHANCE = 0.001
"""How likely so many rounds may be won by a form that is not faster. It is looked at four times, so false choices are 0.4% at most
for each form that is tried."""
_MOST = 8
"""Rounds at most, in times of those that are measured first."""
BUSY = 0.1
"""The share of the time in which threads had to wait for a core, from which on the machine is busy."""
ASKED_BUSY = 1.5
"""The gain that is asked for there, of several threads."""
_AGAIN = "lower again when the machine does nothing else"
_HOPE, _SMALL = 1.1, 0.05
"""More rounds are worth it while a form may be this much faster, by a test that is wrong this often: it only saves time."""


def taken_since(began: Cores | None, device: torch.device) -> float | None:
    """The share of the time since `began` in which other programs had the cores that this one wanted: where times depend on that, for
    several threads on a CPU, and they do not take cores from each other. None where it is not known, or does not matter."""
    threads = torch.get_num_threads()
    now = Cores.now() if device.type == "cpu" and 1 < threads <= usable_cores() else None
    return None if began is None or now is None else now.taken_since(began)


def busy(taken: float | None) -> bool:
    """Whether so much was `taken` that times tell little about an idle machine."""
    return taken is not None and taken > BUSY


def doubtful(taken: float) -> str:
    """What to say of layers that were chosen while so much was `taken`."""
    return (
        f"other programs had the cores for up to {taken:.0%} of the time while layers were timed: some layers may have another form "
        f"than the one that is fastest on an idle machine; {_AGAIN}"
    )


def asked(taken: float | None) -> float:
    """The speed-up that counts where so much was `taken`."""
    return ASKED_BUSY if busy(taken) else GAIN


def timed(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, sparse: Iterable[str]
) -> dict[str, tuple[float, ...]]:
    """The milliseconds of `calls` by round: of `rounds`, or of two, four or eight times as many, until it is clear which to take."""
    found: dict[str, tuple[float, ...]] = dict.fromkeys(calls, ())
    count, sparse = rounds, set(sparse)
    while True:
        seconds = interleaved(list(calls.values()), count, device)
        for name, own in zip(calls, seconds, strict=True):
            found[name] += tuple(1000 * one for one in own)
        count = len(found[BASE])
        if count >= _MOST * rounds or decided(found, sparse):
            return found


def decided(rounds: Rounds, sparse: Iterable[str]) -> bool:
    """Whether more rounds are of no use: what looks fastest is so beyond doubt, or nothing is likely to be."""
    contest = Contest.of(rounds, sparse)
    choice = contest.verdict().choice
    if contest.verdict(sure=False).choice != choice:
        return False
    open_still = [] if choice in contest.sparse else [(name, contest.dense) for name in contest.sparse]
    open_still += [(name, [BASE]) for name in contest.dense if choice == BASE != name]
    return not any(all(_promises(rounds[name], rounds[other]) for other in others) for name, others in open_still)


def _promises(own: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether a form that takes `own` times may well be faster by something that matters."""
    won = sum(theirs >= _HOPE * ours for ours, theirs in zip(own, other, strict=True))
    return won > len(own) - needed(len(own), _SMALL)


@cache
def needed(rounds: int, chance: float = _CHANCE) -> int:
    """In how many of `rounds` a form must be faster, so that it is not by `chance`; more than there are where those are too few."""
    ways = 0
    for wins in range(rounds, -1, -1):
        ways += comb(rounds, wins)
        if ways > chance * 2**rounds:
            return wins + 1
    return 0


@dataclass(frozen=True)
class Verdict:
    """The form to take. `best` is the sparse one that it was about, if any, `ratio` its speed over `opponent`, the dense form that it
    gains least on, and `doubt` what could not be told."""

    choice: str
    best: str | None
    opponent: str
    ratio: float
    doubt: str = ""
    taken: float | None = None

    def reason(self, who: str | None = None, none: str = "no sparse kernel takes this layer") -> str:
        """It in words: of `best`, or of `who`; `none` where there is no sparse form."""
        doubt = f"; {self.doubt}" if self.doubt else ""
        if self.best is None:
            return none + doubt
        if self.choice == self.best:
            return f"{self.ratio:.2f}x the speed of {self.opponent}, the best dense form"
        if self.ratio >= asked(self.taken):
            return f"{who or self.best} has {self.ratio:.2f}x the speed of {self.opponent}{doubt}"
        return f"{_less(who or self.best, self.ratio, self.opponent, self.taken)}{'' if busy(self.taken) else doubt}"


def _less(who: str, ratio: float, opponent: str, taken: float | None) -> str:
    """Why the gain of `who` does not count."""
    shown = min(ratio, asked(taken) - 0.01)  # 1.029 is not rounded to the 1.03 that it is less than
    less = f"{who} has {shown:.2f}x the speed of {opponent}, less than the {asked(taken):.2f}x that are asked"
    return f"{less} while other programs have the cores for {taken:.0%} of the time: {_AGAIN}" if busy(taken) else less


@dataclass(frozen=True)
class Contest:
    """Forms by their median times, those in `sparse` apart, and how each did `against` the dense ones in the same rounds.

    Without the latter (plans from before have none) medians are all there is.
    """

    medians: Mapping[str, float]
    against: Mapping[str, Mapping[str, Against]]
    sparse: frozenset[str]
    taken: float | None = None
    """The share of the time in which other programs had the cores, where that matters (`taken_since`)."""

    @classmethod
    def of(cls, rounds: Rounds, sparse: Iterable[str], taken: float | None = None) -> Contest:
        """That of `rounds`, in which so much of the cores was `taken`."""
        apart = frozenset(sparse) & set(rounds)
        against = {
            name: {other: _against(own, rounds[other]) for other in rounds if other not in apart and other != name}
            for name, own in rounds.items()
        }
        return cls({name: median(own) for name, own in rounds.items()}, against, apart, taken)

    def without(self, names: Collection[str]) -> Contest:
        """That of the forms but for `names`."""
        medians = {name: value for name, value in self.medians.items() if name not in names}
        against = {
            name: {other: found for other, found in own.items() if other not in names}
            for name, own in self.against.items()
            if name not in names
        }
        return replace(self, medians=medians, against=against, sparse=self.sparse - set(names))

    @property
    def dense(self) -> list[str]:
        """The forms that are not sparse."""
        return [name for name in self.medians if name not in self.sparse]

    def ratio(self, name: str, other: str) -> float:
        """The speed of `name` over that of the dense `other`: the median of the ratios of single rounds."""
        found = self.against.get(name, {}).get(other)
        return self.medians[other] / self.medians[name] if found is None else found.ratio

    def faster(self, name: str, other: str, sure: bool) -> bool:
        """Whether `name` gains on the dense `other`; beyond doubt where `sure`."""
        return self.ratio(name, other) >= asked(self.taken) and (not sure or self._clear(name, other))

    def _clear(self, name: str, other: str) -> bool:
        found = self.against.get(name, {}).get(other)
        return found is not None and found.wins >= needed(found.rounds)

    def verdict(self, sure: bool = True) -> Verdict:
        """The sparse form that clearly gains on every dense one; else the dense one that clearly gains on the dense form as it is;
        else that. Of several the fastest. Without `sure`, doubts do not count."""
        faster = [name for name in self.dense if name != BASE and self.faster(name, BASE, sure)]
        base = min(faster or [BASE], key=self.medians.__getitem__)
        unclear = [(name, BASE) for name in self.dense if name != BASE and self._doubtful(name, BASE)]
        if not self.sparse:
            return Verdict(base, None, base, 1.0, self._doubt(unclear if base == BASE else ()), self.taken)
        winning = [name for name in self.sparse if all(self.faster(name, other, sure) for other in self.dense)]
        best = min(sorted(winning or self.sparse), key=self.medians.__getitem__)
        opponent = min(self.dense, key=lambda other: self.ratio(best, other))
        ratio = self.ratio(best, opponent)
        if winning:
            return Verdict(best, best, opponent, ratio, taken=self.taken)
        of_best = [(best, other) for other in self.dense if ratio >= asked(self.taken) and self._doubtful(best, other)]
        doubt = self._doubt([*of_best, *(unclear if base == BASE else ())])
        return Verdict(base, best, opponent, ratio, doubt, self.taken)

    def _doubtful(self, name: str, other: str) -> bool:
        return self.faster(name, other, sure=False) and not self._clear(name, other)

    def _doubt(self, pairs: Iterable[tuple[str, str]]) -> str:
        passed = [name for name in self.dense if name != BASE and GAIN <= self.ratio(name, BASE) < asked(self.taken)]
        if passed:  # on a busy machine
            best = max(passed, key=lambda name: self.ratio(name, BASE))
            return _less(best, self.ratio(best, BASE), BASE, self.taken)
        for name, other in pairs:  # the first says enough
            if (found := self.against.get(name, {}).get(other)) is not None:
                return f"{name} could not be told apart from {other} in {found.rounds} rounds, of which it won {found.wins}: {_AGAIN}"
        return ""


def _against(own: tuple[float, ...], other: tuple[float, ...]) -> Against:
    ratios = [theirs / ours for ours, theirs in zip(own, other, strict=True)]
    return Against(ratio=median(ratios), wins=sum(one > 1 for one in ratios), rounds=len(ratios))
