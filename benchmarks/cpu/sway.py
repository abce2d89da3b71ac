"""What processes that take the cores do to the speed of one form over another: why several threads are asked for more there.

    python benchmarks/cpu/sway.py [--rounds 31]      # some minutes, on every core

Each model, pruned by magnitude, is lowered on the idle machine; its sparse form is kept whatever it gained. Then that, the model as it
is, and its best dense form take turns while none, one, two, … processes spin. Writes benchmarks/results/sway_cpu.json.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from busy import CPU, busy, pruned

import compressor
from compressor import registry
from compressor.cost.contention import Cores
from compressor.cost.timing import interleaved
from compressor.environment import environment
from compressor.lower.contest import Contest, taken_since
from compressor.lower.forms import dense_forms

CASES = (
    ("uvit-digits", "4:2:4", 4),
    ("ddpm-digits", "8:2:4", 4),
    ("uvit-pictures", "4:2:4", 4),
    ("uvit-cifar10", "4:2:4", 1),
)


@torch.no_grad()
def swayed(name: str, pattern: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """The ratios of one model's forms, by number of processes."""
    torch.manual_seed(0)
    adapter = registry.adapter(name)
    model, example = pruned(adapter, pattern), adapter.example_inputs(batch)
    plan = compressor.lower(model, example, adapter=adapter, cache=False).plan
    forms: dict[str, Any] = dense_forms(model, example, plan, adapter=adapter)
    kept = plan.model_copy(update={"choice": "lowered"})
    forms["lowered"] = compressor.lower(model, example, adapter=adapter, plan=kept).model
    calls = [partial(adapter.predict, form, example) for form in forms.values()]
    found = []
    for count in range(len(os.sched_getaffinity(0)) + 1):
        with busy(count):
            began = Cores.now()
            seconds = interleaved(calls, rounds, CPU)
            taken = taken_since(began, CPU)
        times = {form: tuple(1000 * one for one in own) for form, own in zip(forms, seconds, strict=True)}
        held = Contest.of(times, ["lowered"])
        found.append(
            {
                "model": name,
                "pattern": pattern,
                "batch": batch,
                "processes": count,
                "taken": taken,
                "median_ms": dict(held.medians),
                "lowered over": {other: held.ratio("lowered", other) for other in held.dense},
                "dense over eager": held.ratio("dense", "eager"),
            }
        )
        click.echo(json.dumps(found[-1]))
    return found


@click.command()
@click.option("--rounds", default=31, show_default=True)
@click.option("--out", default="benchmarks/results/sway_cpu.json", show_default=True)
def main(rounds: int, out: str) -> None:
    cells = [cell for case in CASES for cell in swayed(*case, rounds)]
    facts = {"rounds": rounds, "seed": 0, "cells": cells, **environment(CPU)}
    Path(out).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
