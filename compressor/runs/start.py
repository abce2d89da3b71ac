"""What model a run starts from: one with weights, a saved model of an earlier run, or a new one that fits the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor import registry, saving
from compressor.adapter import Adapter
from compressor.data.latents import Autoencoder
from compressor.data.reading import read_data
from compressor.data.sets import ImageSet, SampleSet
from compressor.environment import usual_torch
from compressor.errors import CompressorError, UsageError
from compressor.recipe import Recipe
from compressor.sparsity.surgery import surgery_of
from compressor.training.pruner import Pruner
from compressor.weights import bare

_SIZES = ("img_size", "sample_size")
"""Settings of an architecture that say how large its images are."""
_ANY = (3, 32, 32)


def saved_start(weights: str | None) -> Path | None:
    """The folder of the saved model that `weights` names, itself or by its run's directory; None where it names something else."""
    if weights is None or not Path(weights).is_dir():
        return None
    for folder in (Path(weights), Path(weights) / "model"):
        if all((folder / name).is_file() for name in saving.MODEL_FILES):
            try:
                saving.read_config(folder)
            except CompressorError:
                continue  # a folder of diffusers may have files of the same names
            return folder
    return None


def model_of(weights: str | None) -> dict[str, Any]:
    """What a recipe's `weights` say of its `model`, where they are a saved model's: settings below the user's."""
    folder = saved_start(weights)
    name = None if folder is None else saving.model_name(folder)
    return {} if name is None else {"model": name}


def opened(recipe: Recipe) -> Adapter:
    """The adapter of the very model that `recipe` names. Raises UsageError where its weights are of another one."""
    folder = saved_start(recipe.weights)
    if folder is None:
        return registry.adapter(recipe.model).opened(recipe.weights, recipe.architecture)
    config = saving.read_config(folder)
    if config.model is not None and config.model != recipe.model:
        raise UsageError(f"{folder} holds {config.model}, not {recipe.model}", "Leave --model out, or give its name.")
    adapter = registry.adapter(recipe.model).rebuilt(config.architecture)
    return adapter.opened(None, recipe.architecture) if recipe.architecture else adapter


@usual_torch()
def started(recipe: Recipe, adapter: Adapter) -> nn.Module:
    """The model of `adapter`, with the weights that `recipe` names, or random ones, drawn from its seed."""
    if recipe.from_scratch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.train.seed)
            return bare(adapter.build())
    folder = saved_start(recipe.weights)
    if folder is None:
        return bare(adapter.load(recipe.weights))
    model = saving.load(folder, adapter.build())
    if surgery_of(model) is not None:
        raise UsageError(
            f"{folder}: channels or blocks of that model were removed, and no run starts from such a one",
            "Start from the model that it was made of.",
        )
    return model


def refuse_unasked(recipe: Recipe, named: bool) -> None:
    """Raise UsageError where pictures were given and no model was `named`: they would be made to fit the small default model."""
    pictures = recipe.data is not None and (recipe.data.startswith("hf:") or Path(recipe.data).is_dir())
    told = named or recipe.weights is not None or recipe.pipeline is not None
    if pictures and not told and recipe.data not in registry.names("data"):
        raise UsageError(
            f"data is {recipe.data}, and no model was chosen: the default, {recipe.model}, is for 8x8 digits",
            "Give --model NAME with its --weights, or train one on the data: compressor train --model uvit --data …",
        )


def refuse_scratch(recipe: Recipe, pruner: Pruner) -> None:
    """Raise UsageError where what `recipe` says cannot be of a model that starts with random weights."""
    if not recipe.from_scratch:
        return
    for name in ("weights", "pipeline"):
        if getattr(recipe, name) is not None:
            raise UsageError(f"from_scratch: {name} would not be used", f"Leave out {name}, or from_scratch.")
    if pruner.objective.teacher > 0:
        raise UsageError(
            f"from_scratch: {type(pruner).__name__} learns from the dense model, which would be random",
            "Train a dense model first (compressor train), then prune it.",
        )
    if recipe.train.steps == 0:
        raise UsageError("from_scratch: without steps, the model would stay random", "Give --steps.")


def is_unsized(recipe: Recipe) -> bool:
    """Whether the model of `recipe` will take the size of its data."""
    own = registry.adapter(recipe.model).fitted(_ANY, 1) if recipe.from_scratch else {}
    return any(name in own and name not in recipe.architecture for name in _SIZES)


def guessed(recipe: Recipe) -> Recipe:
    """`recipe`, whose new model takes data of any one shape: enough to read data by where the user says the size."""
    return _of_shape(recipe, _ANY, 1) if recipe.from_scratch else recipe


def fitted(recipe: Recipe, data: SampleSet) -> Recipe:
    """`recipe`, whose new model takes `data`: the user's own settings of its architecture on top."""
    if not recipe.from_scratch or data.shape is None:
        return recipe
    labels = data.labels if isinstance(data, ImageSet) else None
    return _of_shape(recipe, data.shape, 0 if labels is None or not len(labels) else int(labels.max()) + 1)


def _of_shape(recipe: Recipe, shape: tuple[int, int, int], classes: int) -> Recipe:
    own: Mapping[str, Any] = registry.adapter(recipe.model).fitted(shape, classes)
    return recipe.model_copy(update={"architecture": {**own, **recipe.architecture}})


def pictures(recipe: Recipe, source: str, adapter: Adapter, autoencoder: Autoencoder | None) -> SampleSet:
    """The data at `source`, or of that name; pictures are brought to the size that the model takes, or `loading.size` where it
    takes any.

    With an `autoencoder`, that is the size of which it makes latents that the model takes.
    """
    if source in registry.names("data"):
        return registry.images(source)
    loading, shape = recipe.loading, None if is_unsized(recipe) else adapter.image_shape
    if autoencoder is not None and shape is not None:
        shape = autoencoder.picture_shape(shape)
    if loading.size is not None:
        wanted = (shape[0] if shape is not None else 3, loading.size, loading.size)
        if shape is not None and shape != wanted:
            raise UsageError(
                f"loading.size: {adapter.name} takes images {shape}, not {wanted}",
                "Leave loading.size out, or choose another model.",
            )
        shape = wanted
    return read_data(
        source, shape, workers=loading.workers, skip_damaged=loading.skip_damaged, cache_mb=loading.cache_mb
    )
