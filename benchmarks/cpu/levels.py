"""The compiled kernels at several instruction sets of one processor, layer by layer on one thread.

    OMP_NUM_THREADS=1 python benchmarks/cpu/levels.py [--rounds 41]      # a few minutes

The layers of a U-ViT-S/2 (batch 4) at 4:2:4, 3x3 convolutions of the DDPM UNet for CIFAR-10 (batch 4) at 8:2:4, and the attention of a
U-ViT-S/2 and of a DiT-XL/2. Normal weights and inputs, seed 0; all forms of a layer take turns in one process, each after the kernels
were set to its level, and a ratio is the median of those of single rounds. Writes benchmarks/results/levels_cpu.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from int8 import layers
from torch import Tensor, nn

from compressor import NM
from compressor.cost.timing import interleaved, iqr_ms, median_ms
from compressor.environment import environment
from compressor.lower import Backend, Unit
from compressor.lower.attention import SelfAttention, VNMAttentionInt8, VNMAttentionInt16
from compressor.lower.vnm import VNM, VNMW7A8, VNMW8A8, VNMInt8
from compressor.lower.vnm_kernels import kernels

SEED = 0
CPU = torch.device("cpu")
FORMS: dict[str, dict[str, tuple[type[Backend], ...]]] = {
    "weights": {
        "avx2": (VNM, VNMInt8, VNMW7A8),
        "avx_vnni": (VNMInt8, VNMW8A8),
        "avx512": (VNM, VNMW7A8),
        "avx512_vnni": (VNMInt8, VNMW8A8),
    },
    "attention": {
        "avx2": (VNMAttentionInt16,),
        "avx_vnni": (VNMAttentionInt16, VNMAttentionInt8),
        "avx512_vnni": (VNMAttentionInt16, VNMAttentionInt8),
    },
}
CONVOLUTIONS = ((128, 128, 32), (256, 256, 16), (256, 256, 8), (256, 256, 4))
"""Channels in and out, and the side of the image."""
ATTENTIONS = ((4, 8, 257, 64), (1, 16, 1024, 72))
"""Images, heads, tokens, channels of a head."""


def units(rng: torch.Generator) -> list[Unit]:
    """What is timed."""
    pattern = NM(2, 4, 4)
    found = []
    for name, module in layers(pattern, rng).items():
        count = sum(isinstance(m, nn.Linear) for m in module.modules())
        shape = (4 * 257, int(name.split()[0]))
        found.append(Unit(name, module, shape, torch.float32, CPU, (pattern,) * count))
    pattern = NM(2, 4, 8)
    for inner, out, side in CONVOLUTIONS:
        conv = nn.Conv2d(inner, out, 3, padding=1).requires_grad_(False)
        weight = torch.randn(conv.weight.shape, generator=rng) / (9 * inner) ** 0.5
        conv.weight.copy_(pattern.mask(weight.abs()).apply(weight))
        name = f"3x3, {inner} -> {out}, {side} x {side}"
        found.append(Unit(name, conv, (4, inner, side, side), torch.float32, CPU, (pattern,)))
    for images, heads, tokens, channels in ATTENTIONS:
        name = f"attention, {images} x {heads} heads of {channels}, {tokens} tokens"
        found.append(Unit(name, SelfAttention(), (images, tokens, 3, heads, channels), torch.float32, CPU, ()))
    return found


def at(level: str, form: nn.Module, x: Tensor) -> Any:
    """A call with the kernels of a level."""
    kernels()[0].set_level(level)
    return form(x)


def measured(unit: Unit, x: Tensor, rounds: int) -> dict[str, Any]:
    """The times of every form of a unit, by level and backend, and what they are over avx2's fastest in few bits."""
    extension = kernels()[0]
    calls: dict[str, Callable[[], object]] = {}
    for level, backends in FORMS["weights" if unit.patterns else "attention"].items():
        if level not in extension.levels():
            continue
        extension.set_level(level)
        for backend in (one() for one in backends):
            calls[f"{level}, {backend.name}"] = partial(at, level, backend.build(unit), x)
    seconds = dict(zip(calls, interleaved(list(calls.values()), rounds, CPU), strict=True))
    first = "avx2, vnm-w7a8" if unit.patterns else "avx2, attention-int16"
    return {
        "layer": unit.name,
        "pattern": ", ".join(map(str, unit.patterns)),
        "median_ms": {name: median_ms(own) for name, own in seconds.items()},
        "iqr_ms": {name: iqr_ms(own) for name, own in seconds.items()},
        f"over {first}": {
            name: median(a / b for a, b in zip(seconds[first], own, strict=True)) for name, own in seconds.items()
        },
    }


@click.command()
@click.option("--rounds", default=41, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parents[1] / "results/levels_cpu.json")
@torch.no_grad()
def main(rounds: int, out: Path) -> None:
    """Measure every layer and write the JSON."""
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(SEED)
    rows = []
    for unit in units(rng):
        rows.append(row := measured(unit, torch.randn(unit.input_shape, generator=rng), rounds))
        click.echo(json.dumps(row, indent=1))
    result = {**environment(), "levels": list(kernels()[0].levels()), "seed": SEED, "rounds": rounds, "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
