"""Quality of samples, and drift from the dense model: what a row of the report says about its weights' pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.errors import CompressorError
from compressor.quality.fidelity import Reference, measures
from compressor.quality.frechet import Gaussian, bootstrap, frechet_distance, gaussian
from compressor.quality.metric import Metric, features_of, spatial_of
from compressor.quality.settings import Evaluation
from compressor.report.content import Floor, Quality
from compressor.seeds import generator

_BRIGHT = 2.0
"""No dense model's images lie above it that are never below 0, but for those in bytes."""


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
        drawn = adapter.sample(module, n, generator(settings.seed, "sample", first), settings.sampler_steps)
        yield checked_images(adapter, drawn, n).cpu()


def checked_images(adapter: Adapter, drawn: Any, n: int) -> Tensor:
    """What the adapter's `sample` has `drawn`. Raises CompressorError unless it is a tensor of `n` images."""
    if not isinstance(drawn, Tensor) or not drawn.dim() or len(drawn) != n:
        found = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
        raise CompressorError(
            f"{type(adapter).__name__}.sample gave {found} for {n} images", "It gives (n, channels, height, width)."
        )
    return drawn


def refuse_bytes(adapter: Adapter, drawn: Tensor) -> None:
    """Raise CompressorError where images of the dense model go from 0 up to far more than 1: they are taken as [-1, 1]."""
    low, high = (float(value) for value in drawn.aminmax()) if drawn.numel() else (0.0, 0.0)
    if low >= 0 and high > _BRIGHT:
        raise CompressorError(
            f"{type(adapter).__name__}.sample gave images from {low:.3g} to {high:.3g}",
            "Images are in [-1, 1]: images / 127.5 - 1 makes them of bytes.",
        )


def qualities(metric: Metric, images: Tensor, reference: Reference, settings: Evaluation) -> list[Quality]:
    """The `quality` of a report row for these generated images: the Fréchet distance, then `settings.measures`."""
    features = features_of(metric, images)
    spatial = spatial_of(metric, images) if reference.spatial is not None else None
    first = _distance(metric, features, reference.gaussian, settings)
    return [first, *measures(metric, features, spatial, reference, settings)]


def quality(metric: Metric, images: Tensor, reference: Gaussian, settings: Evaluation) -> Quality:
    """The metric's own entry of a report row for these generated images."""
    return _distance(metric, features_of(metric, images), reference, settings)


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
