"""The Metric interface: an extractor of features, by whose name a Fréchet distance goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from torch import Tensor

from compressor.errors import UsageError


class Metric(ABC):
    """An extractor of features, and the Fréchet distance in them. The extractor is part of the name: only Inception's is FID.

    `compressor.quality.fidelity` takes further measures in the same features.
    """

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

    def with_weights(self, path: Path) -> Metric:
        """This metric with the extractor's weights from the file at `path`. Raises UsageError where it takes none."""
        raise UsageError(
            f"{self.name} takes no weights, got {path}",
            "Leave evaluate.inception_weights out, or measure fid: --set evaluate.metric=fid",
        )

    def spatial(self, images: Tensor) -> Tensor | None:
        """Features (n, e) that still know where in the image things are; None where the extractor has none."""
        return None
