"""`compressor push`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from compressor.cli.command import Command
from compressor.cli.options import folder_option, options, run_argument
from compressor.cli.terminal import Output, print_json, say
from compressor.errors import UsageError

_MESSAGE = "Upload by compressor"


@click.command(cls=Command)
@options(
    run_argument,
    click.argument("name", required=False, metavar="[OWNER/NAME]"),
    click.option("--public", is_flag=True, help="A repository that everybody sees. Default: a private one."),
    click.option("--revision", metavar="BRANCH", help="Upload to this branch, which is made where it is not there."),
    click.option("--message", metavar="TEXT", help=f"Of the commit.  [default: {_MESSAGE}]"),
    folder_option("--folder", help="Write the folder, and upload nothing."),
)
def push(
    output: Output,
    directory: Path,
    name: str | None,
    public: bool,
    revision: str | None,
    message: str | None,
    folder: Path | None,
) -> None:
    """Upload a finished run's model to the hub of Hugging Face, with samples and a model card from its report.

    `compressor.load("OWNER/NAME")` reads it there. A repository that is there already keeps its visibility.
    """
    from compressor.runs import card
    from compressor.saving import hub

    card.checked(name, folder)
    if folder is not None:
        upload = {"--public": public, "--revision": revision, "--message": message}
        if given := [option for option, value in upload.items() if value]:
            raise UsageError(f"{given[0]} with --folder, which uploads nothing", "Leave one of them out.")
        made = card.folder_for_hub(directory, folder)
        if output.as_json:
            print_json({"folder": str(folder), "files": made})
            return
        say(f"{folder}: {', '.join(made)}")
        return
    assert name is not None  # checked
    hub.checked_name(name)
    with tempfile.TemporaryDirectory(prefix="compressor-") as text:
        out = Path(text) / "folder"
        made = card.folder_for_hub(directory, out, name)
        address = card.push(out, name, not public, message or _MESSAGE, revision)
    if output.as_json:
        print_json({"repository": name, "address": address, "files": made})
        return
    say(f"{address}: {', '.join(made)}")
