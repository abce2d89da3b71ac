"""Drift: how far a model's samples and predictions are from those of the dense one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter, to_device
from compressor.data.calls import joined
from compressor.data.sets import SampleSet
from compressor.errors import CompressorError
from compressor.quality.metric import refuse_broken
from compressor.quality.settings import Evaluation
from compressor.report.content import Drift
from compressor.seeds import generator


def sample_rmse(images: Tensor, dense: Tensor) -> Drift:
    """Root mean square difference of images from the dense model's, from the same noise; pixels span [-1, 1].

    Raises CompressorError where the images are not finite.
    """
    refuse_broken(images)
    value = float((images - dense).square().mean().sqrt())
    return Drift(metric="sample_rmse", value=value, samples=len(images))


def predictions(
    adapter: Adapter, module: nn.Module, data: SampleSet, settings: Evaluation, device: torch.device
) -> Tensor:
    """What `module` predicts on up to 512 real images, noised at random timesteps: the same inputs for every model."""
    return joined(list(answers(adapter, module, data, settings, device)))


def asked(data: SampleSet) -> int:
    """How many samples of `data` a model is asked about: all that were held out, up to 512."""
    return min(512, len(data.unseen))


def answers(
    adapter: Adapter,
    module: nn.Module,
    data: SampleSet,
    settings: Evaluation,
    device: torch.device,
    rank: int = 0,
    count: int = 1,
) -> Iterator[Tensor]:
    """As `predictions`, batch by batch.

    Of `count` processes that share the batches, that of `rank` asks every one whose number it has modulo `count`.
    """
    n, data = asked(data), data.unseen
    for first in range(rank * settings.batch_size, n, count * settings.batch_size):
        batch = data.take(torch.arange(first, min(first + settings.batch_size, n)))
        inputs, _ = adapter.noised(batch, generator(settings.seed, "drift", first))
        with torch.no_grad():
            yield adapter.predict(module, to_device(inputs, device)).float().cpu()


def prediction_error(predicted: Tensor, dense: Tensor, asked: int | None = None) -> Drift:
    """Mean square difference from the dense model's predictions, relative to their mean square. `asked` is how many there are, where
    they are of unlike shapes and come without a row each (n,). Raises CompressorError where there is no such number."""
    refuse_silent(dense)
    value = float((predicted - dense).square().mean() / dense.square().mean())
    if not math.isfinite(value):
        raise CompressorError("the predictions are not finite", "Prune less, or fine-tune with a lower learning rate.")
    samples = len(predicted) if asked is None or predicted.dim() > 1 else asked
    return Drift(metric="prediction_error", value=value, samples=samples)


def refuse_silent(answers: Tensor) -> None:
    """Raise CompressorError where the dense model's `answers` are zeros alone: nothing can be told of how far others are from them."""
    if not bool(answers.any()):
        raise CompressorError(
            "the dense model predicts zeros alone: it was never trained, or its weights are others",
            "Give the weights of a trained model, or train one: compressor train.",
        )
