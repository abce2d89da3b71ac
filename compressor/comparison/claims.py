"""Claims: which of several processes, of one computer or of many, does a job in a folder that all of them see.

A claim on the job NAME is a file `NAME.1`; who takes it over makes `NAME.2`, and so on. The one with the largest number counts. A
number is only ever made by an exclusive create, so that of several that want it one gets it, and no claim is ever removed or
replaced while processes share the folder: nobody can remove one that was taken anew in the meantime. Its holder writes a sign
of life into the file that it holds open. So the file system has to provide exclusive creation, and that a file which is opened
shows what was written and flushed elsewhere before (NFS does, from version 3 on); locks it need not have.

A claim is dead where its process is known to be gone (same boot, same space of process numbers), and elsewhere where it has given
no sign of life for `patience` seconds of the observer's own clock: clocks of two computers are never compared. A holder that could
not give one for half as long, or finds a larger number, knows that it may have lost its claim, and ends what it does.
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from compressor import files
from compressor.errors import CompressorError, LockedError, printable
from compressor.progress import Progress

FOLDER = f"{files.LOCK}-claims"
PATIENCE = 300.0
_MOST_BYTES = 4096
State = Literal["free", "held", "done", "failed"]


@dataclass(frozen=True)
class Holder:
    """A process, as far as others can tell whether it lives. `started` is in clock ticks since `boot`; empty where not known."""

    host: str
    pid: int
    started: str = ""
    boot: str = ""
    space: str = ""

    @classmethod
    def here(cls) -> Self:
        """This process."""
        space = ""
        with suppress(OSError):
            space = os.readlink("/proc/self/ns/pid")
        return cls(platform.node(), os.getpid(), _started(os.getpid()), _line("/proc/sys/kernel/random/boot_id"), space)

    def lives(self, seen_from: Holder) -> bool | None:
        """Whether it does; None where `seen_from` cannot know."""
        same = (self.boot, self.space) == (seen_from.boot, seen_from.space) and self.boot and self.space
        return _started(self.pid) == self.started if same and self.started else None

    def __str__(self) -> str:
        return printable(f"process {self.pid} of {self.host}")


@dataclass(frozen=True)
class _Found:
    """The claim with the largest number: what its file holds, and what that says."""

    number: int
    content: bytes
    holder: Holder | None
    state: State
    note: str
    patience: float
    token: str = ""


@dataclass(eq=False)
class _Held:
    number: int
    descriptor: int
    note: str
    renewed: float
    beats: int = 0
    lost: bool = False


class Claims:
    """This process's claims on the jobs of the comparison in `out`. Within the `with` block it is one of those that share `out`.

    `plan` says what it is about to do; all that share a folder at one time have the same. `patience`: see above, in seconds.
    Entering raises LockedError where a process works in `out` that does not share it, or one with another plan does; leaving
    gives back what is not finished.
    """

    def __init__(
        self,
        out: Path,
        patience: float = PATIENCE,
        holder: Holder | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.out, self.folder, self.patience = out, out / FOLDER, patience
        self.holder = holder or Holder.here()
        self._clock = clock or _now
        self._token = secrets.token_hex(8)
        self._held: dict[str, _Held] = {}
        self._before: dict[str, int] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._guard, self._over = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CompressorError(f"{self.out}: {error.strerror}", "Choose a folder that you may write to.") from error
        for name in self._names():
            if (found := self._newest(name)) is not None and found.state in ("done", "failed"):
                self._before[name] = found.number  # of an earlier call: this one may try again
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for name in list(self._held):
            self.release(name, "free")

    def announce(self, plan: str) -> None:
        """Say what this process is about to do, `plan`. Raises LockedError, see the class."""
        own = f"node-{self.holder.pid}-{secrets.token_hex(4)}"
        self._make(own, 1, plan)
        for name in self._names():
            found = self._newest(name) if name.startswith("node-") and name != own else None
            if found is not None and self._is_held(name, found) and found.note and found.note != plan:
                raise LockedError(
                    f"{self.out} is in use by {found.holder}, for another comparison",
                    f"Give all that share a folder the same command. Where that process is gone for good, remove {self.folder}.",
                )
        if (self.out / files.LOCK).exists():
            with files.held(self.out, 10.0):  # raises where a call without --shared works there
                pass

    def state(self, name: str) -> State:
        """Whether the job `name` is to be had (`free`), another one has it, or it was `done` or has `failed` since this call began."""
        return self._look(name)[1]

    def take(self, name: str) -> bool:
        """Claim the job `name` where it is to be had; whether this process has it now."""
        number, state = self._look(name)
        return state == "free" and self._make(name, number + 1, "")

    def was_of_another(self, name: str) -> bool:
        """Whether the job `name`, which is this process's, was taken over from one of another computer, as far as can be known."""
        held = self._held.get(name)
        before = self._read(name, held.number - 1) if held is not None and held.number > 1 else None
        return before is not None and before.state == "held" and _lives(before.holder, self.holder) is None

    def release(self, name: str, state: State) -> None:
        """Say what became of the job `name`; nothing where it was lost."""
        with self._guard:
            held = self._held.pop(name, None)
            if held is not None:
                with suppress(OSError):  # who waits for a sign of life finds none
                    if not held.lost:
                        self._write(held, state)
                os.close(held.descriptor)

    def is_lost(self, name: str) -> bool:
        """Whether another process may have the job `name` now, that was this one's."""
        held = self._held.get(name)
        return held is None or held.lost or self._is_late(held)

    def _is_late(self, held: _Held) -> bool:
        return self._clock() - held.renewed > self.patience / 2

    def turn(self, name: str, stage: str) -> Generator[Progress, None, bool]:
        """Wait until the job `name` is this process's (True), or another one has done it since this call began (False)."""
        while True:
            number, state = self._look(name)
            if state == "done":
                return False
            if state != "held" and self._make(name, number + 1, ""):
                return True
            yield Progress(stage, 0, 1, "another process is at it", unbroken=True)
            self._over.wait(0.2)

    # --- Files. ---

    def _look(self, name: str) -> tuple[int, State]:
        """The largest number of the job `name`, and its `state`. Whoever takes over makes the next one after the one that it saw."""
        found = self._newest(name)
        if found is None:
            return 0, "free"
        if found.state == "held":
            return found.number, "held" if self._is_held(name, found) else "free"
        return found.number, "free" if found.number <= self._before.get(name, 0) else found.state

    def _names(self) -> list[str]:
        numbered = (re.fullmatch(r"(.+)\.\d+", path.name) for path in self.folder.iterdir())
        return sorted({match[1] for match in numbered if match is not None})

    def _newest(self, name: str) -> _Found | None:
        numbers = [
            int(path.suffix[1:]) for path in self.folder.iterdir() if path.stem == name and path.suffix[1:].isdecimal()
        ]
        return self._read(name, max(numbers)) if numbers else None

    def _read(self, name: str, number: int) -> _Found:
        content = b""
        with suppress(OSError), (self.folder / f"{name}.{number}").open("rb") as file:
            content = file.read(_MOST_BYTES)
        told: Any = None
        with suppress(ValueError):
            told = json.loads(content)
        try:
            state: State = told["state"] if told["state"] in ("free", "done", "failed") else "held"
            return _Found(
                number,
                content,
                Holder(**told["holder"]),
                state,
                str(told["note"]),
                float(told["patience"]),
                str(told["token"]),
            )
        except (TypeError, LookupError, ValueError):  # about to be written, or its process died before it was
            return _Found(number, content, None, "held", "", 0.0)

    def _make(self, name: str, number: int, note: str) -> bool:
        try:
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
            descriptor = os.open(self.folder / f"{name}.{number}", flags, 0o644)
        except FileExistsError:
            return False
        except OSError as error:
            raise CompressorError(
                f"{self.folder}: {error.strerror}", "Choose a folder that you may write to."
            ) from error
        held = _Held(number, descriptor, note, self._clock())
        with self._guard:
            self._held[name] = held
            self._write(held, "held")
        return True

    def _write(self, held: _Held, state: State) -> None:
        """To the file that is open: where it is no longer the one of that name, nothing of others is touched."""
        held.beats += 1
        told: dict[str, Any] = {"state": state, "holder": asdict(self.holder), "note": held.note}
        told |= {"patience": self.patience, "beats": held.beats, "token": self._token}
        os.lseek(held.descriptor, 0, os.SEEK_SET)
        os.write(held.descriptor, json.dumps(told).ljust(_MOST_BYTES // 4).encode())
        os.fsync(held.descriptor)

    def _is_held(self, name: str, found: _Found) -> bool:
        """Whether the claim `found` is that of a process which lives, as far as is known, and has not given it up."""
        if found.token == self._token:  # its own, which it gave up where it could give no sign of life
            return name in self._held and self._held[name].number == found.number
        if (lives := _lives(found.holder, self.holder)) is not None:
            return lives
        content, since = self._seen.get(f"{name}.{found.number}", (None, 0.0))
        if content != found.content:
            self._seen[f"{name}.{found.number}"] = found.content, self._clock()
            return True
        return self._clock() - since <= max(self.patience, found.patience)

    def _beat(self) -> None:
        while not self._over.wait(min(10.0, self.patience / 10)):
            self.renew()

    def renew(self) -> None:
        """Give a sign of life for every claim, and see which are lost."""
        with self._guard:
            for name, held in self._held.items():
                held.lost = held.lost or self._is_late(held) or (self.folder / f"{name}.{held.number + 1}").exists()
                if not held.lost:
                    with suppress(OSError):
                        self._write(held, "held")
                        held.renewed = self._clock()


def refuse_shared(out: Path) -> None:
    """Raise LockedError where processes share `out`; else remove what such processes left there. To be asked by who holds it."""
    claims = Claims(out)
    if not claims.folder.is_dir():
        return
    for name in claims._names():
        found = claims._newest(name)
        if found is not None and found.state == "held" and _lives(found.holder, claims.holder) is not False:
            raise LockedError(
                f"{out} is shared, and in use by {found.holder or 'another process'}",
                f"Add --shared to take part. Where that process is gone for good, remove {claims.folder}.",
            )
    shutil.rmtree(claims.folder, ignore_errors=True)


def _lives(holder: Holder | None, seen_from: Holder) -> bool | None:
    return None if holder is None else holder.lives(seen_from)


def _started(pid: int) -> str:
    """When the process began, by which it is told from a later one with its number; empty where it is gone, or nobody knows."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "" if facts[0] in "ZX" else facts[19]
    except (OSError, IndexError):
        return ""


def _line(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return ""


def _now() -> float:
    """Seconds that go on while the machine sleeps, where it can tell: others count them, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
