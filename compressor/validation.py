"""Values that are checked against a pydantic model, with errors that name the key, what was found and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from compressor.errors import UsageError, did_you_mean
from compressor.recipe import SECTIONS, Recipe

_Model = TypeVar("_Model", bound=BaseModel)


def validated(model: type[_Model], values: Mapping[str, Any], where: str) -> _Model:
    """`values` as a `model`, or a UsageError that names the key, what was found and what is allowed."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            names = model.model_fields
            for part in first["loc"][:-1]:
                annotation = names[str(part)].annotation
                names = (
                    annotation.model_fields
                    if isinstance(annotation, type) and issubclass(annotation, BaseModel)
                    else {}
                )
            everywhere = list(names) + (
                [f"{s}.{k}" for s, m in SECTIONS.items() for k in m.model_fields] if model is Recipe else []
            )
            hint = did_you_mean(str(first["loc"][-1]), names if len(first["loc"]) > 1 else everywhere)
            raise UsageError(f"{where}: unknown setting {path!r}", hint) from error
        found = repr(first["input"])
        raise UsageError(
            f"{where}: {path}: {first['msg'].lower()}, found {found[:80]}",
            "docs/recipe.md says what each setting allows.",
        ) from error
