"""Makes diffusion models sparse, keeps their quality, and reports what was measured.

Names are imported when first used, so that `import compressor` and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor import lower as lower
    from compressor import testing as testing
    from compressor.adapter import Adapter
    from compressor.artifact import load, save
    from compressor.data import Images, ImageSet, Records, Samples, SampleSet
    from compressor.engine import FineTuning, Result, Step, prune, steps
    from compressor.errors import CompressorError
    from compressor.estimator import Estimator, Exact, StraightThrough
    from compressor.lower import Backend, Lowered, Plan
    from compressor.pattern import NM, Mask, Pattern, Unstructured, parse
    from compressor.pruner import Objective, Pruner
    from compressor.reading import read_data
    from compressor.shadow import Shadow
    from compressor.training import Training

__version__ = "0.1.0"

_MODULES = ("lower", "testing")
"""`lower` can be called: `compressor.lower(model, example_inputs)`."""
_HOMES = {
    "adapter": ("Adapter",),
    "artifact": ("load", "save"),
    "data": ("ImageSet", "Images", "Records", "SampleSet", "Samples"),
    "engine": ("FineTuning", "Result", "Step", "prune", "steps"),
    "errors": ("CompressorError",),
    "estimator": ("Estimator", "Exact", "StraightThrough"),
    "lower": ("Backend", "Lowered", "Plan"),
    "pattern": ("NM", "Mask", "Pattern", "Unstructured", "parse"),
    "pruner": ("Objective", "Pruner"),
    "reading": ("read_data",),
    "shadow": ("Shadow",),
    "training": ("Training",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "NM",
    "Adapter",
    "Backend",
    "CompressorError",
    "Estimator",
    "Exact",
    "FineTuning",
    "ImageSet",
    "Images",
    "Lowered",
    "Mask",
    "Objective",
    "Pattern",
    "Plan",
    "Pruner",
    "Records",
    "Result",
    "SampleSet",
    "Samples",
    "Shadow",
    "Step",
    "StraightThrough",
    "Training",
    "Unstructured",
    "load",
    "lower",
    "parse",
    "prune",
    "read_data",
    "save",
    "steps",
    "testing",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"compressor.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    value = getattr(import_module(f"compressor.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
