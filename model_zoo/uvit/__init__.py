"""U-ViT (Bao et al. 2023): the network, its adapter, and the published sizes."""

from compressor.model_zoo.uvit.adapter import UViTAdapter
from compressor.model_zoo.uvit.network import UViT

__all__ = ["UViT", "UViTAdapter"]
