"""A lowered U-ViT-S/2 beside every engine that a user of a CPU would take instead, side by side in one process.

    python benchmarks/cpu/opponents.py --out benchmarks/results/opponents_cpu.json

Random weights, pruned by magnitude to 4:2:4 in every Linear of the blocks. The dense weights run in PyTorch (eager, prepacked), ONNX
Runtime and OpenVINO, in float32 and int8 each; the pruned ones lowered in float32, and with a tolerance, where 8-bit kernels may be
taken. Errors are root mean square differences from the same weights in eager float32, in standard deviations of the output.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click
import torch
from lowering import built, prune

import compressor
from compressor.cost.timing import side_by_side
from compressor.environment import environment
from compressor.export.engines import engines
from compressor.lower.forms import dense_forms


def measured(batch: int, rounds: int, tolerance: float) -> dict[str, Any]:
    torch.manual_seed(0)
    dense, _, adapter = built("uvit-s2", batch)
    example = adapter.example_inputs(batch)
    sparse, _, _ = built("uvit-s2", batch)
    sparse.load_state_dict(dense.state_dict())
    prune(sparse, {"model": "uvit-s2", "pattern": "4:2:4"})
    plans = {
        "lowered, float32": compressor.lower(sparse, example, adapter=adapter, cache=False),
        "lowered, 8 bits": compressor.lower(sparse, example, adapter=adapter, tolerance=tolerance, cache=False),
    }
    plan = plans["lowered, float32"].plan
    torch_forms = dense_forms(dense, example, plan, adapter=adapter)
    calls: dict[str, Any] = {
        {"eager": "eager", "dense": "prepacked"}[name]: lambda form=form: adapter.predict(form, example)
        for name, form in torch_forms.items()
    }
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        others, left = engines(dense, adapter, Path(folder), openvino=True)
        calls |= {one.name: lambda one=one: one.run(example) for one in others}
        calls |= {name: lambda form=form: adapter.predict(form.model, example) for name, form in plans.items()}
        wanted = {name: adapter.predict(model, example) for name, model in (("dense", dense), ("sparse", sparse))}
        errors = {}
        for name, call in calls.items():
            own = wanted["sparse" if name.startswith("lowered") else "dense"]
            errors[name] = float((call() - own).square().mean().sqrt() / own.std())
        times = side_by_side(calls, rounds, torch.device("cpu"))
    medians = {name: own.median_ms for name, own in times.items()}
    found: dict[str, Any] = {}
    for name, form in plans.items():
        rivals = [one for one in medians if not one.startswith("lowered") and errors[one] <= max(errors[name], 1e-4)]
        best = min(rivals, key=lambda one: medians[one])
        any_best = min((one for one in medians if not one.startswith("lowered")), key=lambda one: medians[one])
        found[name] = {
            "over the best no less exact": {best: medians[best] / medians[name]},
            "over the fastest of all": {any_best: medians[any_best] / medians[name]},
            "choice": form.plan.choice,
            "layers": dict(Counter(one.choice for one in form.plan.layers)),
        }
    return {
        "batch": batch, "pattern": "4:2:4", "tolerance": tolerance, "rounds": rounds, "seed": 0, "median_ms": medians,
        "iqr_ms": {name: own.iqr_ms for name, own in times.items()}, "error": errors, "left_out": left, "speedup": found,
    }  # fmt: skip


@click.command()
@click.option("--batches", default="4,1", show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--tolerance", default=0.02, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(batches: str, rounds: int, tolerance: float, out: Path | None) -> None:
    from importlib.metadata import version

    facts = environment(torch.device("cpu"))
    facts["versions"] |= {name: version(name) for name in ("onnxruntime", "openvino", "nncf")}
    facts |= {"threads": torch.get_num_threads(), "cells": []}
    for batch in map(int, batches.split(",")):
        facts["cells"].append(measured(batch, rounds, tolerance))
        click.echo(json.dumps(facts["cells"][-1], indent=1))
        if out is not None:
            out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
