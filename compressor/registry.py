"""Plugins, found by entry points. Listing loads nothing; only what is asked for is imported, and its errors are named."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from compressor.errors import CompressorError, UsageError, did_you_mean

if TYPE_CHECKING:
    from compressor.adapter import Adapter
    from compressor.data import SampleSet
    from compressor.evaluate import Metric
    from compressor.lower.backend import Backend
    from compressor.pruner import Pruner

_T = TypeVar("_T")

KINDS = ("pruners", "models", "data", "metrics", "backends")
_SINGULAR = {"pruners": "method", "models": "model", "data": "data set", "metrics": "metric", "backends": "backend"}


@dataclass(frozen=True)
class Listed:
    """One line of `compressor list`: where a plugin comes from, what it says of itself, or why it cannot be loaded."""

    name: str
    distribution: str
    summary: str
    error: str | None
    about: Mapping[str, str] = field(default_factory=dict)
    """Of models: `size`, `data`, `licence`, `weights` (how to get them), `source`."""


def names(kind: str) -> list[str]:
    """The registered names of a kind (one of `KINDS`), without loading anything."""
    return sorted({entry.name for entry in entry_points(group=f"compressor.{kind}")})


def listing(kind: str) -> list[Listed]:
    """Every plugin of a kind; those that fail to load carry the error instead of ending the listing."""
    found = []
    for name in names(kind):
        try:
            loaded = load(kind, name)
            summary = (inspect.getdoc(loaded) or "").strip().split("\n")[0]
            about = adapter(name).about if kind == "models" else {}
            found.append(Listed(name, _distribution(_entry(kind, name)), summary, None, dict(about)))
        except CompressorError as error:
            found.append(Listed(name, "", "", error.message))
    return found


def load(kind: str, name: str) -> Any:
    """The object registered as `name`. Raises UsageError for unknown or doubly registered names, CompressorError where
    the plugin itself fails to import, naming plugin and distribution."""
    entry = _entry(kind, name)
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may raise anything at import, SystemExit too
        raise CompressorError(
            f"{kind} plugin {name!r} of {_distribution(entry)} failed to load: {type(error).__name__}: {error}",
            "Reinstall or remove that distribution.",
        ) from error


def pruner_class(name: str) -> type[Pruner]:
    """The registered pruner class called `name`."""
    return _checked_class(load("pruners", name), name)


def pruner_class_from_file(reference: str) -> type[Pruner]:
    """The class that `path/to/file.py:Class` names. The file is imported, so it runs: it is the user's own code."""
    return _checked_class(_from_file(reference, "--pruner"), reference)


def is_file_reference(name: str) -> bool:
    """Whether `name` is `FILE.py:NAME`, and not a registered name."""
    return name.rpartition(":")[0].endswith(".py")


def _from_file(reference: str, option: str) -> Any:
    path_text, colon, name = reference.rpartition(":")
    path = Path(path_text)
    if not colon or not name.isidentifier() or path.suffix != ".py":
        raise UsageError(f"{option} {reference!r}: not FILE.py:NAME", f"Write it like {option} mine.py:Mine")
    if not path.is_file():
        raise UsageError(f"{option} {reference!r}: no such file", f"Looked for {path.absolute()}")
    module_name = f"compressor_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{option} {reference!r}: cannot be imported", "Give a Python source file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise CompressorError(
            f"{path} failed to import: {type(error).__name__}: {error}", "Run it with python."
        ) from error
    if name not in vars(module):
        found = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module_name]
        raise UsageError(f"{path} has no {name!r}", did_you_mean(name, found))
    return vars(module)[name]


def build_pruner(cls: type[Pruner], settings: Mapping[str, Any]) -> Pruner:
    """An instance of `cls` with `settings` as constructor arguments, checked against their annotated types.

    Patterns are given as text. Dataclass fields of `repr=False` hold what `prepare` found, and are no settings.
    Raises UsageError that names the setting and what exists.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    from compressor.pattern import Pattern, parse

    hints = get_type_hints(cls.__init__)
    found = {name for name, field in getattr(cls, "__dataclass_fields__", {}).items() if not field.repr}
    allowed = [
        p
        for p in inspect.signature(cls).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in found
    ]
    arguments: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in [parameter.name for parameter in allowed]:
            raise UsageError(f"{cls.__name__} has no setting {name!r}", did_you_mean(name, [p.name for p in allowed]))
        hint = hints.get(name, Any)
        if hint is Pattern or (isinstance(value, str) and inspect.isclass(hint) and issubclass(hint, Pattern)):
            arguments[name] = parsed = parse(value)
            if not isinstance(parsed, hint):
                raise UsageError(
                    f"{cls.__name__}: {name}: {value} is not of the kind {hint.__name__}", "See the method's card."
                )
            continue
        try:
            config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
            arguments[name] = TypeAdapter(hint, config=None if hint is Any else config).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"].lower()
            raise UsageError(f"{cls.__name__}: {name}: {message}, found {value!r}", f"Its type is {hint}.") from error
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UsageError(
            f"{cls.__name__} cannot be built: {error}", "Give its settings defaults, or --set them."
        ) from error


def adapter(name: str) -> Adapter:
    """The adapter of the model registered as `name`, or made by what `path/to/file.py:NAME` names: a class or a function.

    Such a file is imported, so it runs: it is the user's own code.
    """
    from compressor.adapter import Adapter

    return _made("models", name, Adapter)


def images(name: str) -> SampleSet:
    """The bundled or registered data set called `name`."""
    from compressor.data import SampleSet

    return _made("data", name, SampleSet)


def metric(name: str) -> Metric:
    """The registered metric called `name`."""
    from compressor.evaluate import Metric

    return _made("metrics", name, Metric)


def backend(name: str) -> Backend:
    """The lowering backend registered as `name`."""
    from compressor.lower.backend import Backend

    return _made("backends", name, Backend)


def _made(kind: str, name: str, expected: type[_T]) -> _T:
    if is_file_reference(name):
        factory, what = _from_file(name, f"--{_SINGULAR[kind]}"), name
    else:
        factory, what = load(kind, name), f"{kind} plugin {name!r} of {_distribution(_entry(kind, name))}"
    try:
        made = factory()
    except Exception as error:  # a plugin may raise anything
        raise CompressorError(
            f"{what} failed: {type(error).__name__}: {error}", "Update, mend or remove that plugin."
        ) from error
    if not isinstance(made, expected):
        raise CompressorError(
            f"{what} gave {type(made).__name__}, not {expected.__name__}", "Update, mend or remove that plugin."
        )
    return made


def _checked_class(found: Any, name: str) -> type[Pruner]:
    from compressor.pruner import Pruner

    if not (inspect.isclass(found) and issubclass(found, Pruner)):
        raise CompressorError(f"{name!r} is not a subclass of compressor.Pruner", "Register or name a Pruner class.")
    return found


def _entry(kind: str, name: str) -> EntryPoint:
    entries = list(entry_points(group=f"compressor.{kind}", name=name))
    singular = _SINGULAR[kind]
    if not entries:
        raise UsageError(f"unknown {singular} {name!r}", did_you_mean(name, names(kind)))
    if len({entry.value for entry in entries}) > 1:
        owners = ", ".join(sorted(_distribution(entry) for entry in entries))
        raise UsageError(f"{singular} {name!r} is registered more than once, by {owners}", "Remove one of them.")
    return entries[0]


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unnamed distribution"
