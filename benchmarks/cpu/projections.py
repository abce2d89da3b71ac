"""Query, key and value as one product or as three, on a CPU: whole models lowered either way, in turns in one process.

    python benchmarks/cpu/projections.py [--only NAME]      # some minutes for each

Models, weights and inputs are those of tokens.py and the DDPM UNet for CIFAR-10 at batch 4. Each is lowered with and without
`fuse_projections`, in float32 and in few bits (`max_error` 5%), compiled; then the four chosen forms take turns, and so do the best
dense ones. Writes benchmarks/results/projections_cpu.json; cells of a former file stay unless they are measured again.
"""

from __future__ import annotations

import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import click
import tokens
import torch
from opponents import cells_of, pruned
from torch import nn

import compressor
from compressor.cost.timing import interleaved, iqr_ms, median_ms
from compressor.environment import environment
from compressor.lower.forms import dense_forms

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DDPM = "DDPM UNet for CIFAR-10, batch 4"
CELLS = ("DiT-XL/2, a block, 1,024 tokens", "PixArt-alpha, a block, 1,024 tokens", DDPM)
ROUNDS = 21
MAX_ERROR = 0.05


@torch.no_grad()
def made(cell: str) -> tuple[nn.Module, dict[str, Any]]:
    """The cell's model, pruned, and its inputs."""
    if cell != DDPM:
        return tokens.made(cell)
    torch.manual_seed(0)
    adapter = compressor.registry.adapter("ddpm-cifar10")
    model = adapter.build().eval()
    pruned(model, adapter, "8:2:4")
    return model, {"sample": torch.randn(4, 3, 32, 32), "timestep": torch.full((4,), 500)}


@torch.no_grad()
def measured(cell: str) -> dict[str, Any]:
    """Times of each form with projections fused and apart, and the ratio of the two by round."""
    model, inputs = made(cell)
    forms: dict[str, nn.Module] = {}
    chosen: dict[str, str] = {}
    for fused in (False, True):
        how = "fused" if fused else "apart"
        for name, error in (("float32", None), ("few bits", MAX_ERROR)):
            lowered = compressor.lower(
                model, inputs, compiled=True, max_error=error, cache=False, fuse_projections=fused
            )
            forms[f"{name}, {how}"], chosen[f"{name}, {how}"] = lowered.model, lowered.plan.choice
            if error is None:
                dense = [form for form in lowered.plan.forms if form.dense]
                best = min(dense, key=lambda form: form.median_ms).name
                forms[f"dense, {how}"] = dense_forms(model, inputs, lowered.plan)[best]
                chosen[f"dense, {how}"] = best
    calls = [partial(form, **inputs) for form in forms.values()]
    seconds = dict(zip(forms, interleaved(calls, ROUNDS, CPU), strict=True))
    gains = {}
    for name in ("dense", "float32", "few bits"):
        ratios = [a / b for a, b in zip(seconds[f"{name}, apart"], seconds[f"{name}, fused"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        gains[name] = {"median": statistics.median(ratios), "quartiles": [low, high]}
    return {
        "groups": len(lowered.plan.fused),
        "chosen": chosen,
        "median_ms": {name: median_ms(own) for name, own in seconds.items()},
        "iqr_ms": {name: iqr_ms(own) for name, own in seconds.items()},
        "fused over apart": gains,
    }


@click.command()
@click.option("--only", type=click.Choice(CELLS), multiple=True)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks/results/projections_cpu.json")
def main(only: tuple[str, ...], out: Path) -> None:
    about = environment(CPU)
    cells = cells_of(out, about, ("hardware",))
    for cell in only or CELLS:
        cells[cell] = measured(cell)
        click.echo(json.dumps({cell: cells[cell]}, indent=1))
        settings = {"rounds": ROUNDS, "max_error": MAX_ERROR, "seed": 0, "threads": torch.get_num_threads()}
        out.write_text(json.dumps({**settings, "cells": cells, **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
