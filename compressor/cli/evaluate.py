"""`compressor evaluate`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from compressor.cli.command import Command
from compressor.cli.options import budget_options, options, run_argument, setting
from compressor.cli.report import show_report
from compressor.cli.terminal import Output, drive, watch
from compressor.errors import UsageError, how_to_finish


@click.command(cls=Command)
@options(
    run_argument,
    setting("--samples", type=click.IntRange(0), help="Images per row; 0 draws none."),
    setting("--metric", metavar="NAME", help="`compressor list metrics` shows all."),
    setting("--sampler", metavar="NAME", help="ddim, ddpm, dpm-solver++, unipc, euler-maruyama."),
    setting("--spacing", metavar="NAME", help="Of ddim's timesteps: uniform, trailing, quadratic."),
    setting("--sampler-steps", type=click.IntRange(1, 999), help="Steps of the sampler."),
    setting("--guidance", type=click.FloatRange(0), help="Scale of classifier-free guidance; 1 is none."),
    setting("--inception-weights", metavar="FILE", help="Measure FID with these weights (docs/metrics.md)."),
    budget_options,
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting of `evaluate`."),
)
def evaluate(output: Output, directory: Path, settings: dict[str, Any], assignments: tuple[str, ...]) -> None:
    """Judge a finished run again, in another way: its report is made anew, its model stays.

    What is not given stays as it was. A run with `--lower`, or one that was benched, is timed again, too.
    """
    from compressor import recipe as recipes

    changed = recipes.merged({"evaluate": settings}, *map(recipes.assignment, assignments))
    again(directory, evaluation(changed), output)


def evaluation(changed: Mapping[str, Any]) -> dict[str, Any]:
    """The section `evaluate` of settings. Raises UsageError where they have another one: the model is what it is."""
    from compressor.recipe import SECTIONS

    train = changed.get("train")
    if isinstance(train, dict) and (both := sorted(SECTIONS["evaluate"].model_fields.keys() & train.keys())):
        raise UsageError(f"{both[0]} is a setting of `train` too", f"Write --set evaluate.{both[0]}=…")
    if other := [name for name in changed if name != "evaluate"]:
        raise UsageError(
            f"{other[0]} is no setting of `evaluate`: the run keeps the others",
            "Start a run of its own with `compressor run --config RUN/recipe.yaml --set …`.",
        )
    return dict(changed.get("evaluate", {}))


def settings_with(out: Path, changed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the run in `out`, and the same with those of `evaluate` that are `changed`."""
    from compressor import recipe as recipes

    before = recipes.read(out / "recipe.yaml")
    own = dict(before.get("evaluate", {}))
    if "budget" in changed:  # which chooses what was chosen before
        own = {name: own[name] for name in ("metric", "inception_weights", "scores") if name in own}
    return before, {**before, "evaluate": {**own, **changed}}


def again(out: Path, changed: Mapping[str, Any], output: Output) -> None:
    """Judge the finished run in `out` again with the settings of `evaluate` that are `changed`, and show its report."""
    from compressor.runs import facts
    from compressor.runs.captioned import refuse_unused
    from compressor.runs.directory import refuse_busy_directory, refuse_unbegun
    from compressor.runs.finish import unfinished
    from compressor.runs.inputs import prepared, resolve
    from compressor.runs.run import judge_again
    from compressor.runs.unread import refuse_unread

    refuse_unbegun(out)
    if (reason := unfinished(out)) is not None:
        raise UsageError(f"{out} is not finished: {reason}", how_to_finish(out))
    refuse_busy_directory(out)
    before, settings = settings_with(out, changed)
    where = str(out / "recipe.yaml")
    recipe = resolve(settings, where)
    refuse_unread([recipe], {"evaluate": changed})
    if recipe.pipeline is not None:
        refuse_unused(recipe, changed)
    inputs = watch(prepared(recipe, facts.begun(out)), output.quiet)
    given = [part for name, value in changed.items() for part in ("--set", f"evaluate.{name}={value}")]
    command = shlex.join(["compressor", "evaluate", str(out), *given])
    drive(judge_again(inputs, out, resolve(before, where)), out, output.quiet, again=command)
    show_report(out, output.as_json)
