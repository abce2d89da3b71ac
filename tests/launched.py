"""Several processes as torchrun starts them, but forked from this one, so that they need no time to begin.

The processes meet at a port of this machine. What each returned, or raised, comes back; one that does not end is killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compressor import processes

PATIENCE = 240.0  # seconds; only a process that hangs takes so long


def surroundings(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    local = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
    return {**local, "RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def launched(action: Callable[[int], Any], count: int = 2) -> list[Any]:
    """What `action` (given its rank) returned or raised in each of `count` processes; its exit code, negative for a signal, where it
    did neither."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = [_forked(action, rank, count, port, Path(folder) / str(rank)) for rank in range(count)]
        codes = _waited(children)
        return [_result(Path(folder) / str(rank), codes[rank]) for rank in range(count)]


def _forked(action: Callable[[int], Any], rank: int, count: int, port: int, told: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads in this process: the child needs none
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(surroundings(rank, count, port))
        processes._joined.cache_clear()
        warnings.simplefilter("ignore")
        try:
            value = action(rank)
        except Exception as error:
            traceback.print_exc()
            value = error
        told.write_bytes(pickle.dumps(value))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _waited(children: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > deadline:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def _result(told: Path, code: int) -> Any:
    return pickle.loads(told.read_bytes()) if told.is_file() else code
