"""Data sets of Hugging Face's `datasets`, from the hub or from a folder of `save_to_disk`. Needs the extra `datasets`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from compressor.data.reading.decoded import Pictures
from compressor.errors import CompressorError, first_line
from compressor.foreign.bounded import MOST_PICTURE_BYTES, read_bytes

INSTALL = 'pip install "diffusion-compressor[datasets]"'
_NAME = re.compile(r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>[\w.+-]+))?")


@dataclass(frozen=True, eq=False)
class Rows(Pictures):
    """The pictures in `column` of a `datasets.Dataset`, as they are stored there."""

    name: str
    rows: Any
    column: str
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)

    def called(self, index: int) -> str:
        return f"row {index}"

    def content(self, index: int) -> bytes:
        stored = self.rows[index][self.column] or {}
        if stored.get("bytes") is None and stored.get("path"):
            return read_bytes(stored["path"], MOST_PICTURE_BYTES)
        return stored.get("bytes") or b""


def from_hub(source: str) -> Rows:
    """The set that `hf:OWNER/NAME[:SPLIT]` names; the split is `train` by default. With HF_HUB_OFFLINE=1, from the cache alone."""
    found = _NAME.fullmatch(source)
    if found is None:
        raise CompressorError(f"{source!r}: not the name of a data set", "Write hf:OWNER/NAME or hf:OWNER/NAME:SPLIT.")
    library = _library(source)
    try:
        rows = library.load_dataset(found["name"], split=found["split"] or "train")
    except Exception as error:  # of the network, the hub, the cache, pyarrow, …
        raise CompressorError(
            f"{source}: cannot be had: {_first_line(error)}",
            "Check the name and the split. With HF_HUB_OFFLINE=1, only sets that were loaded before are found.",
        ) from error
    return _rows(library, source, found["name"].rpartition("/")[2], rows)


def recognised(folder: Path) -> bool:
    """Whether `folder` was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def from_disk(folder: Path) -> Rows:
    """The set that `save_to_disk` wrote to `folder`; of several splits, `train`."""
    library = _library(str(folder))
    try:
        loaded = library.load_from_disk(str(folder))
    except Exception as error:  # whatever pyarrow and json raise on damaged files
        raise CompressorError(f"{folder}: cannot be read: {_first_line(error)}", "Save the data set again.") from error
    if isinstance(loaded, dict):
        if "train" not in loaded:
            raise CompressorError(
                f"{folder}: no split 'train', found {sorted(loaded)}", f"Give the folder of one: {folder}/SPLIT."
            )
        loaded = loaded["train"]
    return _rows(library, str(folder), folder.resolve().name, loaded)


def _rows(library: ModuleType, where: str, name: str, rows: Any) -> Rows:
    features = rows.features
    pictures = [column for column, feature in features.items() if isinstance(feature, library.Image)]
    if not pictures:
        raise CompressorError(
            f"{where}: no column of images, found {', '.join(features)}",
            "Cast one to datasets.Image() and save the set.",
        )
    classes = [column for column, feature in features.items() if isinstance(feature, library.ClassLabel)]
    if len(pictures) > 1 or len(classes) > 1:
        several = pictures if len(pictures) > 1 else classes
        raise CompressorError(
            f"{where}: several columns could be meant: {', '.join(several)}",
            f"Keep one: remove_columns({several[1:]}), then save_to_disk.",
        )
    try:
        rows.data.validate(full=True)  # a damaged file has places outside of it, and reading there ends the process
        labels = torch.tensor(rows.with_format(None)[classes[0]][:]) if classes else None
    except Exception as error:  # of pyarrow, and of torch where a label is missing
        raise CompressorError(f"{where}: cannot be read: {_first_line(error)}", "Save the data set again.") from error
    stored = rows.with_format(None).cast_column(pictures[0], library.Image(decode=False))
    return Rows(name, stored.select_columns(pictures), pictures[0], labels)


def _library(where: str) -> ModuleType:
    try:
        return import_module("datasets")
    except ImportError as error:
        raise CompressorError(f"{where}: needs Hugging Face's datasets", f"Install it with: {INSTALL}") from error


def _first_line(error: Exception) -> str:
    return first_line(error)
