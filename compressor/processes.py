"""Processes: how they are started, how they are told to stop, and how many of them there are."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TypeVar

from compressor.errors import UsageError
from compressor.progress import Progress

_Result = TypeVar("_Result")

TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What ends a process that nobody looks after: `kill`, a scheduler, a terminal that is gone."""

_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


class Interrupted(KeyboardInterrupt):
    """Ends a run in order: raised where a signal is heard, or thrown into a running `execute` to make it stop after a checkpoint.

    `exit_code` is the process's. It is a KeyboardInterrupt, since what looks after Ctrl-C has to look after it alike.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("interrupted")
        self.exit_code = exit_code


def python(*arguments: str) -> list[str]:
    """The command of another Python like this one. The working folder is not on its path (`-P`): with `-m` and `-c` it would be,
    and a file that happens to lie there, `einops.py`, would run in the place of a library."""
    return [sys.executable, "-P", *arguments]


@contextmanager
def safe_path() -> Iterator[None]:
    """Python processes that others start meanwhile, such as those of `multiprocessing`, are like those of `python`."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def ranks(surroundings: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(this process's rank, how many there are) of a launch by torchrun, accelerate or MPI; (0, 1) where it is none."""
    return _first(surroundings, _RANKS, 0), max(1, _first(surroundings, _WORLD_SIZES, 1))


def _first(surroundings: Mapping[str, str], names: tuple[str, ...], otherwise: int) -> int:
    for name in names:
        with suppress(KeyError, ValueError):
            return int(surroundings[name])
    return otherwise


def refuse_ranks(what: str) -> None:
    """Raise UsageError where this process is one of several that were launched together: `what` is not shared among them yet."""
    rank, count = ranks()
    if count > 1:
        raise UsageError(
            f"{what} was launched as {count} processes (this is rank {rank}), and works in one only",
            "Start it by itself, without torchrun, accelerate launch or mpirun. `compressor compare` and `compressor sample "
            "--processes N` use several GPUs by themselves.",
        )


@contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Interrupted inside, as Ctrl-C raises KeyboardInterrupt: what is open is closed, and children end."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(128 + number)

    with _handled(stop, TERMINATING):
        yield


@contextmanager
def _handled(stop: Callable[[int, object], None], numbers: tuple[int, ...]) -> Iterator[None]:
    """`stop` is called at these signals. Those that are ignored, as by nohup, stay ignored; threads get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in numbers if number != getattr(signal, "SIGHUP", None) or _is_heard(number)]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _is_heard(number: int) -> bool:
    return signal.getsignal(number) is not signal.SIG_IGN


def drive(
    events: Generator[Progress, None, _Result],
    show: Callable[[Progress], object],
    numbers: tuple[int, ...] = (signal.SIGINT, *TERMINATING),
) -> _Result:
    """What `events` returns; each event goes to `show`. The first of the signals `numbers` ends it with Interrupted, a second
    Ctrl-C at once with KeyboardInterrupt.

    After an event that is `unbroken`, Interrupted is thrown into `events` at the next one. After any other, what goes on is broken
    off where it is: sampling, measuring and calibrating, in whatever code of whoever's, keep nothing that is not whole.
    """
    received: list[int] = []
    held = False

    def stop(number: int, frame: object) -> None:
        received.append(number)
        if signal.SIGINT in numbers:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if not held:
            raise Interrupted(128 + number)

    with _handled(stop, numbers):
        thrown: Interrupted | None = None
        try:
            while True:
                try:
                    event = next(events) if thrown is None else events.throw(thrown)
                except StopIteration as finished:
                    result: _Result = finished.value
                    return result
                finally:
                    held = True
                show(event)
                thrown = Interrupted(128 + received[0]) if received else None
                held = event.unbroken or thrown is not None
        finally:
            held = True
            events.close()
