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
    weights_setting: str | None = None
    """The setting of `evaluate` that names a file with the extractor's weights, for an extractor that comes without. Who gives
    such a file means this metric, where none is named."""

    data: str | None = None
    """The registered data set whose models this metric judges, where neither the model nor the user names another."""

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
            "Leave the file out, or name a metric that takes one; `compressor list metrics` shows all.",
        )

    def measure_name(self, measure: str) -> str:
        """What a `measure` of `compressor.quality.fidelity` is called in these features: `kid-digits` in those of `fd-digits`.

        Only Inception's features give plain names such as `kid`: those are what published values are in.
        """
        return f"{measure}-{self.name.removeprefix('fd-')}"

    def spatial(self, images: Tensor) -> Tensor | None:
        """Features (n, e) that still know where in the image things are; None where the extractor has none."""
        return None
