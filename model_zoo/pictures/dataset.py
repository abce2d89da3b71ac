"""The bundled pictures: 32x32, in colour, with nine classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from compressor.data.sets import Images

SIZE = 32
GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
"""The classes, which are Unicode's groups of emoji, by their labels."""


def images() -> Images:
    """Emoji drawn in Noto's style, pixels (n, 3, 32, 32) uint8 on white, labels 0 to 8 (`GROUPS`).

    An eighth is held out (`unseen`): no picture of it differs from one of the others in skin tone or in who is drawn alone.
    """
    with np.load(Path(__file__).with_name("pictures.npz")) as file:
        pixels = torch.from_numpy(file["images"].transpose(0, 3, 1, 2).copy())
        labels, held = torch.from_numpy(file["labels"].astype(np.int64)), torch.from_numpy(file["held_out"])
    unseen = Images("pictures-32, held out", pixels[held], labels[held])
    return Images("pictures-32", pixels[~held], labels[~held], held_out=unseen)
