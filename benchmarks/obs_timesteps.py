"""How the weights of the denoising times should fall in `obs`: early or late, far or little. One-shot, 2:4, both bundled models.

    OMP_NUM_THREADS=1 python benchmarks/obs_timesteps.py [--seeds 5]

The seed chooses the order of the calibration's images, and the noise that samples and predictions start from; curves are compared
at equal seeds. Writes benchmarks/results/obs_timesteps.json.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import compressor
from compressor import registry
from compressor.adapter import Adapter
from compressor.comparison.statistics import summary
from compressor.data.sets import ImageSet
from compressor.environment import environment
from compressor.plugins.obs import OBS
from compressor.quality import drift, evaluate
from compressor.quality.features import compared_with
from compressor.quality.fidelity import Reference
from compressor.quality.settings import Evaluation

CURVES: dict[str, dict[str, Any]] = {
    "early, to 0.1": {"falls": "early", "last_weight": 0.1},
    "late, to 2/3 (OBS-Diff)": {"falls": "late", "last_weight": 2 / 3},
    "late, to 0.1": {"falls": "late", "last_weight": 0.1},
    "even": {"last_weight": 1.0},
}
DEFAULT = "early, to 0.1"
MODELS = ("uvit-digits", "ddpm-digits")


def judged(
    model: nn.Module, dense: nn.Module, adapter: Adapter, data: ImageSet, reference: Reference, settings: Evaluation
) -> dict[str, float]:
    """The prediction error of `model` against `dense`, and the Fréchet distance of its samples."""
    cpu = torch.device("cpu")
    pair = [drift.predictions(adapter, one, data, settings, cpu) for one in (model, dense)]
    images = torch.cat(list(evaluate.sample(adapter, model, settings)))
    quality = evaluate.quality(registry.metric("fd-digits"), images, reference.gaussian, settings)
    return {"prediction_error": drift.prediction_error(*pair)["value"], "fd-digits": quality["value"]}


@click.command()
@click.option("--seeds", default=5, show_default=True)
@click.option("--samples", default=1024, show_default=True)
@click.option("--sampler-steps", default=10, show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "obs_timesteps.json"
)
def main(seeds: int, samples: int, sampler_steps: int, out: Path) -> None:
    began = time.perf_counter()
    data = registry.images("digits")
    assert isinstance(data, ImageSet)
    result: dict[str, Any] = {
        **environment(),
        "pattern": "2:4",
        "calibration": {"timesteps": OBS().timesteps, "batch_size": 128},
        "samples": samples,
        "sampler_steps": sampler_steps,
        "seeds": list(range(seeds)),
        "curves": CURVES,
        "models": {},
    }
    for name in MODELS:
        adapter = registry.adapter(name)
        dense = adapter.load(None).eval()
        found: dict[str, dict[str, list[float]]] = {curve: {} for curve in CURVES}
        for seed in range(seeds):
            settings = Evaluation(samples=samples, sampler_steps=sampler_steps, measures=[], bootstrap=0, seed=seed)
            _, reference = compared_with(registry.metric("fd-digits"), data, settings)
            for curve, given in CURVES.items():
                pruned = compressor.prune(
                    dense, OBS(**given), adapter=adapter, data=data, steps=0, batch_size=128, seed=seed
                )
                for metric, value in judged(pruned.model, dense, adapter, data, reference, settings).items():
                    found[curve].setdefault(metric, []).append(value)
                click.echo(f"{name} seed {seed} {curve}: { ({m: round(v[-1], 5) for m, v in found[curve].items()}) }")
        against = {
            curve: {
                metric: summary([a - b for a, b in zip(values, found[DEFAULT][metric], strict=True)])
                for metric, values in by_metric.items()
            }
            for curve, by_metric in found.items()
            if curve != DEFAULT
        }
        result["models"][name] = {"by_seed": found, f"minus {DEFAULT}": against}
    result["seconds"] = round(time.perf_counter() - began)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
