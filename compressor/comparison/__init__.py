"""Comparing methods: equal budgets, the same data, noise and evaluation for all, several seeds, one report."""

from compressor.comparison.entries import Comparison, planned
from compressor.comparison.jobs import conduct, evaluated_before, matched_before, measured_in_turn, sharing

__all__ = [
    "Comparison",
    "conduct",
    "evaluated_before",
    "matched_before",
    "measured_in_turn",
    "planned",
    "sharing",
]
