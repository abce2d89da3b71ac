"""Masks that take an eighth of their memory: a bit per entry, unpacked when one is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field

import numpy as np
import torch

from compressor.sparsity.pattern import Mask, Pattern

_Bits = tuple["np.ndarray[tuple[int], np.dtype[np.uint8]]", torch.Size, Pattern]


@dataclass(eq=False)
class PackedMasks(MutableMapping[str, Mask]):
    """Masks by name, on the CPU. What is taken out is a new `Mask` each time, with the same survivors as what was put in."""

    _held: dict[str, _Bits] = field(default_factory=dict)

    @classmethod
    def of(cls, masks: Mapping[str, Mask]) -> PackedMasks:
        """`masks`, packed."""
        found = cls()
        found.update(masks)
        return found

    def __setitem__(self, name: str, mask: Mask) -> None:
        self._held[name] = (np.packbits(mask.keep.cpu().numpy().reshape(-1)), mask.keep.shape, mask.pattern)

    def __getitem__(self, name: str) -> Mask:
        bits, shape, pattern = self._held[name]
        keep = np.unpackbits(bits, count=shape.numel()).view(np.bool_)
        return Mask(torch.from_numpy(keep).view(shape), pattern)

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)
