"""When a run is finished, and what goes away then."""

from __future__ import annotations

from pathlib import Path

from compressor import files, saving
from compressor import recipe as recipes
from compressor.errors import CompressorError
from compressor.report import read_report
from compressor.report.content import Report
from compressor.runs.directory import RECIPE, differing, locked
from compressor.runs.one_shot import FOLDER

_PAGES = ("report.json", "report.md", "report.html")


def unfinished(out: Path) -> str | None:
    """Why the run in `out` is not finished; None where it is: its model is whole, byte for byte, and its report speaks of it."""
    try:
        files.verify(out / "model", needs=saving.MODEL_FILES)
        for name in _PAGES:
            if not (out / name).is_file():
                return f"{out / name} is missing"
        report, saved = read_report(out / "report.json"), saving.read_config(out / "model").weights_sha256
        if report.final.weights_sha256 != saved:
            return f"{out / 'report.json'} speaks of other weights than those in model/"
        return edited(out, report)
    except CompressorError as error:
        return error.message


def edited(out: Path, report: Report) -> str | None:
    """How `recipe.yaml` in `out` differs from the recipe that the `report` there is of; None where it does not."""
    for setting, found, value in differing(recipes.read(out / RECIPE), report.recipe):
        return f"{out / RECIPE} was changed: {setting} is {found} there, and the report is of a run with {value}"
    return None


def reopen(out: Path) -> None:
    """Let the run in `out` be unfinished: the pages of its report go."""
    for name in _PAGES[1:]:
        (out / name).unlink(missing_ok=True)


def refuse_lost(out: Path) -> None:
    """Raise CompressorError where something that a run has just left in `out` is not there, or is not as it was written."""
    if (reason := unfinished(out)) is not None:
        raise CompressorError(
            f"{out} is not finished: {reason}; something changed it while the run worked there",
            "`compressor resume` makes again what is missing.",
        )


def settle(out: Path) -> None:
    """Remove what a finished run no longer needs. Does nothing, and takes no lock, where there is nothing of that."""
    if _passing(out) or files.strays(out):
        with locked(out):
            clean(out)


def clean(out: Path) -> None:
    """As `settle`, for who holds `out`."""
    for path in (*_passing(out), *files.strays(out)):
        files.remove(path)


def _passing(out: Path) -> list[Path]:
    """What is in `out` while its run goes on only."""
    return [path for path in (*sorted(out.glob("checkpoint-*")), out / FOLDER) if path.is_dir()]
