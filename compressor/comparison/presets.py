"""Comparisons that can be asked for by name: the presets of the registered methods."""

from __future__ import annotations

from compressor import registry
from compressor.errors import CompressorError
from compressor.training.pruner import Preset


def presets() -> dict[str, Preset]:
    """The presets of every registered method, by name. Raises CompressorError where two methods have one of the same name."""
    owners: dict[str, str] = {}
    known: dict[str, Preset] = {}
    for method in registry.names("pruners"):
        for name, preset in registry.pruner_class(method).presets.items():
            if known.get(name, preset) is not preset:
                raise CompressorError(
                    f"{owners[name]} and {method} both have a preset {name!r}",
                    "Remove the distribution of one of them.",
                )
            owners.setdefault(name, method)
            known[name] = preset
    return known


def compared_by_default() -> tuple[str, ...]:
    """The registered methods that say they belong in a comparison where the user names none."""
    return tuple(name for name in registry.names("pruners") if registry.pruner_class(name).compared)
