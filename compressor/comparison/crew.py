"""The processes that do a comparison's jobs: each does one after another, and one that dies loses no more than its own."""

from __future__ import annotations

import json
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

from compressor.comparison.worker import ENDED, ROW, SEEN
from compressor.processes import python
from compressor.progress import Progress

_PATIENCE = 60.0  # seconds that all workers together get to finish their steps and save them


@dataclass(eq=False)
class _Worker:
    """A process, the GPU that it alone sees (None: the CPU), and the folder of the job that it does now."""

    process: subprocess.Popen[str]
    device: str | None
    job: Path | None = None


class Crew:
    """As many processes as there are `devices`, started when they are needed. Leaving the `with` block ends them."""

    def __init__(self, devices: Sequence[str | None]) -> None:
        self._free, self._count = list(devices), len(devices)
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
            for worker in self._workers:
                worker.process.kill()
                _end(worker)

    def carry_out(self, folders: Sequence[Path]) -> Iterator[Progress]:
        """Do the jobs of `folders` that are not done."""
        waiting = [folder for folder in folders if not _is_done(folder)]
        done, total = 0, len(waiting)
        if waiting:
            yield Progress("cells", 0, total, unbroken=True)
        while done < total:
            while waiting and (worker := self._idle()) is not None:
                self._give(worker, waiting.pop(0))
            try:
                worker, line = self._events.get(timeout=1)
            except queue.Empty:
                yield Progress("cells", done, total, unbroken=True)  # so that the caller can stop this at any time
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
                yield Progress("cells", done, total, f"{folder.name} {note}".strip(), unbroken=True)

    def _idle(self) -> _Worker | None:
        """A worker without a job; a new one where a device is free; None where all have something to do."""
        if (idle := next((worker for worker in self._workers if worker.job is None), None)) is not None:
            return idle
        if not self._free:
            return None
        worker = _started(self._free.pop(0), self._count)
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


def reason(folder: Path) -> str:
    """Why the job of `folder` failed, in a line."""
    path = folder / "error.txt"
    text = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
    lines = text.splitlines() or ["the process ended without a word (killed, or out of memory)"]
    return lines[0][:200]


def _started(device: str | None, workers: int) -> _Worker:
    surroundings = dict(os.environ)
    if device is not None:
        surroundings["CUDA_VISIBLE_DEVICES"] = device
    elif workers > 1:
        surroundings["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    process = subprocess.Popen(
        python("-m", "compressor.comparison"),
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
