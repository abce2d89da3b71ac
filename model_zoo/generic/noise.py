"""How models of diffusers were trained: the noise process and the target that a scheduler's configuration says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.model_zoo.sampling import Process

_FLOW = "FlowMatch"
_TARGETS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, eq=False)
class Noise:
    """A discrete process with cumulative products `log_alpha_bars`, or rectified flow where that is None."""

    log_alpha_bars: Tensor | None
    timesteps: int
    prediction: str
    clip: bool
    large_variance: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Noise:
        """The process of a scheduler's configuration, as diffusers writes it; `{}` is DDPM's. Raises CompressorError."""
        total = int(config.get("num_train_timesteps", 1000))
        if _FLOW in str(config.get("_class_name", "")):
            return cls(None, total, "flow", False, False)
        prediction = str(config.get("prediction_type", "epsilon"))
        if prediction not in _TARGETS:
            raise CompressorError(f"prediction_type {prediction!r}", f"Allowed: {', '.join(_TARGETS)}.")
        logs = torch.log1p(-_betas(config, total)).cumsum(0)
        large = str(config.get("variance_type", "fixed_small")) == "fixed_large"
        return cls(logs, total, prediction, bool(config.get("clip_sample", True)), large)

    def noised(self, clean: Tensor, rng: torch.Generator, at: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(timesteps (n,), noised, what the model shall answer) for `clean` (n, …), all drawn from `rng`.

        `at` is the time of all of them, from 0 to 1, where they shall not be drawn.
        """
        n, shape = len(clean), (-1, *[1] * (clean.dim() - 1))
        if self.log_alpha_bars is None:
            # Liu et al. 2022, rectified flow: x_s = (1 - s) x + s noise, velocity noise - x
            share = torch.rand(n, generator=rng) if at is None else torch.full((n,), at)
            noise = torch.randn(clean.shape, generator=rng)
            mixed = (1 - share.view(shape)) * clean + share.view(shape) * noise
            return share * self.timesteps, mixed, noise - clean
        if at is None:
            time = torch.randint(self.timesteps, (n,), generator=rng)
        else:
            time = torch.full((n,), min(int(at * self.timesteps), self.timesteps - 1))
        noise = torch.randn(clean.shape, generator=rng)
        logs = self.log_alpha_bars[time]
        signal = torch.exp(0.5 * logs).float().view(shape)
        spread = torch.sqrt(-torch.expm1(logs)).float().view(shape)
        target = {"epsilon": noise, "sample": clean}.get(self.prediction)
        return time, signal * clean + spread * noise, signal * noise - spread * clean if target is None else target

    def process(self) -> Process:
        """The process for samplers. Raises CompressorError for rectified flow, which has samplers of its own."""
        if self.log_alpha_bars is None:
            raise CompressorError("flow matching is sampled by the model's pipeline", "Set evaluate.samples to 0.")
        return Process(self.log_alpha_bars, self.prediction, self.clip, self.large_variance)


def _betas(config: Mapping[str, Any], total: int) -> Tensor:
    """Source: Ho et al. 2020, section 4 (linear); Nichol & Dhariwal 2021, eq. 17 (cosine); Rombach et al. 2022 (scaled)."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    match config.get("beta_schedule", "linear"):
        case "linear":
            return torch.linspace(start, end, total, dtype=torch.float64)
        case "scaled_linear":
            return torch.linspace(start**0.5, end**0.5, total, dtype=torch.float64) ** 2
        case "squaredcos_cap_v2":
            grid = torch.arange(total + 1, dtype=torch.float64) / total
            bars = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - bars[1:] / bars[:-1]).clamp(max=0.999)
        case other:
            raise CompressorError(
                f"beta_schedule {other!r}", "Allowed: linear, scaled_linear, squaredcos_cap_v2, or trained_betas."
            )
