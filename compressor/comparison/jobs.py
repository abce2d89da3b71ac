"""A comparison, carried out: jobs in processes, what is finished is kept, one that fails does not lose the others."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from compressor import files, saving
from compressor.comparison.claims import PATIENCE, Claims, refuse_shared
from compressor.comparison.crew import Crew, reason
from compressor.comparison.entries import Cell, Comparison
from compressor.comparison.foretold import Outlook
from compressor.comparison.made_of import KEY, changed, made_of
from compressor.comparison.page import Outcome, written
from compressor.comparison.worker import JOB, ROW, RUN, read_row
from compressor.environment import environment, resolve_device
from compressor.errors import CompressorError, UsageError
from compressor.progress import Progress
from compressor.recipe import Recipe
from compressor.report.content import Environment, Latency
from compressor.runs.directory import locked, refuse_own_sources
from compressor.runs.inputs import SHARED
from compressor.runs.latency import timed

REPORT, MATCH = "report", "match"
"""Claims besides those on cells: on writing the report, and on measuring what `--match latency` needs."""
FOLDERS = ("dense", "cells", "trials")
FILES = ("report.json", "report.md", "report.html", "report.csv", "latency.json", "rates.json", "match.json")
RATES = "rates.json"
_UNSEARCHED = "none of its learning rates could be tried"


def refuse_used(out: Path) -> None:
    """Raise UsageError where `out` has files that are no comparison's."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "Choose a folder with --out.")
    names = _names(out)
    if names and (foreign := names - {*FOLDERS, *FILES}):
        raise UsageError(f"{out} has files of others: {min(foreign)}", "Choose another --out.")
    if names and "cells" not in names and "dense" not in names:
        raise UsageError(f"{out} is not a comparison's folder", "Choose another --out.")


def _names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if not path.name.startswith(".lock")} if out.is_dir() else set()


def matched_before(out: Path) -> dict[str, dict[str, dict[str, float]]]:
    """What was measured for `--match latency` in the folder `out`, by what was matched and by label; a comparison that goes on keeps
    it."""
    path = out / "match.json"
    return files.read_json(path) if path.is_file() else {}


def sharing(
    out: Path, shared: bool, patience: float | None = None, overwrite: bool = False
) -> AbstractContextManager[Claims | None]:
    """The claims on `out` where it is `shared`, to be entered; None where it is not. Raises UsageError for a folder with files of
    others, and for settings that make no sense together."""
    refuse_used(out)
    if shared and overwrite:
        raise UsageError(
            "--overwrite with --shared: one process would remove what another one has just made",
            "Remove the folder by hand before the first one starts, or leave --overwrite out.",
        )
    if patience is not None and not shared:
        raise UsageError("--patience is for folders that several share", "Give --shared too.")
    return Claims(out, patience or PATIENCE) if shared else nullcontext()


def measured_in_turn(
    plan: Callable[[], Comparison], out: Path, claims: Claims | None
) -> Generator[Progress, None, Comparison]:
    """What `plan` gives. Where it measures something (`--match latency`), of several that share `out` one does, and the others
    take what it found."""
    if claims is None:
        return plan()
    if (yield from claims.turn(MATCH, "prepare")):
        found = plan()
        if found.mask:
            _write_match(found, out)
        claims.release(MATCH, "done")
        return found
    return plan()


def _write_match(wanted: Comparison, out: Path) -> None:
    """Keep what was measured, beside what was for other methods or other masks."""
    before = matched_before(out)
    found = {**before.get(wanted.mask, {}), **{label: dict(own) for label, own in wanted.matched.items()}}
    files.write_json(out / "match.json", {**before, wanted.mask: found})


def evaluated_before(out: Path) -> dict[str, Any]:
    """The number of samples in the folder `out`, as settings below the user's: a comparison that goes on keeps it. None of a pipeline,
    whose pictures are recorded."""
    path = out / "dense" / JOB
    recipe = files.read_json(path).get("recipe") if path.is_file() else None
    settings = recipe.get("evaluate") if isinstance(recipe, dict) and recipe.get("pipeline") is None else None
    samples = settings.get("samples") if isinstance(settings, dict) else None
    return {"evaluate": {"samples": samples}} if isinstance(samples, int) else {}


def conduct(
    wanted: Comparison,
    out: Path,
    workers: int = 0,
    overwrite: bool = False,
    devices: Sequence[str] = (),
    claims: Claims | None = None,
) -> Generator[Progress, None, None]:
    """Carry out `wanted` in the folder `out`, in `workers` processes (0: one for each GPU, else one) or on these `devices`. Yields
    progress.

    Called again after an interruption it goes on, with other seeds or methods it adds to what is there. With `claims`, of `out`,
    it shares the work with all who have some of the same folder, and ends when all is done. Raises
    CompressorError where a cell of the folder was trained with other settings, before anything is changed, and where every cell,
    or every trial of a learning rate, failed.
    """
    refuse_used(out)
    for recipe in wanted.recipes.values():
        refuse_own_sources(recipe, out, (lambda _: True) if overwrite else None)
    with locked(out) if claims is None else nullcontext():
        if claims is None:
            refuse_shared(out)
        else:
            claims.announce(_plan(wanted, out))
        if overwrite:
            for name in _names(out):
                path = out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        _refuse_others(wanted, out)
        if wanted.mask:
            _write_match(wanted, out)
        _write_job(out / "dense", _dense(wanted), SHARED)
        places = _devices(wanted, workers, devices)
        every = (*wanted.trials(), *wanted.cells({}))
        outlook = Outlook(wanted, [cell for cell in every if not (_place(cell, out) / ROW).is_file()], len(places))
        with Crew(places, claims) as crew:
            yield from outlook.told(crew.carry_out([out / "dense"]))
            if not (out / "dense" / ROW).is_file():
                raise CompressorError(
                    f"the dense model cannot be judged: {reason(out / 'dense')}", "See dense/error.txt in it."
                )
            rates, failed = yield from _searched(wanted, out, crew, outlook)
            # whose rate nothing is known of is not trained at one that was not searched
            cells = [cell for cell in wanted.cells(rates) if cell.name not in failed]
            folders = [_folder(wanted, cell, out) for cell in cells]
            yield from outlook.told(crew.carry_out(folders))
        if not any((folder / ROW).is_file() for folder in folders):
            raise CompressorError(f"every cell failed; the first: {reason(folders[0])}", "See error.txt in each cell.")
        if claims is not None and not (yield from claims.turn(REPORT, "report")):
            return  # another one has written it
        times = yield from _latencies(wanted, cells, folders, out)
        failed |= _failed(cells, folders)
        facts = Environment(**environment(resolve_device(wanted.inputs.recipe.train.device)))
        done = [(cell, folder) for cell, folder in zip(cells, folders, strict=True) if (folder / ROW).is_file()]
        written(Outcome(wanted, out, done, times, rates, failed, facts))
        if claims is not None:
            claims.release(REPORT, "done")
        yield Progress("report", 1, 1)


def _searched(
    wanted: Comparison, out: Path, crew: Crew, outlook: Outlook
) -> Generator[Progress, None, tuple[dict[str, float], dict[str, str]]]:
    """The learning rates that trials chose, by label, and what failed and why, by the name of the cell: with the trials, all cells of
    labels that no trial succeeded for."""
    trials = wanted.trials()
    if not trials:
        return {}, {}
    folders = [_folder(wanted, cell, out) for cell in trials]
    yield from outlook.told(crew.carry_out(folders))
    rates = _best_rates(trials, folders)
    if not rates:
        raise CompressorError(f"every trial failed; the first: {reason(folders[0])}", "See error.txt in each of them.")
    files.write_json(out / RATES, {**_rates(out), **rates})  # beside those of methods that this call leaves out
    unsearched = {cell.name: _UNSEARCHED for cell in wanted.cells(rates) if cell.label not in rates}
    return rates, {**_failed(trials, folders), **unsearched}


def _plan(wanted: Comparison, out: Path) -> str:
    """A hash of what is to be done: that of two calls is the same where all that they do is."""
    jobs = [_job(wanted, cell, out) for cell in (*wanted.trials(), *wanted.cells({}))]
    rest = [wanted.lower, wanted.max_error, wanted.title]
    return hashlib.sha256(json.dumps([jobs, rest], sort_keys=True).encode()).hexdigest()


def _dense(wanted: Comparison) -> dict[str, Any]:
    recipe = wanted.inputs.recipe
    return {
        "kind": "dense",
        "recipe": recipe.model_dump(mode="json"),
        "sampler_steps": list(wanted.sampler_steps),
        KEY: made_of(wanted.inputs, recipe, trains=False),
    }


def _refuse_others(wanted: Comparison, out: Path) -> None:
    """Raise CompressorError where the dense model was judged or a cell begun in `out` with another recipe than `wanted` has for it,
    or where what the recipes name is not what it was then."""
    _refuse_other(out / "dense", _dense(wanted), SHARED)
    rates = _rates(out) if wanted.rates else {}
    for cell in (*wanted.trials(), *wanted.cells(rates)):
        place = _place(cell, out)
        if wanted.rates and not cell.tuning and cell.label not in rates and _is_begun(place):
            raise CompressorError(f"{place} was made without --lr-grid", _OTHER)
        _refuse_other(place, _job(wanted, cell, out), tuple(Recipe.model_fields))


def _rates(out: Path) -> dict[str, float]:
    """The learning rates that were chosen in the folder `out`, by label."""
    path = out / RATES
    return files.read_json(path) if path.is_file() else {}


def _failed(cells: Sequence[Cell], folders: Sequence[Path]) -> dict[str, str]:
    """Why there is no result, by the name of the cell."""
    return {cell.name: reason(f) for cell, f in zip(cells, folders, strict=True) if not (f / ROW).is_file()}


def _place(cell: Cell, out: Path) -> Path:
    return out / ("trials" if cell.tuning else "cells") / cell.name


def _job(wanted: Comparison, cell: Cell, out: Path) -> dict[str, Any]:
    return {
        "kind": "cell",
        "label": cell.label,
        "recipe": cell.recipe.model_dump(mode="json"),
        "first": cell.first,
        **({"tuning": True} if cell.tuning else {}),
        "dense": os.path.join("..", "..", "dense"),  # from the job's folder: others may see it in another place
        "sampler_steps": [] if cell.tuning else list(wanted.sampler_steps),
        KEY: made_of(wanted.inputs, cell.recipe, trains=True),
    }


def _folder(wanted: Comparison, cell: Cell, out: Path) -> Path:
    """The folder of `cell`, with its job in it."""
    folder = _place(cell, out)
    _write_job(folder, _job(wanted, cell, out), tuple(Recipe.model_fields))
    return folder


def _write_job(folder: Path, job: Mapping[str, Any], identity: Sequence[str]) -> None:
    """Leave `job` in `folder`. What was trained there with another recipe is refused.

    Where only something else differs, such as the numbers of sampler steps, what was trained stays and is judged again.
    """
    _refuse_other(folder, job, identity)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / JOB).is_file():
        before = files.read_json(folder / JOB)
        if any(before.get(key) != job[key] for key in job if key not in ("recipe", "dense")):
            (folder / ROW).unlink(missing_ok=True)
        if before == job:
            return
    files.write_json(folder / JOB, job)


def _refuse_other(folder: Path, job: Mapping[str, Any], identity: Sequence[str]) -> None:
    """Raise CompressorError where something was begun in `folder` with another recipe, by the keys of `identity`, or of something
    else."""
    if not _is_begun(folder):
        return
    former = files.read_json(folder / JOB) if (folder / JOB).is_file() else {}
    before = former.get("recipe")
    if not isinstance(before, dict):
        raise CompressorError(f"{folder / JOB}: not a job", f"Remove {folder}; it is made again.")
    defaults = Recipe().model_dump(mode="json")  # of settings that are newer than the job
    for key in identity:
        before.setdefault(key, defaults[key])
        if isinstance(defaults[key], dict) and isinstance(before.get(key), dict):
            before[key] = {**defaults[key], **before[key]}
        if differences := _differences(key, before.get(key), job["recipe"][key]):
            raise CompressorError(f"{folder} was made with another {'; '.join(differences[:3])}", _OTHER)
    if found := changed(former.get(KEY), job[KEY]):
        raise CompressorError(
            f"{folder}: since it was made, {found}",
            f"Put back what it was, choose another --out, or remove {folder}: it is made again.",
        )


_OTHER = "Choose another --out, or start anew with --overwrite."


def _is_begun(folder: Path) -> bool:
    """Whether there is more in `folder` than a job, and what was said of its failure; of what lost its job nobody knows what it is."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return bool(names & {ROW, RUN}) or (JOB in names and not names <= {JOB, "error.txt"})


def _differences(key: str, before: Any, now: Any) -> list[str]:
    """What two values of a recipe's setting differ in, part by part."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({*before, *now} - {"budget"})  # which has done its work: the samples and steps are compared
        return [line for name in names for line in _differences(f"{key}.{name}", before.get(name), now.get(name))]
    return [] if before == now else [f"{key}: {_short(before)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _devices(wanted: Comparison, workers: int, devices: Sequence[str] = ()) -> list[str | None]:
    """For each worker the GPU that it alone sees; None for the CPU, and where the recipe names one GPU itself. `devices` are GPUs
    as torch calls them, cuda:N, one for each worker. Raises UsageError for those that there are not."""
    named = wanted.inputs.recipe.train.device
    if devices:
        return _named_devices(devices, named, workers)
    if resolve_device(named).type != "cuda" or named not in ("auto", "cuda"):
        return [None] * max(1, workers)
    names = _visible()
    return [names[index % len(names)] for index in range(workers or len(names))]


def _visible() -> list[str]:
    """The GPUs that there are, as CUDA_VISIBLE_DEVICES calls them."""
    count, seen = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[:count] if seen else [str(index) for index in range(count)]


def _named_devices(devices: Sequence[str], recipe: str, workers: int) -> list[str | None]:
    names = _visible()
    known = {f"cuda:{index}": name for index, name in enumerate(names)}
    if unknown := [device for device in devices if device not in known]:
        there = ", ".join(known) or "none: this machine has no GPU that torch can use"
        raise UsageError(f"--devices {unknown[0]!r}: no such GPU", f"There are {there}. On the CPU, give --workers N.")
    if recipe not in ("auto", "cuda"):
        raise UsageError(f"--devices, and the recipe's device is {recipe!r}", "Leave train.device at auto.")
    if workers:
        raise UsageError("--devices and --workers both say how many processes there are", "Give one of them.")
    return [known[device] for device in devices]


def _best_rates(trials: Sequence[Cell], folders: Sequence[Path]) -> dict[str, float]:
    """For each label the learning rate whose trial scored best, or drifted least where no metric is there."""
    best: dict[str, tuple[float, float]] = {}
    for cell, folder in zip(trials, folders, strict=True):
        if not (folder / ROW).is_file():
            continue
        row = read_row(folder).row
        score = row.quality[0].value if row.quality else row.drift[0].value
        if cell.label not in best or score < best[cell.label][0]:
            best[cell.label] = (score, cell.recipe.train.lr)
    return {label: rate for label, (_, rate) in best.items()}


def _latencies(
    wanted: Comparison, cells: Sequence[Cell], folders: Sequence[Path], out: Path
) -> Generator[Progress, None, dict[str, list[Latency]]]:
    """The latency entries by label, of the weights of the first seed that there is; kept while those and the machine are the same."""
    first: dict[str, Path] = {}
    for cell, folder in zip(cells, folders, strict=True):
        if (folder / ROW).is_file():
            first.setdefault(cell.label, folder)
    settings = wanted.inputs.recipe.evaluate
    if not settings.latency_rounds:
        return {label: [] for label in ("dense", *first)}
    hashes = {label: read_row(folder).row.weights_sha256 for label, folder in first.items()}
    key = {"weights": hashes, "batch": settings.latency_batch, "rounds": settings.latency_rounds, "lower": wanted.lower}
    key["machine"] = environment(resolve_device(wanted.inputs.recipe.train.device))  # which the report names
    if wanted.max_error is not None:
        key["max_error"] = wanted.max_error
    path = out / "latency.json"
    kept: dict[str, Any] = {}
    with suppress(CompressorError):  # a damaged file is measured again
        kept = files.read_json(path)
    if kept.get("key") == key:
        with suppress(ValidationError):
            return TypeAdapter(dict[str, list[Latency]]).validate_python(kept.get("entries"))
    models = {"dense": copy.deepcopy(wanted.inputs.model)}
    for label, folder in first.items():
        models[label] = saving.load(folder / RUN / "model", copy.deepcopy(wanted.inputs.model))
    entries = yield from timed(wanted.inputs, models, wanted.lower, wanted.max_error)
    listed = {label: [entry.as_json() for entry in own] for label, own in entries.items()}
    files.write_json(path, {"key": key, "entries": listed})
    return entries
