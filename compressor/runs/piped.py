"""A recipe's pipeline: opened, its calls recorded or found recorded, and the adapter that fine-tunes on them."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor import registry
from compressor.adapter import Adapter, to_device
from compressor.data.calls import Index, Recording, joined
from compressor.environment import cache_folder, resolve_device
from compressor.errors import CompressorError, UsageError, first_line
from compressor.pipelines.adapter import CallsAdapter
from compressor.pipelines.opened import DENOISERS, Opened, open_pipeline
from compressor.pipelines.prompts import pictures, read_prompts
from compressor.pipelines.recording import index_of, recording
from compressor.progress import Progress
from compressor.quality.score import Score
from compressor.recipe import Recipe

DEFAULTS: Mapping[str, Any] = {
    "train": {"batch_size": 4, "lr": 1e-4, "ema": 0.0, "weight_decay": 0.0},
    "evaluate": {"metric": None, "batch_size": 16, "latency_batch": 1, "latency_rounds": 10},
}
"""What suits pretrained pipelines: a batch is calls, of one or two samples each."""
_TOLERANCE = 0.05


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


def piped(recipe: Recipe) -> Generator[Progress, None, Piped]:
    """Open the pipeline of `recipe` and record it, where that was not done before. Raises CompressorError."""
    scores = _scores(recipe)
    opened, records = yield from recorded(recipe)
    _check(opened, records)
    return Piped(opened, records, adapter_of_calls(opened, records), scores)


def _scores(recipe: Recipe) -> list[Score]:
    """The scores that `recipe` names, with their networks."""
    given = recipe.evaluate.scores
    if given and (bare := next((line for line in _lines(recipe) if not isinstance(line.get("prompt"), str)), None)):
        raise UsageError(
            f"evaluate.scores: a line of prompts has no text: {str(bare)[:60]}", "Scores compare pictures with prompts."
        )
    return [registry.score(name).opened(None if path is None else Path(path)) for name, path in given.items()]


def recorded(recipe: Recipe) -> Generator[Progress, None, tuple[Opened, Recording]]:
    """The pipeline of `recipe` and the records of it, made where they were not there."""
    lines = _lines(recipe)  # what is wrong with them is said before anything is opened
    assert recipe.pipeline is not None  # the caller looked
    yield Progress("open", 0, 1, recipe.pipeline)
    opened = open_pipeline(recipe.pipeline, recipe.part, resolve_device(recipe.train.device))
    opened.module.requires_grad_(True).eval()
    index = index_for(recipe, opened, lines)
    records = yield from recording(opened, index, records_folder(recipe, index))
    return opened, records


def index_for(recipe: Recipe, opened: Opened, lines: Sequence[Mapping[str, Any]] | None = None) -> Index:
    """What the records of `opened` that `recipe` wants are of."""
    record = recipe.record
    wanted = pictures(_lines(recipe) if lines is None else lines, record.n, record.unseen, record.seed)
    return index_of(opened, wanted, record.steps, record.keep)


def _lines(recipe: Recipe) -> list[dict[str, Any]]:
    """The arguments of each prompt of `recipe`."""
    if recipe.prompts is None:
        raise UsageError("--pipeline needs prompts", "Give --prompts FILE: one a line, or JSON objects (.jsonl).")
    return [{**recipe.record.arguments, **line} for line in read_prompts(recipe.prompts)]


def adapter_of_calls(opened: Opened, records: Recording) -> CallsAdapter:
    """The adapter of the part of `opened`, with the rules for layers of the family that reads pipelines; its name and the
    architecture too, where the part denoises."""
    name, family = registry.of_pipelines()
    if opened.part not in DENOISERS or opened.source is None:
        return CallsAdapter(opened, records, family.targets, family.ignore)
    own = family.opened(str(opened.source / opened.part))
    return CallsAdapter(opened, records, family.targets, family.ignore, own, name)


def records_folder(recipe: Recipe, index: Index) -> Path:
    """Where the calls of `index` are kept: the folder that `recipe` names, else one of the user's cache by what they are of."""
    if recipe.records is not None:
        return Path(recipe.records)
    key = hashlib.sha256(index.model_dump_json(exclude={"pipeline"}).encode()).hexdigest()[:16]
    return cache_folder("records") / key


@torch.no_grad()
def _check(opened: Opened, records: Recording) -> None:
    """Refuse a part that does not answer a recorded call as it did: then it is told something that no argument says."""
    if not len(records):
        raise UsageError(f"{records.folder}: no call to fine-tune on", "Record at least one picture.")
    adapter: Adapter = CallsAdapter(opened, records)
    (call,) = records.take(torch.arange(1))
    inputs, _ = adapter.noised([call], torch.Generator())
    device = next(opened.module.parameters()).device
    try:
        found = adapter.predict(opened.module, to_device(inputs, device)).float().cpu()
    except Exception as error:  # whatever a model raises
        raise CompressorError(
            f"{opened.part} cannot be called as it was recorded: {first_line(error)}", "Record the pipeline again."
        ) from error
    expected = joined([call])
    scale = float(expected.square().mean().sqrt()) or 1.0
    if found.shape != expected.shape or float((found - expected).square().mean().sqrt()) > _TOLERANCE * scale:
        raise CompressorError(
            f"{opened.part} does not answer a recorded call as it did then",
            "Something beside its arguments changes it (hooks, a state, an attention processor). Record it without that.",
        )
