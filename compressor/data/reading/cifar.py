"""CIFAR-10 and CIFAR-100 as their authors publish them: the binary version and the python one.

Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images, and the data sets' page.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from compressor.data.reading import plain_pickle
from compressor.data.sets import Images
from compressor.errors import CompressorError
from compressor.foreign.bounded import read_bytes

_PIXELS = 3 * 32 * 32
_MOST_BYTES = 512 * 2**20  # the largest file of the archives has 154 MB
# What gives a folder away, and the files that make up its training set.
_SETS = {
    "data_batch_*.bin": [f"data_batch_{number}.bin" for number in range(1, 6)],
    "data_batch_?": [f"data_batch_{number}" for number in range(1, 6)],
    "train.bin": ["train.bin"],
    "train": ["train"],
}
_HINT = "Download and unpack the archive again."


def recognised(folder: Path) -> bool:
    """Whether `folder` is one of the four CIFAR archives, unpacked."""
    return _files(folder) is not None


def read(path: Path) -> Images:
    """The training images of an unpacked archive, or those of one `.bin` file. Test batches of a folder are left out.

    Labels are the ten classes, or the hundred fine ones. Raises CompressorError for what is missing, cut short or not CIFAR.
    """
    files = _files(path) or [path]
    if missing := [file.name for file in files if not file.exists()]:
        raise CompressorError(f"{path}: {', '.join(missing)} of CIFAR-10 is missing", _HINT)
    pairs = [_from_bytes(file) if file.suffix == ".bin" else _from_pickle(file) for file in files]
    pixels, labels = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return Images(path.stem, torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.from_numpy(labels.astype(np.int64)))


def _files(folder: Path) -> list[Path] | None:
    for pattern, names in _SETS.items():
        if any(found.is_file() for found in folder.glob(pattern)):
            return [folder / name for name in names]
    return None


def _content(file: Path) -> bytes:
    try:
        return read_bytes(file, _MOST_BYTES)
    except OSError as error:
        raise CompressorError(f"{file}: {error.strerror or error}", _HINT) from error


def _from_bytes(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(pixels, labels) of records that are a label (CIFAR-100: a coarse and a fine one) and the pixels, channels first."""
    content = np.frombuffer(_content(file), np.uint8)
    for labels, classes in ((1, 10), (2, 100)):
        if content.size and content.size % (_PIXELS + labels) == 0:
            records = content.reshape(-1, _PIXELS + labels)
            if records[:, labels - 1].max() < classes:
                return records[:, labels:], records[:, labels - 1]
    raise CompressorError(
        f"{file}: {content.size} bytes that are no records of CIFAR",
        f"CIFAR-10 has 3073 bytes per image, a label from 0 to 9 first; CIFAR-100 has 3074. {_HINT}",
    )


def _from_pickle(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        found = plain_pickle.load(_content(file))
    except ValueError as error:
        raise CompressorError(
            f"{file}: refused: not a plain CIFAR batch ({error})",
            "Nothing in it was run. Where you trust its source, load it there and save np.savez(images=..., labels=...); "
            "or take the binary version.",
        ) from error
    found = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in found.items()}
    pixels, labels = found.get("data"), found.get("labels", found.get("fine_labels"))
    classes = 100 if "fine_labels" in found else 10
    if isinstance(pixels, np.ndarray) and isinstance(labels, list):
        known = all(type(label) is int and 0 <= label < classes for label in labels)
        if known and len(labels) > 0 and pixels.shape == (len(labels), _PIXELS):
            return pixels, np.array(labels, np.uint8)
    shape = pixels.shape if isinstance(pixels, np.ndarray) else type(pixels).__name__
    count = len(labels) if isinstance(labels, list) else type(labels).__name__
    raise CompressorError(
        f"{file}: not a CIFAR batch: data {shape}, labels {count}, keys {sorted(map(str, found))[:6]}",
        f"Allowed: data (n, {_PIXELS}) and n labels from 0 to {classes - 1}. {_HINT}",
    )
