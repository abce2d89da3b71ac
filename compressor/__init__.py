"""Makes diffusion models sparse, keeps their quality, and reports what was measured.

Names are imported when first used, so that `import compressor` and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor import testing as testing
    from compressor.adapter import Adapter
    from compressor.data.batches import Samples
    from compressor.data.calls import Recording
    from compressor.data.reading import read_data
    from compressor.data.sets import Images, ImageSet, Records, SampleSet
    from compressor.errors import CompressorError
    from compressor.lower import Backend, Lowered, Plan
    from compressor.lower.lowering import lower as lower  # a package that can be called: the verb, to type checkers
    from compressor.runs.lora import Merged, merge_lora
    from compressor.runs.placed import apply, example_inputs, prune, prune_, record
    from compressor.saving.model import load, save
    from compressor.sparsity.estimator import Estimator, Exact, StraightThrough
    from compressor.sparsity.notation import parse
    from compressor.sparsity.pattern import NM, Mask, Pattern, Unstructured
    from compressor.sparsity.surgery import Surgery
    from compressor.training.average import Average
    from compressor.training.engine import FineTuning, Result, Step, choose_layers, steps
    from compressor.training.pruner import Objective, Preset, Pruner, found
    from compressor.training.settings import Training
    from compressor.training.shadow import Shadow

__version__ = "0.1.0"

_MODULES = ("lower", "testing")
"""`lower` can be called: `compressor.lower(model, example_inputs)`."""
_HOMES = {
    "adapter": ("Adapter",),
    "data.batches": ("Samples",),
    "data.calls": ("Recording",),
    "data.reading": ("read_data",),
    "data.sets": ("ImageSet", "Images", "Records", "SampleSet"),
    "errors": ("CompressorError",),
    "lower": ("Backend", "Lowered", "Plan"),
    "runs.placed": ("apply", "example_inputs", "prune", "prune_", "record"),
    "runs.lora": ("Merged", "merge_lora"),
    "saving.model": ("load", "save"),
    "sparsity.estimator": ("Estimator", "Exact", "StraightThrough"),
    "sparsity.notation": ("parse",),
    "sparsity.pattern": ("NM", "Mask", "Pattern", "Unstructured"),
    "sparsity.surgery": ("Surgery",),
    "training.average": ("Average",),
    "training.engine": ("FineTuning", "Result", "Step", "choose_layers", "steps"),
    "training.pruner": ("Objective", "Preset", "Pruner", "found"),
    "training.settings": ("Training",),
    "training.shadow": ("Shadow",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "NM",
    "Adapter",
    "Average",
    "Backend",
    "CompressorError",
    "Estimator",
    "Exact",
    "FineTuning",
    "ImageSet",
    "Images",
    "Lowered",
    "Mask",
    "Merged",
    "Objective",
    "Pattern",
    "Plan",
    "Preset",
    "Pruner",
    "Recording",
    "Records",
    "Result",
    "SampleSet",
    "Samples",
    "Shadow",
    "Step",
    "StraightThrough",
    "Surgery",
    "Training",
    "Unstructured",
    "apply",
    "choose_layers",
    "example_inputs",
    "found",
    "load",
    "lower",
    "merge_lora",
    "parse",
    "prune",
    "prune_",
    "read_data",
    "record",
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
