"""Data: sets of samples, batches of them, and the formats that they are read from."""

from compressor.data.batches import Batches, Samples, as_batches
from compressor.data.sets import Images, ImageSet, Records, SampleSet

__all__ = ["Batches", "ImageSet", "Images", "Records", "SampleSet", "Samples", "as_batches"]
