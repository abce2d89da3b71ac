"""The two noise processes that U-ViTs are trained with, and the time that the network is told of each.

Source: `sde.py` (VPSDE, ScoreModel) for `train.py` and `train_ldm.py`, and `train_ldm_discrete.py`, all in the authors'
repository, whose README says which script trained which model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.model_zoo.sampling import Process, even

TRAIN_TIMESTEPS = 1000


class Times(ABC):
    """The times of a variance-preserving process. A time is what the process counts in: `t` or `n` below."""

    continuous: bool

    def drawn(self, count: int, rng: torch.Generator, evenly: bool = False) -> Tensor:
        """`count` times (count,), as training draws them: each for itself, or `evenly` (`compressor.model_zoo.sampling.even`)."""
        return self.at_shares(even(count, rng)).float() if evenly else self._drawn(count, rng)

    @abstractmethod
    def _drawn(self, count: int, rng: torch.Generator) -> Tensor:
        """`count` times (count,), each drawn for itself."""

    @abstractmethod
    def at_shares(self, shares: Tensor) -> Tensor:
        """The times at `shares` (count,) of all of them: from 0 (the least noise) to 1 (the most)."""

    @abstractmethod
    def log_alpha_bar(self, times: Tensor) -> Tensor:
        """The log of the share of the image's variance that is left at `times`, in their shape."""

    @abstractmethod
    def told(self, times: Tensor) -> Tensor:
        """What the network is given as its `timesteps`."""

    @abstractmethod
    def grid(self) -> Tensor:
        """The `TRAIN_TIMESTEPS` times, rising, float64, on which samplers see the process."""

    def diffuse(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The noised images at `times` (batch,): mean `sqrt(alpha_bar) * images`, standard deviation `sqrt(1 - alpha_bar)`."""
        log = self.log_alpha_bar(times).view(-1, *[1] * (images.dim() - 1))
        return torch.exp(0.5 * log) * images + torch.sqrt(-torch.expm1(log)) * noise

    def process(self, clip: bool) -> Process:
        """The process on the grid, for samplers; not its linear approximation."""
        return Process(self.log_alpha_bar(self.grid()), clip=clip, continuous=self.continuous)


@dataclass(frozen=True)
class ContinuousTimes(Times):
    """`beta(t) = 0.1 + 19.9 t` for t in [0, 1]; the network is given `999 t`. Source: Song et al. 2021, eq. 32-33."""

    continuous = True

    def _drawn(self, count: int, rng: torch.Generator) -> Tensor:
        return torch.rand(count, generator=rng)

    def at_shares(self, shares: Tensor) -> Tensor:
        return shares

    def log_alpha_bar(self, times: Tensor) -> Tensor:
        return -(0.1 * times + 9.95 * times**2)

    def told(self, times: Tensor) -> Tensor:
        return 999 * times

    def grid(self) -> Tensor:
        return torch.arange(1, TRAIN_TIMESTEPS + 1, dtype=torch.float64) / TRAIN_TIMESTEPS


@dataclass(frozen=True)
class DiscreteTimes(Times):
    """n = 1, …, 1000 of Stable Diffusion's schedule, whose betas' square roots rise evenly; the network is given n.

    Source: Rombach et al. 2022; `stable_diffusion_beta_schedule` of `train_ldm_discrete.py`.
    """

    continuous = False

    def _drawn(self, count: int, rng: torch.Generator) -> Tensor:
        return torch.randint(1, TRAIN_TIMESTEPS + 1, (count,), generator=rng).float()

    def at_shares(self, shares: Tensor) -> Tensor:
        return 1.0 + (shares * TRAIN_TIMESTEPS).floor().clamp(max=TRAIN_TIMESTEPS - 1)

    def log_alpha_bar(self, times: Tensor) -> Tensor:
        roots = torch.linspace(0.00085**0.5, 0.0120**0.5, TRAIN_TIMESTEPS, dtype=torch.float64)
        logs = torch.log1p(-(roots**2)).cumsum(0)
        return logs[times.long() - 1].to(times.dtype)

    def told(self, times: Tensor) -> Tensor:
        return times

    def grid(self) -> Tensor:
        return torch.arange(1, TRAIN_TIMESTEPS + 1, dtype=torch.float64)
