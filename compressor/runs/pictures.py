"""Sheets of images, for people to look at."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from compressor import files


def save_grid(images: Tensor, path: Path) -> None:
    """A PNG of `images` (n, channels, h, w) in [-1, 1], as square as n allows; small ones are enlarged by whole factors."""
    n, channels, height, width = images.shape
    columns = max(1, round(n**0.5))
    lines = -(-n // columns)
    sheet = torch.full((channels, lines * (height + 1) + 1, columns * (width + 1) + 1), 1.0)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        sheet[:, top : top + height, left : left + width] = image
    picture = _picture(sheet)
    factor = max(1, 32 // max(height, width))
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial:
        picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(partial, "PNG")


def save_image(image: Tensor, path: Path) -> None:
    """A PNG of one image (channels, h, w) in [-1, 1], 1 or 3 channels."""
    _picture(image).save(path, "PNG")


def _picture(image: Tensor) -> Image.Image:
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    shown = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]
    return Image.fromarray(shown.contiguous().numpy())
