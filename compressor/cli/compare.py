"""`compressor compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compressor.cli.command import Command
from compressor.cli.options import budget_options, input_options, model_options, numbers, options, training_options
from compressor.cli.report import show_comparison
from compressor.cli.terminal import Output, drive

_entry_options = options(
    click.option(
        "--methods", metavar="NAME,NAME,…", help="Methods (`compressor list pruners`). Default: all but depth and nni."
    ),
    click.option(
        "--config",
        "configs",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="A recipe to compare; may be repeated.",
    ),
    click.option("--preset", metavar="NAME", help="Entries by name: sparsedm-ablation, sparsedm-best."),
    click.option("--seeds", type=int, default=3, show_default=True, help="Seeds of training for each."),
)
"""What is compared."""

_condition_options = options(
    click.option(
        "--match",
        default="macs",
        show_default=True,
        metavar="macs|density|latency|none",
        help="What methods that can be told their cost share with the first mask.",
    ),
    click.option(
        "--lr-grid",
        metavar="RATE,RATE,…",
        help="Learning rates to choose from, for every method alike. Default: no search.",
    ),
    click.option("--sampler-steps", metavar="N,N,…", help="Judge at these numbers of sampler steps too."),
    click.option("--lower", is_flag=True, help="Also time the lowered models."),
    click.option(
        "--max-error",
        type=click.FloatRange(0, 1, min_open=True),
        help="With --lower: how far a lowered model may be from the weights judged; lets 8-bit kernels in.",
    ),
)
"""How it is compared."""


@click.command(cls=Command)
@options(
    _entry_options,
    input_options,
    model_options,
    _condition_options,
    click.option(
        "--workers", type=click.IntRange(0), default=0, help="Processes. Default: one for each GPU, else one."
    ),
    training_options,
    budget_options,
    click.option("--out", "-o", type=click.Path(path_type=Path), metavar="DIR", help="Default: runs/compare-MODEL."),
    click.option("--overwrite", is_flag=True, help="Start anew; a former comparison in DIR is removed."),
)
def compare(
    output: Output,
    methods: str | None,
    configs: tuple[Path, ...],
    settings: dict[str, Any],
    assignments: tuple[str, ...],
    lr_grid: str | None,
    sampler_steps: str | None,
    workers: int,
    out: Path | None,
    overwrite: bool,
    **flags: Any,
) -> None:
    """Compare methods: equal budgets, data, noise and evaluation, several seeds, one report.

    What is finished is kept: interrupted, the same command goes on; with more seeds or methods, it adds to what is there.
    """
    from compressor import comparison
    from compressor import recipe as recipes

    common = recipes.merged(settings, *map(recipes.assignment, assignments))
    if out is None:
        first = recipes.merged(recipes.read(configs[0]), common) if configs and not methods else common
        out = Path("runs") / f"compare-{first.get('model', recipes.Recipe().model)}"
    planned = comparison.planned(
        [name.strip() for name in methods.split(",")] if methods else [],
        configs,
        common=common,
        rates=numbers(lr_grid, float, "--lr-grid 5e-4,1e-3"),
        sampler_steps=numbers(sampler_steps, int, "--sampler-steps 10,50"),
        known={} if overwrite else comparison.matched_before(out),
        before={} if overwrite else comparison.evaluated_before(out),
        **flags,  # preset, seeds, match, lower, max_error
    )
    drive(comparison.conduct(planned, out, workers, overwrite), out, output.quiet, "the same command")
    show_comparison(out, output.as_json)
