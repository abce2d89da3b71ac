"""`compressor report`, and the tables that `run` and `compare` end with."""

from __future__ import annotations

from pathlib import Path

import click

from compressor.cli.command import Command, Folder
from compressor.cli.options import RUN, folder_option, options
from compressor.cli.terminal import Output, print_json, print_table, say
from compressor.errors import CompressorError, UsageError, how_to_finish


@click.command(cls=Command)
@options(
    click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=Folder(RUN)),
    folder_option("--out", help="Of several runs: write their pages there."),
)
def report(output: Output, runs: tuple[Path, ...], out: Path | None) -> None:
    """Write the pages of a run's or a comparison's report again, and show the table.

    Given several finished RUNs, it shows their reports side by side. Nothing is trained or measured again; quality is compared where
    model, data and metric are the same.
    """
    if len(runs) > 1:
        _show_beside(runs, output.as_json, out)
        return
    [directory] = runs
    if out is not None:
        raise UsageError(
            "--out with one run", "Its pages lie in its own directory: leave --out out, or give a second run."
        )
    if _is_comparison(directory):
        from compressor.comparison.page import render as render_comparison

        render_comparison(directory)
        show_comparison(directory, output.as_json)
        return
    from compressor.report import read_report, render
    from compressor.runs.finish import edited

    render(directory)
    show_report(directory, output.as_json)
    if (directory / "recipe.yaml").is_file() and (reason := edited(directory, read_report(directory / "report.json"))):
        say(f"warning: {reason}", err=True)


def _show_beside(runs: tuple[Path, ...], as_json: bool, out: Path | None) -> None:
    from compressor.cli.tables import plain_table
    from compressor.report import read_report
    from compressor.report.beside import beside, refuse_other_pages, write

    if out is not None:
        refuse_other_pages(out)
    for directory in runs:
        if _is_comparison(directory):
            raise UsageError(f"{directory} is a comparison", "Give the directories of finished runs.")
        if not (directory / "report.json").is_file():
            raise CompressorError(
                f"{directory / 'report.json'}: no such file",
                how_to_finish(directory),
            )
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    if len(set(names)) < len(names):
        raise UsageError(f"{', '.join(names)}: the same run twice", "Give each once.")
    found = beside({name: read_report(run / "report.json") for name, run in zip(names, runs, strict=True)})
    if out is not None:
        write(found, out)
    if as_json:
        print_json(found.as_json())
        return
    print_table(plain_table(("", *found.names), [(title, *cells) for title, _, cells in found.columns]))
    for line in found.refused:
        say(f"quality is not compared: {line}")
    for line in found.verdict:
        say(line)
    if out is not None:
        say(f"report: {out / 'report.html'}")


def _is_comparison(directory: Path) -> bool:
    from compressor.files import read_json

    path = directory / "report.json"
    return path.is_file() and read_json(path).get("kind") == "comparison"


def show_report(directory: Path, as_json: bool) -> None:
    """A run's table."""
    from compressor.report import read_report
    from compressor.report.numbers import number

    content = read_report(directory / "report.json")
    if as_json:
        print_json(content.as_json())
        return
    from compressor.cli.tables import rows_table

    print_table(rows_table(content))
    if content.metric:
        floor = content.metric.floor
        say(f"floor (real against real, {floor.samples} images each): {number(floor.value)}")
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
