"""The Fréchet inception distance, in the features of the Inception network that published values are measured with."""

from compressor.model_zoo.inception.fid import FID

__all__ = ["FID"]
