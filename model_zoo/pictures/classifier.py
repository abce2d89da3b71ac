"""A network that knows the bundled pictures, and the Fréchet distance in its features (`compressor.model_zoo.pictures.train`)."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from compressor.environment import usual_torch
from compressor.model_zoo.generic.classified import Classifier, FDOfClassifier
from compressor.model_zoo.pictures.dataset import GROUPS

WEIGHTS = Path(__file__).with_name("classifier.safetensors")


class PicturesClassifier(Classifier):
    """(n, 3, 32, 32) in [-1, 1] -> (n, 9) logits of the groups; `features` gives the 96 activations before the last layers.

    What tells groups apart says little of how a picture looks, so that a second layer, `small`, has to make the picture in 8x8
    pixels (n, 192) from the same activations: they keep shapes and colours.
    """

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 32, 48, 64, 96, 64), (1, 2, 1, 2, 2)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.hidden = nn.Linear(64 * 4 * 4, 96)
        self.output = nn.Linear(96, len(GROUPS))
        self.small = nn.Linear(96, 3 * 8 * 8)

    def maps(self, images: Tensor) -> Tensor:
        """The 64 maps (n, 64, 4, 4) that the convolutions make."""
        for convolution in self.convolutions:
            images = F.silu(convolution(images))
        return images

    def features(self, images: Tensor) -> Tensor:
        return F.silu(self.hidden(self.maps(images).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.output(self.features(images))
        return out


class FDPictures(FDOfClassifier):
    """`fd-pictures`: for 32x32 pictures in colour like the bundled ones."""

    name = "fd-pictures"
    data = "pictures-32"
    shape = (3, 32, 32)

    @usual_torch()
    def __init__(self) -> None:
        super().__init__(PicturesClassifier(), WEIGHTS)
