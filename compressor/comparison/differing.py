"""What the trainings that are compared have in common, and what not: the settings of their recipes besides each method's own."""

from __future__ import annotations

from typing import Any

from compressor.comparison.entries import Comparison
from compressor.report.compared import ComparisonReport

_SECTIONS = ("train", "loading")
_ORDER = ("train.batch_size", "train.times", "loading.flip", "loading.size")
"""What the batches and the noise of a seed depend on."""


def differing(wanted: Comparison) -> dict[str, dict[str, Any]]:
    """By setting, the value of each entry, of those in which the recipes differ; not the rates where they were searched."""
    own: dict[str, dict[str, Any]] = {}
    for label, recipe in wanted.recipes.items():
        parts = recipe.model_dump(mode="json", include={*_SECTIONS, "targets", "ignore"})
        own[label] = {f"{name}.{key}": value for name in _SECTIONS for key, value in parts.pop(name).items()} | parts
    names = [name for name in next(iter(own.values())) if name != "train.lr" or not wanted.rates]
    found = {name: {label: values[name] for label, values in own.items()} for name in names}
    return {name: values for name, values in found.items() if len({str(value) for value in values.values()}) > 1}


def alike(report: ComparisonReport) -> str:
    """What the trainings of a seed had in common."""
    same = not any(name in report.differing for name in _ORDER)
    return f"saw the same data{' in the same order with the same noise for a seed' * same}"


def told(report: ComparisonReport) -> list[str]:
    """The sentence on what recipes differ in; none where it is nothing."""
    found = []
    for name, values in report.differing.items():
        labels: dict[str, list[str]] = {}
        for label, value in values.items():
            labels.setdefault("the default" if value is None else str(value), []).append(label)
        found.append(f"{name} is {', '.join(f'{value} in {_listed(own)}' for value, own in labels.items())}")
    return [f"Recipes differ in more than the method: {'; '.join(found)}."] if found else []


def _listed(labels: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(labels[:-1]), labels[-1])))
