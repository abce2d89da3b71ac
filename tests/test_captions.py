"""A pipeline's denoiser, fine-tuned with noise on a user's own captioned pictures: told what its pipeline tells it, and no more."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_flatten

import compressor
from compressor import CompressorError, files, parse, registry, seeds
from compressor.adapter import to_device
from compressor.data.latents import Autoencoder
from compressor.data.reading.captions import read_captioned
from compressor.data.sets import Records
from compressor.data.settings import Loading, Record
from compressor.errors import UsageError
from compressor.pipelines import captions
from compressor.pipelines.opened import open_pipeline

CAPTIONS = tiny_pipelines.PROMPTS[:7]
UNGUIDED = {"flux": {}}
"""What turns guidance off where it is not guidance_scale=1: FLUX tells its model how much to imitate."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that gives the folder of a tiny pipeline by its name, made once."""
    base = tmp_path_factory.mktemp("pipelines")

    def folder(name: str) -> Path:
        target = base / name
        if not target.is_dir():
            tiny_pipelines.made(name, base / f"{name}-files").save_pretrained(target)
        return target

    return folder


def picture(path: Path, seed: int, height: int = 40, width: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven pictures with captions in text files, two of which are the same."""
    folder = tmp_path_factory.mktemp("photos")
    for number, caption in enumerate([*CAPTIONS[:6], CAPTIONS[0]]):
        picture(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def own(name: str) -> dict[str, object]:
    """The pipeline's arguments beside a prompt, without those that the size of the pictures decides."""
    return {k: v for k, v in tiny_pipelines.arguments(name).items() if k not in ("height", "width")}


def size(name: str) -> int:
    return tiny_pipelines.SIZES.get(name, 16)


def through(events):
    while True:
        try:
            next(events)
        except StopIteration as finished:
            return finished.value


def data_of(name: str, folder: Path, photos: Path, **record: object):
    opened = open_pipeline(folder)
    adapter = registry.adapter("diffusers").opened(str(folder))
    settings = Record(arguments=own(name), unseen=2, **record)
    loading = Loading(size=size(name))
    return opened, adapter, through(captions.encoded(opened, adapter, read_captioned(photos), settings, loading))


def calls_of(module: torch.nn.Module, act) -> list[dict[str, object]]:
    """The arguments of each call of `module` while `act` runs, by name; those that the class takes anyway are left out."""
    parameters, found = inspect.signature(module.forward).parameters, []

    def hook(_, args, kwargs):
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        given.pop("return_dict", None)
        found.append({n: v for n, v in given.items() if v is not parameters[n].default})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            act()
    finally:
        handle.remove()
    return found


def asked_by_the_pipeline(name: str, opened, caption: str, **more: object) -> list[dict[str, object]]:
    pipe = opened.pipe
    pipe.set_progress_bar_config(disable=True)
    given = {**tiny_pipelines.arguments(name), **more, "prompt": caption, "output_type": "latent"}
    rng = torch.Generator().manual_seed(0)
    return calls_of(opened.module, lambda: pipe(**given, num_inference_steps=2, generator=rng))


def same(ours: object, theirs: object, where: str) -> None:
    one, form = tree_flatten(ours)
    other, expected = tree_flatten(theirs)
    assert form == expected, where
    for a, b in zip(one, other, strict=True):
        if isinstance(b, Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), where
            assert torch.equal(a, b), where
        else:
            assert a == b, where


@pytest.mark.parametrize("name", tiny_pipelines.MAKERS)
def test_the_model_is_told_what_its_pipeline_tells_it(name, folders, photos):
    opened, adapter, data = data_of(name, folders(name), photos)
    model, told = adapter.load(str(folders(name))), read_captioned(photos).captions
    order = torch.randperm(7, generator=seeds.generator(0, "captions"))
    seen = order[1:].sort().values.tolist()  # a fifth of seven is held out
    nothing = 0 if name == "flux" else 1
    assert len(data) == len(seen) + nothing
    unguided = UNGUIDED.get(name, {"guidance_scale": 1.0})
    for row, number in enumerate(seen):
        expected, *_ = asked_by_the_pipeline(name, opened, told[number], **unguided)
        for rows in (torch.tensor([row]), torch.tensor([row, (row + 1) % len(seen)])):
            inputs, target = adapter.noised(data.take(rows), torch.Generator().manual_seed(0))
            (found,) = calls_of(model, lambda inputs=inputs: adapter.predict(model, to_device(inputs, torch.device("cpu"))))
            assert found.keys() == expected.keys()
            first = next(iter(inspect.signature(model.forward).parameters))
            assert found[first].shape == (len(rows), *expected[first].shape[1:]) == target.shape
            assert found[first].dtype == expected[first].dtype
            for argument in expected.keys() - {first, "timestep"}:
                ours = torch.utils._pytree.tree_map_only(
                    Tensor, lambda t, n=len(rows): t[:1] if len(t) == n and n > 1 else t, found[argument]
                )
                same(ours, expected[argument], f"{argument} of {told[number]}")


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "sana"])
def test_one_sample_in_ten_is_told_what_guidance_tells_beside_the_caption(name, folders, photos):
    opened, adapter, data = data_of(name, folders(name), photos)
    call, *_ = asked_by_the_pipeline(name, opened, CAPTIONS[0], guidance_scale=5.0)
    both = adapter.conditions((), call)
    assert len(both.noisy) == 2  # of which diffusers has the negative one first
    last = data.take(torch.tensor([len(data) - 1]))
    for argument, array in Records("", both.arrays).take(torch.tensor([0])).items():
        same(last[argument], array, argument)
