"""`compressor train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compressor.cli.command import Command
from compressor.cli.options import (
    budget_options,
    folder_option,
    options,
    resolved_recipe,
    run_options,
    set_option,
    setting,
    tracking_option,
)
from compressor.cli.run import begin
from compressor.cli.terminal import Output
from compressor.errors import UsageError


@click.command(cls=Command, shared=True)
@options(
    click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="A recipe (YAML)."),
    setting(
        "--model",
        metavar="NAME",
        help="uvit, ddpm or dit, which take the size of the data; any other of `compressor list models`.",
    ),
    setting(
        "--data", metavar="PATH|NAME", help="A folder of pictures, CIFAR, .npz, … (docs/data.md), or a bundled set."
    ),
    setting("--vae", metavar="DIR", help="An AutoencoderKL of diffusers, for models of latents: it encodes pictures."),
    setting("--steps", type=int, help="Steps of training."),
    run_options,
    set_option,
    budget_options,
    tracking_option,
    folder_option("--out", "-o", help="Default: runs/MODEL-trained."),
    click.option("--overwrite", is_flag=True, help="Replace a former run in DIR; other files in it stay."),
)
def train(
    output: Output,
    config: Path | None,
    settings: dict[str, Any],
    assignments: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    log_with: tuple[str, ...],
) -> None:
    """Train a dense model from random weights, to be pruned then.

    Its size: --set architecture.embed_dim=256 and the like; docs/training.md. Prune it with `compressor run --weights DIR`.
    """
    from compressor import recipe as recipes

    dense = {"from_scratch": True, "method": "dense-continued", "pruner": None}
    if other := sorted(dense.keys() & recipes.merged(*map(recipes.assignment, assignments)).keys()):
        raise UsageError(
            f"--set {other[0]}: a dense model is trained from random weights, and not pruned",
            "Leave it out. `compressor run` prunes, and starts from weights that are there.",
        )
    begin(output, resolved_recipe(config, {**settings, **dense}, assignments), out, overwrite, "trained", log_with)
