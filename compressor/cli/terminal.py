"""What reaches the user: text, JSON, tables, progress, and errors in one line."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from compressor import processes
from compressor.cli.streams import crashed
from compressor.discovery import blamed
from compressor.errors import (
    CompressorError,
    MemoryShortError,
    first_line,
    memory_behind,
    memory_short,
    printable,
    resume_command,
)
from compressor.processes import Interrupted

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
    """Let an error through, with its traceback where `debug`; unexpected ones in one line, with a crash file that has the rest."""
    try:
        yield
    except Interrupted as interrupted:
        say("stopped", err=True)
        raise click.exceptions.Exit(interrupted.exit_code) from None
    except (CompressorError, click.ClickException, click.exceptions.Exit, KeyboardInterrupt) as error:
        if isinstance(error, CompressorError):
            _trace(debug, error)
        if (behind := memory_behind(error)) is not None:
            raise memory_short(behind) from error
        raise
    except OSError as error:  # a path that cannot be used; the places that know more say more
        _trace(debug, error)
        if memory_behind(error) is not None:
            raise memory_short(error) from error
        where = f"{error.filename}: " if error.filename is not None else ""
        reason = error.strerror or first_line(error)
        hint = "Choose another path." if where else "The disk may be full, or a file gone."
        raise CompressorError(f"{where}{reason}", hint) from error
    except (Exception, SystemExit) as error:  # a plugin's sys.exit(0) is no success
        if _is_interrupt(error):
            raise KeyboardInterrupt from error
        _trace(debug, error)
        found = blamed(error)
        if isinstance(found, MemoryShortError):  # nothing to be reported
            raise found from error
        raise CompressorError(found.message, f"{found.hint} {crashed(error)}".strip()) from error


def _trace(debug: bool, error: BaseException) -> None:
    if debug:
        for line in "".join(traceback.format_exception(error)).splitlines():
            say(line, err=True)


def _is_interrupt(error: BaseException) -> bool:
    """Whether a Ctrl-C is behind it: some libraries raise an error of their own for everything that ends their work."""
    behind = error.__cause__ or error.__context__
    return behind is not None and (isinstance(behind, KeyboardInterrupt) or _is_interrupt(behind))


def complain(error: CompressorError) -> int:
    """Show an error; its exit code."""
    for line in f"error: {error}".splitlines():
        say(line, err=True)
    if error.exit_code == 1 and sys.flags.optimize > 1:
        say(
            "note: Python runs without docstrings here (-OO, PYTHONOPTIMIZE=2), which transformers and diffusers need: leave it out.",
            err=True,
        )
    return error.exit_code


def say(text: str, err: bool = False) -> None:
    """A line on stdout, or on stderr."""
    with nullcontext() if err else _results():
        click.echo(printable(text), err=err)


def say_notes(notes: Sequence[str]) -> None:
    """What a plan of lowering notes, on stderr."""
    for note in notes:
        say(f"note: {note}", err=True)


@contextmanager
def _results() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CompressorError(
            f"the standard output cannot be written to: {error.strerror}",
            "What was made is kept; `compressor report` shows it.",
        ) from error


def warn_of_idle_rules(model: nn.Module, ignore: Sequence[str] | None) -> None:
    """Each rule of the user's that leaves nothing out is likely a mistake."""
    from compressor.sparsity.layers import idle

    for rule in idle(model, ignore):
        say(f"warning: --ignore {rule!r} matches no layer", err=True)


def drive(events: Generator[Progress, None, None], out: Path, quiet: bool, again: str | None = None) -> None:
    """Iterate over a run's progress. The first Ctrl-C, SIGTERM or SIGHUP ends it after the step under way and a checkpoint, a
    second Ctrl-C at once.

    Where no step is under way it ends at once. `again` is what continues it; by default, `compressor resume`.
    """
    from compressor.cli.tables import Ticker

    try:
        with Ticker(console(stderr=True), quiet) as ticker:
            processes.drive(events, ticker.show)
    except Interrupted as interrupted:
        processes.refuse_failed()
        say(f"stopped; continue with: {again or resume_command(out)}", err=True)
        raise click.exceptions.Exit(interrupted.exit_code) from None


def watch(events: Generator[Progress, None, _Result], quiet: bool) -> _Result:
    """Show the progress of `events`, and give what it returns."""
    from compressor.cli.tables import Ticker
    from compressor.progress import result_of

    with Ticker(console(stderr=True), quiet) as ticker:
        return result_of(events, ticker.show)


RESULTS = "compressor.results"
"""Under which click's context has the `ResultsAlone` of a command that was asked for JSON."""


def print_json(value: Any) -> None:
    """A command's result, for programs."""
    context = click.get_current_context(silent=True)
    alone = None if context is None else context.meta.get(RESULTS)
    with nullcontext() if alone is None else alone.result(), _results():
        click.echo(json.dumps(value, indent=2))


def print_table(table: Table) -> None:
    """A table on stdout, in the width of the terminal."""
    from compressor.cli.tables import fitted

    terminal = console(stderr=False)
    with _results():
        terminal.print(fitted(table, terminal.width))


def console(stderr: bool) -> Console:
    """The terminal, for tables and progress."""
    from rich.console import Console

    terminal = Console(stderr=stderr)
    if not terminal.width or (not terminal.is_terminal and "COLUMNS" not in os.environ):
        terminal.width = 400  # a file or pipe has no width of its own to be cut to, and COLUMNS=0 is none
    return terminal
