"""The UCI handwritten digits (1,797 images, 8x8), and a Fréchet distance in the features of a small classifier of them."""

from compressor.model_zoo.digits.classifier import FDDigits
from compressor.model_zoo.digits.dataset import images

__all__ = ["FDDigits", "images"]
