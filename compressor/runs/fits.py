"""Whether data, model and metric fit each other, found out before anything is trained."""

from __future__ import annotations

from itertools import count

import torch
from torch import nn

from compressor.adapter import Adapter, check_examples, checked_pair, to_device
from compressor.data.sets import Images, ImageSet, Records, SampleSet
from compressor.errors import CompressorError, UsageError, first_line
from compressor.quality.drift import refuse_silent
from compressor.quality.metric import Metric, features_of, spatial_of
from compressor.recipe import Recipe
from compressor.seeds import generator


@torch.no_grad()
def asked(adapter: Adapter, model: nn.Module, data: SampleSet, trained: bool = True) -> Adapter:
    """`adapter`, once its model has taken a batch of `data`; with the batch's inputs as examples where those of its own would be
    guessed: where `data` holds the model's arguments, whose sizes nothing else tells, or where it has none.

    Data that the model cannot take is refused by asking it: only the adapter knows what it means. So is a `trained` model that says
    nothing.
    """
    try:
        batch = data.take(torch.arange(_unmistakable(data)) % len(data))
        inputs, target = checked_pair(adapter, batch, adapter.noised(batch, generator("check")))
        given = to_device(inputs, next(model.parameters()).device)
        answer = adapter.predict(model, given)
        found = tuple(answer.shape)
    except UsageError:
        raise  # of what the user said, not of the data
    except Exception as error:  # whatever an adapter or a model raises
        reason = first_line(error)
        raise UsageError(
            f"{data.name}: {adapter.name} cannot take {_held(data)}: {reason}",
            "Arrays are called as the model's arguments; help(compressor.Adapter) has an adapter's.",
        ) from error
    if found != tuple(target.shape):
        raise UsageError(
            f"{data.name}: {adapter.name} answers {found} to {_held(data)}, the target is {tuple(target.shape)}",
            "The target has the shape of what the model predicts.",
        )
    if trained:
        refuse_silent(answer)
    if isinstance(data, Records):
        return adapter.exampled(inputs)
    try:
        examples = adapter.example_inputs(2)
    except CompressorError:
        return adapter.exampled(inputs)
    check_examples(adapter, adapter.predict(model, to_device(examples, next(model.parameters()).device)), 2)
    return adapter


def _unmistakable(data: SampleSet) -> int:
    """How many samples to ask with, so that no array of `data` passes for samples that all of them share."""
    shared = (
        {len(data.arrays[name]) for name in data.shared if data.arrays[name].dim()}
        if isinstance(data, Records)
        else set()
    )
    return next(size for size in count(2) if size not in shared)


def _held(data: SampleSet) -> str:
    return f"its arrays ({data.describe()})" if isinstance(data, Records) else f"its images {data.shape}"


def refuse_unsigned(data: SampleSet) -> None:
    """Raise UsageError where `data` are images in floats that are never below 0: they would be taken as in [-1, 1], and are not."""
    if not isinstance(data, Images) or not data.latent:
        return
    low, high = (float(value) for value in data.pixels.aminmax())
    if 0 <= low < high:
        raise UsageError(
            f"{data.name}: images are floats from {low:.3g} to {high:.3g}; floats are taken as they are, and pictures lie in [-1, 1]",
            "Save pictures as uint8, or as floats from -1 to 1. For numbers that mean something else, give an adapter of your own: "
            "--model FILE.py:NAME.",
        )


def check_shapes(adapter: Adapter, data: SampleSet, size: int | None) -> None:
    """Refuse data that the model cannot take, or that was not brought to `size`, before anything is trained on it."""
    if size is not None and (data.shape is None or data.shape[1:] != (size, size)):
        raise UsageError(
            f"loading.size: {data.name} holds {'records' if data.shape is None else f'images {data.shape}'}",
            "Only pictures of a folder or a Hugging Face set are resized: leave loading.size out.",
        )
    expected = adapter.image_shape
    if expected is not None and data.shape not in (None, expected):
        raise UsageError(
            f"{data.name}: images are {data.shape}, {adapter.name} takes {expected}",
            "Channels, height and width must agree; resize the images, or choose another model.",
        )
    if isinstance(data, Records):
        return
    labels = data.labels if isinstance(data, ImageSet) else None
    if adapter.num_classes and (
        labels is None or not 0 <= int(labels.min()) <= int(labels.max()) < adapter.num_classes
    ):
        found = "none" if labels is None else f"{int(labels.min())} to {int(labels.max())}"
        raise UsageError(
            f"{data.name}: labels are {found}, {adapter.name} takes 0 to {adapter.num_classes - 1}",
            "Give a folder with a subfolder per class, or an .npz file with an array `labels`.",
        )


def check_metric(metric: Metric, recipe: Recipe, pictures: SampleSet, count: int) -> None:
    """Refuse pictures that cannot be measured, or not with so few samples."""
    if not isinstance(pictures, ImageSet):
        raise UsageError(
            f"{metric.name} compares images, and {pictures.name} holds records",
            "Measure no such metric: --set evaluate.metric=null",
        )
    if recipe.evaluate.drawn < 2 or count < 4:
        raise UsageError(
            f"{metric.name} needs at least 2 samples and 4 real images, got {recipe.evaluate.samples} and {count}",
            "Draw more with evaluate.samples, or measure nothing with --set evaluate.metric=null",
        )
    two = pictures.images(torch.arange(2))
    features_of(metric, two)  # raises now where it cannot take these images
    if "sfd" in recipe.evaluate.measures:
        spatial_of(metric, two)
