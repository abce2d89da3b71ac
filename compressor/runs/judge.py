"""Evaluating models against the dense one they came from: the same noise, the same inputs, the same real images for all."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import cost
from compressor.data.sets import ImageSet
from compressor.environment import resolve_device
from compressor.progress import Progress
from compressor.quality import drift, evaluate
from compressor.quality.features import compared_with
from compressor.quality.fidelity import Reference
from compressor.runs.inputs import Inputs
from compressor.runs.pictures import save_grid
from compressor.weights import weights_sha256


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model drew and predicted: `images` (n, channels, height, width), None where it cannot be sampled."""

    images: Tensor | None
    predictions: Tensor


class Judge:
    """Makes report rows. The first model that it sees is the dense one, unless `dense` holds what that one gave before."""

    def __init__(self, inputs: Inputs, dense: Seen | None = None) -> None:
        self.inputs, self.dense = inputs, dense
        self.device = resolve_device(inputs.recipe.train.device)
        self.reference: Reference | None = None
        self.floor: dict[str, Any] | None = None

    def look(self) -> Iterator[Progress]:
        """Take the real images in; without it, no quality is measured."""
        inputs, settings = self.inputs, self.inputs.recipe.evaluate
        if inputs.metric is not None and isinstance(inputs.pictures, ImageSet) and settings.samples:
            yield Progress("real images", 0, 1)
            features, self.reference = compared_with(inputs.metric, inputs.pictures, settings)
            self.floor = evaluate.floor(features, settings)

    def costs(self, name: str, model: nn.Module, pruned: Mapping[str, str], train: Mapping[str, Any]) -> dict[str, Any]:
        """The row of `model` as far as nothing is drawn; `pruned` has the patterns of its masked weights."""
        row = {
            "name": name,
            "weights_sha256": weights_sha256(model),
            **cost.costs(model, self.inputs.adapter, pruned),
        }
        return {**row, "quality": [], "drift": [], "latency": [], "train": dict(train)}

    def judge(self, row: dict[str, Any], model: nn.Module, sheet: Path | None) -> Generator[Progress, None, Seen]:
        """Fill in quality and drift of `model`'s `row`; 64 of its samples are saved as the picture `sheet`."""
        inputs, settings = self.inputs, self.inputs.recipe.evaluate
        images = None
        if evaluate.can_sample(inputs.adapter) and settings.samples:
            images = yield from self.drawn(row["name"], model)
            if sheet is not None:
                save_grid(images[:64], sheet)
        if images is not None and self.reference is not None and inputs.metric is not None:
            yield Progress(f"measure {row['name']}", 0, 1)
            row["quality"] = evaluate.qualities(inputs.metric, images, self.reference, settings)
        seen = Seen(images, drift.predictions(inputs.adapter, model, inputs.data, settings, self.device))
        if self.dense is None:
            self.dense = seen
        else:
            row["drift"] = [drift.prediction_error(seen.predictions, self.dense.predictions)]
            if images is not None and self.dense.images is not None:
                row["drift"].append(drift.sample_rmse(images, self.dense.images))
        return seen

    def drawn(self, name: str, model: nn.Module, steps: int | None = None) -> Generator[Progress, None, Tensor]:
        """The images that `model` draws, in `steps` sampler steps where they are not the recipe's."""
        settings = self.inputs.recipe.evaluate
        if steps is not None:
            settings = settings.model_copy(update={"sampler_steps": steps})
        drawn: list[Tensor] = []
        for batch in evaluate.sample(self.inputs.adapter, model, settings):
            decoded = batch if self.inputs.autoencoder is None else self.inputs.autoencoder.decode(batch)
            drawn.append(decoded)
            yield Progress(f"sample {name}", sum(map(len, drawn)), settings.samples)
        return torch.cat(drawn)
