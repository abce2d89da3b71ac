"""Quality of samples, and drift from the dense model: what a row of the report says about its weights' pictures."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.quality.fidelity import Reference, measures
from compressor.quality.frechet import Gaussian, bootstrap, frechet_distance, gaussian
from compressor.quality.metric import Metric
from compressor.quality.settings import Evaluation
from compressor.report.content import Floor, Quality
from compressor.seeds import generator


def can_sample(adapter: Adapter) -> bool:
    """Whether the adapter has a `sample` method of its own, and its model can be sampled by it."""
    return type(adapter).sample is not Adapter.sample and not adapter.unsampled


def sample(
    adapter: Adapter, module: nn.Module, settings: Evaluation, rank: int = 0, count: int = 1
) -> Iterator[Tensor]:
    """`settings.samples` images in batches, on the CPU. The same settings give every model the same initial noise.

    Of `count` processes that share them, that of `rank` draws every batch whose number it has modulo `count`.
    """
    for first in range(rank * settings.batch_size, settings.drawn, count * settings.batch_size):
        n = min(settings.batch_size, settings.drawn - first)
        yield adapter.sample(module, n, generator(settings.seed, "sample", first), settings.sampler_steps).cpu()


def qualities(metric: Metric, images: Tensor, reference: Reference, settings: Evaluation) -> list[Quality]:
    """The `quality` of a report row for these generated images: the Fréchet distance, then `settings.measures`."""
    features = metric.features(images)
    spatial = metric.spatial(images) if reference.spatial is not None else None
    first = _distance(metric, features, reference.gaussian, settings)
    return [first, *measures(metric, features, spatial, reference, settings)]


def quality(metric: Metric, images: Tensor, reference: Gaussian, settings: Evaluation) -> Quality:
    """The metric's own entry of a report row for these generated images."""
    return _distance(metric, metric.features(images), reference, settings)


def _distance(metric: Metric, features: Tensor, reference: Gaussian, settings: Evaluation) -> Quality:
    interval = bootstrap(features, reference, settings.bootstrap, settings.seed)
    return Quality(
        metric=metric.name,
        value=frechet_distance(gaussian(features), reference),
        ci95=interval,
        samples=len(features),
        sampler_steps=settings.sampler_steps,
        seed=settings.seed,
    )


def floor(features: Tensor, settings: Evaluation) -> Floor:
    """The distance between two disjoint random halves of the real images: what a perfect model of them would score.

    It is on the high side for more samples than half the data, since the distance falls with the number of samples.
    """
    order = torch.randperm(len(features), generator=generator(settings.seed, "floor"))
    half = len(features) // 2
    reference = gaussian(features[order[half : 2 * half]])
    interval = bootstrap(features[order[:half]], reference, settings.bootstrap, settings.seed)
    value = frechet_distance(gaussian(features[order[:half]]), reference)
    return Floor(value=value, ci95=interval, samples=half)
