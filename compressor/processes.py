"""Processes: how they are started, how they are told to stop, and how many of them there are."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from compressor.errors import CompressorError, UsageError, causes
from compressor.progress import Progress

_Result = TypeVar("_Result")

TERMINATING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What ends a process that nobody looks after: `kill`, a scheduler, a terminal that is gone."""

_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
_MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(minutes=30)
"""How long a process waits for another one that is there and does not answer. One that died is noticed at once."""
_WORD = 5.0
"""Seconds that the first process waits for another one to say why it ended."""
_TRANSPORT = ("gloo", "nccl", "connection closed by peer", "connection reset", "tcpstore")


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


def refuse_ranks(what: str, why: str = "works in one only") -> None:
    """Raise UsageError where this process is one of several that were launched together: `what` is not shared among them."""
    rank, count = ranks()
    if count > 1:
        raise UsageError(
            f"{what} was launched as {count} processes (this is rank {rank}), and {why}",
            "Start it by itself, without torchrun, accelerate launch or mpirun. `compressor run`, `resume`, `record` and `sample` "
            "take torchrun and accelerate launch; `compressor compare` uses several GPUs by itself.",
        )


class Team:
    """The processes that a launcher started together, as one of them sees it. What it says travels between CPUs.

    Every process has to call the same methods in the same order. Alone (`size` 1), each gives back what it got.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank, self.size = rank, size
        self._group = group

    @property
    def leads(self) -> bool:
        """Whether this is the first process: the one that writes and prints."""
        return self.rank == 0

    def shared(self, value: _Result) -> _Result:
        """The `value` of the first process."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        held = [value]
        dist.broadcast_object_list(held, src=0, group=self._group)
        return held[0]

    def gathered(self, value: _Result) -> list[_Result]:
        """In the first process the `value` of each, by rank; in the others that of their own alone."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(value, found, dst=0, group=self._group)
        return [value] if found is None else found

    def in_turn(self, mine: Sequence[_Result]) -> list[_Result]:
        """In the first process all of a list of which each process has what stands at its rank, and at every `size`-th place from
        there; in the others what they have."""
        parts = self.gathered(list(mine))
        return [parts[n % len(parts)][n // len(parts)] for n in range(sum(map(len, parts)))]

    def summed(self, *numbers: float) -> list[float]:
        """Each of `numbers` added up over all processes."""
        return list(numbers) if self.size == 1 else self._reduced(numbers, "SUM")

    def largest(self, number: int) -> int:
        """The largest `number` of all processes."""
        return number if self.size == 1 else int(self._reduced([number], "MAX")[0])

    def _reduced(self, numbers: Sequence[float], how: str) -> list[float]:
        import torch
        import torch.distributed as dist

        held = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(held, getattr(dist.ReduceOp, how), group=self._group)
        found: list[float] = held.tolist()
        return found

    def broadcast_(self, tensor: Any) -> None:
        """Write the first process's values into `tensor`, on whatever device it is."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            held = tensor.detach().contiguous()
            sent = held.flatten().view(torch.uint8)  # not every transport knows every dtype
            dist.broadcast(sent, src=0, group=self._group if tensor.is_cpu else None)
            tensor.detach().copy_(held)

    def refuse_difference(self, what: str, found: str) -> None:
        """Raise CompressorError in all processes unless `found` (a hash of `what`) is the same in all of them."""
        if self.size > 1 and self.largest(int(self.shared(found) != found)):
            raise CompressorError(
                f"{what} of the {self.size} processes differ",
                "All must see the same weights, data and settings, and have the same versions and devices.",
            )


_ALONE = Team()


def team() -> Team:
    """Those that this process was launched with, of torchrun or accelerate. The first call waits until all are there.

    Raises UsageError where another launcher started several.
    """
    rank, count = ranks()
    return _joined(rank, count) if count > 1 else _ALONE


@cache
def _joined(rank: int, count: int) -> Team:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if any(name not in os.environ for name in _MEETING):
            refuse_ranks("this", "nothing says where they meet (MASTER_ADDR): torchrun or accelerate launch would")
        devices = torch.cuda.device_count()
        if (local := int(os.environ.get("LOCAL_RANK", "0"))) < devices:
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if devices else "gloo", timeout=_PATIENCE)
    return Team(rank, count, dist.new_group(backend="gloo", timeout=_PATIENCE))


@contextmanager
def together(*passing: type[Exception]) -> Iterator[None]:
    """What fails in one of the processes of a launch ends all, and the first one raises the error: its own, or that of the other.

    Exceptions of the kinds `passing` are an end in order, no error.
    """
    if ranks()[1] == 1:
        yield
        return
    here = team()
    in_order: tuple[type[BaseException], ...] = (Interrupted, *passing)
    try:
        yield
    except in_order:
        refuse_failed()
        raise
    except Exception as error:
        with suppress(ValueError):  # not in the main thread
            for number in TERMINATING:  # the launcher ends those that are left: they end by themselves, with a word
                signal.signal(number, signal.SIG_IGN)
        lost = _is_lost(error)
        if here.leads:
            if lost or not isinstance(error, CompressorError):  # else it is this one's own, whoever was faster
                refuse_failed(_WORD if lost else 0.0)
        elif not lost:
            _post(here.rank, error)
        if lost:
            raise CompressorError(
                f"one of the {here.size} processes of this launch died, or does not answer any more",
                "The launcher says which one. `compressor resume` goes on from the last checkpoint, with any number of processes.",
            ) from error
        raise


def refuse_failed(wait: float = 0.0) -> None:
    """Raise the error of another process of this launch, where one has failed; within `wait` seconds."""
    if ranks()[1] == 1:
        return
    deadline = time.monotonic() + wait
    with suppress(RuntimeError, KeyError, ValueError):  # the store may be gone, with the launcher
        store = _store()
        while not store.check([_failure()]):
            if time.monotonic() >= deadline:
                return
            time.sleep(0.05)
        found = json.loads(store.get(_failure()))
        raise _told(found)


def _told(found: Mapping[str, Any]) -> CompressorError:
    error = CompressorError(f"process {found['rank']}: {found['message']}", found["hint"])
    error.exit_code = int(found["code"])
    return error


def _post(rank: int, error: Exception) -> None:
    said = {
        "rank": rank,
        "message": error.message if isinstance(error, CompressorError) else f"{type(error).__name__}: {error}",
        "hint": error.hint
        if isinstance(error, CompressorError)
        else "The crash file of that process, in the cache folder of its machine, has the traceback.",
        "code": error.exit_code if isinstance(error, CompressorError) else 1,
    }
    with suppress(RuntimeError, KeyError, ValueError):
        _store().compare_set(_failure(), "", json.dumps(said))


def _failure() -> str:
    return f"compressor/failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store() -> Any:
    """The store at which the processes met; it is the launcher's, and outlives them."""
    import torch.distributed as dist

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=_WORD)
    return dist.TCPStore(*where, is_master=False, wait_for_workers=False, timeout=wait)  # type: ignore[attr-defined]


def _is_lost(error: BaseException) -> bool:
    """Whether `error`, or one behind it, says that another process does not answer any more."""
    said = (f"{type(one).__name__} {one}".lower() for one in causes(error) if isinstance(one, RuntimeError))
    return any(word in text for text in said for word in _TRANSPORT)


@contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Interrupted inside, as Ctrl-C raises KeyboardInterrupt: what is open is closed, and children end.

    So does what a library makes of them: an import that is broken off, say, and fails in another place later.
    """
    received: list[BaseException] = []

    def stop(number: int, frame: object) -> None:
        received.append(KeyboardInterrupt() if number == signal.SIGINT else Interrupted(128 + number))
        raise received[0]

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with _handled(stop, (*TERMINATING, *[signal.SIGINT] * usual)):
        try:
            yield
        except Exception as error:
            if received:
                raise received[0] from error
            raise


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
