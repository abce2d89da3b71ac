"""How much faster a structured model is: dense and half of its multiply-accumulates, timed in turns in the same process.

    python benchmarks/structured.py [--rounds 11]

Random weights; eager, and each model in its fastest dense form (as `compressor.lower` finds it). Writes
benchmarks/results/structured.json.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import click
import torch

import compressor
from compressor import registry
from compressor.cost.macs import layer_macs
from compressor.cost.timing import interleaved, median_ms
from compressor.data.batches import as_batches
from compressor.environment import environment
from compressor.plugins.structured import Structured

MODELS = {"uvit-cifar10": 4, "ddpm-cifar10": 4, "uvit-digits": 16, "ddpm-digits": 16}


def cell(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """One model, dense and structured."""
    torch.manual_seed(0)
    adapter = registry.adapter(name)
    dense = adapter.build().eval()
    samples = torch.rand(8, *(adapter.image_shape or (3, 32, 32))) * 2 - 1
    pruner = Structured(macs=0.5).prepare(dense, adapter, as_batches(samples, 4, 0))
    smaller = copy.deepcopy(dense)
    if pruner.surgery is None:
        raise RuntimeError("nothing was removed")
    pruner.surgery.apply(smaller)
    example = adapter.example_inputs(batch)
    forms = {"dense": dense, "structured": smaller}
    forms |= {f"{key}, lowered": compressor.lower(m, example, adapter=adapter).model for key, m in forms.items()}
    with torch.no_grad():
        calls = [lambda model=model: adapter.predict(model, example) for model in forms.values()]
        times = interleaved(calls, rounds, torch.device("cpu"))
    median = {key: median_ms(seconds) for key, seconds in zip(forms, times, strict=True)}
    return {
        "model": name,
        "batch": batch,
        "macs_share": layer_macs(smaller, adapter)[0] / layer_macs(dense, adapter)[0],
        "params_share": sum(p.numel() for p in smaller.parameters()) / sum(p.numel() for p in dense.parameters()),
        "median_ms": median,
        "speedup_eager": median["dense"] / median["structured"],
        "speedup_lowered": median["dense, lowered"] / median["structured, lowered"],
    }


@click.command()
@click.option("--rounds", default=11, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "structured.json")
def main(rounds: int, out: Path) -> None:
    cells = {}
    for name, batch in MODELS.items():
        cells[name] = cell(name, batch, rounds)
        found = cells[name]
        click.echo(f"{name}: eager {found['speedup_eager']:.2f}x, lowered {found['speedup_lowered']:.2f}x")
        facts = {key: value for key, value in environment().items() if key in ("versions", "hardware", "platform")}
        out.write_text(
            json.dumps({**facts, "rounds": rounds, "seed": 0, "cells": cells}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
