"""Whole-model speed of lowered models against dense ones on a CPU, side by side.

    python benchmarks/cpu/lowering.py                       # every cell, into benchmarks/results/lowering_cpu.json
    python benchmarks/cpu/lowering.py --only uvit-s2 --only 4:2:4 --rounds 9 --out /tmp/trial.json

Each cell runs in a process of its own: random weights, pruned by magnitude in every Linear of U-ViT's blocks, or in every
layer of the UNet that the pattern fits; the model is lowered as users would, and then all forms take turns. The dense
opponents are the model as it is (eager), under torch.compile with frozen weights (compiled), and with every layer in its
fastest dense form, oneDNN with packed weights (prepacked). A cell at `avx2` restricts torch, oneDNN and the kernels alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[2]
AVX2 = {
    **{"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    **{"TORCHINDUCTOR_CPP_MARCH": "x86-64-v3", "COMPRESSOR_CPU_LEVEL": "avx2"},
}


def cells() -> list[dict[str, Any]]:
    """Every cell of the table."""
    uvit = [("4:2:4", b, "float32", "") for b in (4, 1, 16)] + [("2:2:4", b, "float32", "") for b in (4, 1, 16)]
    uvit += [("8:2:4", 4, "float32", ""), ("2:4", 4, "float32", "")]
    uvit += [(pattern, 4, "bfloat16", "") for pattern in ("4:2:4", "2:2:4")]
    uvit += [(pattern, batch, "bfloat16", "") for pattern in ("4:2:4",) for batch in (1, 16)]
    uvit += [(pattern, 4, "float32", "avx2") for pattern in ("4:2:4", "2:2:4")]
    unet = [
        (pattern, batch, "float32", "") for pattern, batch in (("8:2:4", 4), ("8:2:4", 1), ("4:2:4", 4), ("2:4", 4))
    ]
    keys = ("pattern", "batch", "dtype", "level")
    return [
        {"model": model, **dict(zip(keys, cell, strict=True))}
        for model, some in (("uvit-s2", uvit), ("ddpm-cifar10", unet))
        for cell in some
    ]


def name_of(cell: dict[str, Any]) -> str:
    return " ".join(str(value) for value in cell.values() if value != "")


@click.command()
@click.option("--only", multiple=True, help="Cells whose name contains this; several must all match.")
@click.option("--rounds", default=21, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--compiled/--no-compiled", default=True, show_default=True)
@click.option("--out", default=str(ROOT / "benchmarks/results/lowering_cpu.json"), show_default=True)
@click.option("--cell", help="Measure this one cell here and print it as JSON (used by the command itself).")
def main(only: tuple[str, ...], rounds: int, seed: int, compiled: bool, out: str, cell: str | None) -> None:
    """Measure the cells, one process each, and write the JSON after every one."""
    if cell is not None:
        print(json.dumps(measured(json.loads(cell), rounds, seed, compiled)))
        return
    path = Path(out)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    for one in cells():
        if not all(part in name_of(one).split() or part in name_of(one) for part in only):
            continue
        command = [sys.executable, __file__, "--cell", json.dumps(one), "--rounds", str(rounds), "--seed", str(seed)]
        command += [] if compiled else ["--no-compiled"]
        environment = {**os.environ, **(AVX2 if one["level"] == "avx2" else {})}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if run.returncode:
            print(run.stderr[-2000:], file=sys.stderr)
            raise SystemExit(f"{name_of(one)} failed")
        result = json.loads(run.stdout.splitlines()[-1])
        found["cells"][name_of(one)] = result
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        speeds = ", ".join(f"{key} {value:.2f}x" for key, value in result["speedup"].items())
        print(f"{name_of(one)}: {speeds}", flush=True)


def measured(cell: dict[str, Any], rounds: int, seed: int, compiled: bool) -> dict[str, Any]:
    """One cell: lower the model, and time all forms in turns."""
    import torch

    import compressor
    from compressor.cost.timing import interleaved, iqr_ms, median_ms
    from compressor.environment import environment
    from compressor.lower.forms import dense_forms
    from compressor.lower.vnm_kernels import level

    torch.manual_seed(seed)
    model, example, adapter = built(cell["model"], cell["batch"])
    pruned = prune(model, cell)
    dtype = torch.bfloat16 if cell["dtype"] == "bfloat16" else None
    lowered = compressor.lower(model, example, dtype=dtype, adapter=adapter, compiled=compiled, cache=False)
    plan = lowered.plan
    forms = {"eager float32": model} if dtype is not None else {}
    forms |= dense_forms(model, example, plan, dtype=dtype, adapter=adapter)
    dense = [name for name in forms if name != "eager float32"]
    forms["lowered"] = lowered.model

    def call(form: Any) -> Any:
        if adapter is not None:
            return adapter.predict(form, example)
        return form(**example)

    with torch.no_grad():
        times = interleaved([lambda f=f: call(f) for f in forms.values()], rounds, torch.device("cpu"))
    medians = {name: median_ms(seconds) for name, seconds in zip(forms, times, strict=True)}
    best = min(dense, key=medians.__getitem__)
    about = environment(torch.device("cpu"))
    return {
        **cell,
        "pruned_weights": pruned,
        "n": rounds,
        "seed": seed,
        "median_ms": medians,
        "iqr_ms": {name: iqr_ms(seconds) for name, seconds in zip(forms, times, strict=True)},
        "best_dense": best,
        "speedup": {
            "over eager float32": medians.get("eager float32", medians["eager"]) / medians["lowered"],
            "over eager": medians["eager"] / medians["lowered"],
            "over best dense": medians[best] / medians["lowered"],
        },
        "choice": plan.choice,
        "reason": plan.reason,
        "guard": [form.model_dump() for form in plan.forms],
        "error": next((form.error for form in plan.forms if form.name == plan.choice), None),
        "notes": list(plan.notes),
        "layers": layer_groups(plan),
        "threads": torch.get_num_threads(),
        "instructions": {"torch": torch.backends.cpu.get_cpu_capability(), "kernels": level()},
        **{key: about[key] for key in ("hardware", "versions", "platform")},
    }


def prune(model: Any, cell: dict[str, Any]) -> int:
    """Prune the wanted weights of `model` in place by magnitude, and count them."""
    import torch

    from compressor import parse

    pattern, pruned = parse(cell["pattern"]), 0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if wanted(cell["model"], name, weight) and pattern.misfit(tuple(weight.shape)) is None:
                weight.copy_(pattern.mask(weight.abs()).apply(weight))
                pruned += 1
    return pruned


def layer_groups(plan: Any) -> dict[str, dict[str, Any]]:
    """The layers of `plan` that are alike in kind, shapes and patterns: how many, and what was measured of the last of them."""
    groups: dict[str, dict[str, Any]] = {}
    for layer in plan.layers:
        key = f"{layer.kind} {[list(shape) for shape in layer.shapes]} {list(layer.patterns)}"
        group = groups.setdefault(key, {"count": 0, "choice": layer.choice, "reason": layer.reason})
        group["count"] += 1
        group["candidates"] = [candidate.model_dump(exclude_none=True) for candidate in layer.candidates]
    return groups


def built(name: str, batch: int) -> tuple[Any, Any, Any]:
    """A model with random weights, what it is called with, and its adapter where it has one."""
    import torch

    if name == "uvit-s2":
        from compressor import registry

        adapter = registry.adapter("uvit-cifar10")
        return adapter.build().eval(), adapter.example_inputs(batch), adapter
    from diffusers import UNet2DModel

    # The configuration of google/ddpm-cifar10-32.
    model = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    example = {"sample": torch.zeros(batch, 3, 32, 32), "timestep": torch.full((batch,), 500.0), "return_dict": False}
    return model.eval(), example, None


def wanted(model: str, name: str, weight: Any) -> bool:
    """Every Linear of the blocks of U-ViT, `skip_linear` too; every layer of the UNet."""
    if model == "uvit-s2":
        return weight.dim() == 2 and ("blocks." in name or name.startswith("mid_block."))
    return weight.dim() > 1


if __name__ == "__main__":
    main()
