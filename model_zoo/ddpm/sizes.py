"""DDPM models by name. Each function is a registered model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.model_zoo.generic import DiffusersAdapter

_SOURCE = "Ho et al. 2020, Denoising Diffusion Probabilistic Models"

CIFAR10_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
DIGITS_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
_NEW_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "layers_per_block": 2,
    "block_out_channels": [64, 128, 128],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 32,
}
"""For `compressor train`: about 5 million weights."""
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "variance_type": "fixed_large",
    "clip_sample": True,
    "prediction_type": "epsilon",
}
# As many steps as Diff-Pruning gives its baselines, at their learning rate.
_DEFAULTS = {
    "train": {"steps": 100_000, "lr": 2e-4, "warmup": 2500},
    "evaluate": {"sampler_steps": 100},
    "checkpoint_every": 2500,
}


def ddpm() -> DiffusersAdapter:
    """A DDPM from --weights: a diffusers DDPMPipeline's or UNet2DModel's folder, or a name on the hub."""
    return DiffusersAdapter(
        name="ddpm",
        scheduler=SCHEDULER,
        defaults=_DEFAULTS,
        about={
            "size": "that of the weights",
            "source": _SOURCE,
            "data": "that of the weights",
            "weights": "Give --weights: a DDPMPipeline's folder, or a name on the hub such as google/ddpm-cifar10-32.",
            "licence": "that of the weights (google/ddpm-*: Apache-2.0)",
        },
        new_config=_NEW_CONFIG,
    )


def cifar10() -> DiffusersAdapter:
    """DDPM for CIFAR-10, 32x32 pixels: the configuration of google/ddpm-cifar10-32."""
    return DiffusersAdapter(
        name="ddpm-cifar10",
        config=CIFAR10_CONFIG,
        scheduler=SCHEDULER,
        defaults=_DEFAULTS,
        about={
            "size": "35.7M",
            "source": _SOURCE,
            "data": "CIFAR-10, 32x32",
            "weights": "--weights google/ddpm-cifar10-32, or a copy of it on disk.",
            "licence": "Apache-2.0",
        },
    )


def digits() -> DiffusersAdapter:
    """A small DDPM for 8x8 handwritten digits, bundled with its weights."""
    return DiffusersAdapter(
        name="ddpm-digits",
        config=DIGITS_CONFIG,
        scheduler=SCHEDULER,
        weights=Path(__file__).with_name("ddpm-digits.safetensors"),
        family="UNet",
        small_config={"block_out_channels": [16, 32], "norm_num_groups": 4},
        defaults={
            "data": "digits",
            "train": {"steps": 1800, "lr": 5e-4, "betas": [0.9, 0.99], "warmup": 50},
            "evaluate": {"metric": "fd-digits"},
        },
        about={
            "size": "0.7M",
            "source": "trained for this project by `python -m compressor.model_zoo.digits.train`",
            "data": "UCI handwritten digits, 8x8",
            "weights": "bundled",
            "licence": "Apache-2.0",
        },
    )
