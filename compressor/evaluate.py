"""Quality of samples, and drift from the dense model."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Metric(ABC):
    """A Fréchet distance in the features of some extractor. The extractor is part of the name: only Inception's is FID."""

    name: str

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Features (n, d), float, of `images` (n, channels, height, width) in [-1, 1].

        Raises CompressorError where the images are not what the extractor takes.
        """

    @property
    @abstractmethod
    def sha256(self) -> str:
        """The hash of the extractor's weights."""
