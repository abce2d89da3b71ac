"""One family of errors. Inner code states the fact; the public function adds where it happened.

A message says where, what was found and what is allowed; the hint says what to do. Only the command line turns an
error into an exit code, and only it prints.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches


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


class UsageError(CompressorError):
    """A name, flag or recipe that cannot be meant."""

    exit_code = 2


class GateError(CompressorError):
    """What was made differs from what it was made of by more than is allowed, and was thrown away."""

    exit_code = 3


class LockedError(CompressorError):
    """Another process works in the output directory."""

    exit_code = 4


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


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a message: its first line, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


_STEERING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    """`text` on one line, without what steers a terminal or an editor: control characters, those that turn the direction of writing
    round or that nobody sees, halves of characters."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter for letter in text if unicodedata.category(letter) not in _STEERING)
