"""Whether what lowering chooses on a busy machine is ever slower than dense when the machine is idle.

    python benchmarks/cpu/busy.py [--lowerings 6] [--rounds 61] [--batch 4] [--seed 0]   # minutes, on every core

`uvit-digits`, every weight that 4:2:4 fits pruned by magnitude, is lowered again and again without a cache, while one process per core
does nothing but spin. Then those are ended, and each lowered model takes turns with the model as it is and with the best dense form
of an undisturbed lowering. Slower is one that dense won by more than 3%, and in more rounds than chance explains. Writes
benchmarks/results/busy_cpu.json.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import nn

import compressor
from compressor import registry
from compressor.adapter import Adapter
from compressor.cost.timing import interleaved
from compressor.environment import environment
from compressor.lower.contest import Contest, needed
from compressor.lower.forms import dense_forms
from compressor.report.content import gains
from compressor.weights import in_float32

CPU = torch.device("cpu")


@contextmanager
def busy(count: int) -> Iterator[None]:
    """`count` processes that spin, ended afterwards."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that they are ended then too
    spinning = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in spinning:
            one.kill()
            one.wait()


@torch.no_grad()
def pruned(adapter: Adapter, rule: str) -> nn.Module:
    """The adapter's model with its pretrained weights, where it has them, pruned by magnitude wherever `rule` fits."""
    bundled = adapter.name.endswith(("-digits", "-pictures"))
    model, pattern = in_float32(adapter.load(None) if bundled else adapter.build()).eval(), compressor.parse(rule)
    for weight in model.parameters():
        if weight.dim() > 1 and pattern.misfit(tuple(weight.shape)) is None:
            weight.copy_(pattern.mask(weight.abs()).apply(weight))
    return model


@click.command()
@click.option("--lowerings", default=6, show_default=True)
@click.option("--rounds", default=61, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default="benchmarks/results/busy_cpu.json", show_default=True)
def main(lowerings: int, rounds: int, batch: int, seed: int, out: str) -> None:
    torch.manual_seed(seed)
    adapter = registry.adapter("uvit-digits")
    model, example = pruned(adapter, "4:2:4"), adapter.example_inputs(batch)
    lower = partial(compressor.lower, model, example, adapter=adapter, cache=False)
    cores = len(os.sched_getaffinity(0))
    found = []
    with busy(cores):
        for _ in range(lowerings):
            began = time.monotonic()
            found.append(lower())
            print(f"lowered in {time.monotonic() - began:.0f} s: {found[-1].plan.reason}", flush=True)
    quiet = lower()
    forms: dict[str, Any] = {**dense_forms(model, example, quiet.plan, adapter=adapter), "quiet": quiet.model}
    forms |= {f"busy {at}": one.model for at, one in enumerate(found)}
    with torch.no_grad():
        seconds = interleaved([partial(adapter.predict, form, example) for form in forms.values()], rounds, CPU)
    times = {name: tuple(1000 * one for one in own) for name, own in zip(forms, seconds, strict=True)}
    held = Contest.of(times, [name for name in times if name.startswith(("busy", "quiet"))])
    result = {
        "lowerings": [
            {
                "choice": one.plan.choice,
                "reason": one.plan.reason,
                "taken": one.plan.taken,
                "layers": {layer.name: layer.choice for layer in one.plan.layers},
                "rounds_of_the_model": next((a.rounds for f in one.plan.forms for a in f.against.values()), 0),
                "against": {other: beside.model_dump() for other, beside in held.against[name].items()},
            }
            for name, one in [("quiet", quiet), *((f"busy {at}", one) for at, one in enumerate(found))]
        ],
        "median_ms": {name: median(own) for name, own in times.items()},
        "rounds": rounds,
        "batch": batch,
        "seed": seed,
        "cores": cores,
        **environment(CPU),
    }
    slower = {other: sum(_slower(held, f"busy {at}", other) for at in range(lowerings)) for other in held.dense}
    result["slower"] = slower
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"of {lowerings} models lowered while {cores} processes spun, slower when idle than {slower}")
    for at, one in enumerate(found):
        ratios = ", ".join(f"{held.ratio(f'busy {at}', other):.2f}x {other}" for other in held.dense)
        print(f"{one.plan.choice}: {ratios}; {one.plan.reason}")


def _slower(held: Contest, name: str, dense: str) -> bool:
    beside = held.against[name][dense]
    return gains(1 / beside.ratio) and beside.rounds - beside.wins >= needed(beside.rounds)


if __name__ == "__main__":
    main()
