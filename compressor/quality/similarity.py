"""Structural similarity of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """The structural similarity (n,) of `images` and `others` (n, channels, height, width) in [-1, 1]; 1 is the same.

    A Gaussian window of deviation 1.5 and 11 pixels, or as many as the image has, without padding.
    Source: Wang et al. 2004, "Image Quality Assessment", eq. 13 with K1 = 0.01 and K2 = 0.03.
    """
    x, y = images.double(), others.double()
    size = min(11, x.shape[-1], x.shape[-2])
    size -= 1 - size % 2
    at = torch.arange(size, dtype=torch.float64) - size // 2
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(x.shape[1], 1, size, size)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values, window, groups=values.shape[1])

    mean_x, mean_y = mean(x), mean(y)
    spread_x, spread_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    together = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    found = ((2 * mean_x * mean_y + c1) * (2 * together + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (spread_x + spread_y + c2)
    )
    return found.flatten(1).mean(1)
