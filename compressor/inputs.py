"""From settings to things in hand: the resolved recipe, and the model, data, method and metric that it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from compressor import recipe as recipes
from compressor import registry
from compressor.adapter import Adapter
from compressor.data import Images, read_images
from compressor.engine import resolve_device
from compressor.errors import UsageError
from compressor.evaluate import Metric
from compressor.pruner import Pruner
from compressor.recipe import Recipe
from compressor.targets import survey, unmatched
from compressor.weights import weights_sha256


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a recipe names, found and loaded: model, data, method."""

    recipe: Recipe
    adapter: Adapter
    model: nn.Module
    data: Images
    pruner: Pruner
    metric: Metric | None

    @property
    def method(self) -> str:
        return type(self.pruner).__name__ if self.recipe.pruner else self.recipe.method

    def identity(self) -> dict[str, str]:
        """The hashes that a resumed run must find again."""
        return {"weights_sha256": weights_sha256(self.model), "data_sha256": self.data.sha256}


def resolve(settings: Mapping[str, Any], where: str) -> Recipe:
    """The validated recipe: the model's own defaults below `settings`. Raises UsageError for anything unknown."""
    early = recipes.validated(Recipe, recipes.merged(settings), where)
    return recipes.validated(Recipe, recipes.merged(registry.adapter(early.model).defaults, settings), where)


def load_inputs(recipe: Recipe) -> Inputs:
    """Find and load what `recipe` names. The cheap checks come first."""
    adapter = registry.adapter(recipe.model)
    cls = registry.pruner_class_from_file(recipe.pruner) if recipe.pruner else registry.pruner_class(recipe.method)
    own = {**recipe.settings, **({"pattern": recipe.pattern} if recipe.pattern is not None else {})}
    pruner = registry.build_pruner(cls, own)
    if recipe.data is None:
        raise UsageError(
            f"{recipe.model} has no default data", "Give --data FILE (.npz or .npy), or a bundled set's name."
        )
    metric = registry.metric(recipe.evaluate.metric) if recipe.evaluate.metric is not None else None
    resolve_device(recipe.train.device)
    model = adapter.load(recipe.weights)
    data = registry.images(recipe.data) if recipe.data in registry.names("data") else read_images(recipe.data)
    _check_shapes(adapter, data)
    return Inputs(recipe, adapter, model, data, pruner, metric)


def unmatched_ignores(inputs: Inputs) -> list[str]:
    """The user's ignore rules that match no layer; each deserves a warning."""
    return unmatched(survey(inputs.model, inputs.pruner.pattern), inputs.recipe.ignore or ())


def _check_shapes(adapter: Adapter, data: Images) -> None:
    """Refuse data that the model cannot take, before anything is trained on it."""
    expected = adapter.image_shape
    if expected is not None and expected != tuple(data.pixels.shape[1:]):
        raise UsageError(
            f"{data.name}: images are {tuple(data.pixels.shape[1:])}, {adapter.name} takes {expected}",
            "Channels, height and width must agree; resize the images, or choose another model.",
        )
