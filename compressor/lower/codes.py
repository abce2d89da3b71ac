"""The codes of quantising backends: those that training with 8 bits rounds to."""

from __future__ import annotations

from compressor.sparsity.codes import LARGEST, quantised

__all__ = ["LARGEST", "quantised"]
