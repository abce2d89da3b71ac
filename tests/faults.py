"""Faults at every step of what touches files: an action is done again and again, each time with a fault one file operation later.

The steps are Python's audit events: every open, rename, removal and so on of something under a folder. The action runs in a
process of its own, forked from this one, so that it can really die there. No step has to be named, and none can be forgotten.
"""

from __future__ import annotations

import errno
import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from compressor.errors import CompressorError

EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate", "fcntl.flock"}
KINDS = ("killed", "error", "full")
"""The process is gone; one operation fails; from then on nothing can be made or written, only removed and renamed."""
DONE, REFUSED, KILLED, WRONG = 0, 3, 9, 1


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and at which operation, from 0."""

    kind: str
    at: int

    def install(self, root: Path) -> None:
        """Let it happen in this process, which can no longer be without it."""

        def meet(number: int, event: str, args: tuple[object, ...]) -> None:
            if self.kind == "killed" and number >= self.at:
                os._exit(KILLED)
            if self.kind == "error" and number == self.at and event != "fcntl.flock":
                raise OSError(errno.EIO, "Input/output error")
            if self.kind == "full" and number >= self.at and (event == "os.mkdir" or _writes(event, args)):
                raise OSError(errno.ENOSPC, "No space left on device")

        watch(root, meet)


def watch(root: Path, meet: Callable[[int, str, tuple[object, ...]], object]) -> None:
    """Call `meet` at every file operation under `root` in this process, with its number, from 0."""
    numbers = itertools.count()

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event in EVENTS and _under(root, event, args):
            meet(next(numbers), event, args)

    sys.addaudithook(hook)


def _under(root: Path, event: str, args: tuple[object, ...]) -> bool:
    if event == "fcntl.flock":
        return True
    path = args[0]
    if isinstance(path, (str, bytes, os.PathLike)):
        text = os.fsdecode(path)
        return text.startswith(str(root)) or not os.path.isabs(text)  # a name in a folder that is being removed
    return False


def _writes(event: str, args: tuple[object, ...]) -> bool:
    flags = args[2] if event == "open" and len(args) > 2 else 0
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def in_a_process(action: Callable[[], object], root: Path, fault: Fault | None = None) -> int:
    """Do `action` in a forked process, with `fault`; how it ended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads in this process: the child needs none
        child = os.fork()
    if child == 0:
        code = WRONG
        try:
            if fault is not None:
                fault.install(root)
            action()
            code = DONE
        except CompressorError:
            code = REFUSED
        except OSError as error:
            code = REFUSED if fault is not None and fault.kind != "killed" else WRONG
            if code == WRONG:
                traceback.print_exception(error)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def operations(action: Callable[[], object], root: Path) -> int:
    """How many operations `action` has under `root`."""
    reading, writing = os.pipe()

    def counted() -> None:
        watch(root, lambda number, event, args: seen.append(number))
        action()
        os.write(writing, str(len(seen)).encode())

    seen: list[int] = []
    assert in_a_process(counted, root) == DONE
    os.close(writing)
    found = int(os.read(reading, 32))
    os.close(reading)
    return found


def each(kind: str, action: Callable[[Path], object], fresh: Callable[[], Path]) -> Iterator[tuple[Path, int]]:
    """`action` in a `fresh` folder with a fault at its first operation, the second, … and at last with none: the folder, and how
    the process ended."""
    first = fresh()
    for at in range(operations(lambda: action(first), first) + 1):
        folder = fresh()
        code = in_a_process(lambda folder=folder: action(folder), folder, Fault(kind, at))
        assert code != WRONG, (kind, at)
        yield folder, code
    assert code == DONE
