"""Arrays in `.npz`, `.npy` and `.safetensors` files: images, latents, or records of several arrays."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from compressor.data.naming import nested
from compressor.data.sets import SHARED, Images, Records, SampleSet
from compressor.errors import CompressorError
from compressor.foreign.bounded import check_regular, check_unpacked, mapping, open_regular

SUFFIXES = (".npz", ".npy", ".safetensors")
_NOISY = ("sample", "hidden_states")  # what diffusers calls what is noised
_FINITE = ("target", *_NOISY)
_NO_NAN = "One such number ends a training: leave that sample out, or make it again."
_LONG = "g"  # NumPy's character of long doubles, which torch has not
_Array = np.ndarray[Any, np.dtype[Any]]


def read(path: Path) -> SampleSet:
    """The arrays at `path`; nothing in the file is executed.

    With an array `images`, or a plain `.npy` file: Images, with `labels` where there is one. Images are (n, h, w),
    (n, h, w, c) or (n, c, h, w): uint8 pixels, or float latents. Otherwise Records: all arrays, with one dim 0, or shared by
    all samples: those with another, and those whose name ends in `[shared]`.
    Raises CompressorError with the path and what was found.
    """
    try:
        arrays = _tensors(path) if path.suffix == ".safetensors" else _arrays(path)
    except OSError as error:
        raise CompressorError(
            f"{path}: cannot be read: {error.strerror or error}",
            "Where it is large and yours: np.savez does not compress.",
        ) from error
    except Exception as error:  # numpy, zipfile and safetensors raise a dozen types on damaged files
        raise CompressorError(
            f"{path}: cannot be read: {error}", "The file is damaged, or holds pickled objects."
        ) from error
    return _images(path, arrays["images"], arrays.get("labels")) if "images" in arrays else _records(path, arrays)


def _arrays(path: Path) -> dict[str, _Array]:
    with open_regular(path) as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.lib.npyio.NpzFile):
            check_unpacked(zipfile.ZipFile(file), path.stat().st_size)
        found = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"images": loaded}
    if other := [name for name, array in found.items() if not isinstance(array, np.ndarray)]:
        raise ValueError(f"{other[0][:60]!r} in it is no array")
    return found


def _tensors(path: Path) -> dict[str, _Array]:
    check_regular(path)
    wide = (torch.float16, torch.float32, torch.float64)
    with mapping():
        found = load_file(path)
    return {
        name: (tensor.float() if tensor.is_floating_point() and tensor.dtype not in wide else tensor).numpy()
        for name, tensor in found.items()  # numpy has no bfloat16: float32 holds it exactly
    }


def _images(path: Path, images: _Array, labels: _Array | None) -> Images:
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if (
        images.ndim != 4
        or 0 in images.shape
        or not (images.dtype == np.uint8 or images.dtype.kind == "f")
        or images.dtype.char == _LONG
    ):
        raise CompressorError(
            f"{path}: images are {images.dtype} {images.shape}",
            "Allowed: uint8 or float of up to 64 bits, (n, h, w[, c]) or (n, c, h, w).",
        )
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise CompressorError(
            f"{path}: labels are {labels.dtype} {labels.shape}", f"Allowed: integers ({len(images)},)."
        )
    if images.dtype.kind == "f" and not bool(np.isfinite(images).all()):
        raise CompressorError(f"{path}: images hold NaN or infinity, the first in image {_first_bad(images)}", _NO_NAN)
    return Images(path.stem, _tensor(images), None if labels is None else torch.from_numpy(labels.astype(np.int64)))


def _records(path: Path, arrays: Mapping[str, _Array]) -> Records:
    shapes = {name: f"{array.dtype} {array.shape}" for name, array in sorted(arrays.items())}
    found = ", ".join(f"{name}: {shape}" for name, shape in shapes.items()) or "none"
    bare = {name for name, array in arrays.items() if array.ndim == 0 and not name.endswith(SHARED)}
    odd = [a for a in arrays.values() if a.dtype.kind not in "fiub" or a.dtype.char == _LONG]
    if not arrays or bare or odd:
        raise CompressorError(
            f"{path}: arrays are {found}",
            "Save images with np.savez(images=...), or numeric arrays of up to 64 bits that have one entry per sample along dim 0.",
        )
    for name, array in arrays.items():  # masks of attention hold minus infinity, and nothing holds NaN
        if array.dtype.kind == "f" and bool(
            np.isnan(array).any() if name not in _FINITE else ~np.isfinite(array).all()
        ):
            raise CompressorError(f"{path}: {name} holds NaN{' or infinity' * (name in _FINITE)}", _NO_NAN)
    named = {name.removesuffix(SHARED): _tensor(array) for name, array in sorted(arrays.items())}
    if len(named) < len(arrays):
        raise CompressorError(f"{path}: an array is there with and without {SHARED}: {found}", "Save it once.")
    said = {name.removesuffix(SHARED) for name in arrays if name.endswith(SHARED)}
    count = _samples(path, {name: len(array) for name, array in named.items() if name not in said}, found)
    shared = said | {name for name, array in named.items() if name not in said and len(array) != count}
    nested(dict.fromkeys(named))  # raises now where names contradict each other
    return Records(path.stem, named, frozenset(shared))


def _samples(path: Path, sizes: Mapping[str, int], found: str) -> int:
    """The number of samples, from the first dims of the arrays: that of the model's noisy input or its target, where one has
    the name, else that of most. What has another is shared by all samples. Raises CompressorError where it is not clear."""
    known = {sizes[name] for name in ("target", *_NOISY) if name in sizes}
    (most, times), *others = Counter(sizes.values()).most_common(2) or [(0, 0)]
    clear = (
        len(known) == 1 or (not known and times > 1 and all(times > other for _, other in others)) or len(sizes) == 1
    )
    count = known.pop() if len(known) == 1 else most
    if not clear or not count:
        raise CompressorError(
            f"{path}: no array named 'images', and the arrays are no records: {found}",
            "Records have the same dim 0, the number of samples, in every array; what all samples share has a name that ends in "
            f"{SHARED}.",
        )
    return count


def _first_bad(array: _Array) -> int:
    """The number of the first sample that holds a number which is not finite."""
    return int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])


def _tensor(array: _Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
