"""How much of the time other programs had the cores that this process wanted, as the Linux kernel counts it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_NS = 1e-9


@dataclass(frozen=True)
class Cores:
    """What the threads of this process have had so far, in seconds: those that they `ran`, and those that they `waited` for a core
    while they could have run."""

    ran: float
    waited: float

    @classmethod
    def now(cls, root: Path = Path("/")) -> Cores | None:
        """As it is now; None where that is not counted: elsewhere than on Linux, or in a kernel without it.

        `root` has `proc`. From `/proc/self/task/*/schedstat`; a thread that has ended takes its count with it.
        """
        ran = waited = threads = 0
        with suppress(OSError):  # threads may end meanwhile
            for place in (root / "proc/self/task").iterdir():
                with suppress(OSError, ValueError):
                    own = [int(word) for word in (place / "schedstat").read_text(encoding="ascii").split()]
                    ran, waited, threads = ran + own[0], waited + own[1], threads + 1
        return cls(ran * _NS, waited * _NS) if threads and ran else None

    def taken_since(self, before: Cores) -> float:
        """The share of the time in which this process wanted a core and had none, 0 to 1, since `before`."""
        ran, waited = max(self.ran - before.ran, 0.0), max(self.waited - before.waited, 0.0)
        return waited / (ran + waited) if ran + waited else 0.0
