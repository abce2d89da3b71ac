"""Data: the order of samples, and what is read from a file and what is refused."""

from __future__ import annotations

import io
import pickle
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from compressor import Adapter, CompressorError, prune
from compressor.data.batches import Samples, as_batches
from compressor.data.reading import read_data
from compressor.data.sets import Images, Records
from compressor.plugins.magnitude import Magnitude
from compressor.seeds import generator

SIZES = st.integers(1, 40)


def order(n: int, batch_size: int, seed: int, steps: int) -> torch.Tensor:
    samples = Samples(torch.arange(n), batch_size, seed)
    return torch.cat([samples.batch(step) for step in range(steps)])


@given(SIZES, SIZES, st.integers(0, 5))
def test_every_epoch_is_a_permutation_and_batches_span_epochs(n: int, batch_size: int, seed: int) -> None:
    steps = 3 * n // batch_size + 1
    drawn = order(n, batch_size, seed, steps)
    assert len(drawn) == steps * batch_size
    for epoch in drawn.split(n):
        if len(epoch) == n:
            assert epoch.sort().values.tolist() == list(range(n))
        assert len(set(epoch.tolist())) == len(epoch)


@given(SIZES, SIZES, st.integers(0, 5), st.integers(0, 1000))
def test_a_batch_depends_on_seed_and_step_alone(n: int, batch_size: int, seed: int, step: int) -> None:
    samples = Samples(torch.arange(n), batch_size, seed)
    samples.batch(step + 1)
    torch.manual_seed(step)
    again = Samples(torch.arange(n), batch_size, seed)
    assert torch.equal(samples.batch(step), again.batch(step))


@given(SIZES, st.integers(0, 5))
def test_batch_size_does_not_change_the_order(n: int, seed: int) -> None:
    assert torch.equal(order(n, 6, seed, 10), order(n, 4, seed, 15))


def test_epochs_and_seeds_differ() -> None:
    first, second = order(50, 50, 0, 2).split(50)
    assert not torch.equal(first, second)
    assert not torch.equal(first, order(50, 50, 1, 1))


def test_generators_of_one_key_agree_and_of_other_keys_differ() -> None:
    def draw(*key: int | str) -> float:
        return float(torch.rand((), generator=generator(*key)))

    assert draw(0, "noise", 3) == draw(0, "noise", 3)
    assert len({draw(0, "noise", 3), draw(0, "noise", 4), draw(1, "noise", 3), draw(0, "order", 3)}) == 4


def test_bytes_become_images_from_minus_one_to_one() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    taken = Images("three", pixels).take(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(taken.flatten(), torch.tensor([1.0, -1.0, -0.6]))
    assert pixels.flatten().tolist() == [0, 51, 255]


def test_latents_are_taken_as_they_are_and_labels_come_along() -> None:
    latents = torch.randn(3, 4, 2, 2)
    images, labels = Images("latents", latents, torch.tensor([7, 8, 9])).take(torch.tensor([2, 0]))
    assert torch.equal(images, latents[[2, 0]]) and labels.tolist() == [9, 7]


PICTURES = Images(
    "some", torch.randint(256, (20, 3, 4, 5), dtype=torch.uint8, generator=generator("pictures")), torch.arange(20)
)


def test_flipping_mirrors_about_half_of_the_images_and_leaves_labels_where_they_are() -> None:
    plain, flipped = Samples(PICTURES, 8, 0), Samples(PICTURES, 8, 0, flip=True)
    mirrored = []
    for step in range(40):
        (images, labels), (before, same) = flipped.batch(step), plain.batch(step)
        assert torch.equal(labels, same)
        as_before, turned = (
            [torch.equal(a, b) for a, b in zip(images, other, strict=True)] for other in (before, before.flip(-1))
        )
        assert all(a != b for a, b in zip(as_before, turned, strict=True))
        mirrored += turned
    assert 0.4 < sum(mirrored) / len(mirrored) < 0.6


def test_what_is_flipped_depends_on_seed_and_step_alone() -> None:
    samples = Samples(PICTURES, 8, 0, flip=True)
    batches = [samples.batch(step)[0] for step in range(6)]
    torch.manual_seed(1)
    resumed = Samples(PICTURES, 8, 0, flip=True)
    for step in (5, 0, 3, 4):
        assert torch.equal(resumed.batch(step)[0], batches[step])
    other = Samples(replace(PICTURES, labels=None), 8, 1, flip=True)
    assert not torch.equal(other.batch(0), batches[0])


@pytest.mark.parametrize("samples", [torch.zeros(4, 3), Images("latents", torch.zeros(4, 4, 2, 2))])
def test_only_pictures_are_flipped(samples: Any) -> None:
    with pytest.raises(CompressorError, match="flip mirrors pictures, and these samples are none"):
        Samples(samples, 2, 0, flip=True)


def test_the_hash_is_of_dtype_shape_pixels_and_labels() -> None:
    pixels = torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2)
    others = [
        Images("a", pixels.view(2, 2, 2, 1)),
        Images("a", pixels.view(torch.int8)),
        Images("a", pixels + 1),
        Images("a", pixels, torch.tensor([0, 1])),
        Images("a", pixels, torch.tensor([1, 0])),
    ]
    assert Images("a", pixels).sha256 == Images("b", pixels.clone()).sha256
    assert len({other.sha256 for other in others} | {Images("a", pixels).sha256}) == 6


def test_going_back_in_a_stream_is_refused() -> None:
    stream = as_batches(iter([torch.zeros(1), torch.ones(1)]), 1, 0)
    assert stream.batch(1).item() == 1
    with pytest.raises(CompressorError, match="cannot go back"):
        stream.batch(0)


# Files


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 8, 6), (5, 1, 8, 6)),
        ((5, 8, 6, 3), (5, 3, 8, 6)),
        ((5, 8, 6, 1), (5, 1, 8, 6)),
        ((5, 3, 8, 6), (5, 3, 8, 6)),
        ((5, 4, 8, 6), (5, 4, 8, 6)),
    ],
)
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_images_are_read_channels_first(
    shape: tuple[int, ...], expected: tuple[int, ...], kind: str, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / f"set.{kind}"
    if kind == "npz":
        saved(path, images=pixels)
    else:
        np.save(path, pixels)
    images = read_data(path)
    assert images.pixels.shape == expected and images.pixels.dtype == torch.uint8 and images.name == "set"
    assert images.pixels.sum() == pixels.sum(dtype=np.int64)
    if shape[-1] == 3:
        assert np.array_equal(images.pixels.numpy().transpose(0, 2, 3, 1), pixels)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_float_latents_are_read(dtype: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 4, 8, 8)).astype(dtype)
    images = read_data(saved(tmp_path / "latents.npz", images=values))
    assert np.array_equal(images.pixels.numpy(), values)


def test_labels_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "set.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([2, 0, 1], np.uint8))
    labels = read_data(path).labels
    assert labels is not None and labels.tolist() == [2, 0, 1] and labels.dtype == torch.int64


ZEROS = np.zeros((3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"x": ZEROS, "y": ZEROS[:2]},
            r"no array named 'images', and .* no records: x: uint8 \(3, 8, 8\), y: uint8 \(2,",
        ),
        ({"x": ZEROS[:0]}, r"no records: x: uint8 \(0, 8, 8\)"),
        ({"x": ZEROS, "y": np.float32(1)}, r"arrays are x: uint8 \(3, 8, 8\), y: float32 \(\)"),
        ({"x": np.array(["a"])}, r"arrays are x: <U1 \(1,\)"),
        ({}, "arrays are none"),
        (
            {"images": np.zeros((3, 1, 8, 8), np.longdouble)},
            r"images are (float|longdouble)\d* .*\nAllowed: uint8 or float of up",
        ),
        (
            {"sample": np.zeros((3, 4), np.longdouble)},
            r"arrays are sample: (float|longdouble)\d* \(3, 4\)\n.* up to 64 bits",
        ),
        ({"images": ZEROS.astype(np.int64)}, r"images are int64 \(3, 1, 8, 8\)\nAllowed: uint8 or float"),
        ({"images": ZEROS.astype(bool)}, "images are bool"),
        ({"images": ZEROS.astype(complex)}, "images are complex128"),
        ({"images": np.array(["a"])}, "images are <U1"),
        ({"images": ZEROS[0]}, r"images are uint8 \(8, 8\)"),
        ({"images": ZEROS[:0]}, r"images are uint8 \(0, 1, 8, 8\)"),
        ({"images": ZEROS[:, :0]}, r"images are uint8 \(3, 1, 0, 8\)"),
        ({"images": ZEROS, "labels": np.zeros(2, np.int64)}, r"labels are int64 \(2,\)\nAllowed: integers \(3,\)"),
        ({"images": ZEROS, "labels": np.zeros(3)}, r"labels are float64 \(3,\)"),
    ],
)
def test_wrong_arrays_are_refused_with_what_was_found(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "set.npz", **arrays)
    with pytest.raises(CompressorError, match=message) as caught:
        read_data(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["nothing.npz", "nothing.npy", "folder.npz", "images.png"])
def test_what_is_no_data_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(CompressorError, match=r"no such file or folder|no pictures in this folder"):
        read_data(tmp_path / name)


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["npz", "npy", "labels", "plain pickle"])
def test_pickled_objects_are_refused_and_nothing_runs(kind: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / ("set.npz" if kind in ("npz", "labels") else "set.npy")
    objects = np.array([Hostile(trace)], dtype=object)
    if kind == "npz":
        saved(path, images=objects)
    elif kind == "labels":
        saved(path, images=ZEROS, labels=objects)
    elif kind == "npy":
        np.save(path, objects)
    else:
        path.write_bytes(pickle.dumps(objects))
    with pytest.raises(CompressorError, match=r"cannot be read: .*\nThe file is damaged, or holds pickled objects"):
        read_data(path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists()  # the trap would have sprung


@pytest.mark.parametrize("kind", ["npz", "npy"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_files_are_refused(kind: str, share: float, tmp_path: Path) -> None:
    whole = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.savez(whole, images=pixels) if kind == "npz" else np.save(whole, pixels)
    path = tmp_path / f"cut.{kind}"
    path.write_bytes(whole.getvalue()[: int(share * len(whole.getvalue()))])
    with pytest.raises(CompressorError, match="cannot be read"):
        read_data(path)


def test_a_flipped_byte_in_an_archive_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "set.npz", images=np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CompressorError, match="cannot be read"):
        read_data(path)


@pytest.mark.parametrize(("holds", "suffix"), [("npz", ".npy"), ("npy", ".npz")])
def test_a_file_with_the_other_suffix_is_refused_or_read(holds: str, suffix: str, tmp_path: Path) -> None:
    whole = io.BytesIO()
    np.savez(whole, images=ZEROS) if holds == "npz" else np.save(whole, ZEROS)
    path = tmp_path / f"set{suffix}"
    path.write_bytes(whole.getvalue())
    with suppress(CompressorError):
        assert read_data(path).shape == (1, 8, 8)


# Records


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_named_arrays_that_are_no_images_are_records(kind: str, tmp_path: Path) -> None:
    arrays = {"sample": torch.randn(5, 4, 2, 2), "timestep": torch.arange(5), "target": torch.randn(5, 4, 2, 2).half()}
    path = tmp_path / f"set.{kind}"
    np.savez(path, **{n: a.numpy() for n, a in arrays.items()}) if kind == "npz" else save_file(arrays, path)
    records = read_data(path)
    assert isinstance(records, Records) and len(records) == 5 and records.shape is None and records.name == "set"
    batch = records.take(torch.tensor([3, 0]))
    assert batch.keys() == arrays.keys()
    for name, array in arrays.items():
        assert batch[name].dtype == array.dtype and torch.equal(batch[name], array[[3, 0]])
    assert records.sha256 == Records("other", dict(reversed(arrays.items()))).sha256
    assert records.sha256 != Records("set", {**arrays, "timestep": arrays["timestep"] + 1}).sha256


def test_images_in_safetensors_are_read_bfloat16_exactly(tmp_path: Path) -> None:
    latents = torch.randn(3, 4, 2, 2).bfloat16()
    save_file({"images": latents, "labels": torch.tensor([2, 0, 1])}, tmp_path / "set.safetensors")
    images, labels = read_data(tmp_path / "set.safetensors").take(torch.arange(3))
    assert torch.equal(images, latents.float()) and labels.tolist() == [2, 0, 1]


def test_a_model_is_pruned_on_records(model: nn.Module, adapter: Adapter) -> None:
    class OnRecords(type(adapter)):  # type: ignore[misc]
        def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, torch.Tensor]:
            return batch["sample"], batch["target"]

    records = Records("some", {"sample": torch.randn(32, 16), "target": torch.randn(32, 16)})
    result = prune(model, Magnitude(), adapter=OnRecords(), data=records, steps=3, batch_size=8)
    assert len(result.steps) == 3 and result.masks
