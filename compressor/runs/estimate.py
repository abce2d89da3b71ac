"""What a run will cost and may bring, before any training: `compressor plan`."""

from __future__ import annotations

import time
from collections.abc import Generator
from statistics import median
from typing import Any

from compressor import cost
from compressor.adapter import to_device
from compressor.environment import resolve_device
from compressor.lower import lowering
from compressor.progress import Progress
from compressor.runs.inputs import Inputs, one_shot
from compressor.runs.latency import timed
from compressor.runs.rows import layer_rows
from compressor.training.engine import FineTuning

WARM_UP, PROBE = 2, 5


def planned_run(found: Inputs, lower: bool = True) -> Generator[Progress, None, dict[str, Any]]:
    """The facts, as JSON: costs `before` and `after`, `layers`, whether structure is `removed`, `lowering` (None where not asked
    for), `fine_tuning`.

    Costs and lowering are those of the method without fine-tuning, whose zeros lie where others will, but are as many. The time of
    fine-tuning is that of a few steps, times their number.
    """
    recipe = found.recipe
    yield Progress("one-shot", 0, 1)
    result = one_shot(found)
    patterns = {name: str(mask.pattern) for name, mask in result.masks.items()}
    facts: dict[str, Any] = {
        "model": recipe.model,
        "method": found.method,
        "pattern": ", ".join(sorted(set(patterns.values()))) or None,
        "before": cost.costs(found.model, found.adapter, {}),
        "after": cost.costs(result.model, found.adapter, patterns),
        "layers": [
            {key: layer[key] for key in ("name", "shape", "pattern", "reason")}
            for layer in layer_rows(result, patterns, result.model, {})
        ],
        "removed": result.surgery is not None,
        "lowering": None,
        "fine_tuning": None,
    }
    if lower:
        device = resolve_device(recipe.train.device)
        example = to_device(found.adapter.example_inputs(recipe.evaluate.latency_batch), device)
        lowered = yield from lowering(result.model.to(device), example, adapter=found.adapter)
        form = lowered.plan.form(lowered.plan.choice)
        facts["lowering"] = {
            "choice": lowered.plan.choice,
            "reason": lowered.plan.reason,
            "speedup_vs_dense": form.speedup if form is not None else 1.0,
            "batch": recipe.evaluate.latency_batch,
            "layers_that_skip_zeros": len(lowered.plan.skipping()),
            "hardware": lowered.plan.setting.hardware,
        }
        if result.surgery is not None:  # the plan holds the smaller model against itself
            models = {"dense": found.model, "smaller": result.model}
            if entries := (yield from timed(found, models, lowered=True))["smaller"]:
                facts["lowering"] |= {
                    "reason": "channels or blocks are removed: the model is smaller for every kernel",
                    "speedup_vs_dense": entries[-1]["speedup_vs_dense"],
                }
    if recipe.train.steps:
        run = FineTuning(
            found.model,
            found.pruner,
            adapter=found.adapter,
            data=found.batches,
            training=recipe.train,
            targets=recipe.targets,
            ignore=recipe.ignore,
        )
        seconds = []
        count = min(WARM_UP + PROBE, recipe.train.steps)
        for step in range(count):
            yield Progress("probe", step, count)
            began = time.perf_counter()
            run.advance()
            seconds.append(time.perf_counter() - began)
        each = median(seconds[WARM_UP:] or seconds)
        facts["fine_tuning"] = {
            "steps": recipe.train.steps,
            "seconds_per_step": each,
            "seconds": each * recipe.train.steps,
        }
    return facts
