"""The published U-ViT sizes by name, and the bundled ones. Each function is a registered model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from compressor.adapter import Sampling
from compressor.model_zoo.uvit.adapter import UViTAdapter
from compressor.model_zoo.uvit.noise import DiscreteTimes

_SMALL = {"embed_dim": 512, "depth": 12, "num_heads": 8}
_MEDIUM = {"embed_dim": 768, "depth": 16, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 20, "num_heads": 16}
_HUGE = {"embed_dim": 1152, "depth": 28, "num_heads": 16}
_PARAMETERS = {512: "44M", 768: "131M", 1024: "287M", 1152: "501M"}
_LATENT = {"in_chans": 4, "num_classes": 1001}  # 1,000 classes and the empty one of guidance
# The two huge ones have no last convolution, and were trained by another script, in discrete time, with more of the labels.
_HUGE_LATENT = {**_LATENT, "conv": False}
_HUGE_TRAINING: dict[str, Any] = {"times": DiscreteTimes(), "unlabelled": 0.1}

PICTURES_CONFIG = {
    "img_size": 32,
    "patch_size": 4,
    "in_chans": 3,
    "num_classes": 10,
    "embed_dim": 256,
    "depth": 4,
    "num_heads": 8,
}
DIGITS_CONFIG = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 96, "depth": 4, "num_heads": 4}


def _published(name: str, data: str, size: dict[str, int], guidance: float | None = None, **config: Any) -> UViTAdapter:
    """Source: `configs/` of the authors' repository; its `sample.scale` s is the guidance 1 + s here."""
    about = {
        "size": _PARAMETERS[size["embed_dim"]],
        "source": "Bao et al. 2023, All are Worth Words",
        "data": data,
        "weights": "--weights FILE.pth from the authors' U-ViT repository, which lists one for each size.",
        "licence": "MIT (the authors' code; see their repository for the weights)",
    }
    # Learning rate, warm-up and the rest of the released SparseDM code, which trains up to 500,000 steps.
    defaults = {"train": {"steps": 100_000, "lr": 2e-4, "warmup": 2500}, "checkpoint_every": 2500}
    return UViTAdapter(
        {"in_chans": 3, **config, **size},
        name,
        defaults=defaults,
        about=about,
        null_class=guidance is not None,
        how=Sampling("dpm-solver++", guidance=guidance),
    )


def uvit() -> UViTAdapter:
    """A U-ViT of one's own size: train it (`compressor train`), or give --weights of one that was trained so."""
    return UViTAdapter(
        {"img_size": 32, "patch_size": 2, "in_chans": 3, "embed_dim": 256, "depth": 6, "num_heads": 8},
        "uvit",
        defaults={"train": {"steps": 20_000, "warmup": 500, "ema": 0.9995}, "checkpoint_every": 500},
        about={
            "size": "6M unless `architecture` says another",
            "source": "Bao et al. 2023, All are Worth Words",
            "data": "yours",
            "weights": "Train a model: compressor train --model uvit --data FOLDER; then give --weights RUN.",
            "licence": "MIT (the authors' code)",
        },
        null_class=True,
        sized=False,
    )


def cifar10() -> UViTAdapter:
    """U-ViT-S/2 for CIFAR-10, 32x32 pixels."""
    return _published("uvit-cifar10", "CIFAR-10, 32x32", _SMALL, img_size=32, patch_size=2)


def celeba64() -> UViTAdapter:
    """U-ViT-S/4 for CelebA, 64x64 pixels."""
    return _published("uvit-celeba64", "CelebA, 64x64", _SMALL, img_size=64, patch_size=4)


def imagenet64_m() -> UViTAdapter:
    """U-ViT-M/4 for ImageNet at 64x64, class-conditional."""
    return _published("uvit-imagenet64-m", "ImageNet, 64x64", _MEDIUM, img_size=64, patch_size=4, num_classes=1000)


def imagenet64_l() -> UViTAdapter:
    """U-ViT-L/4 for ImageNet at 64x64, class-conditional."""
    return _published("uvit-imagenet64-l", "ImageNet, 64x64", _LARGE, img_size=64, patch_size=4, num_classes=1000)


def imagenet256_l() -> UViTAdapter:
    """U-ViT-L/2 for ImageNet at 256x256, in the 4x32x32 latent space, class-conditional."""
    shape = {"img_size": 32, "patch_size": 2, **_LATENT}
    return _published("uvit-imagenet256-l", "ImageNet, latents 4x32x32", _LARGE, 1.4, **shape)


def imagenet256_h() -> UViTAdapter:
    """U-ViT-H/2 for ImageNet at 256x256, in the 4x32x32 latent space, class-conditional."""
    shape = {"img_size": 32, "patch_size": 2, **_HUGE_LATENT}
    adapter = _published("uvit-imagenet256-h", "ImageNet, latents 4x32x32", _HUGE, 1.4, **shape)
    return replace(adapter, **_HUGE_TRAINING)


def imagenet512_l() -> UViTAdapter:
    """U-ViT-L/4 for ImageNet at 512x512, in the 4x64x64 latent space, class-conditional."""
    shape = {"img_size": 64, "patch_size": 4, **_LATENT}
    return _published("uvit-imagenet512-l", "ImageNet, latents 4x64x64", _LARGE, 1.7, **shape)


def imagenet512_h() -> UViTAdapter:
    """U-ViT-H/4 for ImageNet at 512x512, in the 4x64x64 latent space, class-conditional."""
    shape = {"img_size": 64, "patch_size": 4, **_HUGE_LATENT}
    adapter = _published("uvit-imagenet512-h", "ImageNet, latents 4x64x64", _HUGE, 1.7, **shape)
    return replace(adapter, **_HUGE_TRAINING)


def digits() -> UViTAdapter:
    """A small U-ViT for 8x8 handwritten digits, bundled with its weights."""
    return UViTAdapter(
        DIGITS_CONFIG,
        "uvit-digits",
        weights=Path(__file__).with_name("uvit-digits.safetensors"),
        small_config={"embed_dim": 32, "depth": 2, "num_heads": 4},
        defaults={
            "data": "digits",
            # A short budget wants quicker moments than the 0.99 and 0.999 that suit 100,000 steps.
            "train": {"steps": 1200, "lr": 1e-3, "betas": [0.9, 0.99], "warmup": 50},
            "evaluate": {"metric": "fd-digits"},
        },
        about={
            "size": "0.6M",
            "source": "trained for this project by `python -m compressor.model_zoo.digits.train`",
            "data": "UCI handwritten digits, 8x8",
            "weights": "bundled",
            "licence": "Apache-2.0",
        },
    )


def pictures() -> UViTAdapter:
    """A U-ViT for emoji of 32x32 in colour, with nine classes and the empty one of guidance, bundled with its weights."""
    return UViTAdapter(
        PICTURES_CONFIG,
        "uvit-pictures",
        weights=Path(__file__).with_name("uvit-pictures.safetensors"),
        small_config={"embed_dim": 32, "depth": 2, "num_heads": 4},
        defaults={
            "data": "pictures-32",
            "train": {"steps": 2000, "batch_size": 64, "lr": 5e-4, "betas": [0.9, 0.99], "warmup": 50},
            "evaluate": {"metric": "fd-pictures"},
        },
        about={
            "size": "4.3M",
            "source": "trained for this project by `benchmarks/recipes/uvit-pictures.yaml`, on a CPU and an NVIDIA H100",
            "data": "Noto emoji, 32x32",
            "weights": "bundled",
            "licence": "Apache-2.0",
        },
        null_class=True,
        how=Sampling("dpm-solver++", guidance=1.5),
    )
