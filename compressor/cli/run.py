"""`compressor run` and `compressor resume`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.command import Command
from compressor.cli.options import options, recipe_options, resolved_recipe, run_argument, setting
from compressor.cli.report import show_report
from compressor.cli.terminal import Output, drive, say, warn_of_idle_rules, watch
from compressor.errors import UsageError
from compressor.processes import team

if TYPE_CHECKING:
    from compressor.recipe import Recipe
    from compressor.runs.inputs import Inputs


@click.command(cls=Command, shared=True)
@options(
    recipe_options,
    click.option("--out", "-o", type=click.Path(path_type=Path), metavar="DIR", help="Default: runs/MODEL-METHOD."),
    setting("--lower", is_flag=True, default=None, help="At the end, lower the model and report its measured speed."),
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
) -> None:
    """Prune a model, fine-tune it, and report.

    Without options: the bundled U-ViT, 2:4, SparseDM, on bundled images, in a few minutes on a CPU.
    """
    if resumes:
        if out is None:
            raise UsageError("--resume needs the run's directory", "Give it with --out DIR.")
        if config or assignments or overwrite or settings:
            raise UsageError("--resume takes the settings of the run", "Give it with --out alone.")
        _continue(out, output)
        return
    from compressor.runs.directory import refuse_busy_directory, refuse_used_directory
    from compressor.runs.inputs import prepared
    from compressor.runs.run import execute
    from compressor.runs.space import refuse_full_disk
    from compressor.training.ranks import check_ranks

    recipe = resolved_recipe(config, settings, assignments)
    method = recipe.pruner.rpartition(":")[2] if recipe.pruner else recipe.method
    here = team()
    check_ranks(recipe.train)
    if here.leads:
        out = out if out is not None else free_directory(Path("runs") / f"{_source(recipe)}-{method}")
        refuse_busy_directory(out)
        refuse_used_directory(out, overwrite)
        refuse_full_disk(recipe, out)
    out = Path(here.shared(str(out)))
    inputs = watch(prepared(recipe), output.quiet)
    _name_extractor(inputs)
    warn_of_idle_rules(inputs.model, recipe.ignore)
    if inputs.data.skipped:
        say(f"warning: {inputs.data.skipped} damaged pictures are left out", err=True)
    drive(execute(inputs, out, overwrite=overwrite), out, output.quiet)
    if here.leads:
        show_report(out, output.as_json)


@click.command(cls=Command, shared=True)
@run_argument
def resume(output: Output, directory: Path) -> None:
    """Continue an interrupted run, to the same result as if it had not been interrupted."""
    _continue(directory, output)


def _continue(out: Path, output: Output) -> None:
    from compressor import recipe as recipes
    from compressor.runs.directory import refuse_unbegun
    from compressor.runs.finish import settle, unfinished
    from compressor.runs.inputs import prepared, resolve
    from compressor.runs.run import execute
    from compressor.training.ranks import check_ranks

    if not out.is_dir():
        raise UsageError(f"{out}: no such directory", "Give the directory of a run.")
    here = team()
    was_reported = (out / "report.html").is_file()
    if (reason := here.shared(unfinished(out) if here.leads else "")) is None:
        if here.leads:
            settle(out)
        if not output.quiet:
            say(f"{out} is finished", err=True)
    else:
        refuse_unbegun(out)
        if was_reported:
            say(f"{out} has a report, but is not finished: {reason}", err=True)
        recipe = resolve(recipes.read(out / "recipe.yaml"), str(out / "recipe.yaml"))
        check_ranks(recipe.train)
        inputs = watch(prepared(recipe), output.quiet)
        _name_extractor(inputs)
        drive(execute(inputs, out, resume=True), out, output.quiet)
    if here.leads:
        show_report(out, output.as_json)


def _name_extractor(inputs: Inputs) -> None:
    """Say which weights of the user's a metric is measured with."""
    evaluation, metric = inputs.recipe.evaluate, inputs.metric
    if metric is not None and evaluation.inception_weights is not None and evaluation.samples:
        say(f"{metric.name}: {evaluation.inception_weights}, sha256 {metric.sha256}", err=True)


def _source(recipe: Recipe) -> str:
    """What a run is of, in its directory's name."""
    return Path(recipe.pipeline).name if recipe.pipeline is not None else recipe.model


def free_directory(base: Path) -> Path:
    """`base`, or the first of base-2, base-3, … that is not there yet."""
    candidates = (base if n == 1 else base.with_name(f"{base.name}-{n}") for n in range(1, 100_000))
    return next(path for path in candidates if not path.exists())
