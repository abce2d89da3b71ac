"""The Metric interface: an extractor of features, by whose name a Fréchet distance goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.errors import CompressorError, UsageError

_LARGEST = 1e40
"""Of a feature: measures take its sixth power."""


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


def features_of(metric: Metric, images: Tensor) -> Tensor:
    """The features (n, d) of `images`, which stay as they are.

    Raises CompressorError that names the metric where they are anything but a row of finite numbers for each.
    """
    return _rows(metric, "features", metric.features(images.clone()), images)


def spatial_of(metric: Metric, images: Tensor) -> Tensor | None:
    """As `features_of`, of the spatial features; None where the extractor has none."""
    found = metric.spatial(images.clone())
    return None if found is None else _rows(metric, "spatial features", found, images)


def _rows(metric: Metric, what: str, found: Any, images: Tensor) -> Tensor:
    count = len(images)
    of = f"metric {metric.name!r} ({type(metric).__name__})"
    hint = "Mend that metric: it gives a row of finite numbers for each picture, as help(compressor.quality.metric.Metric) says."
    if not isinstance(found, Tensor) or found.is_complex():
        raise CompressorError(f"{of} gave {kind_of(found)} as {what}, not a tensor of numbers", hint)
    if found.dim() != 2 or len(found) != count or not found.shape[1]:
        raise CompressorError(f"{of} gave {what} {tuple(found.shape)} for {count} pictures", hint)
    rows: Tensor = found.detach()
    if not bool(rows.isfinite().all()):
        refuse_broken(images)
        raise CompressorError(f"{of} gave {what} that are not finite", hint)
    if float(largest := rows.double().abs().max()) > _LARGEST:
        raise CompressorError(f"{of} gave {what} as large as {float(largest):.3g}", hint)
    refuse_no_hash(metric.sha256, of)
    return rows


def refuse_broken(images: Tensor) -> None:
    """Raise CompressorError where `images` are not finite: no extractor is to blame for what it makes of them."""
    if not bool(images.isfinite().all()):
        raise CompressorError("the pictures are not finite", "Prune less, or fine-tune with a lower learning rate.")


def kind_of(found: Any) -> str:
    """What a plugin gave, in a word or two."""
    return f"a tensor of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__


def refuse_no_hash(sha256: Any, of: str) -> None:
    """Raise CompressorError unless `sha256`, of the plugin `of`, is a text: reports hold it, and what was computed is kept by it."""
    if not isinstance(sha256, str) or not sha256:
        raise CompressorError(f"{of} has the sha256 {sha256!r}", "It is the hash of its weights, as text.")
