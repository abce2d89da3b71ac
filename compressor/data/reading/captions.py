"""Folders of pictures with captions: in `metadata.jsonl`, as Hugging Face's imagefolder has them, or in a text file beside each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from errno import EFBIG
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from compressor.data.reading.decoded import read_pictures
from compressor.data.reading.folder import Files, pictures_and_others
from compressor.data.sets import ImageSet
from compressor.errors import CompressorError, UsageError, has_half
from compressor.foreign.bounded import parse_json, read_bytes

METADATA = "metadata.jsonl"
KEYS = ("text", "caption", "prompt")
"""What a line of the metadata may call its caption."""
_FORM = (
    f'Write {METADATA} with a line {{"file_name": "a.png", "text": "…"}} for each picture, or a.txt beside each a.png.'
)
_METADATA = (METADATA.encode(), b"metadata.csv")
_MOST_BYTES = 64 * 2**20
_MOST_CHARACTERS = 4000


@dataclass(frozen=True, eq=False)
class Captioned:
    """Pictures that are not yet decoded, in the order of their names, and the caption of each."""

    files: Files
    captions: Sequence[str]

    def images(
        self, shape: Sequence[int], workers: int | None, skip_damaged: bool, cache_mb: int
    ) -> tuple[ImageSet, list[str]]:
        """The pictures as `read_data` decodes them, brought to `shape`, and the captions of those that are not left out."""
        # the decoder drops the labels of damaged pictures with them: so the numbers say which are there
        numbered = replace(self.files, labels=torch.arange(len(self.files)))
        found = read_pictures(numbered, shape, workers, skip_damaged, cache_mb)
        rows = found.labels.tolist() if found.labels is not None else range(len(found))
        return found, [self.captions[row] for row in rows]


def read_captioned(folder: Path) -> Captioned:
    """The pictures in `folder` and below it, each with its caption. No picture is decoded.

    Raises CompressorError where a picture has no caption, a caption no picture, or a line of the metadata is not what it
    should be, with its number.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder" if not folder.exists() else f"{folder} is not a folder", _FORM)
    names, others = pictures_and_others(folder)
    if METADATA.encode() in others:
        captions = _of_metadata(folder, names)
        stems = {_stem(name): name for name in names}
        if twice := next((name for name in others if name.lower().endswith(b".txt") and _stem(name) in stems), None):
            raise UsageError(
                f"{folder}: {_text(stems[_stem(twice)])} has captions in {METADATA} and in {_text(twice)}", "Keep one."
            )
        if second := next(
            (name for name in others if os.path.basename(name) in _METADATA and name != METADATA.encode()), None
        ):
            raise UsageError(f"{folder}: {METADATA} and {_text(second)}, two sources of captions", "Keep the first.")
    else:
        captions = _of_texts(folder, names, [name for name in others if name.lower().endswith(b".txt")])
    if bare := [name for name in names if name not in captions]:
        more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
        raise UsageError(f"{folder}: {_text(bare[0])} has no caption{more}", _FORM)
    files = Files(folder.resolve().name, os.fsencode(folder), names, None)
    return Captioned(files, [captions[name] for name in names])


def _of_metadata(folder: Path, names: Sequence[bytes]) -> dict[bytes, str]:
    """The captions in the folder's metadata, by the names of their pictures."""
    path, found, known = folder / METADATA, dict[bytes, str](), set(names)
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = parse_json(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{where}: not JSON: {error}", _FORM) from error
        if not isinstance(values, dict):
            raise UsageError(f"{where}: not a JSON object", _FORM)
        name = _file_name(values, where)
        if name not in known:
            # not Path.exists, which raises where the name is too long for the system
            there = "is no picture" if os.path.exists(folder / os.fsdecode(name)) else "is not there"
            raise UsageError(f"{where}: {_text(name)} {there}", "Each caption needs its picture.")
        if name in found:
            raise UsageError(f"{where}: {_text(name)} has a caption already", "Keep one.")
        keys = [key for key in KEYS if key in values]
        if len(keys) != 1:
            raise UsageError(
                f"{where}: {' and '.join(keys) or 'no caption'} for {_text(name)}", f"One of {', '.join(KEYS)}."
            )
        found[name] = _checked(values[keys[0]], where)
    if not found:
        raise UsageError(f"{path}: no caption in it", _FORM)
    return found


def _file_name(values: Mapping[str, Any], where: str) -> bytes:
    """The picture that a line of the metadata names, relative to the folder."""
    given = values.get("file_name")
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        raise UsageError(f"{where}: no file_name", _FORM)
    path = PurePosixPath(given.replace(os.sep, "/"))
    if path.is_absolute() or Path(given).is_absolute() or ".." in path.parts:
        raise UsageError(f"{where}: {given!r} leads out of the folder", "Name pictures in the folder or below it.")
    try:
        return os.fsencode(str(path))
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: {given!r} is no file name", _FORM) from error


def _of_texts(folder: Path, names: Sequence[bytes], texts: Sequence[bytes]) -> dict[bytes, str]:
    """The captions in the text files beside pictures, by the names of the pictures."""
    if not texts:
        raise UsageError(f"{folder}: pictures without captions", _FORM)
    pictures: dict[bytes, bytes] = {}
    for name in names:
        if _stem(name) in pictures:
            raise UsageError(
                f"{folder}: {_text(pictures[_stem(name)])} and {_text(name)} would have one caption", "Rename one."
            )
        pictures[_stem(name)] = name
    found: dict[bytes, str] = {}
    for text in texts:
        if _stem(text) not in pictures:
            raise UsageError(f"{folder}: {_text(text)} is the caption of no picture", "Each caption needs its picture.")
        path = folder / os.fsdecode(text)
        if pictures[_stem(text)] in found:
            raise UsageError(f"{path}: {_text(pictures[_stem(text)])} has a caption already", "Keep one.")
        found[pictures[_stem(text)]] = _checked(_read(path), str(path))
    return found


def _read(path: Path) -> str:
    """The text in the file `path`. Raises CompressorError where there is none in UTF-8."""
    try:
        return read_bytes(path, _MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        if error.errno == EFBIG:
            raise UsageError(f"{path}: {error.strerror}", "Captions are a line each.") from error
        raise CompressorError(f"{path}: {error.strerror or error}", "Captions have to be readable.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file in UTF-8", _FORM) from error


def _checked(caption: Any, where: str) -> str:
    if not isinstance(caption, str):
        raise UsageError(f"{where}: a caption of type {type(caption).__name__}", "Captions are text.")
    if "\0" in caption or has_half(caption):
        raise UsageError(f"{where}: not a text", _FORM)
    if not caption.strip():
        raise UsageError(f"{where}: an empty caption", "Write what the picture shows, or leave the picture out.")
    if len(caption) > _MOST_CHARACTERS:
        raise UsageError(
            f"{where}: a caption of {len(caption):,} characters",
            f"Allowed: up to {_MOST_CHARACTERS:,}; encoders read 77 to 512 tokens.",
        )
    return caption.strip()


def _stem(name: bytes) -> bytes:
    return os.path.splitext(name)[0]


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
