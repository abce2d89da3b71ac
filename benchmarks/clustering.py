"""What it brings to let similar rows share a choice: V:N:M with neighbouring rows against clustered rows, on `uvit-digits`.

    python benchmarks/clustering.py [--seeds 2]

For each pattern the share of the weights' energy that one-shot masks keep, and fd-digits after SparseDM's fine-tuning, under
equal budgets. Cells are kept as soon as they are done. Writes benchmarks/results/clustering.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from compressor.model_zoo.uvit.sizes import digits
from compressor.plugins.sparsedm import SparseDM
from methods_digits import Judge, summary, train
from torch import nn

from compressor import Pattern, parse
from compressor.environment import environment
from compressor.inputs import resolve

PATTERNS = ("2:2:4", "2c:2:4", "4:2:4", "4c:2:4", "8:2:4", "8c:2:4")
TRAINED = ("4:2:4", "4c:2:4", "2:2:4")


def energy(model: nn.Module, pattern: Pattern) -> float:
    """The kept share of the sum of squares of the weights that are pruned by default."""
    kept = whole = 0.0
    for name, weight in model.named_parameters():
        if name.endswith((".qkv.weight", ".attn.proj.weight", ".fc1.weight", ".fc2.weight")):
            weight = weight.detach()
            kept += float(pattern.mask(weight.abs()).apply(weight).square().sum())
            whole += float(weight.square().sum())
    return kept / whole


@click.command()
@click.option("--seeds", type=click.IntRange(1, 10), default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "clustering.json")
def main(seeds: int, out: Path) -> None:
    recipe = resolve({}, "benchmark")
    model = digits().load(None)
    judge = Judge(model, recipe.evaluate)
    known = json.loads(out.read_text()) if out.exists() else {}
    cells: dict[str, Any] = known.get("cells", {})
    torch.manual_seed(0)
    gaussian = nn.ModuleDict({"fc1": nn.Linear(512, 2048)})
    nn.init.normal_(gaussian["fc1"].weight)
    for seed in range(seeds):
        for text in TRAINED:
            key = f"{text} / seed {seed}"
            if key not in cells:
                settings = recipe.train.model_copy(update={"seed": seed})
                trained, seconds = train(model, SparseDM(pattern=parse(text)), settings)
                cells[key] = {"pattern": text, "seed": seed, "seconds": round(seconds, 1), **judge(trained)}
            values: dict[str, list[float]] = {}
            for cell in cells.values():
                values.setdefault(cell["pattern"], []).append(cell["quality"]["value"])
            result = {
                **environment(),
                "model": "uvit-digits",
                "method": "sparsedm",
                "steps": recipe.train.steps,
                "energy_kept": {text: energy(model, parse(text)) for text in PATTERNS},
                "energy_kept_gaussian_2048x512": {text: energy(gaussian, parse(text)) for text in PATTERNS},
                "fd-digits": {pattern: summary(found) for pattern, found in values.items()},
                "cells": cells,
            }
            out.write_text(json.dumps(result, indent=2) + "\n")
            click.echo(f"{key}: {cells[key]['quality']['value']:.2f}", err=True)


if __name__ == "__main__":
    main()
