"""The codes of quantising backends: those that training with 8 bits rounds to."""

from compressor.sparsity.codes import LARGEST as LARGEST
from compressor.sparsity.codes import quantised as quantised
