"""What it brings to let similar rows share a choice: V:N:M with neighbouring rows against clustered rows, on `uvit-digits`.

    python benchmarks/clustering.py [--seeds 2]

For each pattern the share of the weights' energy that one-shot masks keep, and fd-digits after SparseDM's fine-tuning, under
equal budgets. Cells are kept as soon as they are done. Writes benchmarks/results/clustering.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from compressor.model_zoo.uvit.sizes import digits
from compressor.plugins.sparsedm import SparseDM
from methods_digits import Judge, summary, train
from torch import Tensor

from compressor import Pattern, parse
from compressor.engine import choose_layers
from compressor.environment import environment
from compressor.inputs import resolve

PATTERNS = ("2:2:4", "2c:2:4", "4:2:4", "4c:2:4", "8:2:4", "8c:2:4")
TRAINED = ("4:2:4", "4c:2:4", "2:2:4")


def energy(weights: Sequence[Tensor], pattern: Pattern) -> float:
    """The kept share of the sum of squares of `weights`."""
    kept = sum(float(pattern.mask(weight.abs()).apply(weight).square().sum()) for weight in weights)
    return kept / sum(float(weight.square().sum()) for weight in weights)


@click.command()
@click.option("--seeds", type=click.IntRange(1, 10), default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "clustering.json")
def main(seeds: int, out: Path) -> None:
    recipe = resolve({}, "benchmark")
    model = digits().load(None)
    judge = Judge(model, recipe.evaluate)
    known = json.loads(out.read_text()) if out.exists() else {}
    cells: dict[str, Any] = known.get("cells", {})
    gaussian = [torch.randn(2048, 512, generator=torch.Generator().manual_seed(0))]
    pruned = choose_layers(model, SparseDM(), digits(), None, None)
    weights = [layer.weight.detach() for layer in pruned if layer.reason is None]
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
                "energy_kept": {text: energy(weights, parse(text)) for text in PATTERNS},
                "energy_kept_gaussian_2048x512": {text: energy(gaussian, parse(text)) for text in PATTERNS},
                "fd-digits": {pattern: summary(found) for pattern, found in values.items()},
                "cells": cells,
            }
            out.write_text(json.dumps(result, indent=2) + "\n")
            click.echo(f"{key}: {cells[key]['quality']['value']:.2f}", err=True)


if __name__ == "__main__":
    main()
