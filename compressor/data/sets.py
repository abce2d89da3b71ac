"""Data: sets of samples, and batches in an order that is a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressor.adapter import Shared
from compressor.data.naming import nested
from compressor.weights import state_sha256

SHARED = "[shared]"
"""What the name of an array in a file ends in where all samples share it."""


class SampleSet(ABC):
    """Samples that are taken by their indices. `name` is for reports; `skipped` counts what was damaged and left out, `greyed` says
    that pictures had colours which the samples have not."""

    name: str
    skipped: int = 0
    greyed: bool = False

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width) where the samples are images, else None."""
        return None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, indices: Tensor) -> Any:
        """The batch at `indices` (k,): tensors whose dim 0 is k, in a form that the adapter's `noised` takes."""

    def stream(self, order: Iterable[Tensor]) -> Iterator[Any]:
        """`take` of each indices of `order`, in that order; a set that has to work for it may work ahead."""
        return map(self.take, order)

    def near(self, time: float) -> Tensor | None:
        """The indices of the samples of about this `time` of denoising, from 0 (no noise) to 1, where samples have one; else None."""
        return None

    @property
    def unseen(self) -> SampleSet:
        """The samples that are held out from fine-tuning, where there are such; else all."""
        return self

    @property
    @abstractmethod
    def sha256(self) -> str:
        """A hash of all samples, the same however they were stored, and on every machine."""


class ImageSet(SampleSet):
    """Images, in memory or decoded when they are taken; `labels` (n,) int64, or None where there are none."""

    labels: Tensor | None = None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]: ...

    @abstractmethod
    def stored(self, indices: Tensor) -> Tensor:
        """The images at `indices`, (k, channels, height, width), as they are stored: uint8 or, for latents, float."""

    @property
    @abstractmethod
    def latent(self) -> bool:
        """Whether the images are latents: floats, taken as they are."""

    def take(self, indices: Tensor) -> Any:
        """The batch at `indices`: float images, uint8 mapped to [-1, 1]; with labels, the pair (images, labels)."""
        return self.batch(self.stored(indices), indices)

    def images(self, indices: Tensor) -> Tensor:
        """As `take`, without labels."""
        return _as_float(self.stored(indices))

    def batch(self, stored: Tensor, indices: Tensor) -> Any:
        """What `take` gives, from the `stored` images at `indices`."""
        images = _as_float(stored)
        return images if self.labels is None else (images, self.labels[indices])


def _as_float(stored: Tensor) -> Tensor:
    return stored.float().div_(127.5).sub_(1.0) if stored.dtype == torch.uint8 else stored.float()


def images_sha256(dtype: torch.dtype, shape: Sequence[int], stored: Iterable[Tensor], labels: Tensor | None) -> str:
    """The hash of an ImageSet: dtype and `shape` (n, channels, height, width), the images in pieces, the labels."""
    digest = hashlib.sha256(f"{dtype} {tuple(shape)} ".encode())
    for piece in stored:
        digest.update(piece.contiguous().numpy().data)
    if labels is not None:
        digest.update(labels.contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Images(ImageSet):
    """Images in memory: `pixels` (n, channels, height, width), uint8 or, for latents, float; `labels` (n,) or None.

    `held_out` are images of the same kind that nothing is trained on, where there are such. `made_of` is a hash of all that latents
    were computed from, by which they are known: other machines, or numbers of threads, round them to other bits.
    """

    name: str
    pixels: Tensor
    labels: Tensor | None = None
    skipped: int = 0
    held_out: Images | None = None
    greyed: bool = False
    made_of: str = ""

    def __len__(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    @property
    def latent(self) -> bool:
        return self.pixels.dtype != torch.uint8

    @property
    def unseen(self) -> Images:
        return self if self.held_out is None else self.held_out

    def stored(self, indices: Tensor) -> Tensor:
        return self.pixels[indices]

    @property
    def sha256(self) -> str:
        own = self.made_of or images_sha256(self.pixels.dtype, self.pixels.shape, [self.pixels], self.labels)
        return own if self.held_out is None else hashlib.sha256(f"{own} {self.held_out.sha256}".encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Records(SampleSet):
    """Samples of several named tensors with one dim 0, for adapters of one's own; a batch is a dict of tensors.

    A name with dots is a place in nested dicts: `a.b` is `{"a": {"b": …}}`. Those that are in `shared` belong to all samples
    alike, and are in each batch whole, as `Shared`; so are `constants`, which are no tensors (JSON, by such names too).
    `held_out` are samples of the same kind that fine-tuning leaves out, where there are such. `made_of` is as that of `Images`.
    """

    name: str
    arrays: Mapping[str, Tensor]
    shared: Collection[str] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    held_out: Records | None = None
    skipped: int = 0
    made_of: str = ""

    def __len__(self) -> int:
        return next(len(array) for name, array in self.arrays.items() if name not in self.shared)

    @property
    def unseen(self) -> Records:
        return self if self.held_out is None else self.held_out

    def take(self, indices: Tensor) -> dict[str, Any]:
        tensors = {
            name: Shared(array) if name in self.shared else array[indices] for name, array in self.arrays.items()
        }
        return nested({**tensors, **self.constants})

    def describe(self) -> str:
        """The names and shapes of its arrays, without the samples' dim, for messages."""
        return ", ".join(
            f"{name} {tuple(array.shape)} shared by all samples"
            if name in self.shared
            else f"{name} {tuple(array.shape[1:])}"
            for name, array in self.arrays.items()
        )

    @property
    def sha256(self) -> str:
        arrays = {name + SHARED * (name in self.shared): array for name, array in self.arrays.items()}
        own = self.made_of or state_sha256(arrays)
        if not self.constants and self.held_out is None:
            return own
        rest = json.dumps(dict(self.constants), sort_keys=True)
        held = "" if self.held_out is None else self.held_out.sha256
        return hashlib.sha256(f"{own} {rest} {held}".encode()).hexdigest()
