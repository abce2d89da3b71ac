"""`compressor lower` and `compressor bench`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from compressor.cli.command import Command
from compressor.cli.options import numbers, options, run_argument, speed_options
from compressor.cli.terminal import Output, print_json, print_table, say, say_notes, watch
from compressor.errors import UsageError

if TYPE_CHECKING:
    from compressor.runs.speed import Benched


@click.command(cls=Command)
@options(
    run_argument,
    click.option(
        "--batch", type=click.IntRange(1), help="Batch size to tune for. Default: the run's evaluate.latency_batch."
    ),
    click.option("--compiled", is_flag=True, help="Also try forms under torch.compile; takes minutes."),
    click.option("--no-compiled", is_flag=True, help="Leave them out on a GPU too, where they are tried by default."),
    speed_options,
)
def lower(output: Output, directory: Path, batch: int | None, compiled: bool, no_compiled: bool, **flags: Any) -> None:
    """Choose the fastest kernel of this machine for every layer of a finished run, and time the whole model.

    The plan is saved as lowering.json, and the times in the run's report. Never slower than dense: where sparse kernels do
    not pay, the plan keeps the best dense form and says so.
    """
    if compiled and no_compiled:
        raise UsageError("--compiled with --no-compiled", "Give one of them.")
    how = (compiled or None) if not no_compiled else False
    plan = _timed(output, directory, (batch,) if batch else (), batch is not None, compiled=how, **flags).plan
    if output.as_json:
        print_json(plan.model_dump(mode="json"))
        return
    from compressor.cli.tables import plan_tables

    for table in plan_tables(plan):
        print_table(table)
    say(f"{plan.choice}: {plan.reason}")
    say_notes(plan.notes)
    say(f"report: {directory / 'report.html'}")


@click.command(cls=Command)
@options(
    run_argument,
    click.option("--batches", default="1,4,16", show_default=True, metavar="N,N,…", help="Batch sizes."),
    click.option(
        "--compiled/--no-compiled", default=True, show_default=True, help="Forms under torch.compile; take minutes."
    ),
    click.option(
        "--onnx/--no-onnx", default=None, help="ONNX Runtime, and OpenVINO. Default: where they are installed."
    ),
    click.option(
        "--cache",
        "caches",
        multiple=True,
        metavar="NAME[:KEY=VALUE]…",
        help="Of a pipeline's run: also with this cache of diffusers, e.g. first-block:threshold=0.1. May be repeated.",
    ),
    click.option("--steps", metavar="N,N,…", help="Of a pipeline's run: also with these numbers of sampler steps."),
    speed_options,
)
@click.pass_context
def bench(
    context: click.Context,
    /,
    output: Output,
    directory: Path,
    batches: str,
    onnx: bool | None,
    caches: tuple[str, ...],
    steps: str | None,
    **flags: Any,
) -> None:
    """Time a finished run's model in every form, side by side: eager, prepacked, compiled, lowered, ONNX Runtime, OpenVINO.

    A pipeline's run can also be drawn with caches and fewer steps, dense and sparse, from the same noise: its report then shows
    the time of each against what the pictures lose.
    """
    given = context.get_parameter_source("batches") is not ParameterSource.DEFAULT
    sizes = numbers(batches or "0", int, "--batches 1,4,16")
    if onnx is None:
        onnx = all(find_spec(name) is not None for name in ("onnx", "onnxscript", "onnxruntime"))
    counts = numbers(steps, int, "--steps 14,7")
    benched = _timed(output, directory, sizes, given, onnx=onnx, caches=caches, steps=counts, **flags)
    for name, reason in benched.left_out.items():
        say(f"note: {name} was left out: {reason}", err=True)
    if output.as_json:
        print_json(benched.as_json())
        return
    from compressor.cli.tables import plain_table
    from compressor.report.timings import SPEEDS, speeds
    from compressor.report.words import TRADE_OFFS, trade_offs

    for setting, lines in speeds(benched.report):
        print_table(plain_table((setting, *SPEEDS), lines))
    if benched.report.trade_offs:
        print_table(plain_table(TRADE_OFFS, trade_offs(benched.report)))
    say(f"report: {directory / 'report.html'}")


def _timed(
    output: Output, directory: Path, batches: Sequence[int], insisted: bool, *, fresh: bool, **more: Any
) -> Benched:
    """Lower and time a run's model for these batch sizes, which the user `insisted` on or not."""
    from compressor.runs import speed
    from compressor.runs.directory import locked

    with locked(directory):
        run = speed.finished(directory)
        own = not batches or (run.adapter.fixed_batch and not insisted)
        events = speed.bench(run, [run.batch] if own else batches, cache=not fresh, **more)
        return watch(events, output.quiet)
