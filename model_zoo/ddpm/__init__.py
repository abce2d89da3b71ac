"""DDPM (Ho et al. 2020): diffusers' UNet2DModel, the published sizes, and a small bundled one."""

from compressor.model_zoo.ddpm.sizes import cifar10, ddpm, digits

__all__ = ["cifar10", "ddpm", "digits"]
