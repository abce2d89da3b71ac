"""The streams and the surroundings of the process: nothing that happens to a pipe, a full device or an encoding ends a run."""

from __future__ import annotations

import ctypes
import io
import os
import platform
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, Self, TextIO

from compressor import __version__
from compressor.processes import ranks


class _Lossy(io.FileIO):
    """A file that drops what cannot be written, where that is for a reason of the kind `forgiven`."""

    forgiven: type[OSError] = OSError

    def write(self, data: Any) -> int:
        """Write what can be written."""
        try:
            written: int | None = super().write(data)
        except self.forgiven:
            written = None
        return memoryview(data).nbytes if written is None else written


class _Unread(_Lossy):
    """One whose reader may go: what fails for another reason is told."""

    forgiven = BrokenPipeError


def settle() -> None:
    """Make this process safe to run for days. To be called once, by the console script.

    - Descriptors that are closed are opened on nothing: else the next file that is opened, a checkpoint, would take stdout's number.
    - Progress is dropped where it cannot be written: the reader of a pipe may be gone, the device full. Results are dropped where
      nobody reads them any more.
    - What an encoding has no word for is written as escapes: a table in ASCII is better than an error after hours.
    - Warnings of libraries stay warnings, also with PYTHONWARNINGS=error.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(_Unread(1, "w", closefd=False), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(_Lossy(2, "w", closefd=False), sys.stderr)
    if any("error" in option for option in sys.warnoptions):
        sys.warnoptions[:] = ["default"]  # processes that are started get these
        os.environ["PYTHONWARNINGS"] = "default"
        warnings.simplefilter("default")


def _stream(raw: io.FileIO, before: TextIO | None) -> TextIO:
    """Text to `raw` as `before` writes it; with escapes where the encoding has no word."""
    encoding = "utf-8" if before is None else before.encoding
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=True)


@contextmanager
def hushed() -> Iterator[None]:
    """Of several processes that were launched together, all but the first say nothing: each line would be there many times."""
    rank, count = ranks()
    if count == 1 or rank == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


class ResultsAlone:
    """While it is entered, standard output is for results alone: what anything else prints to it, code of plugins and processes that
    they start too, goes to stderr. Where stdout is no descriptor of the process, as in tests, what Python prints does.
    """

    def __init__(self) -> None:
        self._stdout: TextIO | None = None
        self._kept: int | None = None

    def __enter__(self) -> Self:
        self._stdout = sys.stdout
        if _is_descriptor(sys.stdout, 1):
            self._kept = os.dup(1)
        self._lead_away()
        return self

    def __exit__(self, *_: object) -> None:
        self._lead_back()
        if self._kept is not None:
            os.close(self._kept)
            self._kept = None

    @contextmanager
    def result(self) -> Iterator[None]:
        """Here, standard output is what it was."""
        self._lead_back()
        try:
            yield
        finally:
            self._lead_away()

    def _lead_away(self) -> None:
        if self._kept is not None:
            os.dup2(2, 1)
        sys.stdout = sys.stderr

    def _lead_back(self) -> None:
        sys.stdout = self._stdout
        if self._kept is not None:
            with suppress(OSError, AttributeError, ValueError):  # what others have printed and still hold
                if sys.__stdout__ is not None and sys.__stdout__ is not self._stdout:
                    sys.__stdout__.flush()
                ctypes.CDLL(None).fflush(None)
            os.dup2(self._kept, 1)


def _is_descriptor(stream: TextIO | None, number: int) -> bool:
    try:
        return stream is not None and stream.fileno() == number
    except (OSError, ValueError):  # a stream of another kind, or a closed one
        return False


def flushed() -> int:
    """Write out what stdout still holds; the exit code: 1 where that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)  # where Python writes the rest when it ends
        print(f"error: the standard output cannot be written to: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def crashed(error: BaseException) -> str:
    """Keep what a report of `error` needs, in a file of the user's cache folder; a sentence that says where and what to do."""
    lines = "".join(traceback.format_exception(error))
    text = f"compressor {__version__}, {platform.python_implementation()} {platform.python_version()}, {platform.platform()}\n"
    text += "".join(f"{package} {found}\n" for package in _packages() if (found := _version(package)) is not None)
    try:
        text += f"command: {sys.argv!r}\nfolder: {os.getcwd()!r}\n\n{lines}"
        from compressor.environment import cache_folder  # which imports torch, and that may be what fails

        folder = cache_folder("crashes")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except (OSError, ImportError):
        return "Run again with --debug for the traceback, and please report it."
    return f"Please report it with this file, which has the traceback, the command and the versions: {path}"


def _packages() -> list[str]:
    """What this toolkit asks for when it is installed."""
    from importlib import metadata

    try:
        asked = metadata.requires("diffusion-compressor") or []
    except metadata.PackageNotFoundError:
        asked = []
    return sorted({re.split(r"[^\w.-]", one, maxsplit=1)[0] for one in asked})


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
