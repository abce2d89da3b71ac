"""Comparisons that show what the parts of SparseDM do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.training.pruner import Preset


def _sparsedm(pattern: str | None = None, **settings: Any) -> dict[str, Any]:
    return {"method": "sparsedm", "settings": settings, **({"pattern": pattern} if pattern else {})}


PRESETS: Mapping[str, Preset] = {
    "sparsedm-ablation": Preset(
        "each part of SparseDM on its own: teacher, estimator, masks, schedule, pattern, sampler steps",
        {
            "dense-continued": {"method": "dense-continued"},
            "paper": _sparsedm(),
            "no teacher": _sparsedm(teacher=0.0),
            "teacher only": _sparsedm(teacher_only=True),
            "STE": _sparsedm(decay=0.0),
            "decoupled decay": _sparsedm(decoupled=True),
            "fixed masks": _sparsedm(fixed=True),
            "progressive": _sparsedm(progressive=True),
            "1:4": _sparsedm("1:4"),
            "4:8": _sparsedm("4:8"),
            "2:2:4": _sparsedm("2:2:4"),
            "4:2:4": _sparsedm("4:2:4"),
            "obs start": _sparsedm(start="obs"),
            "best": _sparsedm(preset="best"),
        },
        (10, 50),
    ),
    "sparsedm-best": Preset(
        "the published recipe against the preset `best`",
        {
            "dense-continued": {"method": "dense-continued"},
            "paper": _sparsedm(),
            "best": _sparsedm(preset="best"),
        },
        (10, 50),
    ),
}
