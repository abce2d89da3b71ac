"""Samplers for models that predict noise: one loop, by name. DDIM and Euler-Maruyama are here, the rest is diffusers'.

A model is seen through a `Process`: the cumulative products of its noise schedule on a grid of timesteps, and what its
output means. A continuous process is one with a fine grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.adapter import Sampling
from compressor.errors import UsageError, did_you_mean

SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpm-solver++": "DPM-Solver++ 2M",
    "unipc": "UniPC",
    "euler-maruyama": "Euler-Maruyama",
}
SPACINGS = ("uniform", "trailing", "quadratic")
_WITH_SPACING = ("ddim",)

Predict = Callable[[Tensor, int], Tensor]
"""(images, index of a timestep on the grid) -> what the model predicts."""


@dataclass(frozen=True, eq=False)
class Process:
    """A variance-preserving noise process on the grid 0 … T - 1.

    `log_alpha_bars` (T,), float64: the logarithms of the shares of the image's variance that are left. `prediction`: `epsilon`,
    `v_prediction` or `sample`. `clip`: whether images are in [-1, 1], so that estimates of the clean one are clamped.
    `large_variance`: which of its two variances DDPM takes. `continuous`: whether the model knows all times between.
    """

    log_alpha_bars: Tensor
    prediction: str = "epsilon"
    clip: bool = True
    large_variance: bool = True
    continuous: bool = False

    def __len__(self) -> int:
        return len(self.log_alpha_bars)

    def alpha_bar(self, index: int) -> float:
        """The share of the image's variance at `index`; all of it before the first (-1)."""
        return math.exp(float(self.log_alpha_bars[index])) if index >= 0 else 1.0

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing is left of the image at the last time: zero terminal SNR. Source: Lin et al. 2024, section 3.1."""
        return self.alpha_bar(len(self) - 1) == 0

    @property
    def betas(self) -> list[float]:
        """The variances that each step of the grid adds."""
        zero = torch.zeros(1, dtype=torch.float64)
        betas: list[float] = (-torch.expm1(torch.diff(self.log_alpha_bars, prepend=zero))).tolist()
        return betas


def check(settings: Sampling, process: Process) -> None:
    """Raise UsageError unless `settings` name a sampler, and a spacing, that go with `process`."""
    name, spacing = settings.sampler, settings.spacing
    if name not in SAMPLERS:
        raise UsageError(f"no sampler {name!r}", did_you_mean(str(name), SAMPLERS))
    if spacing is not None and spacing not in SPACINGS:
        raise UsageError(f"no spacing {spacing!r}", did_you_mean(spacing, SPACINGS))
    if spacing is not None and name not in _WITH_SPACING:
        raise UsageError(f"{name} takes no spacing", f"Samplers that do: {', '.join(_WITH_SPACING)}.")
    if name == "euler-maruyama" and not process.continuous:
        raise UsageError(
            "euler-maruyama needs a model trained in continuous time", "Choose ddim, ddpm, dpm-solver++ or unipc."
        )
    if process.prediction == "epsilon" and process.ends_in_noise:
        raise UsageError(
            "a model that predicts noise says nothing of the image where nothing is left of it (zero terminal SNR)",
            "Its scheduler should say v_prediction or sample, or leave rescale_betas_zero_snr out.",
        )


def merged(own: Sampling, wanted: Sampling, guidable: bool, classes: int = 0) -> Sampling:
    """`own` with what is `wanted` on top, for a model with so many `classes`. Raises UsageError for guidance where it has no empty
    class, and for classes that it has not."""
    if wanted.classes and not classes:
        raise UsageError("this model knows no classes", "Leave out --class.")
    if other := [one for one in wanted.classes if not 0 <= one < classes]:
        raise UsageError(f"no class {other[0]}", f"This model's are 0 to {classes - 1}.")
    if wanted.guidance not in (None, 1.0) and not guidable:
        raise UsageError("this model takes no guidance", "Guidance needs labels and an empty class.")
    spacing = wanted.spacing if wanted.sampler is not None or wanted.spacing is not None else own.spacing
    return Sampling(
        wanted.sampler or own.sampler,
        spacing,
        own.guidance if wanted.guidance is None else wanted.guidance,
        wanted.classes or own.classes,
    )


def beginning(
    shape: Sequence[int], classes: int, how: Sampling, n: int, rng: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """What sampling begins with, on the CPU: noise (n, *shape) and labels (n,), which are None for a model without classes."""
    noise = torch.randn(n, *shape, generator=rng)
    if not classes:
        return noise, None
    if how.classes:
        return noise, torch.tensor(how.classes)[torch.arange(n) % len(how.classes)]
    return noise, torch.randint(classes, (n,), generator=rng)


def describe(settings: Sampling) -> str:
    """The sampler's name and settings, for reports."""
    parts = [SAMPLERS[settings.sampler or ""]]
    if settings.spacing is not None:
        parts.append(f"{settings.spacing} spacing")
    if settings.guidance not in (None, 1.0):
        parts.append(f"guidance {settings.guidance:g}")
    return ", ".join(parts)


@torch.no_grad()
def draw(
    predict: Predict, noise: Tensor, process: Process, settings: Sampling, steps: int, rng: torch.Generator
) -> Tensor:
    """Images from `noise` (n, channels, height, width) in `steps` steps; noise on the way is drawn from `rng`, on the CPU."""
    check(settings, process)
    if steps > len(process):
        raise UsageError(f"{steps} sampler steps", f"This model has {len(process)} timesteps.")
    match settings.sampler:
        case "ddim":
            return _ddim(predict, noise, process, steps, settings.spacing or "uniform")
        case "euler-maruyama":
            return _euler_maruyama(predict, noise, process, steps, rng)
        case _:
            return _with_scheduler(predict, noise, process, settings.sampler or "", steps, rng)


def spaced(total: int, steps: int, spacing: str) -> list[int]:
    """`steps` indices of a grid of `total`, falling. Source: Song et al. 2021 (DDIM), appendix D.2, for the first and last.

    `uniform` begins each interval (0 is the last), `trailing` ends it (total - 1 is the first), `quadratic` is dense near 0.
    """
    match spacing:
        case "uniform":
            grid = [index * (total // steps) for index in range(steps)]
        case "trailing":
            grid = [round(total - index * total / steps) - 1 for index in range(steps)][::-1]
        case _:
            last = (0.8 * total) ** 0.5
            grid = [int((last * index / max(1, steps - 1)) ** 2) for index in range(steps)]
            for index in range(1, steps):  # many steps of a short grid would share an index
                grid[index] = max(grid[index], grid[index - 1] + 1)
    return grid[::-1]


def clean(output: Tensor, images: Tensor, alpha_bar: float, process: Process) -> tuple[Tensor, Tensor]:
    """(clean images, noise) that a model's `output` on `images` at `alpha_bar` says. Source: Salimans & Ho 2022, section 4."""
    signal, spread = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    match process.prediction:
        case "epsilon":
            found = (images - spread * output) / signal
        case "v_prediction":
            found = signal * images - spread * output
        case _:
            found = output
    if process.clip:
        found = found.clamp(-1, 1)
    return found, (images - signal * found) / max(spread, 1e-12)


def _ddim(predict: Predict, images: Tensor, process: Process, steps: int, spacing: str) -> Tensor:
    """Source: Song et al. 2021 (DDIM), eq. 12 with no added noise."""
    grid = spaced(len(process), steps, spacing)
    for index, following in zip(grid, [*grid[1:], -1], strict=True):
        found, noise = clean(predict(images, index), images, process.alpha_bar(index), process)
        target = process.alpha_bar(following)
        images = target**0.5 * found + (1 - target) ** 0.5 * noise
    return images


def _euler_maruyama(predict: Predict, images: Tensor, process: Process, steps: int, rng: torch.Generator) -> Tensor:
    """The reverse-time equation in equal steps of time. Source: Song et al. 2021 (score SDE), eq. 6 and 32.

    The drift and the score are taken at the start of each step, and the last step adds no noise.
    """
    grid = spaced(len(process), steps, "trailing")
    for index, following in zip(grid, [*grid[1:], -1], strict=True):
        before = process.alpha_bar(index)
        rate = math.log(process.alpha_bar(following) / before)  # the integral of beta over the step
        _, noise = clean(predict(images, index), images, before, process)
        score = -noise / (1 - before) ** 0.5
        images = images + rate * (0.5 * images + score)
        if following >= 0:
            images = images + rate**0.5 * torch.randn(images.shape, generator=rng).to(images.device)
    return images


def _with_scheduler(
    predict: Predict, images: Tensor, process: Process, name: str, steps: int, rng: torch.Generator
) -> Tensor:
    solver = _scheduler(name, process)
    solver.set_timesteps(steps, device=images.device)
    if len(solver.timesteps.unique()) < len(solver.timesteps):  # between two alike a solver divides by zero
        raise UsageError(
            f"{steps} sampler steps of {SAMPLERS[name]} come to the same timestep twice",
            f"This model has {len(process)} timesteps: give at most {len(process) - 1} steps, or choose ddim or ddpm.",
        )
    own = {"generator": rng} if name == "ddpm" else {}
    for index in solver.timesteps:
        images = solver.step(predict(images, int(index)), index, images, **own).prev_sample
    return images


def _scheduler(name: str, process: Process) -> Any:
    """diffusers' scheduler with betas that give the very grid."""
    import diffusers

    common = {
        "num_train_timesteps": len(process),
        "trained_betas": process.betas,
        "prediction_type": process.prediction,
        # betas that end in noise stay as they are by this, and the solvers, which divide by the signal, stop just short of 0
        "rescale_betas_zero_snr": process.ends_in_noise,
    }
    make: Any  # they have no annotations
    match name:
        case "ddpm":
            make, variance = diffusers.DDPMScheduler, "fixed_large" if process.large_variance else "fixed_small"
            return make(**common, variance_type=variance, clip_sample=process.clip)
        case "unipc":
            make = diffusers.UniPCMultistepScheduler
            return make(**common, solver_order=2)
        case _:
            make = diffusers.DPMSolverMultistepScheduler
            return make(**common, algorithm_type="dpmsolver++", solver_order=2)


def guided(
    module: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    images: Tensor,
    time: Tensor,
    labels: Tensor | None,
    null_label: int | None,
    guidance: float,
) -> Tensor:
    """The model's prediction; with a null label and guidance other than 1, both predictions in one batch, mixed.

    Source: Ho & Salimans 2022, eq. 6, with g = 1 + w.
    """
    if labels is None or null_label is None or guidance == 1.0:
        return module(images, time, labels)
    both = torch.cat([labels, torch.full_like(labels, null_label)])
    given, without = module(images.repeat(2, 1, 1, 1), time.repeat(2), both).chunk(2)
    return without + guidance * (given - without)


def even(count: int, rng: torch.Generator) -> Tensor:
    """`count` numbers (float64) from 0 to 1, one in each of as many equal parts, in random order.

    A mean over times so drawn has the expectation of one over independent times, and less variance.
    Source: stratified sampling; for the times of a diffusion model, Kingma et al. 2021, "Variational Diffusion Models", I.1.
    """
    return (torch.randperm(count, generator=rng) + torch.rand(count, generator=rng)).double() / count


def dropped(labels: Tensor, null_label: int | None, share: float, rng: torch.Generator) -> Tensor:
    """`labels` with a random `share` of them replaced by the null label, as training for guidance needs."""
    if null_label is None:
        return labels
    chosen = torch.rand(labels.shape, generator=rng) < share
    return torch.where(chosen, null_label, labels)
