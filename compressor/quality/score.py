"""The Score interface: how well a picture suits its prompt, or pleases, picture by picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from compressor.errors import CompressorError
from compressor.quality.intervals import mean_interval
from compressor.quality.metric import kind_of, refuse_broken, refuse_no_hash
from compressor.quality.settings import Evaluation
from compressor.report.content import Scored


class Score(ABC):
    """Scores of pictures with their prompts; more is better. For pipelines, whose rows have no real images to be compared with.

    Plugins are registered under the entry-point group `compressor.scores`.
    """

    name: str

    @abstractmethod
    def opened(self, weights: Path | None) -> Score:
        """This score with the network in the file or folder `weights`; None where the recipe names none.

        Raises UsageError where that is not what it takes. Nothing is downloaded.
        """

    @abstractmethod
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score (n,) of each of `images` (n, channels, height, width), in [-1, 1], with its prompt: finite numbers."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """The hash of the network's weights."""


def scores_of(score: Score, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The scores (n,), float64, on the CPU, of `images`, which stay as they are. Raises CompressorError that names the score where it
    gives anything but a finite number for each."""
    found: Any = score.scores(images.clone(), tuple(prompts))
    of = f"score {score.name!r} ({type(score).__name__})"
    hint = "Mend or leave out that score: `scores` gives one finite number for each picture."
    if not isinstance(found, Tensor) or found.is_complex():
        raise CompressorError(f"{of} gave {kind_of(found)}, not a tensor of numbers", hint)
    if tuple(found.shape) != (len(images),):
        raise CompressorError(f"{of} gave {tuple(found.shape)} for {len(images)} pictures", hint)
    values = found.detach().double().cpu()
    if not bool(values.isfinite().all()):
        refuse_broken(images)
        at = int((~values.isfinite()).nonzero()[0])
        raise CompressorError(f"{of} gave {float(values[at])} for picture {at}", hint)
    refuse_no_hash(score.sha256, of)
    return values


def scored(score: Score, images: Tensor, prompts: Sequence[str], settings: Evaluation) -> Scored:
    """The mean of a row's scores, with a 95% interval over the drawing of pictures: Student's t, which holds for few of them, too."""
    values = scores_of(score, images, prompts)
    interval = mean_interval(values.tolist()) if settings.bootstrap else None
    return Scored(
        name=score.name, value=float(values.mean()), ci95=interval, samples=len(values), extractor_sha256=score.sha256
    )
