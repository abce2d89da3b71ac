"""Data in the formats that people have: folders of pictures, CIFAR, Hugging Face; whole, damaged and hostile."""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import pickle
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile

from compressor import CompressorError, Images, Samples, read_data
from compressor.data.reading import plain_pickle
from compressor.data.reading.decoded import Decoded, decode
from compressor.errors import UsageError
from compressor.runs import inputs

RGB = (3, 8, 8)


def smooth(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """A random picture of (width, height) without edges."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


def stored(data: Any) -> torch.Tensor:
    return data.stored(torch.arange(len(data)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of pictures of several kinds, 70 in all: more than are decoded at once."""
    root = tmp_path / "pets"
    for index in range(70):
        form = ("png", "jpeg", "webp", "bmp", "tiff")[index % 5]
        place = root / ("cat" if index % 3 else "dog") / f"{index:03}.{form}"
        place.parent.mkdir(parents=True, exist_ok=True)
        smooth(index, (8 + index % 4, 8 + index % 3)).save(place)
    return root


# --- Folders. ---


def test_a_folder_is_read_in_the_order_of_its_names_with_subfolders_as_classes(folder: Path) -> None:
    (folder / "cat" / ".hidden.png").write_bytes(b"no picture")
    (folder / "cat" / "notes.txt").write_text("no picture")
    data = read_data(folder, RGB)
    assert isinstance(data, Images) and data.name == "pets" and data.shape == RGB and data.pixels.dtype == torch.uint8
    files = sorted(p for p in folder.rglob("0*") if p.is_file())
    assert data.labels is not None and data.labels.tolist() == [int(p.parent.name == "dog") for p in files]
    for index, file in enumerate(files):
        assert np.array_equal(data.pixels[index].numpy(), decode(file.read_bytes(), RGB))


def test_pictures_beside_subfolders_or_in_a_single_one_have_no_labels(folder: Path) -> None:
    assert read_data(folder / "cat", RGB).labels is None
    assert read_data(folder.parent, RGB).labels is None
    smooth(0).save(folder / "beside.png")
    assert read_data(folder, RGB).labels is None


def test_workers_and_memory_change_no_byte(folder: Path) -> None:
    before = torch.get_rng_state()
    sets = [read_data(folder, RGB, workers=workers, cache_mb=mb) for workers in (0, 2) for mb in (1, 0)]
    assert [type(data) for data in sets] == [Images, Decoded] * 2
    first = sets[0]
    batches = [first.take(Samples(first, 16, 3).indices(step)) for step in range(8)]
    started = 0
    for data in sets:
        assert data.sha256 == first.sha256 and torch.equal(stored(data), stored(first))
        samples = Samples(data, 16, 3)
        for step in range(8):
            images, labels = samples.batch(step)
            assert torch.equal(images, batches[step][0]) and torch.equal(labels, batches[step][1])
        resumed = Samples(data, 16, 3)
        for step in (5, 6, 2):
            assert torch.equal(resumed.batch(step)[0], batches[step][0])
        workers = multiprocessing.active_children()
        resumed.itself = resumed  # type: ignore[attr-defined]
        del samples, resumed  # and with them their workers, by count or by the collector of cycles
        gc.collect()
        # they ended by themselves; nobody had to kill them
        assert [worker.exitcode for worker in workers] == [0] * len(workers)
        started += len(workers)
    assert started
    assert torch.equal(torch.get_rng_state(), before)


def test_the_small_part_of_a_large_picture_is_its_middle() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    middle = decode(encoded(wide), RGB)[:, :, 2:-2].astype(int)
    assert np.abs(middle - np.array([0, 0, 255])[:, None, None]).max() <= 4
    assert decode(encoded(smooth(0, (5, 90))), (3, 4, 6)).shape == (3, 4, 6)


def test_a_picture_is_made_smaller_without_aliasing() -> None:
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    made = decode(encoded(Image.fromarray(stripes)), (1, 8, 8))
    assert np.abs(made.astype(int) - 127).max() < 12


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels)), RGB), pixels.transpose(2, 0, 1))


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
KINDS: dict[str, Callable[[], bytes]] = {
    "grey": lambda: encoded(Image.fromarray(GREY)),
    "16 bit": lambda: encoded(Image.fromarray(GREY.astype(np.uint16) * 257)),
    "16 bit tiff": lambda: encoded(Image.fromarray(GREY.astype(np.uint16) * 257), "TIFF"),
    "palette": lambda: encoded(Image.fromarray(GREY).convert("RGB").quantize(256)),
    "opaque": lambda: encoded(Image.fromarray(GREY).convert("RGBA")),
    "gif": lambda: encoded(
        Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)], duration=9
    ),
    "webp": lambda: encoded(Image.fromarray(GREY).convert("RGB"), "WEBP", lossless=True),
    "bmp": lambda: encoded(Image.fromarray(GREY), "BMP"),
    "cmyk tiff": lambda: encoded(Image.fromarray(GREY).convert("RGB").convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_picture_becomes_the_same_pixels(kind: str, channels: int) -> None:
    made = decode(KINDS[kind](), (channels, 8, 8))
    assert made.dtype == np.uint8
    assert np.abs(made.astype(int) - GREY).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpegs_have_the_right_colours(mode: str) -> None:
    orange = Image.new("RGB", (40, 40), (240, 140, 40))
    made = decode(encoded(orange.convert(mode), "JPEG", quality=95), RGB).astype(int)
    expected = np.array(orange.convert("L").convert("RGB") if mode == "L" else orange).transpose(2, 0, 1)[:, :1, :1]
    assert np.abs(made - expected).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white(mode: str) -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    clear.paste((0, 0, 0, 255), (0, 0, 4, 8))
    content = encoded(clear.convert(mode) if mode != "P" else clear.quantize(4))
    made = decode(content, (1, 8, 8))[0]
    assert (made[:, :4] == 0).all() and (made[:, 4:] == 255).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_that_stands_for_what_is_transparent_shows_white(dtype: type, channels: int) -> None:
    values = np.full((8, 8), np.iinfo(dtype).max // 5, dtype)
    values[:, 4:] = 7
    content, chunk = (
        encoded(Image.fromarray(values)),
        b"tRNS" + struct.pack(">H", 7),
    )  # older Pillows write none of 16 bits
    content = content[:33] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]
    made = decode(content, (channels, 8, 8))
    assert (made[..., :4] == 51).all() and (made[..., 4:] == 255).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_pictures_are_turned_as_their_exif_says(form: str) -> None:
    upright = Image.new("L", (64, 64), 255)
    upright.paste(0, (0, 0, 64, 32))  # the upper half is black
    exif = Image.Exif()
    exif[0x0112] = 6  # was taken turned: the viewer turns it a quarter clockwise
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    made = decode(encoded(lying, form, exif=exif), (1, 8, 8))[0].astype(int)
    assert made[:3].max() < 20 and made[5:].min() > 235


def test_large_jpegs_are_close_to_what_a_full_decoding_gives() -> None:
    large = smooth(3, (900, 700))
    made = decode(encoded(large, "JPEG", quality=95), RGB).astype(int)
    assert np.abs(made - decode(encoded(large), RGB)).max() <= 4


# --- Folders that are damaged or odd. ---


def damage(folder: Path) -> None:
    (folder / "cat" / "001.jpeg").write_bytes(b"")
    (folder / "cat" / "002.webp").write_text("not a picture")
    for name in ("000.png", "021.jpeg"):
        path = folder / "dog" / name
        content = encoded(smooth(0, (64, 64)), path.suffix[1:].upper())
        path.write_bytes(content[: len(content) * 2 // 3])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_mb", [0, 1])
def test_damaged_pictures_are_named_and_counted_and_left_out_on_request(
    folder: Path, workers: int, cache_mb: int
) -> None:
    whole = read_data(folder, RGB)
    damage(folder)
    with pytest.raises(CompressorError) as caught:
        read_data(folder, RGB, workers=workers, cache_mb=cache_mb)
    text = str(caught.value)
    assert "pets: 4 of 70 pictures cannot be read: cat/001.jpeg: an empty file; cat/002.webp: not one of PNG" in text
    assert "dog/000.png: " in text and "dog/021.jpeg: " in text and "truncated" in text and "skip_damaged" in text
    data = read_data(folder, RGB, workers=workers, cache_mb=cache_mb, skip_damaged=True)
    kept = [i for i, file in enumerate(sorted(p for p in folder.rglob("*.*"))) if file.stem not in SKIPPED]
    assert (len(data), data.skipped) == (66, 4)
    assert torch.equal(stored(data), stored(whole)[kept]) and torch.equal(data.labels, whole.labels[kept])
    assert data.sha256 == Images("x", stored(whole)[kept], whole.labels[kept]).sha256


SKIPPED = {"001", "002", "000", "021"}


def test_many_damaged_pictures_are_not_all_listed_and_all_of_them_cannot_be_left_out(tmp_path: Path) -> None:
    for index in range(9):
        (tmp_path / f"{index}.png").write_bytes(b"x")
    with pytest.raises(CompressorError, match=r"9 of 9 pictures cannot be read: 0.png: .*4.png: not one of .*; …\n"):
        read_data(tmp_path, RGB, skip_damaged=True)


def test_a_picture_that_is_damaged_later_ends_the_reading_by_name(folder: Path) -> None:
    data = read_data(folder, RGB, workers=0, cache_mb=0)
    damage(folder)
    (folder / "cat" / "004.tiff").unlink()
    with pytest.raises(CompressorError, match=r"5 of 70 .*cat/004.tiff: .*No such file.*\n.*when the run began"):
        data.take(torch.arange(70))


@pytest.mark.parametrize(("files", "found"), [((), "nothing at all"), (("a.txt", "b/c.TXT", "d"), "1 x .txt, 1 x")])
def test_a_folder_without_pictures_says_what_it_has(files: tuple[str, ...], found: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(CompressorError, match=f"no pictures in this folder or below, found {found}"):
        read_data(tmp_path, RGB)


def test_a_class_without_pictures_is_refused(folder: Path) -> None:
    (folder / "bird").mkdir()
    with pytest.raises(CompressorError, match="the class folder 'bird' has no pictures"):
        read_data(folder, RGB)


def test_parts_of_a_data_set_are_not_taken_for_classes(folder: Path) -> None:
    (folder / "cat").rename(folder / "Test")
    (folder / "dog").rename(folder / "train")
    with pytest.raises(CompressorError, match=r"Test and train are parts of a data set.*\n.*pets/PART"):
        read_data(folder, RGB)
    (folder / "Test").rename(folder / "bus")
    assert read_data(folder, RGB).labels is not None  # a train beside a bus is a train


def test_links_are_followed_and_loops_refused(folder: Path) -> None:
    expected = read_data(folder, RGB).sha256
    (folder / "cat").rename(folder.parent / "elsewhere")
    (folder / "cat").symlink_to(folder.parent / "elsewhere")
    assert read_data(folder, RGB).sha256 == expected
    (folder / "dog" / "loop").symlink_to(folder)
    with pytest.raises(CompressorError, match="loop: a link back to a folder above it"):
        read_data(folder, RGB)
    (folder / "dog" / "loop").unlink()
    (folder / "dog" / "gone.png").symlink_to(folder / "nowhere.png")
    with pytest.raises(CompressorError, match=r"1 of 71 pictures cannot be read: dog/gone.png: .*No such file"):
        read_data(folder, RGB)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_names_that_are_not_utf8_are_read_and_can_be_printed(tmp_path: Path) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    with open(name, "wb") as file:
        file.write(encoded(smooth(0)))
    assert len(read_data(tmp_path, RGB)) == 1
    with open(name, "wb") as file:
        file.write(b"x")
    with pytest.raises(CompressorError, match=r"caf\\xe9.png: not one of"):
        read_data(tmp_path, RGB)


def test_a_picture_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth(0, (40, 40)).save(tmp_path / "bomb.png")
    for limit in (1000, 10):  # Pillow warns above its limit, and raises above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(CompressorError, match=r"bomb.png: Image size \(1600 pixels\) exceeds limit"):
            read_data(tmp_path, RGB)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_small_file_that_claims_to_be_a_large_picture_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / f"claims.{kind.lower()}"
    smooth(0, (10, 12)).save(path, kind)
    content = path.read_bytes()
    if kind == "PNG":
        head = content[12:16] + struct.pack(">II", 10, 2**23) + content[24:29]
        path.write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])
    else:  # the entry of the height, which is a SHORT or a LONG of 12
        at = next(
            i for i in range(len(content)) if content[i : i + 2] == b"\x01\x01" and content[i + 8 : i + 10] == b"\x0c\0"
        )
        path.write_bytes(content[: at + 2] + struct.pack("<HII", 4, 1, 2**23) + content[at + 12 :])
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(CompressorError, match=r"bytes that claim to be 10x8388608 pixels"):
        read_data(tmp_path, RGB)


@pytest.mark.parametrize(("kind", "ratio"), [("png", 500), ("webp", 1100)])
def test_a_large_picture_of_one_colour_packs_well_and_is_read(tmp_path: Path, kind: str, ratio: int) -> None:
    path = tmp_path / f"plain.{kind}"
    Image.new("RGB", (5000, 5000), (9, 99, 199)).save(path, **({"lossless": True} if kind == "webp" else {}))
    assert 5000 * 5000 * 3 / path.stat().st_size > ratio
    images = read_data(tmp_path, RGB).images(torch.arange(1))
    assert torch.equal((images[0, :, 0, 0] * 127.5 + 127.5).round(), torch.tensor([9.0, 99.0, 199.0]))


def test_pixels_of_unknown_range_and_formats_that_run_programs_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "deep.tiff")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(CompressorError, match=r"deep.tiff: pixels of 32 bits .*script.png: not one of PNG"):
        read_data(tmp_path, RGB)


def tiff(pixels: bytes, bits: int, photometric: int = 1, sample_format: int = 1) -> bytes:
    """A grey picture of 8x8 in a TIFF file, as other programs write it and Pillow does not."""
    entries = [(256, 8), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 8)]
    entries += [(279, len(pixels)), (339, sample_format)]
    table = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(entries)) + table + bytes(4)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tiff(bytes(96), 12), "pixels of 12 bits, whose range is not known"),
        (tiff(bytes(128), 16, photometric=0), "greys of 16 bits of which 0 is white"),
        (tiff(bytes(128), 16, sample_format=2), "pixels of 16 bits with a sign"),
        (tiff(bytes(64), 8, sample_format=2), "pixels of 8 bits with a sign"),
    ],
)
def test_greys_that_pillow_would_show_as_others_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        decode(content, RGB)
    assert np.array_equal(decode(tiff((GREY.astype("<u2") * 257).tobytes(), 16), RGB)[0], GREY)
    assert np.array_equal(decode(tiff((255 - GREY).tobytes(), 8, photometric=0), RGB)[0], GREY)


@pytest.mark.parametrize("shape", [None, (4, 8, 8), (3, 8), (3, 0, 8)])
def test_a_shape_that_pictures_cannot_have_is_refused(shape: tuple[int, ...] | None, folder: Path) -> None:
    with pytest.raises(CompressorError, match="pictures cannot become images of shape"):
        read_data(folder, shape)


def test_a_worker_that_dies_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.data.reading.decoded.decode", lambda content, shape: os._exit(9))
    with pytest.raises(CompressorError, match=r"a process that decodes pictures ended.*\n.*loading.workers"):
        read_data(folder, RGB, workers=1)


@pytest.mark.parametrize("name", ["nothing", "nothing/deeper.npz", "archive.tar.gz", "table.parquet"])
def test_what_cannot_be_read_is_refused_at_once(name: str, tmp_path: Path, at_once: Any) -> None:
    if "nothing" not in name:
        (tmp_path / name).write_bytes(b"something")
    with (
        pytest.raises(CompressorError, match=r"no such file or folder|not a data file.*\n(Unpack it|A folder)"),
        at_once(),
    ):
        read_data(tmp_path / name)


# --- CIFAR. ---

ARRAY = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\tU\x01bq\n\x87q\x0bRq\x0c"
DTYPE = b"cnumpy\ndtype\nq\x0fU\x02u1q\x10K\x00K\x01\x87q\x11Rq\x12(K\x03U\x01|q\x13NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x14b"


def text(value: str) -> bytes:
    return b"U" + bytes([len(value)]) + value.encode()


def batch_of_2009(pixels: NDArray[np.uint8], labels: list[int], key: str = "labels") -> bytes:
    """A batch in the very instructions that Python 2 wrote the published files with."""
    raw = pixels.tobytes()
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    names = b"".join(text(f"{index}.png") for index in range(len(labels)))
    return b"".join(
        [
            *(b"\x80\x02}q\x01(", text("batch_label"), b"q\x02", text("training batch 1 of 5"), b"q\x03"),
            *(text(key), b"q\x04]q\x05(", numbers, b"e", text("data"), b"q\x06", ARRAY),
            *(b"(K\x01M", struct.pack("<H", len(labels)), b"M\x00\x0c\x86q\x0e", DTYPE, b"\x89"),
            *(b"T", struct.pack("<i", len(raw)), raw, b"q\x15tq\x16b"),
            *(text("filenames"), b"q\x17]q\x18(", names, b"eu."),
        ]
    )


def cifar(seed: int, n: int = 6, classes: int = 10) -> tuple[NDArray[np.uint8], list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3072), dtype=np.uint8), rng.integers(0, classes, n).tolist()


def records(pixels: NDArray[np.uint8], labels: list[int]) -> bytes:
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1).tobytes()


def write_cifar(folder: Path, kind: str) -> None:
    folder.mkdir()
    for number in range(1, 6):
        pair = cifar(number)
        if kind == "bin":
            (folder / f"data_batch_{number}.bin").write_bytes(records(*pair))
        else:
            (folder / f"data_batch_{number}").write_bytes(batch_of_2009(*pair))
    (folder / ("test_batch.bin" if kind == "bin" else "test_batch")).write_bytes(b"not looked at")
    (folder / "readme.html").touch()


@pytest.mark.parametrize("kind", ["bin", "py"])
def test_cifar10_is_read_in_both_versions(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / f"cifar-10-batches-{kind}"
    write_cifar(folder, kind)
    data = read_data(folder)
    assert isinstance(data, Images) and data.name == folder.name and data.shape == (3, 32, 32)
    pixels = np.concatenate([cifar(number)[0] for number in range(1, 6)])
    assert np.array_equal(data.pixels.flatten(1).numpy(), pixels)
    assert data.labels is not None and data.labels.tolist() == [
        label for number in range(1, 6) for label in cifar(number)[1]
    ]
    (folder / ("data_batch_4" + (".bin" if kind == "bin" else ""))).unlink()
    with pytest.raises(CompressorError, match=r"data_batch_4.* of CIFAR-10 is missing"):
        read_data(folder)


def test_the_test_batch_is_what_python_2_wrote() -> None:
    pixels, labels = cifar(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy.core has become numpy._core
        for encoding in ("bytes", "latin1"):
            found = pickle.loads(batch_of_2009(pixels, labels), encoding=encoding)
            key = (lambda name: name.encode()) if encoding == "bytes" else str
            assert np.array_equal(found[key("data")], pixels) and found[key("labels")] == labels


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_batches_that_python_3_saved_again_are_read_or_refused(protocol: int) -> None:
    pixels, labels = cifar(0)
    content = pickle.dumps({b"data": pixels, b"labels": labels}, protocol)
    if protocol == 2:  # where bytes are written as a call
        with pytest.raises(ValueError, match=r"it calls '_codecs.encode'"):
            plain_pickle.load(content)
    else:
        found = plain_pickle.load(content)
        assert np.array_equal(found[b"data"], pixels) and found[b"labels"] == labels


def test_cifar100_is_read_with_its_fine_labels(tmp_path: Path) -> None:
    pixels, labels = cifar(0, classes=100)
    coarse = np.array(labels, np.uint8)[:, None] // 5
    (tmp_path / "bin").mkdir()
    content = np.concatenate([coarse, np.array(labels, np.uint8)[:, None], pixels], 1).tobytes()
    (tmp_path / "bin" / "train.bin").write_bytes(content)
    (tmp_path / "py").mkdir()
    (tmp_path / "py" / "train").write_bytes(batch_of_2009(pixels, labels, "fine_labels"))
    for data in map(read_data, (tmp_path / "bin", tmp_path / "bin" / "train.bin", tmp_path / "py")):
        assert torch.equal(stored(data).flatten(1), torch.from_numpy(pixels)) and data.labels.tolist() == labels


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("kind", ["bin", "py"])
def test_cifar_files_that_are_cut_short_are_refused(share: float, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "cifar"
    write_cifar(folder, kind)
    path = folder / ("data_batch_3" + (".bin" if kind == "bin" else ""))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CompressorError, match=rf"{path}: ([0-9]+ bytes that are no records|refused: not a plain)"):
        read_data(folder)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (lambda p, y: batch_of_2009(p, [*y[:-1], 10]), r"data \(6, 3072\), labels 6"),
        (
            lambda p, y: batch_of_2009(p, y, "other"),
            r"labels NoneType, keys \['batch_label', 'data', 'filenames', 'other'",
        ),
        (lambda p, y: pickle.dumps({"data": p, "labels": y[:5]}, 4), r"data \(6, 3072\), labels 5"),
        (lambda p, y: pickle.dumps({"data": [1], "labels": y}, 4), "data list, labels 6"),
        (lambda p, y: pickle.dumps({"data": p.astype(np.float32), "labels": y}, 4), "not of uint8"),
        (lambda p, y: pickle.dumps({"data": np.asfortranarray(p), "labels": y}, 4), "not of uint8 in rows"),
        (lambda p, y: pickle.dumps([p, y], 4), "it holds list, not a dict"),
        (lambda p, y: pickle.dumps({(): p}, 4), "keys are no texts"),
        (lambda p, y: b"\x80\x02}(e.", "refused"),
        (lambda p, y: b"e.", "damaged: IndexError"),
    ],
)
def test_a_pickle_that_is_no_batch_is_refused(batch: Callable[..., bytes], found: str, tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar", "py")
    path = tmp_path / "cifar" / "data_batch_2"
    path.write_bytes(batch(*cifar(0)))
    with pytest.raises(CompressorError, match=found) as caught:
        read_data(tmp_path / "cifar")
    assert str(path) in caught.value.message


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["whole", "data", "inside labels"])
def test_nothing_in_a_malicious_batch_is_executed(protocol: int, place: str, tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar", "py")
    evil = Evil(tmp_path / "executed")
    held = {"whole": evil, "data": {"data": evil, "labels": [1]}, "inside labels": {"labels": [evil]}}[place]
    content = pickle.dumps(held, protocol)
    (tmp_path / "cifar" / "data_batch_1").write_bytes(content)
    with pytest.raises(CompressorError, match=r"data_batch_1: refused: .*\nNothing in it was run.*np.savez"):
        read_data(tmp_path / "cifar")
    assert not evil.marker.exists()
    pickle.loads(content)
    assert evil.marker.exists()  # the trap would have sprung


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cos\nsystem\n(U\x08touch me\x85R.",
        b"\x80\x02cnumpy\ndtype\n\x85cos\nsystem\nb.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"(S'touch me'\nios\nsystem\n.",
        b"\x80\x02ccompressor.data.reading.plain_pickle\nload\n)\x81.",
        b"\x80\x02\x82\x01.",
    ],
)
def test_every_way_of_a_pickle_to_call_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"it (calls|holds|changes) |damaged"):
        plain_pickle.load(content)


def test_a_pickle_that_nests_without_end_is_refused_at_once(at_once: Any) -> None:
    with pytest.raises(ValueError, match=r"keys are no texts|not a dict"), at_once():
        plain_pickle.load(b"\x80\x02}N\x85" + b"q\x00h\x00\x86" * 200 + b"Ns.")


# --- Hugging Face. ---


@pytest.fixture
def hugging_face(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def rows(datasets: Any, damaged: bool = False) -> Any:
    contents = [{"bytes": encoded(smooth(index)), "path": None} for index in range(6)]
    if damaged:
        contents[4]["bytes"] = contents[4]["bytes"][:-30]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    return datasets.Dataset.from_dict({"img": contents, "label": [0, 1, 1, 0, 1, 0]}, features=features)


@pytest.mark.parametrize("splits", [False, True])
@pytest.mark.parametrize(("cache_mb", "workers"), [(1, 0), (0, 2)])
def test_a_saved_hugging_face_set_is_read(
    splits: bool, cache_mb: int, workers: int, hugging_face: Any, tmp_path: Path
) -> None:
    whole = rows(hugging_face)
    saved = hugging_face.DatasetDict({"train": whole, "test": whole.select([0])}) if splits else whole
    saved.save_to_disk(tmp_path / "set")
    data = read_data(tmp_path / "set", RGB, cache_mb=cache_mb, workers=workers)
    expected = np.stack([np.asarray(smooth(index)).transpose(2, 0, 1) for index in range(6)])
    assert np.array_equal(stored(data).numpy(), expected) and data.labels.tolist() == [0, 1, 1, 0, 1, 0]
    assert data.name == "set" and Samples(data, 4, 0).batch(0)[0].shape == (4, 3, 8, 8)
    if splits:
        assert len(read_data(tmp_path / "set" / "test", RGB)) == 1


def test_a_damaged_row_of_a_hugging_face_set_is_named(hugging_face: Any, tmp_path: Path) -> None:
    rows(hugging_face, damaged=True).save_to_disk(tmp_path / "set")
    with pytest.raises(CompressorError, match="set: 1 of 6 pictures cannot be read: row 4: "):
        read_data(tmp_path / "set", RGB)
    assert len(read_data(tmp_path / "set", RGB, skip_damaged=True)) == 5


def test_hugging_face_sets_without_one_clear_column_are_refused(hugging_face: Any, tmp_path: Path) -> None:
    rows(hugging_face).remove_columns("img").save_to_disk(tmp_path / "none")
    with pytest.raises(CompressorError, match="no column of images, found label"):
        read_data(tmp_path / "none", RGB)
    whole = rows(hugging_face)
    hugging_face.concatenate_datasets(
        [whole, whole.remove_columns("label").rename_column("img", "other")], axis=1
    ).save_to_disk(tmp_path / "two")
    with pytest.raises(CompressorError, match="several columns could be meant: img, other"):
        read_data(tmp_path / "two", RGB)
    hugging_face.DatasetDict({"test": whole}).save_to_disk(tmp_path / "test")
    with pytest.raises(CompressorError, match=r"no split 'train', found \['test'\]"):
        read_data(tmp_path / "test", RGB)
    (tmp_path / "none" / "state.json").write_text("{")
    with pytest.raises(CompressorError, match="none: cannot be read"):
        read_data(tmp_path / "none", RGB)


def test_offline_a_set_of_the_hub_fails_at_once(hugging_face: Any, at_once: Any) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(CompressorError, match=r"hf:nobody/nothing: cannot be had: .*\n.*HF_HUB_OFFLINE"), at_once():
        read_data("hf:nobody/nothing", RGB)


@pytest.mark.parametrize("name", ["hf:", "hf:../x", "hf:a/b/c", "hf:a b", "hf:a/b:c:d"])
def test_what_is_no_name_of_a_set_is_refused(name: str) -> None:
    with pytest.raises(CompressorError, match=r"not the name of a data set|cannot be had"):
        read_data(name, RGB)


def test_without_the_library_the_line_that_installs_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CompressorError, match=r'Install it with: pip install "diffusion-compressor\[datasets\]"'):
        read_data("hf:someone/something", RGB)


# --- Runs. ---


def trained(out: Path) -> tuple[str, dict[str, Any]]:
    report = json.loads((out / "report.json").read_text())
    return report["rows"][-1]["weights_sha256"], report["data"]


@pytest.mark.slow
def test_a_run_on_a_folder_is_the_same_with_workers_and_without_memory(cli: Any, folder: Path, tmp_path: Path) -> None:
    damage(folder)
    arguments = ("--model", "uvit-digits", "--data", folder, "--set", "flip=true", "--set", "loading.skip_damaged=true")
    first = cli.trial(tmp_path / "memory", *arguments)
    second = cli.trial(tmp_path / "lazy", *arguments, "--set", "cache_mb=0", "--set", "workers=2")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "warning: 4 damaged pictures are left out" in first.err
    assert trained(tmp_path / "memory") == trained(tmp_path / "lazy")
    data = trained(tmp_path / "lazy")[1]
    assert (data["name"], data["samples"], data["skipped"]) == ("pets", 66, 4)
    unflipped = cli.trial(tmp_path / "unflipped", *arguments, "--set", "flip=false")
    assert unflipped.code == 0 and trained(tmp_path / "unflipped")[0] != trained(tmp_path / "lazy")[0]


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        (
            {"images": np.zeros((9, 8, 8), np.uint8)},
            ("size=16",),
            "loading.size: uvit-digits takes images (1, 8, 8), not",
        ),
        ({"images": np.zeros((9, 6, 6), np.uint8)}, ("size=8",), "loading.size: set holds images (1, 6, 6)"),
        ({"images": np.zeros((9, 8, 8), np.float32)}, ("flip=true",), "flip mirrors pictures"),
        ({"sample": np.zeros((9, 8, 8), np.float32)}, (), "set: uvit-digits cannot take its arrays (sample (8, 8))"),
        ({"sample": np.zeros((9, 8, 8), np.float32)}, ("size=8",), "loading.size: set holds records"),
        ({"images": np.zeros((9, 8, 8), np.uint8)}, ("workers=-1",), "loading.workers"),
        ({"images": np.zeros((9, 8, 8), np.uint8)}, ("skip_damged=true",), "Did you mean 'loading.skip_damaged'"),
    ],
)
def test_settings_that_do_not_suit_the_data_end_the_run_before_it_begins(
    arrays: dict[str, Any], settings: tuple[str, ...], message: str, cli: Any, tmp_path: Path
) -> None:
    np.savez(tmp_path / "set.npz", **arrays)
    flags = [part for setting in settings for part in ("--set", setting)]
    outcome = cli.trial(tmp_path / "out", "--data", tmp_path / "set.npz", *flags)
    assert outcome.code == 2 and message in outcome.err and not (tmp_path / "out").exists()


def test_a_metric_of_images_refuses_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "set.npz", sample=np.zeros((9, 4), np.float32))
    monkeypatch.setattr("compressor.runs.fits.asked", lambda adapter, *_: adapter)
    with pytest.raises(UsageError, match=r"fd-digits compares images, and set holds records"):
        inputs.load_inputs(inputs.resolve({"data": str(tmp_path / "set.npz")}, "here"))


def test_the_name_of_a_hugging_face_set_stays_as_it_is_in_the_recipe() -> None:
    hub = {"model": "uvit-digits", "data": "hf:owner/name:train"}
    assert inputs.resolve(hub, "here").data == "hf:owner/name:train"
    assert inputs.resolve({"data": "name"}, "here").data == os.path.abspath("name")
