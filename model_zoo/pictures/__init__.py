"""Emoji as pictures of 32x32 with nine classes: more than digits show, and as free to be passed on."""

from compressor.model_zoo.pictures.classifier import FDPictures
from compressor.model_zoo.pictures.dataset import GROUPS, images

__all__ = ["GROUPS", "FDPictures", "images"]
