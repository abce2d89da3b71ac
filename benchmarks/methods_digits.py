"""Methods on `uvit-digits` under equal budgets: same steps, learning rate, batch, data order, noise and evaluation.

    python benchmarks/methods_digits.py [--seeds 3]

Every cell (method, seed) is kept as soon as it is done, so that a second call does the rest only. Writes
benchmarks/results/methods_digits.json: the cells, and per method the mean over seeds with a 95% interval (Student's t).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
import torch
from compressor.model_zoo.digits import FDDigits, images
from compressor.model_zoo.uvit.sizes import digits
from compressor.plugins.dense import DenseContinued
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.sparsedm import SparseDM
from torch import nn

from compressor import FineTuning, Pruner, Training, evaluate, steps
from compressor.environment import environment
from compressor.frechet import gaussian
from compressor.inputs import resolve
from compressor.recipe import Evaluation
from compressor.weights import weights_sha256

METHODS: dict[str, Pruner] = {
    "sparsedm": SparseDM(),
    "sr-ste (no teacher)": SparseDM(teacher=0.0),
    "sparsedm teacher-only": SparseDM(teacher_only=True),
    "magnitude (frozen mask)": Magnitude(),
    "dense-continued": DenseContinued(),
}
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Judge:
    """Scores a model: fd-digits on fixed initial noise, and the prediction error against the dense model."""

    def __init__(self, dense: nn.Module, settings: Evaluation) -> None:
        self.settings, self.adapter, self.data, self.metric = settings, digits(), images(), FDDigits()
        features = evaluate.real_features(self.metric, self.data)
        self.reference, self.floor = gaussian(features), evaluate.floor(features, settings)
        self.dense = self._predictions(dense)

    def _predictions(self, model: nn.Module) -> torch.Tensor:
        return evaluate.predictions(self.adapter, model, self.data, self.settings, torch.device("cpu"))

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        drawn = torch.cat(list(evaluate.sample(self.adapter, model, self.settings)))
        return {
            "quality": evaluate.quality(self.metric, drawn, self.reference, self.settings),
            "prediction_error": evaluate.prediction_error(self._predictions(model), self.dense)["value"],
            "weights_sha256": weights_sha256(model),
        }


def train(model: nn.Module, pruner: Pruner, training: Training) -> tuple[nn.Module, float]:
    """The pruned and fine-tuned model, and the seconds that it took."""
    run = FineTuning(model, pruner, adapter=digits(), data=images(), training=training)
    began = time.perf_counter()
    for _ in steps(run):
        pass
    return run.finish().model, time.perf_counter() - began


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, and the 95% interval of the mean over seeds where there are at least two."""
    half = T95[len(values) - 1] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {
        "mean": mean(values),
        "ci95": None if half is None else [mean(values) - half, mean(values) + half],
        "n": len(values),
    }


@click.command()
@click.option("--seeds", type=click.IntRange(1, 10), default=3, show_default=True)
@click.option("--steps", "count", type=int, help="Default: the bundled model's own.")
@click.option("--lr", type=float, help="Default: the bundled model's own.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "methods_digits.json"
)
def main(seeds: int, count: int | None, lr: float | None, out: Path) -> None:
    train_settings = {k: v for k, v in (("steps", count), ("lr", lr)) if v is not None}
    recipe = resolve({"train": train_settings}, "benchmark")
    model = digits().load(None)
    identity = {
        "model": "uvit-digits",
        "pattern": "2:4",
        "weights_sha256": weights_sha256(model),
        "train": {k: v for k, v in recipe.train.model_dump(mode="json").items() if k != "seed"},
        "evaluate": recipe.evaluate.model_dump(mode="json"),
    }
    known = json.loads(out.read_text()) if out.exists() else {}
    cells: dict[str, Any] = known.get("cells", {}) if all(known.get(k) == v for k, v in identity.items()) else {}
    judge = Judge(model, recipe.evaluate)
    jobs: list[tuple[str, Pruner, int, int]] = [("dense", DenseContinued(), 0, 0), ("one-shot", SparseDM(), 0, 0)]
    jobs += [(name, pruner, seed, recipe.train.steps) for seed in range(seeds) for name, pruner in METHODS.items()]
    for name, pruner, seed, number in jobs:
        key = f"{name} / seed {seed}"
        if key not in cells:
            settings = recipe.train.model_copy(update={"seed": seed, "steps": number})
            trained, seconds = train(model, pruner, settings)
            cells[key] = {"method": name, "seed": seed, "seconds": round(seconds, 1), **judge(trained)}
        values: dict[str, list[float]] = {}
        for cell in cells.values():
            values.setdefault(cell["method"], []).append(cell["quality"]["value"])
        result = {
            **environment(),
            **identity,
            "metric": {"name": judge.metric.name, "extractor_sha256": judge.metric.sha256, "floor": judge.floor},
            "methods": {method: summary(found) for method, found in values.items()},
            "cells": cells,
        }
        out.write_text(json.dumps(result, indent=2) + "\n")
        click.echo(f"{key}: {cells[key]['quality']['value']:.2f}", err=True)
    for method, entry in result["methods"].items():
        interval = "" if entry["ci95"] is None else " [{:.2f}, {:.2f}]".format(*entry["ci95"])
        click.echo(f"{method:28} {entry['mean']:7.2f}{interval}  n={entry['n']}")


if __name__ == "__main__":
    main()
