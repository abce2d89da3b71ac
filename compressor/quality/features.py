"""Features of the real images, kept on disk between runs: of a data set and an extractor they are always the same."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.data.sets import ImageSet
from compressor.environment import cache_folder
from compressor.errors import CompressorError
from compressor.files import replacing
from compressor.foreign.bounded import mapping
from compressor.quality.fidelity import Reference
from compressor.quality.metric import Metric, features_of, spatial_of
from compressor.quality.settings import Evaluation

_Found = TypeVar("_Found", Tensor, Tensor | None)

VERSION = 1
"""Of the files, and of how features are made: a file of another version is not found."""

WORTH_SECONDS = 2.0
"""What took less to compute is not kept."""


def compared_with(metric: Metric, data: ImageSet, settings: Evaluation) -> tuple[Tensor, Reference]:
    """The features (n, d) of all images of `data`, and what generated images are compared with."""
    features = remembered("features", metric, data, real_features)
    spatial = remembered("spatial", metric, data, real_spatial) if "sfd" in settings.measures else None
    unseen = None
    held_out = data.unseen
    if isinstance(held_out, ImageSet) and held_out is not data and settings.measures:
        unseen = remembered("features", metric, held_out, real_features)
    return features, Reference.of(features, spatial, settings.seed, unseen)


def remembered(
    kind: str, metric: Metric, data: ImageSet, compute: Callable[[Metric, ImageSet], _Found]
) -> _Found | Tensor:
    """`compute(metric, data)`, from disk where it was computed before, by the hashes of the data and the extractor.

    A file that cannot be read, is damaged or does not fit is made again; one that cannot be written is no error.
    """
    path = cache_path(kind, metric, data)
    if (found := _read(path, len(data))) is not None:
        return found
    began = time.perf_counter()
    computed = compute(metric, data)
    if computed is not None and time.perf_counter() - began > WORTH_SECONDS:
        _write(path, computed)
    return computed


def cache_path(kind: str, metric: Metric, data: ImageSet) -> Path:
    """Where the features of `data` are kept: a file named by everything that they depend on."""
    text = f"{VERSION} {kind} {metric.name} {metric.sha256} {data.sha256}"
    return cache_folder("features") / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def _read(path: Path, rows: int) -> Tensor | None:
    try:
        with mapping():
            found = load_file(path)
    except (OSError, SafetensorError):
        return None
    features = found.get("features")
    if features is None or features.ndim != 2 or len(features) != rows or not features.is_floating_point():
        return None
    return features if bool(torch.isfinite(features).all()) else None


def _write(path: Path, features: Tensor) -> None:
    with suppress(OSError, CompressorError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file({"features": features.contiguous()}, partial)


def real_features(metric: Metric, data: ImageSet) -> Tensor:
    """The features (n, d) of all real images."""
    return _over(data, metric, partial(features_of, metric))


def real_spatial(metric: Metric, data: ImageSet) -> Tensor | None:
    """The spatial features (n, e) of all real images; None where the extractor has none."""
    if spatial_of(metric, data.images(torch.arange(min(2, len(data))))) is None:
        return None

    def extract(images: Tensor) -> Tensor:
        found = spatial_of(metric, images)
        if found is None:
            raise CompressorError(f"{metric.name} has spatial features of some images only", "Mend that metric.")
        return found

    return _over(data, metric, extract)


def _over(data: ImageSet, metric: Metric, extract: Callable[[Tensor], Tensor]) -> Tensor:
    batches = data.stream(torch.split(torch.arange(len(data)), 1024))
    found = [extract(batch if data.labels is None else batch[0]) for batch in batches]
    if len(widths := {part.shape[1] for part in found}) > 1:
        raise CompressorError(f"{metric.name} gives features of {sorted(widths)} numbers", "Mend that metric.")
    return torch.cat(found)
