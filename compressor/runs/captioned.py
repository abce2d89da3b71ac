"""A recipe's pipeline whose denoiser is fine-tuned with noise, on a folder of captioned pictures."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from compressor import registry
from compressor.adapter import Adapter
from compressor.data.reading.captions import read_captioned
from compressor.data.sets import Records
from compressor.data.settings import Loading, Record
from compressor.environment import resolve_device
from compressor.errors import UsageError
from compressor.pipelines.adapter import CallsAdapter
from compressor.pipelines.captions import encoded
from compressor.pipelines.opened import DENOISERS, open_pipeline
from compressor.progress import Progress
from compressor.quality.settings import Evaluation, of_budget
from compressor.recipe import Recipe
from compressor.runs import piped
from compressor.seeds import generator
from compressor.weights import bare

DEFAULTS = {**piped.DEFAULTS, "evaluate": {**piped.DEFAULTS["evaluate"], "samples": 0}}
"""Pictures are the pipeline's to draw."""
_DRAWN = ("metric", "inception_weights", "sampler", "spacing", "guidance", "measures")
"""Settings of `evaluate` that say how other models are drawn and judged."""
_USUAL = Evaluation().model_dump()
_BY_ITSELF = "a pipeline draws its pictures itself"
_INSTEAD = (
    "Leave it out. Which it draws, and how: record.unseen, record.seed, record.steps, record.arguments.NAME; scores of its "
    "pictures: evaluate.scores."
)
_FOLDER = (
    "Beside a pipeline, data is a folder of pictures with captions, such as cat.png and cat.txt. Or leave it out, and give "
    "--prompts."
)


def is_captioned(recipe: Recipe) -> bool:
    """Whether `recipe` fine-tunes a pipeline's denoiser on captioned pictures, not on recorded calls."""
    return recipe.pipeline is not None and recipe.data is not None


def refuse_mixed(recipe: Recipe) -> None:
    """Raise UsageError where a recipe names a pipeline and, beside it, a model of its own, or data of two kinds; or prompts and no
    pipeline."""
    written = (Recipe().model, CallsAdapter.name, registry.of_pipelines()[0])  # what a run's own recipe.yaml has there
    own = {"weights": recipe.weights, "vae": recipe.vae, "architecture": recipe.architecture}
    own["model"] = None if recipe.model in written else recipe.model
    if recipe.pipeline is not None and (given := [name for name, value in own.items() if value]):
        raise UsageError(
            f"pipeline and {given[0]}: two sources", "A pipeline brings its model, and its records are the data."
        )
    if recipe.pipeline is not None:
        refuse_unused(recipe)
    alone: dict[str, Any] = {"prompts": recipe.prompts, "records": recipe.records, "part": recipe.part}
    alone["evaluate.scores"] = recipe.evaluate.scores or None
    alone |= dict.fromkeys(_unusual(recipe.record, Record.model_fields, "record"), True)
    if recipe.pipeline is None and (given := [name for name, value in alone.items() if value]):
        raise UsageError(f"{given[0]} without a pipeline", "Give --pipeline DIR.")
    if recipe.pipeline is None or recipe.data is None:
        return
    if recipe.data in registry.names("data") or not Path(recipe.data).is_dir():
        raise UsageError(f"pipeline and data: {recipe.data} is no folder", _FOLDER)
    if recipe.evaluate.scores:
        raise UsageError("evaluate.scores: no pictures are drawn of captioned data", "Leave evaluate.scores out.")
    if recipe.prompts is not None or recipe.records is not None:
        other = "prompts" if recipe.prompts is not None else "records"
        raise UsageError(f"data and {other}: two sources", _FOLDER)
    if recipe.part is not None and recipe.part not in DENOISERS:
        raise UsageError(f"part {recipe.part}: captioned pictures are for what denoises", "Record it: --prompts FILE.")


def refuse_unused(recipe: Recipe, given: Collection[str] = ()) -> None:
    """Raise UsageError for settings that say how other models are trained, drawn and judged, and that no run of a pipeline asks.

    Those are meant that are not as usual, and those of `evaluate` that are `given`.
    """
    captioned, settings = is_captioned(recipe), recipe.evaluate
    meant = [name for name in _DRAWN if getattr(settings, name) not in _usual(recipe, name)]
    meant += ["samples"] if captioned and settings.samples else []
    if drawn := meant or [name for name in (*_DRAWN, *_counts(recipe)) if name in given]:
        raise UsageError(f"evaluate.{drawn[0]}: {_BY_ITSELF}, and they have no real ones beside them", _INSTEAD)
    if captioned:
        idle, why = _unusual(recipe.record, ("n", "steps", "keep"), "record"), "captioned pictures are not recorded"
    else:
        idle, why = _unusual(recipe.loading, Loading.model_fields, "loading"), "recorded calls are no pictures"
        idle += _unusual(recipe.train, ("times",), "train")
    if idle:
        raise UsageError(f"{idle[0]}: nothing asks for it, as {why}", "Leave it out.")


def overruled(recipe: Recipe) -> str | None:
    """A line on the numbers of `evaluate` that are given and that nothing asks for; None where there are none."""
    given = [name for name in _counts(recipe) if getattr(recipe.evaluate, name) not in _usual(recipe, name)]
    said = ", ".join(f"evaluate.{name}" for name in given)
    return f"not asked for: {said}, as {_BY_ITSELF}. {_INSTEAD}" if given else None


def _counts(recipe: Recipe) -> tuple[str, ...]:
    """The numbers of `evaluate` that no run of the recipe's pipeline asks. Scores may have intervals."""
    scored = () if recipe.evaluate.scores else ("bootstrap",)
    return ("samples", "sampler_steps", *scored, *(() if is_captioned(recipe) else ("seed",)))


def _usual(recipe: Recipe, name: str) -> tuple[Any, ...]:
    """What the setting `name` of `evaluate` is where nobody gave it, also in the recipe that a run wrote."""
    own = {
        **_USUAL,
        **of_budget(recipe.evaluate.budget, {}),
        "samples": 0 if is_captioned(recipe) else recipe.record.unseen,
    }
    return _USUAL[name], own[name]


def _unusual(section: BaseModel, names: Iterable[str], where: str) -> list[str]:
    """The `names` of a section that are not as usual."""
    usual = type(section)()
    return [f"{where}.{name}" for name in names if getattr(section, name) != getattr(usual, name)]


def as_model(recipe: Recipe) -> Recipe:
    """`recipe` with the denoiser of its pipeline as its model, by the family that reads pipelines."""
    assert recipe.pipeline is not None  # the caller looked
    weights = recipe.pipeline if recipe.part is None else str(Path(recipe.pipeline) / recipe.part)
    return recipe.model_copy(update={"model": registry.of_pipelines()[0], "weights": weights})


def captioned(recipe: Recipe, adapter: Adapter) -> Generator[Progress, None, tuple[Adapter, nn.Module, Records]]:
    """The adapter of the denoiser, which knows what its inputs look like, the denoiser, and the data of `recipe`."""
    assert recipe.pipeline is not None and recipe.data is not None  # the caller looked
    pictures = read_captioned(Path(recipe.data))  # what is wrong with them is said before anything is opened
    yield Progress("open", 0, 1, recipe.pipeline)
    opened = open_pipeline(recipe.pipeline, recipe.part, resolve_device(recipe.train.device))
    data = yield from encoded(opened, adapter, pictures, recipe.record, recipe.loading)
    del opened  # the encoders are no longer needed
    model: Any = adapter.load(as_model(recipe).weights)
    inputs, _ = adapter.noised(data.take(torch.arange(min(2, len(data)))), generator("check"))
    return adapter.exampled(inputs), bare(model), data
