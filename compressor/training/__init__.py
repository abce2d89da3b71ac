"""Training: the Pruner interface, the Shadow that makes masked training simple, and fine-tuning."""

from compressor.training.settings import Training

__all__ = ["Training"]
