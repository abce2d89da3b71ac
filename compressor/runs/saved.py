"""What a run left: the model of its directory (or of a saved model's folder) with its adapter, and the finished run as a whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor import recipe as recipes
from compressor import saving
from compressor.adapter import Adapter
from compressor.environment import resolve_device, usual_torch
from compressor.errors import CompressorError, how_to_finish, memory
from compressor.recipe import Recipe
from compressor.report import read_report
from compressor.report.content import Report, Row
from compressor.runs import facts, start
from compressor.runs.captioned import as_model, is_captioned
from compressor.runs.finish import edited
from compressor.runs.inputs import adapter_of, load_inputs, resolve
from compressor.weights import weights_sha256


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run: its dense and its sparse model, on `device` and in eval mode, and the report that speaks of them."""

    out: Path
    adapter: Adapter
    dense: nn.Module
    sparse: nn.Module
    device: torch.device
    report: Report
    batch: int

    @property
    def dense_row(self) -> Row:
        """The row of `dense`: in a report that lacks one, that of the finished model."""
        return self.report.dense or self.report.final

    def reported(self, report: Report) -> Finished:
        """This run with another report."""
        return replace(self, report=report)


def finished(out: Path) -> Finished:
    """The finished run in `out`. Raises CompressorError where it has no report, or its files belong to other weights."""
    if not (out / "report.json").is_file():
        raise CompressorError(f"{out}: no report.json", how_to_finish(out))
    report = read_report(out / "report.json")
    if (reason := edited(out, report)) is not None:
        raise CompressorError(reason, "Put it back; for other settings, start a new run with another --out.")
    settings = resolve(recipes.read(out / "recipe.yaml"), str(out / "recipe.yaml"))
    adapter, dense = source(settings, facts.begun(out))
    device = resolve_device(settings.train.device)
    sparse = saving.load(out / "model", copy.deepcopy(dense)).to(device)  # whose hash it verifies
    if settings.from_scratch:  # nothing stood at its start
        dense = copy.deepcopy(sparse)
    dense = dense.to(device)
    saved = saving.read_config(out / "model")
    if saved.model is not None and not _of_calls(settings):
        # what is known of the model since the run, such as its examples
        adapter = adapter.rebuilt(saved.architecture)
    hashes = {report.final.name: saved.weights_sha256}
    if report.dense is not None:
        hashes[report.dense.name] = weights_sha256(dense)
    for row in report.rows:
        if hashes.get(row.name, row.weights_sha256) != row.weights_sha256:
            raise CompressorError(
                f"{out}: the report's row {row.name!r} is of other weights than those found now",
                "The weights file changed since the run; run again.",
            )
    return Finished(out, adapter, dense, sparse, device, report, settings.evaluate.latency_batch)


@memory("loading")
def source(recipe: Recipe, before: Mapping[str, Any] | None = None) -> tuple[Adapter, nn.Module]:
    """The adapter and the dense model that `recipe` names, in eval mode; `before` as for `load_inputs`."""
    if _of_calls(recipe):
        inputs = load_inputs(recipe, before)
        return inputs.adapter, inputs.model.eval()
    adapter = adapter_of(recipe)
    return adapter, start.started(as_model(recipe) if is_captioned(recipe) else recipe, adapter).eval()


def saved_adapter(path: Path) -> Adapter:
    """The adapter of the model of a run, or of a saved model's folder."""
    folder = saving.model_folder(path)
    if (recipe := _recipe(path)) is not None and saving.read_config(folder).model is None:
        return source(recipe)[0] if _of_calls(recipe) else adapter_of(recipe)
    return saving.adapter_at(folder)


@memory("loading")
def saved_model(path: Path) -> tuple[Adapter, nn.Module]:
    """The model of a run, or of a saved model's folder, with its adapter. Of a pipeline's run, the adapter knows its calls."""
    recipe = _recipe(path)
    if recipe is not None and _of_calls(recipe):
        adapter, dense = source(recipe)
        return adapter, saving.load(path, dense)
    adapter, named = saved_adapter(path), saving.read_config(saving.model_folder(path)).model is not None
    with usual_torch():
        return adapter, saving.load(path, None if named else adapter.build())


def learned_from_calls(path: Path) -> bool:
    """Whether `path` is the directory of a run that learned from the recorded calls of a pipeline."""
    recipe = _recipe(path)
    return recipe is not None and _of_calls(recipe)


def _of_calls(recipe: Recipe) -> bool:
    """Whether the adapter of `recipe` is that of recorded calls, which it has to find again."""
    return recipe.pipeline is not None and not is_captioned(recipe)


def _recipe(path: Path) -> Recipe | None:
    """The recipe of the run in `path`; None for a saved model's folder alone."""
    file = path / "recipe.yaml"
    return resolve(recipes.read(file), str(file)) if file.is_file() else None
