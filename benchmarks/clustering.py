"""The share of the weights' energy that masks keep, where neighbouring rows share a choice (V:N:M) and where similar rows do.

    python benchmarks/clustering.py

Writes benchmarks/results/clustering.json. What fine-tuning makes of them is in the comparison `methods-uvit`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch import Tensor

from compressor import Pattern, parse
from compressor.environment import environment
from compressor.model_zoo.uvit.sizes import digits
from compressor.plugins.sparsedm import SparseDM
from compressor.training.engine import chosen

PATTERNS = ("2:2:4", "2c:2:4", "4:2:4", "4c:2:4", "8:2:4", "8c:2:4")


def energy(weights: Sequence[Tensor], pattern: Pattern) -> float:
    """The kept share of the sum of squares of `weights`."""
    kept = sum(float(pattern.mask(weight.abs()).apply(weight).square().sum()) for weight in weights)
    return kept / sum(float(weight.square().sum()) for weight in weights)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "clustering.json")
def main(out: Path) -> None:
    weights = [layer.weight.detach() for layer in chosen(digits().load(None), SparseDM(), digits())]
    gaussian = [torch.randn(2048, 512, generator=torch.Generator().manual_seed(0))]
    result = {
        **environment(),
        "model": "uvit-digits",
        "energy_kept": {text: energy(weights, parse(text)) for text in PATTERNS},
        "energy_kept_gaussian_2048x512": {text: energy(gaussian, parse(text)) for text in PATTERNS},
    }
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
