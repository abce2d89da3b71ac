"""How models of diffusers were trained: the noise process and the target that a scheduler's configuration says."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.errors import UsageError, first_line
from compressor.model_zoo.generic.conventions import HOW_TO_RECORD
from compressor.model_zoo.generic.pretrained import quiet
from compressor.model_zoo.sampling import Process, even

_FLOW = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
)
"""The schedulers of rectified flow alone."""
_TARGETS = ("epsilon", "v_prediction", "sample")
_LONGEST = 1_000_000
_WITHOUT_PACKAGES = {"LMSDiscreteScheduler": "EulerDiscreteScheduler", "DPMSolverSDEScheduler": "HeunDiscreteScheduler"}
"""Classes that diffusers has only beside scipy or torchsde, and those that make the same noise of the same configuration."""
_CHANGES = {
    "snr_shift_scale": (None, 1.0),
    "rescale_betas_zero_snr": (None, False),
    "use_flow_sigmas": (None, False),
    "invert_sigmas": (None, False),
    "timestep_type": (None, "discrete"),
    "sigma_data": (None,),
}
"""Keys that change the noise or the time, with the values that do not: a class that does not read one must not be given it."""


@dataclass(frozen=True, eq=False)
class Noise:
    """A discrete process with cumulative products `log_alpha_bars`, or rectified flow where that is None."""

    log_alpha_bars: Tensor | None
    timesteps: int
    prediction: str
    clip: bool
    large_variance: bool
    unsampled: str = ""
    """Why no sampler here is that of the scheduler; empty where one is."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Noise:
        """The process of a scheduler's configuration, as diffusers writes it; without a class, DDPMScheduler's.

        Raises UsageError for one that is not known here: what it would be trained on were wrong.
        """
        name = str(config.get("_class_name", "DDPMScheduler"))
        total = config.get("num_train_timesteps", 1000)
        if not isinstance(total, int) or not 0 < total <= _LONGEST:
            raise UsageError(f"num_train_timesteps {total!r}", f"Allowed: whole numbers from 1 to {_LONGEST}.")
        if name in _FLOW:
            _refuse_unread(name, config, ())
            return flow(total)
        made = _scheduler(name, config)
        _refuse_unread(name, config, inspect.signature(type(made).__init__).parameters)
        prediction = str(made.config.get("prediction_type", "epsilon"))
        if (prediction == "flow_prediction") != bool(made.config.get("use_flow_sigmas", False)):
            raise UsageError(
                f"{name}: prediction_type {prediction!r} with use_flow_sigmas {made.config.get('use_flow_sigmas')}",
                "Rectified flow is flow_prediction with use_flow_sigmas; anything else: " + HOW_TO_RECORD,
            )
        if prediction == "flow_prediction":
            return flow(total)
        if prediction not in _TARGETS:
            raise UsageError(
                f"prediction_type {prediction!r}",
                f"Allowed: {', '.join(_TARGETS)}, and flow_prediction with use_flow_sigmas. Or: {HOW_TO_RECORD}",
            )
        logs = _log_alpha_bars(made)
        if len(logs) != total:
            raise UsageError(f"{name}: {len(logs)} betas for {total} timesteps", "Their numbers must agree.")
        clip = bool(made.config.get("clip_sample", False))
        return cls(
            logs,
            total,
            prediction,
            clip,
            str(made.config.get("variance_type", "fixed_small")) == "fixed_large",
            _unsampled(name, made.config, clip),
        )

    @property
    def is_flow(self) -> bool:
        """Whether it is rectified flow."""
        return self.log_alpha_bars is None

    def noised(
        self, clean: Tensor, rng: torch.Generator, at: float | Literal["even"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(timesteps (n,), noised, what the model shall answer) for `clean` (n, …), all drawn from `rng`.

        `at` is the time of all of them, from 0 to 1; `even`: drawn with one in each n-th of that (`model_zoo.sampling.even`);
        None: each drawn for itself. Of rectified flow the timesteps are sigma, the share of noise, times their number.
        """
        n, shape = len(clean), (-1, *[1] * (clean.dim() - 1))
        shares = None if at is None else even(n, rng) if at == "even" else torch.full((n,), at, dtype=torch.float64)
        if self.log_alpha_bars is None:
            # Liu et al. 2022, rectified flow: x_s = (1 - s) x + s noise, velocity noise - x
            share = torch.rand(n, generator=rng) if shares is None else shares.float()
            noise = torch.randn(clean.shape, generator=rng)
            mixed = (1 - share.view(shape)) * clean + share.view(shape) * noise
            return share * self.timesteps, mixed, noise - clean
        if shares is None:
            time = torch.randint(self.timesteps, (n,), generator=rng)
        else:
            time = (shares * self.timesteps).long().clamp(max=self.timesteps - 1)
        noise = torch.randn(clean.shape, generator=rng)
        logs = self.log_alpha_bars[time]
        signal = torch.exp(0.5 * logs).float().view(shape)
        spread = torch.sqrt(-torch.expm1(logs)).float().view(shape)
        target = {"epsilon": noise, "sample": clean}.get(self.prediction)
        return time, signal * clean + spread * noise, signal * noise - spread * clean if target is None else target

    def process(self) -> Process:
        """The process for samplers. Raises UsageError where there is none, as for rectified flow."""
        if self.log_alpha_bars is None or self.unsampled:
            raise UsageError(
                self.unsampled or "flow matching is sampled by the model's pipeline", "Set evaluate.samples to 0."
            )
        return Process(self.log_alpha_bars, self.prediction, self.clip, self.large_variance)


def flow(timesteps: int = 1000) -> Noise:
    """Rectified flow."""
    return Noise(None, timesteps, "flow", False, False)


def _scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """diffusers' scheduler of `config`, which has `alphas_cumprod`: so the noise is its own."""
    import diffusers

    known: Any = getattr(diffusers, _WITHOUT_PACKAGES.get(name, name), None) if name.isidentifier() else None
    if not (inspect.isclass(known) and issubclass(known, diffusers.SchedulerMixin)):
        raise UsageError(
            f"scheduler {name!r}: diffusers {diffusers.__version__} has none of that name, so its noise is not known",
            "Say what it was trained with: --set architecture.scheduler._class_name=DDPMScheduler, and its betas. "
            f"Or: {HOW_TO_RECORD}",
        )
    build: Any = known.from_config  # it has no annotations
    try:
        with quiet():
            made: Any = build({key: value for key, value in config.items() if key != "_class_name"})
    except Exception as error:  # whatever its constructor meets
        raise UsageError(
            f"{name} cannot be built: {first_line(error)}", "Its configuration is not one that this diffusers knows."
        ) from error
    if not isinstance(getattr(made, "alphas_cumprod", None), Tensor):
        raise UsageError(f"{name}: its noise process is not known here", HOW_TO_RECORD)
    return made


def _refuse_unread(name: str, config: Mapping[str, Any], read: Collection[str]) -> None:
    for key, neutral in _CHANGES.items():
        if key in config and config[key] not in neutral and (key not in read or key in ("timestep_type", "sigma_data")):
            raise UsageError(
                f"{name}: {key} {config[key]!r} changes the noise in a way that is not known here",
                f"Leave it out where the model was trained without. Or: {HOW_TO_RECORD}",
            )


def _log_alpha_bars(scheduler: Any) -> Tensor:
    """The logarithms of the very `alphas_cumprod` (T,), in double precision where the betas still say what they are.

    Samplers set the last one to 2^-24 where it is 0, since they divide by it; the models were trained with 0.
    """
    bars: Tensor = scheduler.alphas_cumprod.double()
    if bars.dim() != 1:
        raise UsageError(f"{type(scheduler).__name__}: its betas are no list of numbers", "Check trained_betas.")
    betas = getattr(scheduler, "betas", None)
    if isinstance(betas, Tensor) and betas.shape == bars.shape:
        logs: Tensor = torch.log1p(-betas.double()).cumsum(0)
        if torch.allclose(logs.exp(), bars, rtol=1e-4, atol=1e-6):
            return logs
    logs = bars.log()
    if not bool((bars >= 0).all()) or not bool((torch.diff(logs) < 0).all()):
        raise UsageError(
            f"{type(scheduler).__name__}: its configuration makes noise that does not grow", "Check its betas."
        )
    return logs


def _unsampled(name: str, config: Mapping[str, Any], clip: bool) -> str:
    """Why samplers here would not draw what the scheduler of `config` does."""
    if config.get("thresholding"):
        return f"{name}: thresholding is not known to the samplers here"
    if clip and config.get("clip_sample_range", 1.0) != 1:
        return f"{name}: the samplers here clip to [-1, 1], not to {config['clip_sample_range']}"
    return ""
