"""Reading data in the formats that people have. `read_data` looks at what it is given, and leaves it to one of the files here.

Nothing that is read is ever executed: arrays are read without pickles, CIFAR's pickles by a reader that cannot call anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from compressor.data.reading import arrays, cifar, hugging_face
from compressor.data.reading.decoded import Pictures, read_pictures
from compressor.data.reading.folder import find_files
from compressor.data.sets import SampleSet
from compressor.errors import CompressorError

_FORMATS = (
    "A folder of pictures, a CIFAR folder (binary or python version), a .npz, .npy, .safetensors or CIFAR .bin file, "
    "a folder of datasets' save_to_disk, or hf:OWNER/NAME[:SPLIT]."
)


def read_data(
    source: str | os.PathLike[str],
    shape: Sequence[int] | None = None,
    *,
    workers: int | None = None,
    skip_damaged: bool = False,
    cache_mb: int = 4096,
) -> SampleSet:
    """The samples at `source`: a folder or file in one of the formats of docs/data.md, or `hf:OWNER/NAME[:SPLIT]`.

    `shape` is the (channels, height, width) that pictures of a folder or a Hugging Face set are brought to, with 1 or 3
    channels; arrays stay as they are. Pictures are decoded once by `workers` processes (None: none for small sets, else
    one per core) and kept where they take at most `cache_mb` MiB, otherwise decoded again for each batch.

    Raises CompressorError with the path, what was found and what is allowed. Damaged pictures are an error, or, with
    `skip_damaged`, left out and counted in `skipped`.
    """
    pictures: Pictures | None = None
    path = Path(source)
    if isinstance(source, str) and source.startswith("hf:"):
        pictures = hugging_face.from_hub(source)
    elif path.is_dir():
        if cifar.recognised(path):
            return cifar.read(path)
        pictures = hugging_face.from_disk(path) if hugging_face.recognised(path) else find_files(path)
    elif not path.exists():
        raise CompressorError(f"{path}: no such file or folder", f"{_FORMATS} `compressor list data` has bundled sets.")
    elif path.suffix in arrays.SUFFIXES:
        return arrays.read(path)
    elif path.suffix == ".bin":
        return cifar.read(path)
    if pictures is None:
        packed = path.suffix.lower() in {".gz", ".tgz", ".tar", ".zip", ".7z", ".xz", ".zst"}
        raise CompressorError(f"{path}: not a data file that can be read", "Unpack it first." if packed else _FORMATS)
    return read_pictures(pictures, shape, workers, skip_damaged, cache_mb)


def is_decoded(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is read as pictures in files, each of which is decoded; not as arrays."""
    path = Path(source)
    return str(source).startswith("hf:") or (path.is_dir() and not cifar.recognised(path))


def picture_folder(source: str | os.PathLike[str]) -> Path | None:
    """The folder in and below which pictures are looked for, where `source` is read so."""
    path = Path(source)
    return path if path.is_dir() and not (cifar.recognised(path) or hugging_face.recognised(path)) else None
