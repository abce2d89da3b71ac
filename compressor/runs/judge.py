"""Evaluating models against the dense one they came from: the same noise, the same inputs, the same real images for all."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor import cost
from compressor.data.calls import joined
from compressor.data.sets import ImageSet
from compressor.environment import resolve_device
from compressor.errors import memory_in
from compressor.processes import team
from compressor.progress import Progress
from compressor.quality import drift, evaluate
from compressor.quality.features import compared_with
from compressor.quality.fidelity import Reference
from compressor.report.content import Drift, Latency, MetricFacts, Quality, Row, TrainSummary
from compressor.runs.inputs import Inputs
from compressor.runs.pictures import save_grid
from compressor.weights import in_float32

UNTRAINED = TrainSummary(steps=0, seconds=0.0)


@dataclass(frozen=True, eq=False)
class Seen:
    """What a model drew and predicted: `images` (n, channels, height, width), None where it cannot be sampled."""

    images: Tensor | None
    predictions: Tensor


@dataclass(frozen=True, eq=False)
class Variant:
    """A model to be judged: the name of its row, the hash of its weights, the patterns of those that are masked, its training."""

    name: str
    model: nn.Module
    weights_sha256: str
    patterns: Mapping[str, str] = field(default_factory=dict)
    train: TrainSummary = UNTRAINED

    @cached_property
    def working(self) -> nn.Module:
        """The model as it is asked: in float32, so that half precision's own rounding is in no figure, on any machine."""
        return in_float32(self.model)


class Judge:
    """Makes report rows. `seen` gives what the dense model drew and predicted, which the others are held against."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.device = resolve_device(inputs.recipe.train.device)
        self.reference: Reference | None = None
        self.metric: MetricFacts | None = None

    def look(self) -> Iterator[Progress]:
        """Take the real images in; without it, no quality is measured."""
        inputs, settings = self.inputs, self.inputs.recipe.evaluate
        if inputs.metric is not None and isinstance(inputs.pictures, ImageSet) and settings.samples:
            yield Progress("real images", 0, 1)
            features, self.reference = compared_with(inputs.metric, inputs.pictures, settings)
            floor = evaluate.floor(features, settings)
            self.metric = MetricFacts(name=inputs.metric.name, extractor_sha256=inputs.metric.sha256, floor=floor)

    @memory_in("measuring")
    def seen(self, variant: Variant) -> Generator[Progress, None, Seen]:
        """What `variant` draws and predicts."""
        inputs, settings = self.inputs, self.inputs.recipe.evaluate
        images = None
        if evaluate.can_sample(inputs.adapter) and settings.samples:
            images = yield from self.drawn(variant.name, variant.working)
        yield Progress(f"drift of {variant.name}", 0, 1)
        return Seen(images, self.predicted(variant.working))

    def renamed(self, seen: Seen, was: str, name: str) -> Seen:
        """`seen` of the row `was` as that of the row `name`, whose weights are the same."""
        return seen

    def predicted(self, model: nn.Module) -> Tensor:
        """What `model` predicts on real data. The processes of a launch share the batches; the first one has them all."""
        here, inputs = team(), self.inputs
        found = drift.answers(
            inputs.adapter, model, inputs.data, inputs.recipe.evaluate, self.device, here.rank, here.size
        )
        return _joined(here.in_turn(list(found)))

    @memory_in("measuring")
    def row(
        self, variant: Variant, seen: Seen, dense: Seen | None, sheet: Path | None
    ) -> Generator[Progress, None, Row]:
        """The row of `variant`, which gave `seen`; `dense` is what it is held against, None for the dense model itself.

        64 of its samples are saved as the picture `sheet`.
        """
        inputs, settings = self.inputs, self.inputs.recipe.evaluate
        if seen.images is not None and sheet is not None:
            save_grid(seen.images[:64], sheet)
        quality: list[Quality] = []
        if seen.images is not None and self.reference is not None and inputs.metric is not None:
            yield Progress(f"measure {variant.name}", 0, 1)
            quality = evaluate.qualities(inputs.metric, seen.images, self.reference, settings)
        differences: list[Drift] = []
        if dense is not None:
            asked = drift.asked(inputs.data)
            differences.append(drift.prediction_error(seen.predictions, dense.predictions, asked))
            if seen.images is not None and dense.images is not None:
                differences.append(drift.sample_rmse(seen.images, dense.images))
        return Row(
            name=variant.name,
            weights_sha256=variant.weights_sha256,
            **dict(cost.costs(variant.model, inputs.adapter, variant.patterns)),
            quality=tuple(quality),
            drift=tuple(differences),
            latency=(),
            train=variant.train,
        )

    def whole(self, variants: Sequence[Variant]) -> Generator[Progress, None, dict[str, Latency]]:
        """The time of what the models of `variants` are parts of, by the names of their rows. Here: of nothing."""
        yield from ()
        return {}

    @memory_in("sampling")
    def drawn(self, name: str, model: nn.Module, steps: int | None = None) -> Generator[Progress, None, Tensor]:
        """The images that `model` draws, in `steps` sampler steps where they are not the recipe's. The processes of a launch share
        the batches; the first one has them all."""
        here, settings = team(), self.inputs.recipe.evaluate
        if steps is not None:
            settings = settings.model_copy(update={"sampler_steps": steps})
        drawn: list[Tensor] = []
        yield Progress(f"sample {name}", 0, settings.drawn)
        for batch in evaluate.sample(self.inputs.adapter, model, settings, here.rank, here.size):
            decoded = batch if self.inputs.autoencoder is None else self.inputs.autoencoder.decode(batch)
            drawn.append(decoded)
            done = min(here.size * sum(map(len, drawn)), settings.drawn)
            yield Progress(f"sample {name}", done, settings.drawn)
        return _joined(here.in_turn(drawn))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return joined(parts) if parts else torch.zeros(0)
