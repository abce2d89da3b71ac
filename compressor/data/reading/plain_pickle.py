"""Reads the few things that CIFAR's pickles are made of: dicts, lists, texts, numbers and arrays of bytes.

A pickle is a program for a small stack machine. Python's has instructions that import and call; this one reads the same
program and has none: a name stays a name, and a call of anything but the two that arrays are written with is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_DTYPE = "numpy dtype"


@dataclass(frozen=True)
class _Name:
    """What a pickle calls by name: never looked up."""

    text: str


@dataclass
class _Call:
    """A call that a pickle asks for: never made. `array` is what it stands for, once its content has come."""

    name: str
    arguments: tuple[Any, ...]
    array: NDArray[np.uint8] | None = None


class _Mark:
    """Where the items of a list, tuple or dict begin on the stack."""


def load(content: bytes) -> dict[Any, Any]:
    """The dict that a pickle of protocol 2 to 4 holds; arrays are of uint8. Nothing is imported or called.

    Raises ValueError, with the reason, for damaged content and for whatever else a pickle may hold.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                break
            _step(opcode.name, argument, stack, memo)
        (found,) = stack
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeError, RecursionError, OverflowError) as error:
        raise ValueError(f"damaged: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__}, not a dict")
    return {key: value.array if isinstance(value, _Call) else value for key, value in found.items()}


def _step(name: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _VALUES:
        stack.append(argument)
    elif name in _MAKERS:
        stack.append(_MAKERS[name]())
    elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("APPEND", "APPENDS"):
        items = _popped(stack, 1 if name == "APPEND" else None)
        list.extend(stack[-1], items)
    elif name in ("SETITEM", "SETITEMS"):
        items = _popped(stack, 2 if name == "SETITEM" else None)
        if any(not isinstance(key, (str, bytes)) for key in items[::2]):  # hashing nested tuples can take forever
            raise ValueError("it holds a dict whose keys are no texts")
        dict.update(stack[-1], zip(items[::2], items[1::2], strict=True))
    elif name in _TUPLES:
        stack.append(tuple(_popped(stack, _TUPLES[name])))
    elif name in ("GLOBAL", "STACK_GLOBAL"):
        stack.append(_Name(argument if name == "GLOBAL" else " ".join(_popped(stack, 2))))
    elif name == "REDUCE":
        called, arguments = _popped(stack, 2)
        stack.append(_called(called, arguments))
    elif name == "BUILD":
        made, state = _popped(stack, 2)
        _fill(made, state)
        stack.append(made)
    elif name not in ("PROTO", "FRAME"):
        raise ValueError(f"it holds {name}, which no CIFAR batch needs")


def _popped(stack: list[Any], number: int | None) -> list[Any]:
    """The last `number` items, or all behind the last mark, taken from the stack."""
    marks = (index for index in range(len(stack), 0, -1) if isinstance(stack[index - 1], _Mark))
    first = len(stack) - number if number is not None else next(marks, -1)
    if first < 0:
        raise IndexError("the stack is empty")
    items = stack[first:]
    del stack[first if number is not None else first - 1 :]
    return items


def _called(called: Any, arguments: Any) -> _Call:
    name = called.text if isinstance(called, _Name) else type(called).__name__
    if name in _RECONSTRUCT or name == _DTYPE:
        return _Call(name, arguments)
    raise ValueError(f"it calls {name.replace(' ', '.')!r}, which no CIFAR batch needs")


def _fill(made: Any, state: Any) -> None:
    """Give an array its content; a dtype's state says nothing more (uint8 has no byte order)."""
    if not isinstance(made, _Call):
        raise ValueError(f"it changes {type(made).__name__}, which no CIFAR batch needs")
    if made.name == _DTYPE:
        return
    _, shape, dtype, fortran, raw = state
    if not isinstance(dtype, _Call) or dtype.arguments[0] not in ("u1", b"u1") or fortran is not False:
        raise ValueError("it holds an array that is not of uint8 in rows")
    made.array = np.frombuffer(str.encode(raw, "latin1") if isinstance(raw, str) else raw, np.uint8).reshape(shape)


_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1"),
    *("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINBYTES", "SHORT_BINBYTES"),
}
_MAKERS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}
