"""`compressor compare`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.command import Command
from compressor.cli.options import (
    budget_options,
    folder_option,
    input_options,
    model_options,
    name_of,
    numbers,
    options,
    refuse_two_models,
    training_options,
)
from compressor.cli.report import show_comparison
from compressor.cli.terminal import Output, drive, watch
from compressor.errors import UsageError

if TYPE_CHECKING:
    from compressor.comparison import Comparison

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


_places = options(
    click.option(
        "--workers", type=click.IntRange(0), default=0, help="Processes. Default: one for each GPU, else one."
    ),
    click.option("--devices", metavar="cuda:N,…", help="GPUs to use, one process on each. Default: all."),
    click.option(
        "--shared", is_flag=True, help="Share DIR with the same command elsewhere: each takes cells that none has."
    ),
    click.option(
        "--patience",
        type=click.FloatRange(1),
        metavar="SECONDS",
        help="With --shared: after so much silence of another computer its cells are taken over. Default: 300.",
    ),
)
"""Where it is computed."""


@click.command(cls=Command)
@options(
    _entry_options,
    input_options,
    model_options,
    _condition_options,
    _places,
    training_options,
    budget_options,
    folder_option("--out", "-o", help="Default: runs/compare-MODEL."),
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
    devices: str | None,
    shared: bool,
    patience: float | None,
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
    refuse_two_models(common, common)
    if other := sorted({"method", "pruner"} & common.keys()):
        raise UsageError(f"--set {other[0]}: all entries would be that method", "Name what is compared with --methods.")
    if out is None:
        from compressor.runs import start

        first = recipes.merged(recipes.read(configs[0]), common) if configs and not methods else common
        first = {**start.model_of(first.get("weights")), **first}
        model, pipeline = first.get("model", recipes.Recipe().model), first.get("pipeline")
        out = Path("runs") / f"compare-{name_of(model, pipeline)}"
    named = _names(devices, "--devices cuda:0,cuda:1")
    plan = partial(
        _planned, methods, configs, common, out, overwrite, numbers(lr_grid, float, "--lr-grid 5e-4,1e-3"),
        numbers(sampler_steps, int, "--sampler-steps 10,50"), **flags,
    )  # fmt: skip
    with comparison.sharing(out, shared, patience, overwrite) as claims:
        planned = watch(comparison.measured_in_turn(plan, out, claims), output.quiet)
        events = comparison.conduct(planned, out, workers, overwrite, named, claims)
        drive(events, out, output.quiet, "the same command")
    show_comparison(out, output.as_json)


def _names(text: str | None, like: str) -> list[str]:
    """The names in `text`, which commas part."""
    found = [name.strip() for name in text.split(",")] if text else []
    if "" in found:
        raise UsageError(f"{like.partition(' ')[0]} {text!r}: a name is empty", f"Write it like {like}")
    return found


def _planned(
    methods: str | None,
    configs: tuple[Path, ...],
    common: dict[str, Any],
    out: Path,
    overwrite: bool,
    rates: tuple[float, ...],
    sampler_steps: tuple[int, ...],
    **flags: Any,
) -> Comparison:
    """The comparison that is wanted; what one in `out` has measured before is kept. `flags` are the rest."""
    from compressor import comparison

    return comparison.planned(
        _names(methods, "--methods magnitude,sparsedm"),
        configs,
        common=common,
        rates=rates,
        sampler_steps=sampler_steps,
        known={} if overwrite else comparison.matched_before(out),
        before={} if overwrite else comparison.evaluated_before(out),
        **flags,
    )
