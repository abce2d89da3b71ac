"""A recipe's pipeline: opened, its calls recorded or found recorded, and the adapter that fine-tunes on them."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import nn

from compressor import registry
from compressor.data.calls import Index, Picture, Recording
from compressor.environment import cache_folder, resolve_device
from compressor.errors import CompressorError, UsageError
from compressor.pipelines.adapter import CallsAdapter
from compressor.pipelines.opened import DENOISERS, Opened, open_pipeline
from compressor.pipelines.prompts import pictures, read_prompts, with_pictures
from compressor.pipelines.recording import index_of, recording, sample
from compressor.pipelines.same import refuse_changed
from compressor.progress import Progress
from compressor.quality.score import Score, scores_of
from compressor.recipe import Recipe

DEFAULTS: Mapping[str, Any] = {
    "train": {"batch_size": 4, "lr": 1e-4, "ema": 0.0, "weight_decay": 0.0},
    "evaluate": {"metric": None, "batch_size": 16, "latency_batch": 1, "latency_rounds": 10},
}
"""What suits pretrained pipelines: a batch is calls, of one or two samples each."""
_PICTURES = ("image", "mask_image", "control_image")


@dataclass(frozen=True, eq=False)
class Piped:
    """What a recipe's pipeline comes to."""

    opened: Opened
    records: Recording
    adapter: CallsAdapter
    scores: Sequence[Score] = ()

    @property
    def module(self) -> nn.Module:
        return self.opened.module


def piped(recipe: Recipe, before: Mapping[str, Any] | None = None) -> Generator[Progress, None, Piped]:
    """Open the pipeline of `recipe` and record it, where that was not done before.

    `before` are the facts of the run that is gone on with: where it was of another pipeline, nothing is recorded. Raises
    CompressorError.
    """
    scores = _scores(recipe)
    opened, records = yield from recorded(recipe, before)
    refuse_changed(opened, records)
    adapter = replace(adapter_of_calls(opened, records), pictures=_wanted(recipe, _lines(recipe)))
    _try(scores, adapter)
    return Piped(opened, records, adapter, scores)


def _scores(recipe: Recipe) -> list[Score]:
    """The scores that `recipe` names, with their networks."""
    given = recipe.evaluate.scores
    if given and (bare := next((line for line in _lines(recipe) if not isinstance(line.get("prompt"), str)), None)):
        raise UsageError(
            f"evaluate.scores: a line of prompts has no text: {str(bare)[:60]}", "Scores compare pictures with prompts."
        )
    return [registry.score(name).opened(None if path is None else Path(path)) for name, path in given.items()]


def recorded(
    recipe: Recipe, before: Mapping[str, Any] | None = None
) -> Generator[Progress, None, tuple[Opened, Recording]]:
    """The pipeline of `recipe` and the records of it, made where they were not there; `before` as for `piped`."""
    lines = _lines(recipe)  # what is wrong with them is said before anything is opened
    _refuse_unlike(recipe, lines)
    assert recipe.pipeline is not None  # the caller looked
    yield Progress("open", 0, 1, recipe.pipeline)
    opened = open_pipeline(recipe.pipeline, recipe.part, resolve_device(recipe.train.device))
    if opened.left_dense is not None:
        yield Progress("open", 1, 1, opened.left_dense)
    opened.module.requires_grad_(True).eval()
    wanted = _wanted(recipe, lines)
    index = index_of(opened, wanted, recipe.record.steps, recipe.record.keep)
    if before is not None:
        _refuse_other(before, index, recipe.pipeline)
    records = yield from recording(opened, index, records_folder(recipe, index), wanted)
    return opened, records


def index_for(recipe: Recipe, opened: Opened) -> Index:
    """What the records of `opened` that `recipe` wants are of."""
    return index_of(opened, _wanted(recipe, _lines(recipe)), recipe.record.steps, recipe.record.keep)


def _lines(recipe: Recipe) -> list[dict[str, Any]]:
    """The arguments of each prompt of `recipe`."""
    if recipe.prompts is None:
        raise UsageError("--pipeline needs prompts", "Give --prompts FILE: one a line, or JSON objects (.jsonl).")
    return [{**recipe.record.arguments, **line} for line in read_prompts(recipe.prompts)]


def _refuse_unlike(recipe: Recipe, lines: Sequence[Mapping[str, Any]]) -> None:
    """Raise UsageError where the pictures that are judged would be of several sizes: they are compared as one."""
    judged = [one.arguments for one in _wanted(recipe, lines) if one.unseen]
    sized = all({"height", "width"} <= {*arguments} for arguments in judged)
    for name in ("height", "width", "num_frames", *(() if sized else _PICTURES)):
        if len(found := {_extent(arguments.get(name)) for arguments in judged}) > 1:
            raise UsageError(
                f"{recipe.prompts}: the pictures that are judged have {name} {' and '.join(sorted(found))}",
                f"Give all lines the same {name}. In Python, compressor.record and compressor.prune take several.",
            )


def _extent(value: Any) -> str:
    """A number, or how large a picture is, in words."""
    return "x".join(map(str, value.size)) if isinstance(value, Image) else str(value) if isinstance(value, int) else ""


def _wanted(recipe: Recipe, lines: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The pictures that `recipe` records, with those that they are asked with. Raises UsageError."""
    found = pictures(lines, recipe.record.n, recipe.record.unseen, recipe.record.seed)
    folder = Path(recipe.prompts or "").parent
    return [one.model_copy(update={"arguments": with_pictures(one.arguments, folder)}) for one in found]


def adapter_of_calls(opened: Opened, records: Recording) -> CallsAdapter:
    """The adapter of the part of `opened`, with the rules for layers of the family that reads pipelines; its name and the
    architecture too, where the part denoises."""
    name, family = registry.of_pipelines()
    if opened.part not in DENOISERS or opened.source is None:
        return CallsAdapter(opened, records, family.targets, family.ignore)
    own = family.opened(str(opened.source / opened.part))
    return CallsAdapter(opened, records, family.targets, family.ignore, own, name)


def records_folder(recipe: Recipe, index: Index, pipeline_sha256: str | None = None) -> Path:
    """Where the calls of `index` are kept: the folder that `recipe` names, else one of the user's cache by what they are of.

    `pipeline_sha256` is that of the pipeline which they were made with, where it is another than that of `index`.
    """
    if recipe.records is not None:
        return Path(recipe.records)
    text = index.model_dump_json(exclude={"pipeline", "components"}) + (pipeline_sha256 or index.pipeline_sha256)
    return cache_folder("records") / hashlib.sha256(text.encode()).hexdigest()[:16]


def _refuse_other(before: Mapping[str, Any], index: Index, where: str) -> None:
    """Raise CompressorError where the run with the facts `before` was not of the pipeline of `index`."""
    was = before.get("pipeline_sha256")
    if was is None:
        raise CompressorError(
            "the run is of an earlier version, which did not keep which scheduler, text encoder, … its pipeline had",
            "Start a new run. Its model and its pipeline can be used as they are.",
        )
    for name, now in (("pipeline", index.pipeline_sha256), ("weights", index.weights_sha256)):
        if before.get(f"{name}_sha256") != now:
            what = (
                f"the weights of its {index.part}"
                if name == "weights"
                else "its scheduler, a text encoder or another part"
            )
            raise CompressorError(
                f"{where}: {what} changed since the run began: the hash was {before.get(f'{name}_sha256')}, and is now {now}",
                "Go on with the pipeline as it was, and its versions of diffusers and transformers, or start a new run.",
            )


def _try(scores: Sequence[Score], adapter: CallsAdapter) -> None:
    """Let `scores` judge a picture of the pipeline as it is, twice: what one of them cannot do is said before anything is trained."""
    if not scores:
        return
    picture = next(iter((*adapter.held_out, *adapter.pictures)))
    images = sample(adapter.opened_pipeline, picture, adapter.records.index.steps).images
    if images is not None:
        images = images[:1].repeat(2, *(1 for _ in images.shape[1:]))
        for score in scores:
            scores_of(score, images, [str(picture.arguments.get("prompt"))] * 2)
