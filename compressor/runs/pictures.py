"""Sheets of images, for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
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
    made = picture(sheet)
    factor = max(1, 32 // max(height, width))
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial:
        made.resize((made.width * factor, made.height * factor), Image.Resampling.NEAREST).save(partial, "PNG")


def save_side_by_side(columns: Mapping[str, Tensor], path: Path, most: int = 16) -> None:
    """A PNG of pictures (n, channels, h, w) in [-1, 1] side by side: a column per name, a line per picture, at most `most` lines.

    Small pictures are enlarged by a whole factor, to at least 128 pixels.
    """
    n, _, height, width = next(iter(columns.values())).shape
    factor = max(1, -(-128 // max(height, width)))
    height, width, head, gap = height * factor, width * factor, 24, 4
    lines = min(n, most)
    sheet = Image.new("RGB", (len(columns) * (width + gap) + gap, head + lines * (height + gap)), "white")
    writer = ImageDraw.Draw(sheet)
    for column, (name, images) in enumerate(columns.items()):
        left = gap + column * (width + gap)
        writer.text((left + 2, 6), name, fill="black", font=ImageFont.load_default(13))
        for line in range(lines):
            shown = picture(images[line]).convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(shown, (left, head + line * (height + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial:
        sheet.save(partial, "PNG")


def save_image(image: Tensor, path: Path) -> None:
    """A PNG of one image (channels, h, w) in [-1, 1], 1 or 3 channels."""
    picture(image).save(path, "PNG")


def picture(image: Tensor) -> Image.Image:
    """One image (channels, h, w) in [-1, 1], 1 or 3 channels."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    shown = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]
    return Image.fromarray(shown.contiguous().numpy())
