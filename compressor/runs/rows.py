"""The rows of a report: every variant of the model evaluated and measured, each on its very weights."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from compressor import cost, files, saving
from compressor import recipe as recipes
from compressor.environment import give_back
from compressor.processes import team
from compressor.progress import Progress
from compressor.report.content import DENSE, ONE_SHOT, DataFacts, Environment, Layer, Report, Row, TrainSummary
from compressor.report.limitations import limitations
from compressor.report.words import file_name
from compressor.runs import facts, finish
from compressor.runs.directory import RECIPE
from compressor.runs.inputs import Inputs
from compressor.runs.judge import Judge, Seen, Variant
from compressor.runs.one_shot import FOLDER, layer_rows, one_shot
from compressor.runs.paired import PairedJudge
from compressor.runs.saved import Finished
from compressor.training.pruner import Pruner, settings_of
from compressor.weights import weights_sha256


def build_report(
    inputs: Inputs, out: Path, final: nn.Module | None = None
) -> Generator[Progress, None, Finished | None]:
    """Evaluate and measure every row's very weights, and write the report, with the recipe that it is of. Until its pages are written
    too, the run is not finished.

    `final` is the finished model, which is in `out` already; it is loaded from there where it is not given. Of the processes of a
    launch, all call it, and all but the first, which writes, get None.
    """
    run = team().shared(facts.read(out) if team().leads else {})
    here = facts.facts_of(inputs)  # the numbers are measured here and now, wherever the run began
    yield Progress("one-shot", 0, 1)
    config = saving.read_config(out / "model")
    if final is None:
        final = saving.load(out / "model", copy.deepcopy(inputs.model))
    bare = one_shot(inputs, out / FOLDER)
    untrained = weights_sha256(bare.model)
    if untrained == config.weights_sha256:
        bare = replace(bare, model=final)  # one model in memory less
    give_back()
    judge = Judge(inputs) if inputs.piped is None else PairedJudge(inputs, inputs.piped)
    for model in (inputs.model, bare.model, final):
        model.to(judge.device).eval()
    trained = trained_as(run)
    variants: tuple[Variant, ...] = (Variant(inputs.method, final, config.weights_sha256, config.patterns, trained),)
    if not inputs.recipe.from_scratch:  # what is random is held against nothing
        variants = (
            Variant(DENSE, inputs.model, inputs.weights_sha256),
            Variant(ONE_SHOT, bare.model, untrained, bare.patterns),
            *variants,
        )
    rows = yield from _judged(judge, variants, out / "samples")
    if not team().leads:
        return None
    layers = layer_rows(bare.layers, config.patterns, final, run["train"]["flipped"])
    report = _report(inputs, here, judge, rows, layers, ", ".join(sorted(set(config.patterns.values()))) or None)
    finish.reopen(out)  # pages of before would stand beside other numbers
    files.write_text(out / RECIPE, recipes.dump(inputs.recipe))
    files.write_json(out / "report.json", report.as_json())
    return Finished(
        out, inputs.adapter, inputs.model, final, judge.device, report, inputs.recipe.evaluate.latency_batch
    )


def trained_as(run: Mapping[str, Any]) -> TrainSummary:
    """How the facts of a `run` say that its model was fine-tuned. Those of earlier versions do not say what was skipped."""
    said = run["train"]
    return TrainSummary(steps=said["steps"], seconds=round(said["seconds"], 3), skipped=said.get("skipped", 0))


def _judged(judge: Judge, variants: tuple[Variant, ...], samples: Path) -> Generator[Progress, None, tuple[Row, ...]]:
    """The rows of `variants`, the first of which is the dense one; the others are held against it."""
    settings = judge.inputs.recipe.evaluate
    leads = team().leads
    if leads:
        yield from judge.look()
    rows: list[Row] = []
    dense = None
    last: tuple[Variant, Seen] | None = None
    for variant in variants:
        same = last is not None and last[0].weights_sha256 == variant.weights_sha256
        if team().shared(same) and last is not None:  # without training: not drawn twice
            seen = judge.renamed(last[1], last[0].name, variant.name)
        else:
            seen = yield from judge.seen(variant)
        last = variant, seen
        if not leads:
            continue
        rows.append((yield from judge.row(variant, seen, dense, samples / f"{file_name(variant.name)}.png")))
        dense = dense or seen
    if settings.latency_rounds and leads:
        yield Progress("latency", 0, 1)
        first: dict[str, Variant] = {}  # nor timed twice
        for variant in variants:
            first.setdefault(variant.weights_sha256, variant)
        models = {variant.name: variant.model for variant in first.values()}
        times = cost.latencies(models, judge.inputs.adapter, settings.latency_batch, settings.latency_rounds)
        whole = yield from judge.whole(variants)
        own = {
            v.name: (times[first[v.weights_sha256].name], *([whole[v.name]] if v.name in whole else []))
            for v in variants
        }
        rows = [row.model_copy(update={"latency": own[row.name]}) for row in rows]
    return tuple(rows)


def _report(
    inputs: Inputs,
    run: dict[str, Any],
    judge: Judge,
    rows: tuple[Row, ...],
    layers: tuple[Layer, ...],
    patterns: str | None,
) -> Report:
    recipe = inputs.recipe
    report = Report(
        schema_version=1,
        method=inputs.method,
        model=inputs.model_name,
        pattern=patterns,
        seed=recipe.train.seed,
        settings=method_settings(inputs.pruner),
        weights_sha256=run["weights_sha256"],
        data=DataFacts(
            name=inputs.data.name,
            sha256=run["data_sha256"],
            samples=len(inputs.data),
            kind="images" if inputs.piped is None else "calls",
            skipped=inputs.data.skipped,
        ),
        sampler=inputs.adapter.sampler,
        metric=judge.metric,
        rows=rows,
        layers=layers,
        environment=Environment(versions=run["versions"], hardware=run["hardware"], platform=run["platform"]),
        recipe=recipe.model_dump(mode="json"),
        repeat="compressor run --config recipe.yaml --out DIR",
        lowering=None,
        limitations=(),
    )
    return report.model_copy(update={"limitations": limitations(report)})


def method_settings(pruner: Pruner) -> dict[str, Any]:
    """The settings of a dataclass pruner as JSON; patterns and estimators are given as text. Empty for other classes."""
    plain = (bool, int, float, str, type(None))
    return {name: v if isinstance(v, plain) else str(v) for name, v in settings_of(pruner).items()}
