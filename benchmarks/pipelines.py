"""What recorded calls are worth: the error on calls that were not learned from, for tiny random pipelines of six classes.

    python benchmarks/pipelines.py --out benchmarks/results/pipelines.json

Three rows each, at 2:4 and over several seeds: magnitude and OBS in one shot, and OBS fine-tuned towards the dense model's recorded
answers. A seed chooses weights, prompts and noise. The error is the mean square difference from the dense model's answer to calls
of held-out prompts, relative to its mean square. The pipelines are those of the tests: real classes, text encoders and autoencoders,
random weights. So this says that the way works for every class, and nothing about pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch

import compressor
from compressor.environment import environment
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.obs import OBS

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny_pipelines

PICTURES, UNSEEN, SAMPLER_STEPS = 12, 4, 6


@torch.no_grad()
def error(model: torch.nn.Module, records: compressor.Recording) -> float:
    """The relative error of `model` on the calls that were held out."""
    calls = records.unseen.take(torch.arange(len(records.unseen)))
    off = sum(float((model(*call.args, **call.kwargs)[0] - call.output).square().sum()) for call in calls)
    return off / sum(float(call.output.square().sum()) for call in calls)


def measured(name: str, seed: int, steps: int, lr: float) -> dict[str, float]:
    """The errors of one pipeline and seed, by method."""
    with tempfile.TemporaryDirectory() as folder:
        pipe = tiny_pipelines.made(name, Path(folder) / "files", seed)
        own = tiny_pipelines.arguments(name)
        records = compressor.record(
            pipe,
            tiny_pipelines.PROMPTS,
            Path(folder) / "records",
            n=PICTURES,
            unseen=UNSEEN,
            steps=SAMPLER_STEPS,
            seed=seed,
            **own,
        )
        runs = {
            "magnitude": (Magnitude(), {"steps": 0}),
            "obs": (OBS(timesteps=24), {"steps": 0}),
            "obs, fine-tuned": (OBS(timesteps=24), {"steps": steps, "lr": lr}),
        }
        return {
            label: error(compressor.prune(pipe, pruner, data=records, seed=seed, **training).model, records)
            for label, (pruner, training) in runs.items()
        }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--lr", type=float, default=3e-4)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    rows = []
    for name in tiny_pipelines.MAKERS:
        seeds = [measured(name, seed, given.steps, given.lr) for seed in range(given.seeds)]
        row = {
            "pipeline": name,
            "n": given.seeds,
            "errors": {label: [own[label] for own in seeds] for label in seeds[0]},
        }
        rows.append(row)
        print(name, {label: f"{mean(values):.3g}" for label, values in row["errors"].items()}, flush=True)
    facts = {
        "environment": environment(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "pictures": PICTURES,
        "unseen": UNSEEN,
        "sampler_steps": SAMPLER_STEPS,
        "steps": given.steps,
        "lr": given.lr,
        "rows": rows,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
