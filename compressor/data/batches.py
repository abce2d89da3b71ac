"""Batches: the order of samples, a pure function of seed and step, and what hands them to the engine."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset, default_collate

from compressor.adapter import cloned
from compressor.data.sets import Images, ImageSet, Records, SampleSet
from compressor.errors import CompressorError, UsageError
from compressor.seeds import generator, repeatable
from compressor.weights import state_sha256


class Batches(ABC):
    """Where the engine gets its batches: `batch(step)` for step 0, 1, 2, …"""

    @abstractmethod
    def batch(self, step: int) -> Any:
        """The batch of `step`."""

    def at(self, index: int, time: float) -> Any:
        """A batch to look at for `time`, from 0 (no noise) to 1, the one number `index`. Default: any, which will be noised."""
        return self.batch(index)

    def mark(self) -> str:
        """What tells these batches from others, for runs that go on. Default: nothing, and any are taken."""
        return ""


@dataclass(frozen=True, eq=False)
class Order:
    """The order of `n` samples: each epoch is a permutation that (seed, epoch) gives; batches go over the ends of epochs."""

    n: int
    batch_size: int
    seed: int
    _epochs: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def indices(self, step: int) -> Tensor:
        """The indices (batch_size,) of the samples in the batch of `step`."""
        first = step * self.batch_size
        epochs = range(first // self.n, (first + self.batch_size - 1) // self.n + 1)
        return torch.cat([self._epoch(epoch) for epoch in epochs])[first - epochs[0] * self.n :][: self.batch_size]

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:  # kept: a permutation of a million samples takes longer than taking a batch
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = torch.randperm(self.n, generator=generator(self.seed, "order", epoch))
        return self._epochs[epoch]


@dataclass(eq=False)
class Samples(Batches):
    """Batches drawn from a set of samples, in the `Order` that the seed gives.

    `samples` is a SampleSet, a tensor with samples along dim 0, or a map-style dataset. `flip` mirrors images from left to
    right, each with a probability of one half that (seed, step) decides; it is for an ImageSet of pictures alone.
    """

    samples: Any
    batch_size: int
    seed: int
    flip: bool = False
    _order: Order = field(init=False, repr=False)
    _stream: Iterator[Any] | None = field(default=None, init=False, repr=False)
    _next: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._order = Order(len(self.samples), self.batch_size, self.seed)
        if self.flip and (not isinstance(self.samples, ImageSet) or self.samples.latent):
            raise UsageError(
                "flip mirrors pictures, and these samples are none",
                "Leave loading.flip false; latents of mirrored pictures have to be computed from mirrored pictures.",
            )

    def indices(self, step: int) -> Tensor:
        """The indices of the samples in the batch of `step`."""
        return self._order.indices(step)

    def mark(self) -> str:
        known = f" {state_sha256({'': self.samples[self.indices(0)]}):.12}" if isinstance(self.samples, Tensor) else ""
        flipped = ", mirrored by chance" * self.flip
        return f"{len(self.samples)} samples{known} in batches of {self.batch_size} by seed {self.seed}{flipped}"

    def batch(self, step: int) -> Any:
        if isinstance(self.samples, SampleSet):
            if self._stream is None or step != self._next:
                self._stream = self.samples.stream(map(self._order.indices, count(step)))
            self._next = -1  # a stream that fails is over
            batch = next(self._stream)
            self._next = step + 1
            return self._mirrored(batch, step) if self.flip else batch
        indices = self.indices(step)
        if isinstance(self.samples, Tensor):
            return self.samples[indices]
        with repeatable(self.seed, "data", step):  # which may mirror pictures, or cut them, by chance
            return default_collate([self.samples[i] for i in indices.tolist()])

    def at(self, index: int, time: float) -> Any:
        near = self.samples.near(time) if isinstance(self.samples, SampleSet) else None
        if near is None:
            return self.batch(index)
        order = near[torch.randperm(len(near), generator=generator(self.seed, "near", index))]
        return self.samples.take(order.repeat(math.ceil(self.batch_size / len(order)))[: self.batch_size])

    def _mirrored(self, batch: Any, step: int) -> Any:
        images, *labels = batch if isinstance(batch, tuple) else (batch,)
        chosen = torch.rand(len(images), generator=generator(self.seed, "flip", step)) < 0.5
        images = torch.where(chosen[:, None, None, None], images.flip(-1), images)
        return (images, *labels) if labels else images


@dataclass(frozen=True, eq=False)
class Listed(Batches):
    """Ready-made batches, in turn, again from the start when they run out."""

    batches: Sequence[Any]

    def batch(self, step: int) -> Any:
        return cloned(self.batches[step % len(self.batches)])

    def mark(self) -> str:
        return f"{len(self.batches)} batches"


class Streamed(Batches):
    """Batches from an iterable (a DataLoader, a generator), in its own order; started again when it runs out.

    What it draws by chance, from the global generators of torch, NumPy and Python, `seed` gives: a DataLoader shuffles alike in equal
    runs. A resumed run takes it from the start and skips what was used, which repeats the batches unless the iterable has a generator
    of its own, or its workers do.
    """

    def __init__(self, source: Iterable[Any], seed: int = 0) -> None:
        self._source, self._seed = source, seed
        self._begin()

    def _begin(self) -> None:
        self._next = 0
        self._iterator: Iterator[Any] = self._started()

    def _started(self) -> Iterator[Any]:
        with repeatable(self._seed, "stream", self._next):
            return iter(self._source)

    def batch(self, step: int) -> Any:
        if step < self._next:
            if self._iterator is self._source:
                raise CompressorError(
                    "a stream of batches cannot go back", "Give a dataset or a list of batches instead."
                )
            self._begin()
        while self._next < step:  # a resumed run skips what it has seen
            self._take()
        return self._take()

    def _take(self) -> Any:
        for _ in range(2):
            with repeatable(self._seed, "data", self._next):
                for item in self._iterator:
                    self._next += 1
                    return cloned(item)
            self._iterator = self._started()
        raise CompressorError("the data ran out of batches", "Give a dataset, a list of batches or a DataLoader.")


def parted(batch: Any) -> tuple[Tensor, Any]:
    """(images, labels) of a batch: images alone, or a tuple or list of them and, where there are such, labels (else None).

    Raises CompressorError for a batch of more, or of none.
    """
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if not 1 <= len(batch) <= 2:
        raise CompressorError(
            f"a batch of {len(batch)} parts", "Give images, or the pair (images, labels); leave out what is no label."
        )
    return batch[0], batch[1] if len(batch) == 2 else None


def _check_finite(data: Any) -> None:
    """Raise CompressorError where samples that are in memory hold what would make the loss NaN."""
    held = {"the data": data} if isinstance(data, Tensor) else {}
    if isinstance(data, Images):
        held = {data.name: data.pixels}
    elif isinstance(data, Records):  # masks of attention hold minus infinity
        held = {f"{data.name}: {name}": array.isnan() for name, array in data.arrays.items()}
    for name, values in held.items():
        wrong = values if values.dtype == torch.bool else ~values.isfinite()
        if bool(wrong.any()):
            first = int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0]) if wrong.dim() else 0
            raise CompressorError(
                f"{name}: NaN or infinity, the first in sample {first}", "Leave that sample out, or make it again."
            )


def as_batches(data: Any, batch_size: int, seed: int) -> Batches:
    """`data` as Batches. Samples: a SampleSet, a tensor, a map-style dataset. Batches: a list, a DataLoader, an iterable."""
    if isinstance(data, Batches):
        return data
    if isinstance(data, (str, bytes, os.PathLike)):
        raise UsageError(
            f"data is the name {os.fspath(data)!r}, not samples",
            "Read it: compressor.read_data(PATH); compressor.registry.images(NAME) is a set of `compressor list data`.",
        )
    if isinstance(data, Mapping):
        raise UsageError(
            f"data is a {type(data).__name__}, not batches", "One batch alone is a list of it: data=[batch]."
        )
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data)
    if isinstance(data, (SampleSet, Tensor, Dataset)) and not isinstance(data, torch.utils.data.IterableDataset):
        if len(data) == 0:  # type: ignore[arg-type]
            raise CompressorError("the data is empty", "Give at least one sample.")
        _check_finite(data)
        return Samples(data, batch_size, seed)
    if isinstance(data, (list, tuple)):
        if not data:
            raise CompressorError("the data is empty", "Give at least one batch.")
        leaves = tree_leaves(data[0])
        if leaves and all(isinstance(leaf, (bool, int, float)) for leaf in leaves):
            raise UsageError(
                f"data is a {type(data).__name__} of numbers, not batches",
                "Samples are a tensor: data=torch.tensor(data). Batches are a list of tensors.",
            )
        return Listed(data)
    if isinstance(data, Iterable):
        return Streamed(data, seed)
    raise CompressorError(
        f"data of type {type(data).__name__} cannot be used", "Give images, a tensor, a dataset, or batches."
    )
