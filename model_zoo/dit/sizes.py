"""DiT models by name. Each function is a registered model."""

from __future__ import annotations

from typing import Any

from compressor.adapter import Sampling
from compressor.model_zoo.dit.layout import AUTHORS, Authors
from compressor.model_zoo.generic import DiffusersAdapter

# As facebook/DiT-XL-2-256 has it: the linear schedule of DDPM on latents, which have no bounds.
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "clip_sample": False,
    "prediction_type": "epsilon",
}
_ABOUT = {
    "source": "Peebles & Xie 2023, Scalable Diffusion Models with Transformers",
    "licence": "CC BY-NC 4.0 (the authors' code and weights)",
}


def _xl2(size: int) -> dict[str, Any]:
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "sample_size": size,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        **AUTHORS,
    }


_SMALL = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 4,
}

# For `compressor train`: DiT-S's proportions, smaller, of about 6 million weights.
_NEW = {**_xl2(32), "num_attention_heads": 4, "attention_head_dim": 48, "num_layers": 8}


def _adapter(name: str, config: dict[str, Any], data: str, weights: str) -> DiffusersAdapter:
    return DiffusersAdapter(
        name=name,
        config=config,
        scheduler=SCHEDULER,
        # As in U-ViT: attention and feed-forward. Modulation runs once per image, not per token.
        targets=("*.attn1.to_q", "*.attn1.to_k", "*.attn1.to_v", "*.attn1.to_out.0", "*.ff.net.0.proj", "*.ff.net.2"),
        defaults={
            "train": {"steps": 100_000, "lr": 1e-4, "betas": [0.9, 0.999], "weight_decay": 0.0},
            "evaluate": {"sampler_steps": 50},
            "checkpoint_every": 2500,
        },
        about={**_ABOUT, "size": "675M" if config else "that of the weights", "data": data, "weights": weights},
        how=Sampling("ddim", "uniform", 1.5),
        layout=Authors(),
        family="DiT",
        small_config=_SMALL if config else {},
        new_config={} if config else _NEW,
    )


def dit() -> DiffusersAdapter:
    """A class-conditional DiT from --weights: a diffusers folder, or a file in its authors' layout."""
    return _adapter("dit", {}, "that of the weights", "Give --weights: a diffusers folder or a DiT-*.pt file.")


def xl2_256() -> DiffusersAdapter:
    """DiT-XL/2 for ImageNet at 256x256, in the 4x32x32 latent space, class-conditional."""
    weights = "--weights facebook/DiT-XL-2-256, or DiT-XL-2-256x256.pt from the authors' repository."
    return _adapter("dit-xl-2-256", _xl2(32), "ImageNet, latents 4x32x32", weights)


def xl2_512() -> DiffusersAdapter:
    """DiT-XL/2 for ImageNet at 512x512, in the 4x64x64 latent space, class-conditional."""
    weights = "--weights facebook/DiT-XL-2-512, or DiT-XL-2-512x512.pt from the authors' repository."
    return _adapter("dit-xl-2-512", _xl2(64), "ImageNet, latents 4x64x64", weights)
