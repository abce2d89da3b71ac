"""The Score interface: how well a picture suits its prompt, or pleases, picture by picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compressor.quality.settings import Evaluation
from compressor.report.content import Scored
from compressor.seeds import generator


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
        """The score (n,) of each of `images` (n, channels, height, width), in [-1, 1], with its prompt."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """The hash of the network's weights."""


def scored(score: Score, images: Tensor, prompts: Sequence[str], settings: Evaluation) -> Scored:
    """The mean of a row's scores, with a 95% interval over the drawing of pictures (a bootstrap of `settings.bootstrap` draws)."""
    values = score.scores(images, prompts).double()
    interval = None
    if settings.bootstrap and len(values) > 1:
        draws = torch.randint(
            len(values), (settings.bootstrap, len(values)), generator=generator(settings.seed, "scores")
        )
        low, high = torch.quantile(values[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        interval = (low, high)
    return Scored(
        name=score.name, value=float(values.mean()), ci95=interval, samples=len(values), extractor_sha256=score.sha256
    )
