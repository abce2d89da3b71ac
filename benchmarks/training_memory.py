"""How much memory fine-tuning takes against plain dense fine-tuning: U-ViT-S/2 on latents of 4x32x32, random weights.

    python benchmarks/training_memory.py --out benchmarks/results/training_memory.json

Every figure is the most that a process of its own held (VmHWM), with all libraries: training needs them. Plain is what a short
script does: the model trained in place by AdamW on the noise loss, without teacher and without average. All rows take the same
batches; from the second step on all of an optimizer's state is there, so that two steps tell. `--seed` is of weights and data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import compressor
from compressor.environment import environment
from compressor.model_zoo.uvit.adapter import UViTAdapter
from compressor.plugins.dense import DenseContinued
from compressor.plugins.sparsedm import SparseDM
from compressor.plugins.ste import STE
from compressor.seeds import generator
from compressor.training import Training

MIB = 2**20
STEPS = 2
SMALL = {"img_size": 32, "patch_size": 2, "in_chans": 4, "embed_dim": 512, "depth": 12, "num_heads": 8}
SETTINGS = {
    "plain": (None, {}),
    "dense-continued": (DenseContinued(), {}),
    "sparsedm": (SparseDM(), {}),
    "sr-ste": (STE(), {}),
    "sparsedm, adamw-8bit": (SparseDM(), {"optimizer": "adamw-8bit"}),
}


def held(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def plain(adapter, model, data, settings: Training) -> None:
    """Dense fine-tuning as a short script has it."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
    )
    for step in range(settings.steps):
        inputs, target = adapter.noised(data[: settings.batch_size], generator(settings.seed, "noise", step))
        optimizer.zero_grad()
        F.mse_loss(adapter.predict(model, inputs), target).backward()
        optimizer.step()


def one(name: str, batch: int, seed: int) -> None:
    """Train in this process, and say what it held."""
    torch.manual_seed(seed)
    adapter = UViTAdapter(SMALL, "uvit-small-latents")
    model = adapter.build()
    data = torch.randn(2 * batch, 4, 32, 32, generator=generator(seed, "data"))
    pruner, more = SETTINGS[name]
    settings = Training(steps=STEPS, batch_size=batch, seed=seed, device="cpu", **more)
    before = held("VmRSS")
    if pruner is None:
        plain(adapter, model, data, settings)
    else:
        compressor.prune(model, pruner, adapter=adapter, data=data, **settings.model_dump(exclude_unset=True))
    size = sum(value.nbytes for value in model.parameters())
    print(json.dumps({"model_bytes": size, "before_bytes": before, "most_bytes": held("VmHWM")}))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--one", choices=list(SETTINGS), help="what a process of this script's own does")
    options.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    if given.one:
        one(given.one, given.batch[0], given.seed)
        return
    facts = {"environment": environment(torch.device("cpu")), "seed": given.seed, "steps": STEPS, "runs": []}
    if given.out is not None and given.out.exists():  # rows of other batches stay, where they are of the same versions
        before = json.loads(given.out.read_text())
        same = all(before[key] == facts[key] for key in ("environment", "seed", "steps"))
        facts["runs"] = [row for row in before["runs"] if same and row["batch"] not in given.batch]
        facts |= {"earlier": before["earlier"]} if same and "earlier" in before else {}
    for batch in given.batch:
        base = 0.0
        for name in ["plain", *(name for name in given.only if name != "plain")]:
            most = []
            for _ in range(given.repeats):
                arguments = ["--one", name, "--batch", str(batch), "--seed", str(given.seed)]
                done = subprocess.run(
                    [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
                )
                told = json.loads(done.stdout.splitlines()[-1])
                most.append(told["most_bytes"])
            median = statistics.median(most)
            base = base or median
            row = {"name": name, "batch": batch, **told, "most_bytes": median, "n": len(most)}
            row |= {"spread_bytes": max(most) - min(most), "to_plain": round(median / base, 3)}
            facts["runs"].append(row)
            print(f"batch {batch:3}  {name:24} {median / MIB:8.0f} MiB  {median / base:.3f}", flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
