"""The run directory: which files are a run's own, who works in it, and what may be replaced."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compressor import files
from compressor import recipe as recipes
from compressor.data.reading import picture_folder
from compressor.discovery import is_file_reference
from compressor.errors import OF_COMPARISON, CompressorError, UsageError, resume_command
from compressor.recipe import Recipe

NO_PIPELINE = "pipeline.txt"
"""Why there is no `pipeline/`, where a model of the family has one."""
RECIPE = "recipe.yaml"
"""A run has begun where it is, and can be continued; it is written after `run.json`."""
OWN_FILES = (
    RECIPE,
    files.RUN,
    "metrics.jsonl",
    "lowering.json",
    NO_PIPELINE,
    "model.onnx",
    "report.json",
    "report.md",
    "report.html",
)


_UNDONE = r"\.(partial|old)-.*"
_SOURCES = ("weights", "pipeline", "vae", "data", "records", "prompts", "model", "pruner")
"""The settings that name files or folders."""
TRACKERS = "trackers"
"""What trackers write on the disk: in a folder called `PROJECT`, and `FAILED`."""
FAILED, PROJECT = "failed.txt", "compressor"
OWN_FOLDERS = ("model", "one-shot", "pipeline", "samples", "drawn", TRACKERS)


@contextmanager
def locked(out: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the directory for this process; LockedError where another one has it after `wait` seconds. The lock dies with it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressorError(f"{out}: {error.strerror or error}", "Choose a folder that you may write to.") from error
    with files.held(out, wait):
        yield


def refuse_used_directory(out: Path, overwrite: bool | None) -> None:
    """Raise UsageError unless `out` is empty, not there yet, or may be overwritten; None: by nobody."""
    if out.is_symlink() and not out.exists():
        raise UsageError(
            f"{out} is a link to {os.readlink(out)}, which is not there", "Make that folder, or remove the link."
        )
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "Choose a folder with --out.")
    found = contents(out)
    if all(name == files.RUN or re.match(_UNDONE, name) for name in found):
        return  # at most a run that was killed before it began
    listing = f"{', '.join(found[:4])}{' …' if len(found) > 4 else ''}"
    foreign = files.RUN not in found and any(name in OWN_FILES + OWN_FOLDERS for name in found)
    if not overwrite:
        ways = ["Choose another --out"]
        if overwrite is not None:
            ways += [f"continue it with `{resume_command(out)}`"] if RECIPE in found else []
            ways += [] if foreign else ["replace it with --overwrite"]
        hint = ", ".join(ways[:-1]) + f", or {ways[-1]}." if len(ways) > 1 else f"{ways[0]}."
        raise UsageError(f"{out} is not empty: it has {listing}", hint)
    if foreign:
        raise UsageError(f"{out} is not a run's directory, but has {listing}", "Choose another --out.")
    if (other := next(_of_others(out), None)) is not None:
        raise UsageError(
            f"{other} is none of the run's files, and would be removed with them", "Move it, or choose another --out."
        )


def _of_others(out: Path) -> Iterator[Path]:
    """Files in the folders of the run in `out` that it did not write, as far as is known: of a pipeline's folder, nothing is."""
    for folder in (out / name for name in contents(out) if is_own(name) and (out / name).is_dir()):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if folder.name == TRACKERS:
                own = name == FAILED or name.startswith(f"{PROJECT}/")
            elif folder.name == "samples":
                own = name.endswith(".png")
            else:
                listed = _listed(folder)
                own = name in listed if listed is not None else folder.name != "drawn"
            if not own:
                yield path


def _listed(folder: Path) -> set[str] | None:
    """The files that the manifest of `folder` lists, and it; None where it has none that can be read."""
    with suppress(CompressorError):
        found = files.read_json(folder / files.MANIFEST).get("files")
        return {files.MANIFEST, *found} if isinstance(found, dict) else None
    return None


def refuse_own_sources(recipe: Recipe, out: Path, replaced: Callable[[str], bool] | None) -> None:
    """Raise UsageError where what is done in `out` would change what `recipe` reads: samples would be among the pictures of its data,
    or a source is in a former run that goes. `replaced` says what of `out`, by its name, goes; None: nothing."""
    place = out.resolve()
    folder = None if recipe.data is None or not os.path.isabs(recipe.data) else picture_folder(recipe.data)
    if folder is not None and _is_seen(place, folder.resolve()):
        raise UsageError(
            f"{out} lies in the data, {folder}: samples would be among the pictures, and the data be others afterwards",
            "Choose another --out.",
        )
    for given in (recipe.pipeline, recipe.weights):
        whole = next((one for one in _around(given) if (one / "model_index.json").is_file()), None)
        if whole is not None and place.is_relative_to(whole):
            raise UsageError(
                f"{out} lies in the pipeline, {whole}, which is copied into what is written back: it would be copied into itself",
                "Choose another --out.",
            )
    for name in _SOURCES if replaced is not None else ():
        given = getattr(recipe, name)
        path = Path((given.rpartition(":")[0] if is_file_reference(given) else given) if given else "").resolve()
        if not given or not path.is_relative_to(place):
            continue
        inner = path.relative_to(place).parts
        if not inner or (replaced is not None and replaced(inner[0])):
            raise UsageError(
                f"{name} {given} lies in {out}, whose former run would be removed before it is read again",
                "Choose another --out.",
            )


def _around(given: str | None) -> tuple[Path, ...]:
    """The folder `given` and the one that it lies in, which may be that of its pipeline; none for a name on the hub."""
    folder = Path(given or "").resolve()
    return (folder, folder.parent) if given and folder.is_dir() else ()


def _is_seen(place: Path, folder: Path) -> bool:
    """Whether who looks for pictures in `folder`, and leaves out names with a dot before them, comes to `place`."""
    return place.is_relative_to(folder) and not any(part.startswith(".") for part in place.relative_to(folder).parts)


def refuse_other_settings(out: Path, recipe: Recipe) -> None:
    """Raise UsageError where the run in `out` has other settings than `recipe`, but for those that a run finds out itself."""
    there = recipes.read(out / RECIPE)
    here = recipe.model_dump(mode="json")
    here["architecture"] = {name: value for name, value in here["architecture"].items() if value is not None}
    del here["evaluate"]["budget"]  # it is in the number of samples
    if recipe.pipeline is not None:
        del here["model"]
    for setting, found, value in differing(there, here):
        raise UsageError(
            f"{out} has a run with other settings: {setting} is {found} there, not {value}",
            "Give the same settings, another --out, or --overwrite instead of --resume.",
        )


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, what `there` has, what `here` has) of every setting that is set `here`, and is another one `there`."""
    for name, value in _leaves(here):
        found: Any = there
        for part in name:
            found = found.get(part) if isinstance(found, Mapping) else None
        if value is not None and found != value:
            yield ".".join(name), found, value


def _leaves(settings: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of all settings that are no sections."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*at, name))
        elif not isinstance(value, Mapping):
            yield (*at, name), value


def refuse_unbegun(out: Path) -> None:
    """Raise UsageError where `out` is a directory in which no run has begun: there is nothing to continue."""
    if out.is_dir() and not (out / RECIPE).is_file():
        if (out / "cells").is_dir():
            raise UsageError(f"{out} is a comparison, not a run", OF_COMPARISON)
        found = contents(out)
        again = " --overwrite" if any(name != files.RUN for name in found) and files.RUN in found else ""
        raise UsageError(
            f"{out} has no {RECIPE}: no run has begun there, or a run was about to be replaced",
            f"Start it with `{shlex.join(['compressor', 'run', '--out', str(out)])}{again}` and its settings.",
        )


def refuse_busy_directory(out: Path) -> None:
    """Raise LockedError where another process works in `out`."""
    if (out / files.LOCK).exists():
        with locked(out):
            pass


def clear(out: Path) -> None:
    """Remove a former run's files, and no others."""
    for name in sorted(filter(is_own, contents(out)), key=_order):
        if name in OWN_FILES:
            (out / name).unlink()
        else:
            files.remove(out / name)


def is_own(name: str) -> bool:
    """Whether a run's directory has a file or folder of its own by this `name`."""
    return name in OWN_FILES + OWN_FOLDERS or re.fullmatch(rf"checkpoint-\d+|{_UNDONE}", name) is not None


def _order(name: str) -> int:
    """When `clear` removes it: who dies meanwhile leaves no report of a model that is gone, nothing to go on with when it is half
    gone, and to the last whose directory this is."""
    return 0 if name.startswith("report.") else 1 if name == RECIPE else 3 if name == files.RUN else 2


def contents(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir() if not p.name.startswith(files.LOCK)) if out.is_dir() else []
