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
from compressor.report.content import DENSE
from compressor.runs.inputs import Inputs
from compressor.runs.latency import timed
from compressor.runs.one_shot import OneShot, layer_rows
from compressor.runs.pace import drawn_rows, evaluation_seconds
from compressor.runs.speed import precision_of
from compressor.training.engine import FineTuning, Result

WARM_UP, PROBE = 2, 5


def planned_run(found: Inputs, lower: bool = True) -> Generator[Progress, None, dict[str, Any]]:
    """The facts, as JSON: costs `before` and `after`, `layers`, whether structure is `removed`, `lowering` (None where not asked
    for), `fine_tuning`, `evaluation`, and the `seconds` of both together.

    Costs and lowering are those of the method without fine-tuning, whose zeros lie where others will, but are as many. The time of
    fine-tuning is that of a few steps, times their number; that of evaluation follows from a few steps of the sampler, and leaves out
    the metric, and a whole pipeline's pictures.
    """
    recipe = found.recipe
    yield Progress("one-shot", 0, 1)
    run = found.fine_tuning()
    result = run.one_shot()
    bare = OneShot.of(result)
    fine_tuning = (yield from _probed(run)) if recipe.train.steps else None
    del run  # what training holds is not needed for what follows
    yield Progress("probe", 0, 1, "how long a sample and a forward pass take")
    evaluation = _evaluated(found)
    facts: dict[str, Any] = {
        "model": recipe.model,
        "method": found.method,
        "pattern": ", ".join(sorted(set(bare.patterns.values()))) or None,
        "before": cost.costs(found.model, found.adapter, {}).as_json(),
        "after": cost.costs(bare.model, found.adapter, bare.patterns).as_json(),
        "layers": [
            {key: value for key, value in layer.as_json().items() if key in ("name", "shape", "pattern", "reason")}
            for layer in layer_rows(bare.layers, bare.patterns, bare.model, {})
        ],
        "removed": result.surgery is not None,
        "lowering": None,
        "fine_tuning": fine_tuning,
        "evaluation": evaluation,
        "seconds": sum(part["seconds"] for part in (fine_tuning, evaluation) if part is not None),
    }
    if lower:
        facts["lowering"] = yield from _lowered(found, result)
    return facts


def _lowered(found: Inputs, result: Result) -> Generator[Progress, None, dict[str, Any]]:
    """What lowering gains on this machine."""
    recipe = found.recipe
    device = resolve_device(recipe.train.device)
    example = to_device(found.adapter.example_inputs(recipe.evaluate.latency_batch), device)
    lowered = yield from lowering(
        result.model.to(device),
        example,
        dtype=precision_of(result.model, device, recipe.train.dtype),
        adapter=found.adapter,
        **recipe.lowering.model_dump(),
    )
    form = lowered.plan.form(lowered.plan.choice)
    facts: dict[str, Any] = {
        "choice": lowered.plan.choice,
        "reason": lowered.plan.reason,
        "speedup_vs_dense": form.speedup if form is not None else 1.0,
        "error": form.error if form is not None else None,
        "batch": recipe.evaluate.latency_batch,
        "layers_that_skip_zeros": len(lowered.plan.skipping()),
        "hardware": lowered.plan.setting.hardware,
    }
    if result.surgery is not None:  # the plan holds the smaller model against itself
        models = {DENSE: found.model, "smaller": result.model}
        if entries := (yield from timed(found, models, lowered=True))["smaller"]:
            facts |= {
                "reason": "channels or blocks are removed: the model is smaller for every kernel",
                "speedup_vs_dense": entries[-1].speedup_vs_dense,
            }
    return facts


def _evaluated(found: Inputs) -> dict[str, Any]:
    """The time of evaluation, as far as it can be foretold."""
    settings, by_stage = found.recipe.evaluate, evaluation_seconds(found)
    timing = by_stage.pop("latency", 0.0)
    return {
        "rows": len(drawn_rows(found)) if by_stage else 0,
        "samples": settings.drawn if by_stage else 0,
        "sampler_steps": settings.sampler_steps,
        "sampling_seconds": sum(by_stage.values()),
        "latency_seconds": timing,
        "seconds": sum(by_stage.values()) + timing,
    }


def _probed(run: FineTuning) -> Generator[Progress, None, dict[str, Any]]:
    """The time of fine-tuning, from a few steps of `run`."""
    total, seconds = run.training.steps, []
    count = min(WARM_UP + PROBE, total)
    for step in range(count):
        yield Progress("probe", step, count)
        began = time.perf_counter()
        run.advance()
        seconds.append(time.perf_counter() - began)
    each = median(seconds[WARM_UP:] or seconds)
    return {"steps": total, "seconds_per_step": each, "seconds": each * total}
