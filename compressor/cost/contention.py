"""How much of the time other programs had the cores that this process wanted, as the Linux kernel counts it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_NS = 1e-9


@dataclass(frozen=True)
class Cores:
    """What each thread of this process has had so far, by its number: the seconds for which it ran, and those for which it waited
    for a core while it could have run."""

    threads: Mapping[str, tuple[float, float]]

    @classmethod
    def now(cls, root: Path = Path("/")) -> Cores | None:
        """As it is now; None where that is not counted: elsewhere than on Linux, or in a kernel without it.

        `root` has `proc`. From `/proc/self/task/*/schedstat`.
        """
        found: dict[str, tuple[float, float]] = {}
        with suppress(OSError):  # threads may end meanwhile
            for place in (root / "proc/self/task").iterdir():
                with suppress(OSError, ValueError):
                    ran, waited, _ = (int(word) for word in (place / "schedstat").read_text(encoding="ascii").split())
                    found[place.name] = ran * _NS, waited * _NS
        return cls(found) if any(ran for ran, _ in found.values()) else None

    def taken_since(self, before: Cores) -> float:
        """The share of the time in which threads wanted a core and had none, 0 to 1, since `before`; of those that are still there."""
        ran = waited = 0.0
        for name, own in self.threads.items():
            first = before.threads.get(name, (0.0, 0.0))
            ran, waited = ran + max(own[0] - first[0], 0.0), waited + max(own[1] - first[1], 0.0)
        return waited / (ran + waited) if ran + waited else 0.0
