"""The continuous-time variance-preserving process that U-ViT is trained with, on a grid for samplers.

`beta(t) = 0.1 + 19.9 t` for t in [0, 1]; the network is given `999 t`. Source: Song et al. 2021, eq. 32-33.
"""

from __future__ import annotations

import torch
from compressor.model_zoo.sampling import Process
from torch import Tensor

TRAIN_TIMESTEPS = 1000


def log_alpha_bar(t: Tensor) -> Tensor:
    """The log of the share of the image's variance that is left at time `t`."""
    return -(0.1 * t + 9.95 * t**2)


def diffuse(images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The noised images at `t` (batch,): mean `sqrt(alpha_bar) * images`, standard deviation `sqrt(1 - alpha_bar)`."""
    log = log_alpha_bar(t).view(-1, *[1] * (images.dim() - 1))
    return torch.exp(0.5 * log) * images + torch.sqrt(-torch.expm1(log)) * noise


def times() -> Tensor:
    """The grid t = 1/1000, …, 1 on which a discrete-time sampler sees the continuous process."""
    return torch.arange(1, TRAIN_TIMESTEPS + 1, dtype=torch.float64) / TRAIN_TIMESTEPS


def process(clip: bool) -> Process:
    """The process on the grid, not its linear approximation."""
    return Process(log_alpha_bar(times()), clip=clip, continuous=True)
