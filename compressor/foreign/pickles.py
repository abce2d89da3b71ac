"""A look at a pickle before PyTorch's reader takes it, which runs nothing, but can be kept busy for ever or ended with its process.

A tuple that holds one tuple twice, which holds one twice, and so on, takes a few bytes for each doubling. As the key of a dict, its
hash goes through all of it; that of a million tuples inside each other goes a million calls deep, and ends the process.
So what is counted is how large and how deep every value is once it is written out.
"""

from __future__ import annotations

import pickletools
from collections.abc import Sequence
from typing import IO, Any

_KEY = (1000, 100)
"""The most values in a key, and the most levels of them: keys are names and numbers."""
_ARGUMENTS = (1_000_000, 1000)
"""The same of what is handed to a function, such as the items of an ordered dict."""

_Size = tuple[int, int]
_ONE: _Size = (1, 1)


def check_keys(pickle: bytes | IO[bytes]) -> None:
    """Raise ValueError where a pickle has keys of dicts that no file needs. What is no pickle at all is left to its reader.

    Of a file, what is read is the pickle from where it stands, so that those behind it can be asked next.
    """
    stack: list[_Size | None] = []  # of each value, how large and how deep it is; None for a mark
    memo: dict[int, _Size] = {}
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            name = opcode.name
            if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = (stack[-1] if stack else None) or _ONE
            elif name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo.get(int(argument or 0), _ONE))
            else:
                taken = _taken(stack, opcode)
                _check(name, taken)
                made = (
                    min(1 + sum(size for size, _ in taken), 2**62),
                    1 + max((depth for _, depth in taken), default=0),
                )
                stack.extend(None if kind.name == "mark" else made for kind in opcode.stack_after)
    except _EndlessError:
        raise
    except Exception:  # whatever pickletools raises on what is no pickle
        return


class _EndlessError(ValueError):
    pass


def _taken(stack: list[_Size | None], opcode: Any) -> list[_Size]:
    """What an instruction takes from the stack, the last first."""
    before = [kind.name for kind in opcode.stack_before]
    taken: list[_Size] = []
    if "mark" in before:
        while stack and (found := stack.pop()) is not None:
            taken.append(found)
        before = before[: before.index("mark")]
    for _ in before:
        taken.append((stack.pop() if stack else None) or _ONE)
    return taken


def _check(name: str, taken: Sequence[_Size]) -> None:
    if name in ("SETITEM", "SETITEMS", "DICT"):
        hashed, most = taken[1::2], _KEY
    elif name in ("ADDITEMS", "FROZENSET"):
        hashed, most = taken, _KEY
    else:
        hashed, most = taken[:1] if name in ("REDUCE", "NEWOBJ", "BUILD") else (), _ARGUMENTS
    if any(size > most[0] or depth > most[1] for size, depth in hashed):
        raise _EndlessError("a key of a dict in it is nested without end")
