"""`compressor report`, and the tables that `run` and `compare` end with."""

from __future__ import annotations

from pathlib import Path

import click

from compressor.cli.command import Command
from compressor.cli.options import run_argument
from compressor.cli.terminal import Output, print_json, print_table, say


@click.command(cls=Command)
@run_argument
def report(output: Output, directory: Path) -> None:
    """Write the pages of a run's or a comparison's report again, and show the table."""
    if _is_comparison(directory):
        from compressor.comparison.page import render as render_comparison

        render_comparison(directory)
        show_comparison(directory, output.as_json)
        return
    from compressor.report import render

    render(directory)
    show_report(directory, output.as_json)


def _is_comparison(directory: Path) -> bool:
    from compressor.files import read_json

    path = directory / "report.json"
    return path.is_file() and read_json(path).get("kind") == "comparison"


def show_report(directory: Path, as_json: bool) -> None:
    """A run's table."""
    from compressor.report import read_report

    content = read_report(directory / "report.json")
    if as_json:
        print_json(content.as_json())
        return
    from compressor.cli.tables import rows_table

    print_table(rows_table(content))
    if content.metric:
        floor = content.metric.floor
        say(f"floor (real against real, {floor.samples} images each): {floor.value:.2f}")
    say(f"report: {directory / 'report.html'}")


def show_comparison(directory: Path, as_json: bool) -> None:
    """A comparison's table. Exits with 1 where a part of it failed."""
    from compressor.report import read_comparison

    content = read_comparison(directory / "report.json")
    if as_json:
        print_json(content.as_json())
    else:
        from compressor.cli.tables import plain_table
        from compressor.comparison.words import columns, headline, rows

        lines = [(label, *cells) for label, _, cells in rows(content)]
        print_table(plain_table((content.title, *columns(content)), lines))
        say(headline(content))
        say(f"report: {directory / 'report.html'}")
    if content.failed:
        for name, reason in content.failed.items():
            say(f"failed: {name}: {reason}", err=True)
        raise click.exceptions.Exit(1)
