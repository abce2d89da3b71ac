"""Data: sets of images, and batches in an order that is a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from compressor.errors import CompressorError
from compressor.seeds import generator


@dataclass(frozen=True, eq=False)
class Images:
    """Images in memory: `pixels` (n, channels, height, width), uint8 or, for latents, float; `labels` (n,) or None."""

    name: str
    pixels: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return int(self.pixels.shape[0])

    def take(self, indices: Tensor) -> Any:
        """The batch at `indices`: float images, uint8 mapped to [-1, 1]; with labels, the pair (images, labels)."""
        pixels = self.pixels[indices]
        images = pixels.float().div_(127.5).sub_(1.0) if pixels.dtype == torch.uint8 else pixels.float()
        return images if self.labels is None else (images, self.labels[indices])

    def images(self, indices: Tensor) -> Tensor:
        """As `take`, without labels."""
        batch = self.take(indices)
        images: Tensor = batch if self.labels is None else batch[0]
        return images

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(f"{self.pixels.dtype} {tuple(self.pixels.shape)} ".encode())
        digest.update(self.pixels.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()


def read_images(path: str | Path) -> Images:
    """Images from an `.npz` (arrays `images` and, optionally, `labels`) or an `.npy` file; nothing in it is executed.

    Arrays are (n, h, w), (n, h, w, c) or (n, c, h, w): uint8 pixels, or float latents. Raises CompressorError with the
    path and what was found.
    """
    path = Path(path)
    if path.suffix not in {".npz", ".npy"}:
        raise CompressorError(f"{path}: not a data file that can be read", "Give an .npz or .npy file of images.")
    if not path.is_file():
        raise CompressorError(
            f"{path}: no such file", "Give the path of an .npz or .npy file, or a bundled set's name."
        )
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"images": loaded}
    except Exception as error:  # numpy and zipfile raise a dozen types on damaged files
        raise CompressorError(
            f"{path}: cannot be read: {error}", "The file is damaged, or holds pickled objects."
        ) from error
    if "images" not in arrays:
        raise CompressorError(
            f"{path}: no array named 'images', found {sorted(arrays)}", "Save with np.savez(images=...)."
        )
    images, labels = arrays["images"], arrays.get("labels")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[0] == 0 or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        raise CompressorError(
            f"{path}: images are {images.dtype} {images.shape}",
            "Allowed: uint8 or float, (n, h, w[, c]) or (n, c, h, w).",
        )
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iu"):
        raise CompressorError(
            f"{path}: labels are {labels.dtype} {labels.shape}", f"Allowed: integers ({len(images)},)."
        )
    return Images(
        path.stem,
        torch.from_numpy(np.ascontiguousarray(images, dtype=images.dtype.newbyteorder("="))),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
    )


class Batches(ABC):
    """Where the engine gets its batches: `batch(step)` for step 0, 1, 2, …"""

    @abstractmethod
    def batch(self, step: int) -> Any:
        """The batch of `step`."""


@dataclass(frozen=True, eq=False)
class Samples(Batches):
    """Batches drawn from a set of samples: each epoch is a permutation that (seed, epoch) gives, and none is cut short.

    `samples` is an `Images`, a tensor with samples along dim 0, or a map-style dataset.
    """

    samples: Any
    batch_size: int
    seed: int

    def indices(self, step: int) -> Tensor:
        """The indices of the samples in the batch of `step`."""
        n = len(self.samples)
        first = step * self.batch_size
        epochs = range(first // n, (first + self.batch_size - 1) // n + 1)
        order = torch.cat([torch.randperm(n, generator=generator(self.seed, "order", epoch)) for epoch in epochs])
        return order[first - epochs[0] * n :][: self.batch_size]

    def batch(self, step: int) -> Any:
        indices = self.indices(step)
        if isinstance(self.samples, Images):
            return self.samples.take(indices)
        if isinstance(self.samples, Tensor):
            return self.samples[indices]
        return default_collate([self.samples[i] for i in indices.tolist()])


@dataclass(frozen=True, eq=False)
class Listed(Batches):
    """Ready-made batches, in turn, again from the start when they run out."""

    batches: Sequence[Any]

    def batch(self, step: int) -> Any:
        return self.batches[step % len(self.batches)]


class Streamed(Batches):
    """Batches from an iterable (a DataLoader, a generator), in its own order; started again when it runs out.

    A resumed run takes it from the start and skips what was used, which repeats the batches only where the iterable
    itself always gives the same ones; a shuffling DataLoader does not. Give a dataset for that.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = source
        self._iterator: Iterator[Any] = iter(source)
        self._next = 0

    def batch(self, step: int) -> Any:
        if step < self._next:
            if self._iterator is self._source:
                raise CompressorError(
                    "a stream of batches cannot go back", "Give a dataset or a list of batches instead."
                )
            self._iterator, self._next = iter(self._source), 0
        for _ in range(self._next, step):  # a resumed run skips what it has seen
            self._take()
        self._next = step + 1
        return self._take()

    def _take(self) -> Any:
        for item in self._iterator:
            return item
        self._iterator = iter(self._source)
        for item in self._iterator:
            return item
        raise CompressorError("the data ran out of batches", "Give a dataset, a list of batches or a DataLoader.")


def as_batches(data: Any, batch_size: int, seed: int) -> Batches:
    """`data` as Batches. Samples: an Images, a tensor, a map-style dataset. Batches: a list, a DataLoader, an iterable."""
    if isinstance(data, Batches):
        return data
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    if isinstance(data, (Images, Tensor, Dataset)) and not isinstance(data, torch.utils.data.IterableDataset):
        if len(data) == 0:  # type: ignore[arg-type]
            raise CompressorError("the data is empty", "Give at least one sample.")
        return Samples(data, batch_size, seed)
    if isinstance(data, (list, tuple)):
        if not data:
            raise CompressorError("the data is empty", "Give at least one batch.")
        return Listed(data)
    if isinstance(data, Iterable):
        return Streamed(data)
    raise CompressorError(
        f"data of type {type(data).__name__} cannot be used", "Give images, a tensor, a dataset, or batches."
    )
