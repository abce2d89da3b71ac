"""`compressor plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compressor.cli.command import Command
from compressor.cli.options import lowering_settings, options, recipe_options, resolved_recipe
from compressor.cli.terminal import Output, print_json, print_table, say, warn_of_idle_rules, watch
from compressor.errors import UsageError


@click.command(cls=Command)
@options(
    recipe_options,
    click.option("--lower/--no-lower", default=True, show_default=True, help="Time the lowered model on this machine."),
    lowering_settings,
)
def plan(
    output: Output, config: Path | None, settings: dict[str, Any], assignments: tuple[str, ...], lower: bool
) -> None:
    """What a run will cost and may bring, before any training.

    Takes the options of `run`, but those of its directory: which layers qualify, what is left of parameters, bytes and
    multiply-accumulates, how fast the lowered model is on this machine, and how long fine-tuning will take, by a few steps of it.

    The time of evaluation, and of the whole, is told too.
    """
    if not lower and (idle := [name for name in ("tolerance", "max_error", "fuse_projections") if name in settings]):
        raise UsageError(f"lowering.{idle[0]} with --no-lower", "Leave one of them out.")
    from compressor.runs.estimate import planned_run
    from compressor.runs.inputs import prepared

    inputs = watch(prepared(resolved_recipe(config, settings, assignments)), output.quiet)
    warn_of_idle_rules(inputs.model, inputs.recipe.ignore)
    facts = watch(planned_run(inputs, lower), output.quiet)
    if output.as_json:
        print_json(facts)
        return
    from compressor.cli.tables import plain_table, planning_lines

    dense = [layer for layer in facts["layers"] if layer["reason"]]
    if dense and not output.quiet:
        lines = [(layer["name"], str(tuple(layer["shape"])), layer["reason"]) for layer in dense]
        print_table(plain_table(("left dense", "shape", "why"), lines))
    removed = "; channels or blocks are removed" if facts["removed"] else ""
    click.echo(f"{len(facts['layers']) - len(dense)} of {len(facts['layers'])} layers get a mask{removed}")
    for line in planning_lines(facts):
        say(line)
