"""Names with dots for what lies in nested dicts and tuples, as files of arrays and of JSON have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.errors import CompressorError


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`flat` with `a.b` as `{"a": {"b": …}}`; where all names of a dict are 0, 1, …, it is a tuple.

    Raises CompressorError for a name that is both a value and a dict.
    """
    found: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, _Dict())
            if not isinstance(inner, _Dict):
                raise CompressorError(f"{name}: {part} is an array itself", "A name cannot be both.")
        if last in inner:
            raise CompressorError(f"{name}: there are arrays below it", "A name cannot be both.")
        inner[last] = value
    return {name: _closed(value) for name, value in found.items()}


class _Dict(dict[str, Any]):
    """A dict that `nested` made; values may be dicts too."""


def _closed(value: Any) -> Any:
    if not isinstance(value, _Dict):
        return value
    places = [str(index) for index in range(len(value))]
    if set(value) == set(places):
        return tuple(_closed(value[place]) for place in places)
    return {name: _closed(inner) for name, inner in value.items()}


def flat(inputs: Any, prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`: the leaves of dicts, lists and tuples by names with dots."""
    if isinstance(inputs, Mapping):
        pairs = [(str(name), value) for name, value in inputs.items()]
    elif isinstance(inputs, (list, tuple)):
        pairs = [(str(index), value) for index, value in enumerate(inputs)]
    else:
        return {prefix: inputs}
    found: dict[str, Any] = {}
    for name, value in pairs:
        found |= flat(value, f"{prefix}.{name}" if prefix else name)
    return found
