"""`compressor run` and `compressor resume`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.command import Command
from compressor.cli.evaluate import again, evaluation, settings_with
from compressor.cli.options import (
    RUN,
    folder_option,
    lowering_settings,
    name_of,
    options,
    recipe_options,
    resolved_recipe,
    run_argument,
    setting,
    tracking_option,
)
from compressor.cli.report import show_report
from compressor.cli.terminal import Output, drive, say, say_notes, warn_of_idle_rules, watch
from compressor.errors import CompressorError, UsageError
from compressor.processes import refuse_ranks, team

if TYPE_CHECKING:
    from compressor.recipe import Recipe
    from compressor.runs.inputs import Inputs


@click.command(cls=Command, shared=True)
@options(
    recipe_options,
    tracking_option,
    folder_option("--out", "-o", help="Default: runs/MODEL-METHOD."),
    setting("--lower", is_flag=True, default=None, help="At the end, lower the model and report its measured speed."),
    lowering_settings,
    click.option("--overwrite", is_flag=True, help="Replace a former run in DIR; other files in it stay."),
    click.option("--resume", "resumes", is_flag=True, help="Continue the run in DIR."),
)
def run(
    output: Output,
    config: Path | None,
    settings: dict[str, Any],
    assignments: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    resumes: bool,
    log_with: tuple[str, ...],
) -> None:
    """Prune a model, fine-tune it, and report.

    Without options: the bundled U-ViT, 2:4, SparseDM, on bundled images, in a few minutes on a CPU.
    """
    recipe = resolved_recipe(config, settings, assignments)
    given = bool(config or assignments or settings)
    if resumes and _resumed(output, recipe if given else None, out, overwrite, log_with):
        return
    begin(output, recipe, out, overwrite, log_with=log_with)


def _resumed(output: Output, recipe: Recipe | None, out: Path | None, overwrite: bool, log_with: Sequence[str]) -> bool:
    """Continue the run in `out`; False where a `recipe` is given and none has begun there: then it is to be started.

    So the same command can be given again, by a queue that starts jobs anew.
    """
    from compressor.runs.directory import RECIPE, refuse_other_settings

    if out is None:
        raise UsageError("--resume needs the run's directory", "Give it with --out DIR.")
    if overwrite:
        raise UsageError("--resume and --overwrite contradict each other", "Give one of them.")
    begun = (out / RECIPE).is_file()
    if recipe is not None and begun:
        refuse_other_settings(out, recipe)
    if begun or recipe is None:
        _continue(out, output, log_with=log_with)
    return begun or recipe is None


def begin(
    output: Output,
    recipe: Recipe,
    out: Path | None,
    overwrite: bool,
    name: str | None = None,
    log_with: Sequence[str] = (),
) -> None:
    """Start the run of `recipe`. Where no `out` is given, its directory is called by its model and `name` (its method)."""
    from compressor.data.sets import ImageSet
    from compressor.runs.directory import is_own, refuse_busy_directory, refuse_own_sources, refuse_used_directory
    from compressor.runs.inputs import prepared
    from compressor.runs.run import execute
    from compressor.runs.space import refuse_full_disk
    from compressor.runs.trackers import checked as checked_trackers
    from compressor.training.optimizers import check_optimizer
    from compressor.training.ranks import check_ranks

    if not recipe.lower and (idle := recipe.lowering.model_dump(exclude_defaults=True)):
        raise UsageError(f"lowering.{next(iter(idle))} is of lowered models", "Give --lower too.")
    check_optimizer(recipe.train)
    names = checked_trackers(log_with)
    name = name or (recipe.pruner.rpartition(":")[2] if recipe.pruner else recipe.method)
    here = team()
    check_ranks(recipe.train)
    if here.leads:
        if out is None:
            out = free_directory(Path("runs") / f"{name_of(recipe.model, recipe.pipeline)}-{name}")
        refuse_busy_directory(out)
        refuse_used_directory(out, overwrite)
        refuse_own_sources(recipe, out, is_own if overwrite else None)
        refuse_full_disk(recipe, out)
    out = Path(here.shared(str(out)))
    inputs = watch(prepared(recipe), output.quiet)
    _name_extractor(inputs)
    warn_of_idle_rules(inputs.model, recipe.ignore)
    if unfit := inputs.unfit():
        say(f"warning: {unfit}", err=True)
    if inputs.metric is None and inputs.recipe.evaluate.samples and isinstance(inputs.pictures, ImageSet):
        say(
            "no quality is measured: --set evaluate.metric=fd-scattering needs no network; `compressor list metrics`",
            err=True,
        )
    if inputs.piped is not None and inputs.piped.records.short is not None:
        say(f"warning: {inputs.piped.records.short}", err=True)
    if inputs.data.skipped:
        say(f"warning: {inputs.data.skipped} damaged pictures are left out", err=True)
    if inputs.pictures.greyed:
        say(
            f"warning: {inputs.pictures.name} is in colour, {inputs.adapter.name} is not: it is pruned and judged in grey",
            err=True,
        )
    drive(execute(inputs, out, overwrite=overwrite, log_with=names), out, output.quiet)
    if here.leads:
        _show(out, output)


@click.command(cls=Command, shared=True)
@run_argument
@click.option(
    "--set", "assignments", multiple=True, metavar="evaluate.KEY=VALUE", help="Evaluate otherwise than the run says."
)
@tracking_option
def resume(output: Output, directory: Path, assignments: tuple[str, ...], log_with: tuple[str, ...]) -> None:
    """Continue an interrupted run, to the same result as if it had not been interrupted."""
    from compressor import recipe as recipes

    _continue(directory, output, evaluation(recipes.merged(*map(recipes.assignment, assignments))), log_with)


def _continue(
    out: Path, output: Output, evaluate: Mapping[str, Any] = MappingProxyType({}), log_with: Sequence[str] = ()
) -> None:
    from compressor.runs.directory import refuse_unbegun
    from compressor.runs.facts import begun as begun_facts
    from compressor.runs.finish import settle, unfinished
    from compressor.runs.inputs import prepared, resolve
    from compressor.runs.run import execute
    from compressor.runs.trackers import checked as checked_trackers
    from compressor.runs.unread import refuse_unread
    from compressor.training.ranks import check_ranks

    names = checked_trackers(log_with)
    if not out.is_dir():
        raise UsageError(f"{out}: no such directory", RUN)
    here = team()
    was_reported = (out / "report.html").is_file()
    reason = here.shared(unfinished(out) if here.leads else "")
    if reason is None and evaluate:
        refuse_ranks("judging a run again")
        again(out, evaluate, output)
        return
    if reason is None:
        if here.leads:
            settle(out)
        if not output.quiet:
            say(f"{out} is finished", err=True)
    else:
        refuse_unbegun(out)
        if was_reported:
            say(f"{out} has a report, but is not finished: {reason}", err=True)
        recipe = resolve(settings_with(out, evaluate)[1], str(out / "recipe.yaml"))
        refuse_unread([recipe], {"evaluate": evaluate})
        check_ranks(recipe.train)
        inputs = watch(prepared(recipe, begun_facts(out)), output.quiet)
        _name_extractor(inputs)
        drive(execute(inputs, out, resume=True, log_with=names), out, output.quiet)
    if here.leads:
        _show(out, output)


def _show(out: Path, output: Output) -> None:
    """The report, and where the pipeline is, where models of the family have one, or why there is none."""
    from compressor.lower.plan import FILE as PLAN
    from compressor.lower.plan import Plan
    from compressor.runs.directory import NO_PIPELINE

    show_report(out, output.as_json)
    if (out / PLAN).is_file() and not output.quiet:
        try:
            say_notes(Plan.read(out).notes)
        except CompressorError as error:  # the run is done all the same
            say_notes([error.message])
    if output.as_json:
        return
    if (out / "pipeline").is_dir():
        say(f"pipeline: {out / 'pipeline'}")
    elif (out / NO_PIPELINE).is_file():
        say((out / NO_PIPELINE).read_text(encoding="utf-8").strip().replace("\n", " "))


def _name_extractor(inputs: Inputs) -> None:
    """Say which weights of the user's a metric is measured with."""
    evaluation, metric = inputs.recipe.evaluate, inputs.metric
    if metric is not None and evaluation.inception_weights is not None and evaluation.samples:
        say(f"{metric.name}: {evaluation.inception_weights}, sha256 {metric.sha256}", err=True)


def free_directory(base: Path) -> Path:
    """`base`, or the first of base-2, base-3, … that is not there yet."""
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 100_000))
    return next(path for path in candidates if not path.exists())
