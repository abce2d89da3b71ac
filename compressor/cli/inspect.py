"""`compressor inspect`."""

from __future__ import annotations

from typing import Any

import click

from compressor.cli.command import Command, suggested
from compressor.cli.options import model_options
from compressor.cli.terminal import Output, print_json, print_table, say, warn_of_idle_rules


@click.command(cls=Command)
@click.argument("model", metavar="MODEL", shell_complete=suggested)
@click.option(
    "--weights",
    metavar="FILE|DIR|OWNER/NAME",
    shell_complete=suggested,
    help="Check that these fit the model; `diffusers`, `ddpm`, `dit` and `uvit` are what they say.",
)
@model_options
def inspect(output: Output, model: str, weights: str | None, settings: dict[str, Any]) -> None:
    """Show every layer of MODEL: its shape, its share of the MACs, and whether the pattern fits, or why not."""
    from compressor.runs.inspection import inspect_model

    ignore = settings.get("ignore")
    facts = inspect_model(model, weights, settings.get("pattern") or "2:4", settings.get("targets"), ignore)
    warn_of_idle_rules(facts.pop("module"), ignore)
    if output.as_json:
        print_json(facts)
        return
    from compressor.cli.tables import plain_table
    from compressor.report.numbers import percent

    layers, pattern = facts["layers"], facts["pattern"]
    lines = []
    for layer in layers:
        share = "—" if layer["macs_share"] is None else percent(layer["macs_share"])
        lines.append((layer["name"], str(tuple(layer["shape"])), share, layer["reason"] or pattern))
    print_table(plain_table(("weight", "shape", "MACs", "pattern"), lines))
    say(
        f"{facts['model']}: {facts['params']:,} parameters, {facts['macs_dense']:,} MACs per sample; {pattern} on "
        f"{sum(layer['reason'] is None for layer in layers)} of {len(layers)} layers leaves "
        f"{percent(facts['macs_effective'] / facts['macs_dense'])} of the MACs effective"
    )
