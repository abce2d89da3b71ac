"""The model of a run, or of a saved model's folder, with its adapter."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from compressor import recipe as recipes
from compressor import saving
from compressor.adapter import Adapter
from compressor.runs.inputs import adapter_of, resolve


def saved_adapter(path: Path) -> Adapter:
    """The adapter of the model of a run, or of a saved model's folder."""
    folder = saving.model_folder(path)
    if saving.read_config(folder).model is None and (path / "recipe.yaml").is_file():
        return adapter_of(resolve(recipes.read(path / "recipe.yaml"), str(path / "recipe.yaml")))
    return saving.adapter_at(folder)


def saved_model(path: Path) -> tuple[Adapter, nn.Module]:
    """The model of a run, or of a saved model's folder, with its adapter."""
    adapter, named = saved_adapter(path), saving.read_config(saving.model_folder(path)).model is not None
    return adapter, saving.load(path, None if named else adapter.build())
