"""Settings that a user wrote and that nothing of a run reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from compressor import registry
from compressor.data.reading import is_decoded
from compressor.errors import UsageError
from compressor.pipelines.prompts import COUNT, read_prompts
from compressor.recipe import Recipe, is_whole

_TRAINED = (
    *("accumulate", "lr", "betas", "weight_decay", "warmup", "schedule", "ema", "clip", "compiled", "mode", "lora"),
    *("optimizer", "times", "parallel"),
)
_DECODED = ("workers", "skip_damaged", "cache_mb")
_DRAWN = ("metric", "measures", "inception_weights", "sampler", "spacing", "guidance")


def refuse_unread(
    found: Collection[Recipe], written: Mapping[str, Any], over: Mapping[str, Any] = MappingProxyType({})
) -> None:
    """Raise UsageError for a setting that the user has `written`, and that none of the recipes `found` reads.

    What is as by default, or off, is no mistake; nor is a file whose steps, data or samples are given otherwise `over` it, or the one
    that a run wrote, which has every setting.
    """
    if is_whole(written):
        return
    usual = Recipe().model_dump(mode="json")
    idle = [{name: (by, why) for name, by, why in _idle(recipe)} for recipe in found]
    for name, (by, why) in idle[0].items():
        value = _at(written, name)
        if value and value != _at(usual, name) and _at(over, by) is None and all(name in one for one in idle):
            raise UsageError(f"{name} is given, and {why}", f"Leave {name} out.")


def _at(settings: Any, name: str) -> Any:
    """The setting of this `name`, which may have dots; None where there is none."""
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _idle(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(name, the setting that makes it so, why) of every setting that nothing reads with the others as they are in `recipe`."""
    if not recipe.train.steps:
        for name in ("checkpoint_every", *(f"train.{one}" for one in _TRAINED)):
            yield name, "train.steps", "0 steps train nothing"
    data = recipe.data if recipe.pipeline is None else None
    if data is not None and (data in registry.names("data") or not is_decoded(data)):
        for name in _DECODED:
            yield f"loading.{name}", "data", f"{data} holds no files of pictures to decode"
    if recipe.pipeline is None and recipe.evaluate.samples == 0:
        for name in _DRAWN:
            yield f"evaluate.{name}", "evaluate.samples", "0 samples are drawn"
    if recipe.record.steps is not None:
        yield f"record.arguments.{COUNT}", "record.steps", "record.steps is the number of steps"
        if recipe.prompts is not None and any(COUNT in line for line in read_prompts(recipe.prompts)):
            yield "record.steps", "prompts", f"lines of {recipe.prompts} have {COUNT}"
