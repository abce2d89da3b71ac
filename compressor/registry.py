"""Plugins as what they are: the typed face of `compressor.discovery`, and what `compressor list` says of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_type_hints

from compressor.discovery import (
    KINDS,
    blamed,
    distribution_of,
    entry_point,
    from_file,
    is_file_reference,
    load,
    made,
    names,
)
from compressor.errors import CompressorError, UsageError, did_you_mean

if TYPE_CHECKING:
    from compressor.adapter import Adapter
    from compressor.data.sets import SampleSet
    from compressor.lower.backend import Backend
    from compressor.quality.metric import Metric
    from compressor.quality.score import Score
    from compressor.training.pruner import Pruner


__all__ = [
    "KINDS",
    "Listed",
    "adapter",
    "backend",
    "build_pruner",
    "images",
    "is_file_reference",
    "listing",
    "load",
    "metric",
    "names",
    "pruner_class",
    "pruner_class_from_file",
    "score",
]


@dataclass(frozen=True)
class Listed:
    """One line of `compressor list`: where a plugin comes from, what it says of itself, or why it cannot be loaded."""

    name: str
    distribution: str
    summary: str
    error: str | None
    about: Mapping[str, str] = field(default_factory=dict)
    """Of models: `size`, `data`, `licence`, `weights` (how to get them), `source`."""


def listing(kind: str) -> list[Listed]:
    """Every plugin of a kind; those that fail to load carry the error instead of ending the listing. Scores are among the metrics."""
    found = []
    kinds = (kind, "scores") if kind == "metrics" else (kind,)
    for own, name in [(group, one) for group in kinds for one in names(group)]:
        try:
            loaded = load(own, name)
            summary = " ".join(
                (inspect.getdoc(loaded) or "").partition("\n\n")[0].split()
            )  # all of its first paragraph
            about = adapter(name).about if own == "models" else {}
            found.append(Listed(name, distribution_of(entry_point(own, name)), summary, None, dict(about)))
        except (Exception, SystemExit) as error:
            told = error if isinstance(error, CompressorError) else blamed(error)
            found.append(Listed(name, "", "", told.message))
    return found


def pruner_class(name: str) -> type[Pruner]:
    """The registered pruner class called `name`."""
    return _checked_class(load("pruners", name), name)


def pruner_class_from_file(reference: str) -> type[Pruner]:
    """The class that `path/to/file.py:Class` names. The file is imported, so it runs: it is the user's own code."""
    return _checked_class(from_file(reference, "--pruner"), reference)


def _hints(cls: type[Pruner]) -> dict[str, Any]:
    """The types of what the constructor of `cls` takes. What a dataclass inherits is annotated in the words of other modules."""
    owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
    made = vars(owner).get("__dataclass_params__")
    try:
        return get_type_hints(owner if made is not None and made.init else vars(owner)["__init__"])
    except NameError as error:
        raise UsageError(
            f"{cls.__name__}: the type of a setting is not known where it is used: {error}",
            "Import it there, not under TYPE_CHECKING alone.",
        ) from error


def build_pruner(cls: type[Pruner], settings: Mapping[str, Any]) -> Pruner:
    """An instance of `cls` with `settings` as constructor arguments, checked against their annotated types.

    Patterns are given as text. Fields that `compressor.found` declares hold what `prepare` found, and are no settings.
    Raises UsageError that names the setting and what exists.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    from compressor.sparsity.notation import parse
    from compressor.sparsity.pattern import Pattern
    from compressor.training.pruner import setting_names

    hints = _hints(cls)
    allowed = setting_names(cls)
    arguments: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in allowed:
            raise UsageError(f"{cls.__name__} has no setting {name!r}", did_you_mean(name, allowed))
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

    return made("models", name, Adapter)


def score(name: str) -> Score:
    """The score of pictures registered as `name`, without its network (`Score.opened`)."""
    from compressor.quality.score import Score

    return made("scores", name, Score)


def of_pipelines() -> tuple[str, Adapter]:
    """The name and the adapter of the registered family that reads the models of pipelines. Raises CompressorError where none does."""
    for name in names("models"):
        if (found := adapter(name)).of_pipelines:
            return name, found
    raise CompressorError("no registered model reads pipelines", "Install the toolkit whole.")


def images(name: str) -> SampleSet:
    """The bundled or registered data set called `name`."""
    from compressor.data.sets import SampleSet

    return made("data", name, SampleSet)


def metric(name: str) -> Metric:
    """The registered metric called `name`."""
    from compressor.quality.metric import Metric

    return made("metrics", name, Metric)


def backend(name: str) -> Backend:
    """The lowering backend registered as `name`."""
    from compressor.lower.backend import Backend

    return made("backends", name, Backend)


def _checked_class(found: Any, name: str) -> type[Pruner]:
    from compressor.training.pruner import Pruner

    if not (inspect.isclass(found) and issubclass(found, Pruner)):
        raise CompressorError(f"{name!r} is not a subclass of compressor.Pruner", "Register or name a Pruner class.")
    return found
