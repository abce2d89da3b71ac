"""A small digits classifier, and the Fréchet distance in its features. Trained by `compressor.model_zoo.digits.train`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.quality.metric import Metric
from compressor.weights import load_strictly, read_weights, weights_sha256

WEIGHTS = Path(__file__).with_name("classifier.safetensors")


class DigitsClassifier(nn.Module):
    """(n, 1, 8, 8) in [-1, 1] -> (n, 10) logits; `features` gives the 64 activations before the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 48, 3, padding=1)
        self.hidden = nn.Linear(48 * 4 * 4, 64)
        self.output = nn.Linear(64, 10)

    def maps(self, images: Tensor) -> Tensor:
        """The 48 maps (n, 48, 4, 4) that the convolutions make."""
        x = F.relu(self.conv1(images))
        return F.max_pool2d(F.relu(self.conv2(x)), 2)

    def features(self, images: Tensor) -> Tensor:
        return F.relu(self.hidden(self.maps(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.output(self.features(images))
        return out


class FDDigits(Metric):
    """`fd-digits`: for one-channel 8x8 images."""

    name = "fd-digits"

    def __init__(self) -> None:
        self._classifier = DigitsClassifier()
        load_strictly(self._classifier, read_weights(WEIGHTS), WEIGHTS)
        self._classifier.eval()

    def features(self, images: Tensor) -> Tensor:
        return self._extracted(self._classifier.features, images)

    def spatial(self, images: Tensor) -> Tensor:
        """The first seven maps, (n, 112), as Nash et al. 2021 take the first seven of Inception's."""
        return self._extracted(lambda x: self._classifier.maps(x)[:, :7].flatten(1), images)

    @torch.no_grad()
    def _extracted(self, extract: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        if images.shape[1:] != (1, 8, 8):
            raise CompressorError(
                f"fd-digits takes images (n, 1, 8, 8), got {tuple(images.shape)}",
                "Choose another metric with --set evaluate.metric=NAME, or none with --set evaluate.metric=null",
            )
        return extract(images.cpu().float())

    @property
    def sha256(self) -> str:
        return weights_sha256(self._classifier)
