"""Blocks of large models on whole images, one image at a time: what is chosen, how fast it is, and the memory that it takes.

    python benchmarks/cpu/tokens.py [--only NAME]      # some minutes, on every core

Real classes of diffusers at their published width, one block or two, random weights, 4:2:4 by magnitude in every Linear of the blocks
that reads tokens; 1,024 tokens are an image of 512 pixels, 4,096 one of 1,024. U-ViT-L/2 is whole. Each cell runs in a process of its
own; memory is measured in two more: one that runs the model as it is, and one that lowers it by the plan. Writes
benchmarks/results/tokens_cpu.json; cells of a former file stay unless they are measured again.
"""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import diffusers
import torch
from torch import nn

import compressor
from compressor import registry
from compressor.environment import environment, give_back

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def dit(side: int) -> tuple[nn.Module, dict[str, Any]]:
    """A block of DiT-XL/2 with its ends."""
    model = diffusers.DiTTransformer2DModel(num_layers=1, sample_size=side, in_channels=4, out_channels=8)
    return model, {
        "hidden_states": torch.randn(1, 4, side, side),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([1]),
    }


def pixart(side: int) -> tuple[nn.Module, dict[str, Any]]:
    """A block of PixArt-alpha, 120 tokens of text."""
    model = diffusers.PixArtTransformer2DModel(
        num_layers=1, sample_size=side, caption_channels=4096, use_additional_conditions=False
    )
    inputs = {"hidden_states": torch.randn(1, 4, side, side), "encoder_hidden_states": torch.randn(1, 120, 4096)}
    return model, inputs | {"timestep": torch.tensor([500])}


def sd3(side: int) -> tuple[nn.Module, dict[str, Any]]:
    """Two blocks of Stable Diffusion 3 medium (the last one has no text), 154 tokens of text."""
    model = diffusers.SD3Transformer2DModel(
        num_layers=2, sample_size=128, num_attention_heads=24, caption_projection_dim=1536
    )
    inputs = {"hidden_states": torch.randn(1, 16, side, side), "encoder_hidden_states": torch.randn(1, 154, 4096)}
    return model, inputs | {"pooled_projections": torch.randn(1, 2048), "timestep": torch.tensor([500])}


def uvit(_: int) -> tuple[nn.Module, dict[str, Any]]:
    """The whole U-ViT-L/2 for latents of 32x32."""
    adapter = registry.adapter("uvit-imagenet256-l")
    images, time, labels = (t for t in torch.utils._pytree.tree_leaves(adapter.example_inputs(1)))
    return adapter.build(), {"x": torch.randn(images.shape), "timesteps": time, "y": labels}


CELLS: dict[str, tuple[Callable[[int], tuple[nn.Module, dict[str, Any]]], int, str]] = {
    "DiT-XL/2, a block, 1,024 tokens": (dit, 64, "transformer_blocks"),
    "DiT-XL/2, a block, 4,096 tokens": (dit, 128, "transformer_blocks"),
    "PixArt-alpha, a block, 1,024 tokens": (pixart, 64, "transformer_blocks"),
    "PixArt-alpha, a block, 4,096 tokens": (pixart, 128, "transformer_blocks"),
    "SD3 medium, two blocks, 1,024 tokens": (sd3, 64, "transformer_blocks"),
    "SD3 medium, two blocks, 4,096 tokens": (sd3, 128, "transformer_blocks"),
    "U-ViT-L/2, whole, 256 tokens": (uvit, 0, "block"),
}


@torch.no_grad()
def made(cell: str) -> tuple[nn.Module, dict[str, Any]]:
    """The cell's model, pruned, and its inputs."""
    torch.manual_seed(0)
    make, side, blocks = CELLS[cell]
    model, inputs = make(side)
    pattern = compressor.parse("4:2:4")
    for name, module in model.named_modules():
        # what modulates runs once an image, not once a token
        if isinstance(module, nn.Linear) and blocks in name and not re.search(r"norm|adaln|emb", name):
            module.weight.copy_(pattern.mask(module.weight.abs()).apply(module.weight))
    return model.eval(), inputs


def resident() -> dict[str, float]:
    """This process's memory in MiB, now and at most."""
    told = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE))
    return {"now": int(told["VmRSS"]) / 1024, "most": int(told["VmHWM"]) / 1024}


@torch.no_grad()
def memory(cell: str, plan: Path | None) -> dict[str, float]:
    """Of a process that runs the model as it is, or lowered by a plan without keeping what it came from."""
    model, inputs = made(cell)
    before = resident()["now"]
    if plan is not None:
        model = compressor.lower(model, inputs, plan=compressor.Plan.read(plan)).model
    gc.collect()
    give_back()
    for _ in range(2):
        model(**inputs)
    return {"made": before, **resident()}


def measured(cell: str) -> dict[str, Any]:
    model, inputs = made(cell)
    plan = compressor.lower(model, inputs, cache=False).plan
    with tempfile.TemporaryDirectory() as folder:
        plan.save(path := Path(folder) / "lowering.json")
        memory_mib = {
            name: json.loads(_again(cell, option)) for name, option in (("as it is", ""), ("lowered", str(path)))
        }
    return {
        "choice": plan.choice,
        "reason": plan.reason,
        "median_ms": {form.name: form.median_ms for form in plan.forms},
        "iqr_ms": {form.name: form.iqr_ms for form in plan.forms},
        "over the best dense": {form.name: form.speedup for form in plan.forms},
        "rounds": next((a.rounds for form in plan.forms for a in form.against.values()), 0),
        "layers": dict(Counter(layer.choice for layer in plan.layers)),
        "taken": plan.taken,
        "parameters": sum(p.numel() for p in model.parameters()),
        "memory_mib": memory_mib,
    }


def _again(cell: str, plan: str = "", whole: bool = False) -> str:
    """What this script prints for one cell in a process of its own."""
    more = ["--whole"] if whole else ["--plan", plan]
    command = [sys.executable, __file__, "--only", cell, "--alone", *more]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]


@click.command()
@click.option("--only", type=click.Choice(list(CELLS)), multiple=True)
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "results" / "tokens_cpu.json")
@click.option("--alone", is_flag=True, hidden=True)
@click.option("--whole", is_flag=True, hidden=True)
@click.option("--plan", default="", hidden=True)
def main(only: tuple[str, ...], out: Path, alone: bool, whole: bool, plan: str) -> None:
    if alone:
        (cell,) = only
        print(json.dumps(measured(cell) if whole else memory(cell, Path(plan) if plan else None)))
        return
    cells = json.loads(out.read_text())["cells"] if out.exists() else {}
    for cell in only or CELLS:
        cells[cell] = json.loads(_again(cell, whole=True))
        click.echo(json.dumps({cell: cells[cell]}, indent=1))
        facts = {
            "pattern": "4:2:4",
            "batch": 1,
            "seed": 0,
            "threads": torch.get_num_threads(),
            "cells": cells,
            **environment(CPU),
        }
        out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
