"""A Fréchet distance that needs no network and no file: in the features of a wavelet scattering transform.

Source: Bruna & Mallat 2013, Invariant Scattering Convolution Networks (Morlet wavelets, two layers of moduli, averages); Heusel et al.
2017 for the distance.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import CompressorError
from compressor.quality.metric import Metric

_ORIENTATIONS = 4
_MOST_SCALES = 4
_LARGEST, _SMALLEST = 128, 8  # pixels of the shorter side
_GRID = 4  # of the averages that know where in the image they are
_AT_ONCE = 128
_LEAST = 1e-3  # below it, logarithms would be of rounding
_DEFINITION = f"scattering 1: {_ORIENTATIONS} {_MOST_SCALES} {_LARGEST} {_SMALLEST} {_GRID} {_LEAST}"


class FDScattering(Metric):
    """`fd-scattering`: for pictures of any size and kind, 1 or 3 channels; no network, no file of weights."""

    name = "fd-scattering"

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (n, d): of each channel the average colour on a grid of 4 by 4, and the logarithms of how strong edges and
        waves of each scale and direction are, and of how each of those is arranged at each coarser scale.

        A shorter side above 128 pixels is averaged down to it first. Raises CompressorError for other channels, or below 8 pixels.
        """
        channels, *sides = images.shape[1:]
        if channels not in (1, 3) or min(sides) < _SMALLEST:
            raise CompressorError(
                f"fd-scattering takes images of 1 or 3 channels and at least {_SMALLEST}x{_SMALLEST}, got {tuple(images.shape)}",
                "Choose another metric with --set evaluate.metric=NAME, or none with --set evaluate.metric=null",
            )
        return torch.cat([_features(piece.cpu().float()) for piece in torch.split(images, _AT_ONCE)])

    @property
    def sha256(self) -> str:
        """The hash of the numbers that define the transform: it has no weights."""
        return hashlib.sha256(_DEFINITION.encode()).hexdigest()


def _features(images: Tensor) -> Tensor:
    n, channels, height, width = images.shape
    if (short := min(height, width)) > _LARGEST:
        size = (round(height * _LARGEST / short), round(width * _LARGEST / short))
        images = F.interpolate(images, size, mode="bilinear", antialias=True)
        height, width = size
    scales = max(1, min(_MOST_SCALES, int(math.log2(min(height, width))) - 2))
    planes = images.reshape(n * channels, 1, height, width)
    first = _moduli(planes, _wavelets(height, width, scales))
    waves = [first.mean((-2, -1))]
    # Of an envelope, only what is coarser than itself is left: half the pixels hold it, of which a wave is one scale shorter.
    halved = F.avg_pool2d(first, 2)
    for scale in range(scales - 1):
        coarser = _wavelets(*halved.shape[-2:], scales - 1)[scale * _ORIENTATIONS :]
        for one in range(scale * _ORIENTATIONS, (scale + 1) * _ORIENTATIONS):
            waves.append(_moduli(halved[:, one : one + 1], coarser).mean((-2, -1)))
    places = F.adaptive_avg_pool2d(planes, _GRID).flatten(1)
    return torch.cat([places, (torch.cat(waves, 1) + _LEAST).log()], 1).reshape(n, -1)


def _moduli(planes: Tensor, bank: Tensor) -> Tensor:
    """The moduli (n, k, h, w) of `planes` (n, 1, h, w), convolved on a torus with wavelets whose transforms are `bank` (k, h, w)."""
    moduli: Tensor = torch.fft.ifft2(torch.fft.fft2(planes) * bank).abs()
    return moduli


@lru_cache(maxsize=8)
def _wavelets(height: int, width: int, scales: int) -> Tensor:
    """The Fourier transforms of the Morlet wavelets, scale by scale, (scales * orientations, height, width).

    Of each scale j: an envelope of 0.8 * 2^j pixels, a wave of 3/4 pi / 2^j per pixel, longer across it than along it, and no mean.
    """
    found = []
    for scale in range(scales):
        width_of, frequency = 0.8 * 2**scale, 0.75 * math.pi / 2**scale
        for number in range(_ORIENTATIONS):
            angle = math.pi * number / _ORIENTATIONS
            wave = _bump(height, width, width_of, angle, frequency)
            still = _bump(height, width, width_of, angle, 0.0)
            found.append(wave - wave[0, 0] / still[0, 0] * still)
    return torch.stack(found).float()


def _bump(height: int, width: int, sigma: float, angle: float, frequency: float) -> Tensor:
    """The transform of a Gaussian times a wave, on a torus: summed over what lies beyond the highest frequency."""
    total = torch.zeros(height, width, dtype=torch.float64)
    for over in (-1, 0, 1):
        for across in (-1, 0, 1):
            y = 2 * math.pi * (torch.fft.fftfreq(height, dtype=torch.float64)[:, None] + over)
            x = 2 * math.pi * (torch.fft.fftfreq(width, dtype=torch.float64)[None, :] + across)
            along = x * math.cos(angle) + y * math.sin(angle) - frequency
            beside = (y * math.cos(angle) - x * math.sin(angle)) * _ORIENTATIONS / 4
            total += torch.exp(-0.5 * sigma**2 * (along**2 + beside**2))
    return total
