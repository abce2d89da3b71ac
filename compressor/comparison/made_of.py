"""What the jobs of a comparison are made of: hashes of what they all share, so that a change between two of them is found."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from compressor.recipe import Recipe
from compressor.runs.code import judged_by, modelled_by, own_source, trained_by
from compressor.runs.inputs import Inputs

KEY = "made_of"
"""Where a job has it."""
_WHAT = {
    "weights": "the model's weights",
    "architecture": "the model's configuration, or its scheduler's",
    "pipeline": "the pipeline (its scheduler, a text encoder or another part)",
    "data": "the data",
    "metric": "the weights of the metric's extractor",
    "vae": "the autoencoder",
    "model_file": "the model's own file, or one beside it that it imports",
    "pruner_file": "the method's own file, or one beside it that it imports",
    **{f"{what}_plugin": f"the code of the {what}'s plugin" for what in ("model", "method", "pattern", "metric")},
}


def made_of(found: Inputs, recipe: Recipe, trains: bool) -> dict[str, str]:
    """The hashes of what a job with `recipe` is made of, given what all jobs share, `found`; `trains`: with the method, too."""
    names = {"model_file": recipe.model, **({"pruner_file": recipe.pruner} if trains else {})}
    sources = {
        f"{key}_sha256": hashlib.sha256(text).hexdigest() for key, name in names.items() if (text := own_source(name))
    }
    plugins = {**(trained_by(recipe) if trains else modelled_by(recipe)), **judged_by(recipe)}
    return {**found.sources, **found.judges, **sources, **plugins}


def changed(before: Any, now: Mapping[str, str]) -> str:
    """What is not now what it was when a job was made of it, in a sentence; empty where all is. Jobs of before this was kept say
    nothing."""
    known: Mapping[str, Any] = before if isinstance(before, Mapping) else {}
    for key in sorted({*known, *now}) if known else ():
        if (was := known.get(key)) != now.get(key):
            what = key.removesuffix("_sha256")
            return f"{_WHAT.get(what, what.replace('_', ' '))} changed: the hash was {was}, and is now {now.get(key)}"
    return ""
