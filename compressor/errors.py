"""One family of errors. Inner code states the fact; the public function adds where it happened.

A message says where, what was found and what is allowed; the hint says what to do. Only the command line turns an
error into an exit code, and only it prints.
"""

from __future__ import annotations

import errno
import shlex
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Event = TypeVar("_Event")
_Result = TypeVar("_Result")


class CompressorError(Exception):
    """Something that the caller can put right. `hint` says how; `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class ReshapedError(CompressorError):
    """A model whose structure was made smaller is no model that another library knows; it is whole as it is."""


class Refusal:
    """What takes the place of a method that would do something wrong, or nothing: called, it raises a CompressorError."""

    def __init__(self, message: str, hint: str) -> None:
        self.message, self.hint = message, hint

    def __call__(self, *_: object, **__: object) -> None:
        raise CompressorError(self.message, self.hint)


class UsageError(CompressorError):
    """A name, flag or recipe that cannot be meant."""

    exit_code = 2


class GateError(CompressorError):
    """What was made differs from what it was made of by more than is allowed, and was thrown away."""

    exit_code = 3


class LockedError(CompressorError):
    """Another process works in the output directory."""

    exit_code = 4


class MemoryShortError(CompressorError):
    """The memory of the machine, or of a GPU, was not enough."""


Work = Literal["training", "calibration", "sampling", "measuring", "lowering", "loading"]
_LESS: dict[str, str] = {
    "training": "Split each batch (train.accumulate=4 changes no number beyond rounding), give train.gradient_checkpointing=true, "
    "train.optimizer=adamw-8bit or, on a GPU, train.offload=[optimizer,ema,shadow], or a smaller train.batch_size.",
    "calibration": "Give a smaller train.batch_size, or let the method keep less: its card has the settings.",
    "sampling": "Draw fewer at once: evaluate.batch_size, and with `compressor sample` --batch-size and --processes.",
    "measuring": "Measure on fewer samples (evaluate.samples), or on smaller batches (evaluate.batch_size, evaluate.latency_batch).",
    "lowering": "Lower for a smaller batch (--batch, or a smaller example), or name fewer backends.",
    "loading": "Keep less of the data's pixels in memory (loading.cache_mb), end other programs, or take a machine with more memory.",
}
"""What to change, by what was done."""
_SAID = ("DefaultCPUAllocator", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED", "Cannot allocate memory")
"""Parts of what torch, CUDA, cuBLAS, cuDNN and the operating system say."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what was behind it, each once: `raise error from error` makes a circle."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def memory_behind(error: BaseException | None) -> BaseException | None:
    """The error behind `error`, or itself, that says that there is no memory left; None where there is none.

    Much code takes whatever a library raises for a damaged file or a model that does not fit, and says so: what was behind it knows.
    """
    for one in causes(error):
        if isinstance(one, MemoryShortError):
            return None
        if _is_memory_short(one):
            return one
    return None


def _is_memory_short(error: BaseException) -> bool:
    """Whether it does: Python's error, torch's on a GPU or not, or the system's."""
    # torch's: this file does not need torch
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    named = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    return named and any(part in str(error) for part in _SAID)


def memory_short(error: BaseException, doing: str = "") -> MemoryShortError:
    """What is to be said of an `error` of memory that came while `doing` something (`Work`)."""
    said = first_line(error)
    said = said[max(0, said.find("DefaultCPUAllocator")) :]  # before it is where in torch's own source it was found
    during = f" while {_DURING.get(doing, doing)}" if doing else ""
    hint = _LESS.get(doing, "Work on less at once (batch sizes, samples), or take a machine with more memory.")
    return MemoryShortError(f"out of memory{during}: {said}", hint)


_DURING = {"calibration": "calibrating"}


@contextmanager
def memory(doing: Work) -> Iterator[None]:
    """An error in the block that says that memory is short, or has one behind it, is a MemoryShortError, which says what to change.

    Also a decorator of functions; `memory_in` is one of generators. The innermost of several says what was done.
    """
    try:
        yield
    except Exception as error:
        if (behind := memory_behind(error)) is None:
            raise
        raise memory_short(behind, doing) from error


def memory_in(
    doing: Work,
) -> Callable[[Callable[_Given, Generator[_Event, None, _Result]]], Callable[_Given, Generator[_Event, None, _Result]]]:
    """As `memory`, a decorator of generators."""

    def decorate(
        function: Callable[_Given, Generator[_Event, None, _Result]],
    ) -> Callable[_Given, Generator[_Event, None, _Result]]:
        @wraps(function)
        def wrapped(*args: _Given.args, **named: _Given.kwargs) -> Generator[_Event, None, _Result]:
            with memory(doing):
                return (yield from function(*args, **named))

        return wrapped

    return decorate


@contextmanager
def said_of(where: object) -> Iterator[None]:
    """An error of the family in the block is a CompressorError that says `where` first."""
    try:
        yield
    except CompressorError as error:
        raise CompressorError(f"{where}: {error.message}", error.hint) from error


def did_you_mean(found: str, allowed: Iterable[str]) -> str:
    """`did you mean 'sparsedm'? ` plus the list of what exists, for the hint of an error."""
    names = sorted(allowed)
    close = get_close_matches(found, names, n=1, cutoff=0.5)
    listing = ", ".join(names) if names else "none"
    return (f"Did you mean {close[0]!r}? " if close else "") + f"Available: {listing}."


def one_of(where: str, found: str, allowed: Sequence[str]) -> None:
    """Refuse a choice that does not exist."""
    if found not in allowed:
        raise UsageError(f"{where}: there is no {found!r}", did_you_mean(str(found), allowed))


def texts(where: str, found: Iterable[str]) -> tuple[str, ...]:
    """`found` as a tuple. Raises UsageError unless it is some texts that can be read again: a single one would be taken letter by
    letter."""
    if isinstance(found, str):
        raise UsageError(f"{where} is the text {found!r}", f"Give a list: [{found!r}].")
    if isinstance(found, Iterator) or not isinstance(found, Iterable):
        raise UsageError(f"{where}: a {type(found).__name__}", "Give a list of texts.")
    several = tuple(found)
    if wrong := [one for one in several if not isinstance(one, str)]:
        raise UsageError(f"{where} holds a {type(wrong[0]).__name__}: {wrong[0]!r:.80}", "Allowed: texts.")
    return several


OF_COMPARISON = "Give the folder of one of its trainings: cells/NAME/run."
"""What to do where a comparison is given and a run is wanted."""


def how_to_finish(folder: Path, otherwise: str = "Give the directory of a finished run.") -> str:
    """What to do where `folder` has no report or model yet; `otherwise` where no comparison and no run has begun there."""
    if (folder / "cells").is_dir():
        return "It is a comparison that is not finished: the same `compressor compare` command goes on with it."
    if all((folder / name).is_file() for name in ("run.json", "recipe.yaml")):
        return f"Finish the run first: {resume_command(folder)}"
    return otherwise


def resume_command(run: Path) -> str:
    """The command that continues the run in the directory `run`, for a shell."""
    return shlex.join(["compressor", "resume", str(run)])


_LONGEST = 200


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a message: its first line, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= _LONGEST else f"{lines[0][: _LONGEST - 1]}…"


def has_half(text: str) -> bool:
    """Whether `text` has half of a pair of surrogates, which no file can hold and no encoder reads: JSON and YAML can name one, and a
    file name that is no UTF-8 is read as one."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def decoded(text: str) -> str:
    """`text` with the letters that names of files have in UTF-8 and that the locale has no word for: Python holds their bytes as
    halves of characters there, and so stay those that are no UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # other halves
        return text


UTF_8 = "Set a locale of UTF-8 (LC_ALL=C.UTF-8, or PYTHONUTF8=1)"
"""What to do where a name has letters that the locale has no word for."""


_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    """`text` on one line, without what steers a terminal or an editor: control characters, those that turn the direction of writing
    round or that nobody sees, halves of characters."""
    if text.isascii() and text.isprintable():
        return text
    text = decoded(text)
    return "".join(letter for letter in text if unicodedata.category(letter) not in _STEERING)
