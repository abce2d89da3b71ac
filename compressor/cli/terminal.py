"""What reaches the user: text, JSON, tables, progress, and errors in one line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from compressor.errors import CompressorError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch import nn

    from compressor.progress import Progress

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Output:
    """How a command was asked to answer: as JSON, and without progress."""

    as_json: bool
    quiet: bool


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Let an error through with its traceback where `debug`; else without, and unexpected ones in one line."""
    try:
        yield
    except (CompressorError, click.ClickException, click.exceptions.Exit, KeyboardInterrupt, BrokenPipeError) as error:
        if debug and isinstance(error, CompressorError):
            import traceback

            traceback.print_exc()
        raise
    except OSError as error:  # a path that cannot be used; the places that know more say more
        if debug:
            raise
        raise CompressorError(f"{error.filename}: {error.strerror}", "Choose another path.") from error
    except Exception as error:
        if debug:
            raise
        if _is_interrupt(error):
            raise KeyboardInterrupt from error
        message = f"unexpected {type(error).__name__}: {error}"
        raise CompressorError(message, "Run again with --debug for the traceback, and please report it.") from error


def _is_interrupt(error: BaseException) -> bool:
    """Whether a Ctrl-C is behind it: some libraries raise an error of their own for everything that ends their work."""
    behind = error.__cause__ or error.__context__
    return behind is not None and (isinstance(behind, KeyboardInterrupt) or _is_interrupt(behind))


def complain(error: CompressorError) -> int:
    """Show an error; its exit code."""
    for line in f"error: {error}".splitlines():
        say(line, err=True)
    return error.exit_code


def say(text: str, err: bool = False) -> None:
    """A line on stdout, or on stderr."""
    from compressor.cli.tables import printable

    click.echo(printable(text), err=err)


def warn_of_idle_rules(model: nn.Module, ignore: Sequence[str] | None) -> None:
    """Each rule of the user's that leaves nothing out is likely a mistake."""
    from compressor.sparsity.layers import survey, unmatched
    from compressor.sparsity.pattern import Unstructured

    for rule in unmatched(survey(model, Unstructured(1.0)), ignore or ()):
        say(f"warning: --ignore {rule!r} matches no layer", err=True)


def drive(events: Iterator[Progress], out: Path, quiet: bool, again: str | None = None) -> None:
    """Iterate over a run's progress. The first Ctrl-C or SIGTERM ends it after a checkpoint, a second Ctrl-C at once.

    `again` is what continues it; by default, `compressor resume`.
    """
    from compressor.cli.tables import Ticker
    from compressor.runs.directory import resume_command
    from compressor.runs.run import Interrupted

    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Ticker(console(stderr=True), quiet) as ticker:
            for event in events:
                ticker.show(event)
                if received:
                    events.throw(Interrupted(128 + received[0]))  # type: ignore[attr-defined]
    except Interrupted as interrupted:
        say(f"stopped; continue with: {again or resume_command(out)}", err=True)
        raise click.exceptions.Exit(interrupted.exit_code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(events: Generator[Progress, None, _Result], quiet: bool) -> _Result:
    """Show the progress of `events`, and give what it returns."""
    from compressor.cli.tables import Ticker
    from compressor.progress import result_of

    with Ticker(console(stderr=True), quiet) as ticker:
        return result_of(events, ticker.show)


def print_json(value: Any) -> None:
    """A command's result, for programs."""
    click.echo(json.dumps(value, indent=2))


def print_table(table: Table) -> None:
    """A table on stdout."""
    console(stderr=False).print(table)


def console(stderr: bool) -> Console:
    """The terminal, for tables and progress."""
    from rich.console import Console

    terminal = Console(stderr=stderr)
    if not terminal.is_terminal and "COLUMNS" not in os.environ:
        terminal.width = 400  # a file or pipe has no width of its own to be cut to
    return terminal
