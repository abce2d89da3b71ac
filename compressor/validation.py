"""Values that are checked against a pydantic model, with errors that name the key, what was found and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from compressor import files
from compressor.errors import UTF_8, CompressorError, UsageError, decoded, did_you_mean, has_half

_Model = TypeVar("_Model", bound=BaseModel)


_OF_RECIPES = "The recipe.yaml of any run has every setting with a value that is allowed."


def validated(model: type[_Model], values: Mapping[str, Any], where: str, hint: str = _OF_RECIPES) -> _Model:
    """`values` as a `model`, or a UsageError that names the key, what was found and what is allowed, with `hint`."""
    if (broken := _half(values)) is not None:
        if (name := decoded(broken)).isprintable():
            raise UsageError(f"{where}: {name!r} has letters that the locale has no word for", f"{UTF_8}.")
        raise UsageError(
            f"{where}: {broken!r} has half a character in it, which no file can hold", "Write it in UTF-8."
        )
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = _path(first["loc"])
        if first["type"] == "extra_forbidden":
            inner: type[BaseModel] | None = model
            for part in first["loc"][:-1]:
                if inner is not None and part in inner.model_fields:  # else the place in a list or a dict of such
                    inner = _section(inner, str(part))
            names = list(inner.model_fields) if inner is not None else []
            if len(first["loc"]) == 1:  # a setting of a section may be named without it
                sections = {name: section for name in names if (section := _section(model, name)) is not None}
                names += [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]
            raise UsageError(
                f"{where}: unknown setting {path!r}", did_you_mean(str(first["loc"][-1]), names)
            ) from error
        found = repr(first["input"])
        raise UsageError(
            f"{where}: {path}: {first['msg'].lower()}, found {found[:80]}",
            hint,
        ) from error


def from_file(model: type[_Model], path: Path, what: str, hint: str) -> _Model:
    """The JSON file at `path` as a `model`. Raises CompressorError, with the field at fault, where it is not `what` it should be.

    `hint` says what to do then.
    """
    try:
        values = files.read_json(path)
        if (broken := _half(values)) is not None:
            raise CompressorError(f"{path}: not {what}: {broken!r} has half a character in it")
        return model.model_validate(values)
    except CompressorError as error:
        raise CompressorError(error.message, hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        found = "" if first["type"] == "missing" else f", found {repr(first['input'])[:80]}"
        if first["loc"] == ("schema_version",) and found:
            hint = f"Another version of the toolkit wrote it, which reads it. {hint}"
        raise CompressorError(
            f"{path}: not {what}: {_path(first['loc'])}: {first['msg'].lower()}{found}", hint
        ) from error


def _half(value: Any) -> str | None:
    """A text inside `value` that `has_half` of a character."""
    if isinstance(value, str):
        return value[:80] if has_half(value) else None
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = chain(value, value.values())
    elif isinstance(value, (list, tuple)):
        parts = value
    return next((found for part in parts if (found := _half(part)) is not None), None)


def _path(parts: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in parts)


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model that the field `name` of `model` holds; None where it holds something else."""
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    return next((one for one in _classes(annotation) if issubclass(one, BaseModel)), None)


def _classes(annotation: Any) -> Iterator[type]:
    """The classes in an annotation: itself, or those inside of `tuple[X, ...]`, `dict[str, X]` and `X | None`."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for inner in get_args(annotation):
        yield from _classes(inner)
