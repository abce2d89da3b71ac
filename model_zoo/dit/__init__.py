"""DiT (Peebles & Xie 2023): diffusers' DiTTransformer2DModel, the published sizes, and the authors' own files."""

from compressor.model_zoo.dit.sizes import dit, xl2_256, xl2_512

__all__ = ["dit", "xl2_256", "xl2_512"]
