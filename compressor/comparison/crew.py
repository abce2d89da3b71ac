"""The processes that do a comparison's jobs: each does one after another, and one that dies loses no more than its own."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from compressor.comparison.claims import Claims
from compressor.comparison.worker import ENDED, ROW, RUN, SEEN
from compressor.files import LOCK
from compressor.processes import python
from compressor.progress import Progress

_PATIENCE = 60.0  # seconds that all workers together get to finish their steps and save them
_PAUSE = 1.0  # seconds between two looks at what others do
_UNSEEN = 120  # looks at a job that another computer has done and that is not to be seen


@dataclass(eq=False)
class _Worker:
    """A process, the GPU that it alone sees (None: the CPU), and the folder of the job that it does now."""

    process: subprocess.Popen[str]
    device: str | None
    job: Path | None = None


class Crew:
    """As many processes as there are `devices`, started when they are needed. Leaving the `with` block ends them.

    With `claims`, others do some of the same jobs: then each is claimed first.
    """

    def __init__(self, devices: Sequence[str | None], claims: Claims | None = None) -> None:
        self._free, self._count = list(devices), len(devices)
        self._claims = claims
        self._unseen: dict[Path, int] = {}
        self._gone: list[_Worker] = []
        self._looked = self._fruitless = -math.inf
        self._workers: list[_Worker] = []
        self._events: queue.Queue[tuple[_Worker, str | None]] = queue.Queue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            if worker.job is not None:
                worker.process.terminate()
            if hasattr(signal, "SIGCONT"):
                worker.process.send_signal(signal.SIGCONT)  # one that was suspended hears nothing
            with suppress(OSError):
                worker.process.stdin.close()  # type: ignore[union-attr]
        deadline = time.monotonic() + _PATIENCE
        try:
            for worker in self._workers:
                with suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(0.0, deadline - time.monotonic()))
        finally:  # at a second Ctrl-C, too
            for worker in (*self._workers, *self._gone):
                worker.process.kill()
                _end(worker)

    def carry_out(self, folders: Sequence[Path]) -> Iterator[Progress]:
        """Do the jobs of `folders` that are not done."""
        waiting = [folder for folder in folders if not _is_done(folder)]
        done, total = 0, len(waiting)
        if waiting:
            yield Progress("cells", 0, total, unbroken=True)
        while done < total:
            waiting += self._lost()
            for gone, note in self._elsewhere(waiting):
                waiting.remove(gone)
                done += 1
                yield Progress("cells", done, total, f"{gone.name} {note}", unbroken=True)
            while self._has_room() and (taken := self._taken(waiting)) is not None:
                self._give(self._idle(), taken)
            if done == total:
                break
            try:
                worker, line = self._events.get(timeout=1)
            except queue.Empty:
                yield Progress("cells", done, total, unbroken=True)  # so that the caller can stop this at any time
                continue
            if worker in self._gone:
                continue
            folder = worker.job
            if line is None:  # it ended, with its job or without one
                _end(worker)
                self._workers.remove(worker)
                self._free.append(worker.device)
            elif folder is not None and line.strip() != ENDED:
                if (event := _event(folder, line)) is not None:
                    yield event
                continue
            worker.job = None
            if folder is not None:
                done += 1
                note = "" if (folder / ROW).is_file() else f"failed: {reason(folder)}"
                if self._claims is not None:
                    self._claims.release(_claim(folder), "failed" if note else "done")
                yield Progress("cells", done, total, f"{folder.name} {note}".strip(), unbroken=True)

    def _has_room(self) -> bool:
        return bool(self._free) or any(worker.job is None for worker in self._workers)

    def _taken(self, waiting: list[Path]) -> Path | None:
        """The next of the jobs that are `waiting`, which it leaves; with claims, the next one that nobody else has."""
        if self._claims is None:
            return waiting.pop(0) if waiting else None
        if time.monotonic() - self._fruitless < _PAUSE:
            return None
        for folder in waiting:
            if self._claims.take(name := _claim(folder)):
                if _is_done(folder):  # since it was looked at
                    self._claims.release(name, "done")
                    continue
                if self._claims.was_of_another(name):  # where locks are files, those of a computer that is gone stay
                    for left in (LOCK, f"{LOCK}-holder"):
                        (folder / RUN / left).unlink(missing_ok=True)
                waiting.remove(folder)
                return folder
        self._fruitless = time.monotonic()
        return None

    def _elsewhere(self, waiting: Sequence[Path]) -> list[tuple[Path, str]]:
        """The jobs of `waiting` that others did since, with what there is to say of each."""
        found: list[tuple[Path, str]] = []
        if self._claims is None or time.monotonic() - self._looked < _PAUSE:
            return found
        self._looked = time.monotonic()
        for folder in waiting:
            state = self._claims.state(_claim(folder))
            if _is_done(folder):
                found.append((folder, "elsewhere"))
                continue
            if state == "done":  # a network's file system may show a file a minute after what says that it is there
                self._unseen[folder] = self._unseen.get(folder, 0) + 1
            if state == "failed" or self._unseen.get(folder, 0) > _UNSEEN:
                found.append((folder, f"failed elsewhere: {reason(folder)}"))
        return found

    def _lost(self) -> list[Path]:
        """The jobs that others may have now: the processes that were at them are ended at once."""
        lost = []
        for worker in self._workers if self._claims is not None else ():
            if worker.job is not None and self._claims.is_lost(_claim(worker.job)):  # type: ignore[union-attr]
                worker.process.kill()
                worker.process.wait()
                lost.append(worker.job)
                self._claims.release(_claim(worker.job), "free")  # type: ignore[union-attr]
                self._gone.append(worker)
                self._free.append(worker.device)
        self._workers = [worker for worker in self._workers if worker not in self._gone]
        return lost

    def _idle(self) -> _Worker:
        """A worker without a job; a new one where a device is free. There is one or the other (`_has_room`)."""
        if (idle := next((worker for worker in self._workers if worker.job is None), None)) is not None:
            return idle
        worker = _started(self._free.pop(0), self._count, None if self._claims is None else self._claims.holder.host)
        self._workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()
        return worker

    def _give(self, worker: _Worker, folder: Path) -> None:
        (folder / "error.txt").unlink(missing_ok=True)
        worker.job = folder
        with suppress(OSError):  # it died: its end is among the events
            worker.process.stdin.write(f"{json.dumps(str(folder))}\n")  # type: ignore[union-attr]
            worker.process.stdin.flush()  # type: ignore[union-attr]

    def _listen(self, worker: _Worker) -> None:
        for line in worker.process.stdout or ():
            self._events.put((worker, line))
        self._events.put((worker, None))


def _claim(folder: Path) -> str:
    """What the claim on the job of `folder` is called."""
    return folder.name if folder.name == "dense" else f"{folder.parent.name}-{folder.name}"


def reason(folder: Path) -> str:
    """Why the job of `folder` failed, in a line."""
    path = folder / "error.txt"
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    lines = text.splitlines() or ["the process ended without a word (killed, or out of memory)"]
    return lines[0][:200]


def _started(device: str | None, workers: int, host: str | None) -> _Worker:
    surroundings = dict(os.environ)
    if device is not None:
        surroundings["CUDA_VISIBLE_DEVICES"] = device
    elif workers > 1:
        surroundings["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    process = subprocess.Popen(
        python("-m", "compressor.comparison", *(() if host is None else (host,))),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=surroundings,
        start_new_session=True,  # Ctrl-C is for this process, which stops the others in order
    )
    return _Worker(process, device)


def _end(worker: _Worker) -> None:
    worker.process.wait()
    for pipe in (worker.process.stdin, worker.process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def _is_done(folder: Path) -> bool:
    if not (folder / ROW).is_file():
        return False
    return folder.name != "dense" or (folder / SEEN).is_file()


def _event(folder: Path, line: str) -> Progress | None:
    try:
        found = json.loads(line)
        return Progress(f"{folder.name}: {found['stage']}", found["done"], found["total"], found["note"], unbroken=True)
    except (ValueError, LookupError, TypeError):  # something that a plugin printed
        return None
