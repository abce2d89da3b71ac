"""Quality of samples, and drift from the dense model: what a row of the report says about its weights' pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter, to_device
from compressor.data import ImageSet, SampleSet
from compressor.errors import CompressorError, UsageError
from compressor.fidelity import Reference, measures
from compressor.frechet import Gaussian, bootstrap, frechet_distance, gaussian
from compressor.recipe import Evaluation
from compressor.seeds import generator


class Metric(ABC):
    """An extractor of features, and the Fréchet distance in them. The extractor is part of the name: only Inception's is FID.

    `compressor.fidelity` takes further measures in the same features.
    """

    name: str

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Features (n, d), float, of `images` (n, channels, height, width) in [-1, 1].

        Raises CompressorError where the images are not what the extractor takes.
        """

    @property
    @abstractmethod
    def sha256(self) -> str:
        """The hash of the extractor's weights."""

    def with_weights(self, path: Path) -> Metric:
        """This metric with the extractor's weights from the file at `path`. Raises UsageError where it takes none."""
        raise UsageError(
            f"{self.name} takes no weights, got {path}",
            "Leave evaluate.inception_weights out, or measure fid: --set evaluate.metric=fid",
        )

    def spatial(self, images: Tensor) -> Tensor | None:
        """Features (n, e) that still know where in the image things are; None where the extractor has none."""
        return None


def can_sample(adapter: Adapter) -> bool:
    """Whether the adapter has a `sample` method of its own."""
    return type(adapter).sample is not Adapter.sample


def sample(adapter: Adapter, module: nn.Module, settings: Evaluation) -> Iterator[Tensor]:
    """`settings.samples` images in batches, on the CPU. The same settings give every model the same initial noise."""
    for first in range(0, settings.samples, settings.batch_size):
        n = min(settings.batch_size, settings.samples - first)
        yield adapter.sample(module, n, generator(settings.seed, "sample", first), settings.sampler_steps).cpu()


def real_features(metric: Metric, data: ImageSet) -> Tensor:
    """The features (n, d) of all real images."""
    return _over(data, metric.features)


def real_spatial(metric: Metric, data: ImageSet) -> Tensor | None:
    """The spatial features (n, e) of all real images; None where the extractor has none."""
    if metric.spatial(data.images(torch.arange(min(2, len(data))))) is None:
        return None

    def extract(images: Tensor) -> Tensor:
        found = metric.spatial(images)
        if found is None:
            raise CompressorError(f"{metric.name} has spatial features of some images only", "Mend that metric.")
        return found

    return _over(data, extract)


def _over(data: ImageSet, extract: Callable[[Tensor], Tensor]) -> Tensor:
    batches = data.stream(torch.split(torch.arange(len(data)), 1024))
    return torch.cat([extract(batch if data.labels is None else batch[0]) for batch in batches])


def qualities(metric: Metric, images: Tensor, reference: Reference, settings: Evaluation) -> list[dict[str, Any]]:
    """The `quality` of a report row for these generated images: the Fréchet distance, then `settings.measures`."""
    features = metric.features(images)
    spatial = metric.spatial(images) if reference.spatial is not None else None
    first = _distance(metric, features, reference.gaussian, settings)
    return [first, *measures(metric.name, features, spatial, reference, settings)]


def quality(metric: Metric, images: Tensor, reference: Gaussian, settings: Evaluation) -> dict[str, Any]:
    """The metric's own entry of a report row for these generated images."""
    return _distance(metric, metric.features(images), reference, settings)


def _distance(metric: Metric, features: Tensor, reference: Gaussian, settings: Evaluation) -> dict[str, Any]:
    interval = bootstrap(features, reference, settings.bootstrap, settings.seed)
    return {
        "metric": metric.name,
        "value": frechet_distance(gaussian(features), reference),
        "ci95": None if interval is None else list(interval),
        "samples": len(features),
        "sampler_steps": settings.sampler_steps,
        "seed": settings.seed,
    }


def floor(features: Tensor, settings: Evaluation) -> dict[str, Any]:
    """The distance between two disjoint random halves of the real images: what a perfect model of them would score.

    It is on the high side for more samples than half the data, since the distance falls with the number of samples.
    """
    order = torch.randperm(len(features), generator=generator(settings.seed, "floor"))
    half = len(features) // 2
    reference = gaussian(features[order[half : 2 * half]])
    interval = bootstrap(features[order[:half]], reference, settings.bootstrap, settings.seed)
    value = frechet_distance(gaussian(features[order[:half]]), reference)
    return {"value": value, "ci95": None if interval is None else list(interval), "samples": half}


def sample_rmse(images: Tensor, dense: Tensor) -> dict[str, Any]:
    """Root mean square difference of images from the dense model's, from the same noise; pixels span [-1, 1]."""
    value = float((images - dense).square().mean().sqrt())
    return {"metric": "sample_rmse", "value": value, "samples": len(images)}


@torch.no_grad()
def predictions(
    adapter: Adapter, module: nn.Module, data: SampleSet, settings: Evaluation, device: torch.device
) -> Tensor:
    """What `module` predicts on up to 512 real images, noised at random timesteps: the same inputs for every model."""
    found = []
    for first in range(0, min(512, len(data)), settings.batch_size):
        batch = data.take(torch.arange(first, min(first + settings.batch_size, 512, len(data))))
        inputs, _ = adapter.noised(batch, generator(settings.seed, "drift", first))
        found.append(adapter.predict(module, to_device(inputs, device)).float().cpu())
    return torch.cat(found)


def prediction_error(predicted: Tensor, dense: Tensor) -> dict[str, Any]:
    """Mean square difference from the dense model's predictions, relative to their mean square."""
    value = float((predicted - dense).square().mean() / dense.square().mean())
    return {"metric": "prediction_error", "value": value, "samples": len(predicted)}
