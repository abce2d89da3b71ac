"""The run directory: which files are a run's own, who works in it, and what may be replaced."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor import files
from compressor.errors import CompressorError, UsageError

NO_PIPELINE = "pipeline.txt"
"""Why there is no `pipeline/`, where a model of the family has one."""
OWN_FILES = (
    "recipe.yaml",
    "run.json",
    "metrics.jsonl",
    "lowering.json",
    NO_PIPELINE,
    "model.onnx",
    "report.json",
    "report.md",
    "report.html",
)


OWN_FOLDERS = ("model", "one-shot", "pipeline", "samples", "drawn")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the directory for this process; LockedError where another one has it. The lock dies with its process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressorError(f"{out}: {error.strerror or error}", "Choose a folder that you may write to.") from error
    with files.held(out):
        yield


def refuse_used_directory(out: Path, overwrite: bool) -> None:
    """Raise UsageError unless `out` is empty, not there yet, or may be overwritten."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "Choose a folder with --out.")
    found = contents(out)
    listing = f"{', '.join(found[:4])}{' …' if len(found) > 4 else ''}"
    if found and not overwrite:
        raise UsageError(
            f"{out} is not empty: it has {listing}",
            f"Choose another --out, continue it with `{resume_command(out)}`, or replace it with --overwrite.",
        )
    if "run.json" not in found and any(name in OWN_FILES + OWN_FOLDERS for name in found):
        raise UsageError(f"{out} is not a run's directory, but has {listing}", "Choose another --out.")


def refuse_busy_directory(out: Path) -> None:
    """Raise LockedError where another process works in `out`."""
    if (out / files.LOCK).exists():
        with locked(out):
            pass


def resume_command(out: Path) -> str:
    """The command that continues the run in `out`, for a shell."""
    return shlex.join(["compressor", "resume", str(out)])


def clear(out: Path) -> None:
    """Remove a former run's files, and no others."""
    for name in sorted(contents(out), key=lambda name: name == "run.json"):  # last: it says whose directory this is
        if name in OWN_FILES:
            (out / name).unlink()
        elif name in OWN_FOLDERS or re.fullmatch(r"checkpoint-\d+|\.(partial|old)-.*", name):
            files.remove(out / name)


def contents(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir() if not p.name.startswith(files.LOCK)) if out.is_dir() else []
