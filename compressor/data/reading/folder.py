"""Folders of pictures: which files are taken, in which order, and which classes their subfolders make."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor.data.reading.decoded import Pictures
from compressor.errors import CompressorError
from compressor.foreign.bounded import MOST_NESTED, MOST_PICTURE_BYTES, read_bytes

_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
"""What the parts of a data set are called, of which only one is to be learned from."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Files(Pictures):
    """Picture files below `root`, by their names relative to it."""

    name: str
    root: bytes
    names: list[bytes]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.names)

    def called(self, index: int) -> str:
        return _printable(self.names[index])

    def content(self, index: int) -> bytes:
        return read_bytes(os.path.join(self.root, self.names[index]), MOST_PICTURE_BYTES)


def find_files(folder: Path) -> Files:
    """The pictures below `folder`, sorted by their names as bytes; files and folders that begin with a dot are left out.

    Where all lie in subfolders, and in more than one, the sorted subfolders are the classes 0, 1, …

    Raises CompressorError where there are none, where a link leads back to a folder above it, where folders lie in
    more than 64 others, where a class is empty, and where the classes are called train and test.
    """
    root = os.fsencode(folder)  # names are bytes: a file system may hold some that are not UTF-8
    names, _ = pictures_and_others(folder)
    return Files(folder.resolve().name, root, names, _labels(folder, root, names))


def pictures_and_others(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """The names, relative to `folder`, of the pictures below it and of all other files, each sorted. Raises as `find_files` does."""
    found = sorted(_walk(os.fsencode(folder), b"", ()))
    suffixes = tuple(suffix.encode() for suffix in SUFFIXES)
    names = [name for name in found if name.lower().endswith(suffixes)]
    if not names:
        seen = Counter(_printable(os.path.splitext(name)[1]) or "no suffix" for name in found)
        listing = ", ".join(f"{count} x {suffix}" for suffix, count in seen.most_common(6)) or "nothing at all"
        raise CompressorError(
            f"{folder}: no pictures in this folder or below, found {listing}", f"Allowed: {', '.join(SUFFIXES)}."
        )
    pictures = set(names)
    return names, [name for name in found if name not in pictures]


def _labels(folder: Path, root: bytes, names: list[bytes]) -> Tensor | None:
    tops = [name.partition(b"/")[0] if b"/" in name else None for name in names]
    if None in tops or len(set(tops)) == 1:
        return None
    classes = sorted(entry.name for entry in os.scandir(root) if _is_folder(entry) and not entry.name.startswith(b"."))
    if empty := [name for name in classes if name not in set(tops)]:
        raise CompressorError(
            f"{folder}: the class folder {_printable(empty[0])!r} has no pictures",
            "Remove it: an empty class would shift the labels of those behind it.",
        )
    if {_printable(name).lower() for name in classes} <= _SPLITS:
        raise CompressorError(
            f"{folder}: {' and '.join(map(_printable, classes))} are parts of a data set, not classes of pictures",
            f"Give the folder of the one to be learned from: {folder}/PART.",
        )
    number = {name: label for label, name in enumerate(classes)}
    return torch.tensor([number[top] for top in tops if top is not None])


def _walk(root: bytes, inner: bytes, above: tuple[tuple[int, int], ...]) -> Iterator[bytes]:
    """The names of all files below root/inner, relative to root, with `/` between parts. `above`: the folders on the way."""
    here = os.path.join(root, inner)
    if len(above) > MOST_NESTED:
        raise CompressorError(
            f"{_printable(here[:200])}…: folders in more than {MOST_NESTED} others",
            "Give the folder that has the pictures.",
        )
    status = os.stat(here)
    if (status.st_dev, status.st_ino) in above:
        raise CompressorError(
            f"{_printable(here)}: a link back to a folder above it, so that there is no end",
            "Remove the link.",
        )
    with os.scandir(here) as entries:
        for entry in entries:
            name = os.path.join(inner, entry.name).replace(os.fsencode(os.sep), b"/")
            if entry.name.startswith(b"."):
                continue
            if _is_folder(entry):
                yield from _walk(root, name, (*above, (status.st_dev, status.st_ino)))
            else:
                yield name


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: no folder, and told of as a file that cannot be read
        return False


def _printable(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
