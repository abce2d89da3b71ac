"""Comparing methods: equal budgets, the same data, noise and evaluation for all, several seeds, one report."""

from compressor.comparison.entries import Comparison, planned
from compressor.comparison.jobs import conduct, matched_before

__all__ = ["Comparison", "conduct", "matched_before", "planned"]
