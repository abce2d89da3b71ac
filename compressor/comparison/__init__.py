"""Comparing methods: equal budgets, the same data, noise and evaluation for all, several seeds, one report."""

from compressor.comparison.conduct import conduct
from compressor.comparison.entries import Comparison, planned

__all__ = ["Comparison", "conduct", "planned"]
