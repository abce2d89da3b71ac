"""A small digits classifier, and the Fréchet distance in its features. Trained by `compressor.model_zoo.digits.train`."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from compressor.environment import usual_torch
from compressor.model_zoo.generic.classified import Classifier, FDOfClassifier

WEIGHTS = Path(__file__).with_name("classifier.safetensors")


class DigitsClassifier(Classifier):
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


class FDDigits(FDOfClassifier):
    """`fd-digits`: for one-channel 8x8 images."""

    name = "fd-digits"
    data = "digits"
    shape = (1, 8, 8)

    @usual_torch()
    def __init__(self) -> None:
        super().__init__(DigitsClassifier(), WEIGHTS)
