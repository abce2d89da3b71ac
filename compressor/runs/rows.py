"""The rows of a report: every variant of the model evaluated and measured, each on its very weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor import cost, files, saving
from compressor.files import file_name
from compressor.progress import Progress
from compressor.report.limitations import limitations
from compressor.runs.inputs import Inputs, one_shot
from compressor.runs.judge import Judge
from compressor.training.engine import LEFT_DENSE, Result
from compressor.training.pruner import Pruner


def build_report(inputs: Inputs, out: Path) -> Iterator[Progress]:
    """Evaluate and measure every row's very weights, and write the report."""
    recipe, adapter, settings = inputs.recipe, inputs.adapter, inputs.recipe.evaluate
    run = files.read_json(out / "run.json")
    yield Progress("one-shot", 0, 1)
    bare = one_shot(inputs)
    final = saving.load(out / "model", copy.deepcopy(inputs.model))
    models = {"dense": inputs.model, "one-shot": bare.model, inputs.method: final}
    judge = Judge(inputs)
    models = {name: model.to(judge.device).eval() for name, model in models.items()}
    trained = {"steps": run["train"]["steps"], "seconds": round(run["train"]["seconds"], 3)}
    patterns = saving.read_config(out / "model").patterns
    one_shot_patterns = {name: str(mask.pattern) for name, mask in bare.masks.items()}
    rows = []
    for name, model in models.items():
        pruned = {"dense": {}, "one-shot": one_shot_patterns}.get(name, patterns)
        train = trained if name == inputs.method else {"steps": 0, "seconds": 0.0}
        rows.append(judge.costs(name, model, pruned, train))
    yield from judge.look()
    for row, model in zip(rows, models.values(), strict=True):
        yield from judge.judge(row, model, out / "samples" / f"{file_name(row['name'])}.png")
    if settings.latency_rounds:
        yield Progress("latency", 0, 1)
        timed = cost.latencies(list(models.values()), adapter, settings.latency_batch, settings.latency_rounds)
        for row, entry in zip(rows, timed, strict=True):
            row["latency"] = [entry]
    report = {
        "schema_version": 1,
        "method": inputs.method,
        "model": recipe.model,
        "pattern": ", ".join(sorted(set(patterns.values()))) or None,
        "seed": recipe.train.seed,
        "settings": method_settings(inputs.pruner),
        "weights_sha256": run["weights_sha256"],
        "data": {
            "name": inputs.data.name,
            "sha256": run["data_sha256"],
            "samples": len(inputs.data),
            "skipped": inputs.data.skipped,
        },
        "sampler": adapter.sampler,
        "metric": None
        if inputs.metric is None or judge.floor is None
        else {"name": inputs.metric.name, "extractor_sha256": inputs.metric.sha256, "floor": judge.floor},
        "rows": rows,
        "layers": layer_rows(bare, patterns, final, run["train"]["flipped"]),
        "environment": {key: run[key] for key in ("versions", "hardware", "platform")},
        "recipe": recipe.model_dump(mode="json"),
        "repeat": "compressor run --config recipe.yaml --out DIR",
        "lowering": None,
        "limitations": limitations(rows, settings.samples, len(inputs.data), None),
    }
    files.write_json(out / "report.json", report)


def layer_rows(
    result: Result, patterns: Mapping[str, str], final: nn.Module, flipped: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The report's lines on each layer of `result`: shape, pattern, density of the `final` weights, flips, and why it is dense."""
    weights = dict(final.named_parameters())
    return [
        {
            "name": layer.name,
            "shape": list(layer.weight.shape),
            "pattern": patterns.get(layer.name),
            "density": int(torch.count_nonzero(weights.get(layer.name, layer.weight))) / max(1, layer.weight.numel()),
            "flips_per_weight": flipped.get(layer.name),
            "reason": layer.reason or (None if layer.name in patterns else LEFT_DENSE),
        }
        for layer in result.layers
    ]


def method_settings(pruner: Pruner) -> dict[str, Any]:
    """The settings of a dataclass pruner as JSON: its fields, but for those of `repr=False`, which hold what it found.

    Patterns and estimators are given as text. Empty for other classes.
    """
    fields = getattr(type(pruner), "__dataclass_fields__", {})
    values = {name: getattr(pruner, name) for name, field in fields.items() if field.repr}
    return {name: v if isinstance(v, (bool, int, float, str, type(None))) else str(v) for name, v in values.items()}
