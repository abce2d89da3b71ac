"""A run: from a recipe to a directory with a checked model, samples and a report. `execute` yields progress.

Directory: `recipe.yaml` (resolved), `run.json` (versions, hardware, hashes), `metrics.jsonl`, `checkpoint-<step>/`,
`model/` (what `compressor.load` reads), `pipeline/` (what diffusers reads, where the model is one of its), `samples/`,
`report.json`, `report.md`, `report.html`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from compressor import files, saving
from compressor import recipe as recipes
from compressor.adapter import Adapter
from compressor.discovery import is_file_reference
from compressor.environment import give_back
from compressor.errors import CompressorError, MemoryShortError, ReshapedError, resume_command
from compressor.processes import Interrupted, team
from compressor.progress import Progress
from compressor.recipe import Recipe
from compressor.report import read_report, render
from compressor.runs import facts as run_facts
from compressor.runs import finish, one_shot, space
from compressor.runs.directory import (
    NO_PIPELINE,
    RECIPE,
    clear,
    is_own,
    locked,
    refuse_own_sources,
    refuse_used_directory,
)
from compressor.runs.inputs import Inputs
from compressor.runs.pace import paced
from compressor.runs.paired import PairedJudge
from compressor.runs.rows import build_report
from compressor.runs.speed import measured
from compressor.runs.trackers import Tracking
from compressor.sparsity.surgery import surgery_of
from compressor.training.engine import FineTuning, Result, Step, steps

_CHECKPOINT = "checkpoint-"


def execute(
    inputs: Inputs, out: Path, *, resume: bool = False, overwrite: bool = False, log_with: Sequence[str] = ()
) -> Generator[Progress, None, None]:
    """Carry out the run in `out`, yielding its progress. The caller may throw `Interrupted` into it at any time.

    Steps are sent to the trackers `log_with` too (`trackers.checked`), whose failures are said and change nothing.

    When it ends, the model and the report are there and are what was written (`finish.unfinished`); else it raises CompressorError.
    Of the processes of a launch, all call it: they share training, sampling and drift; the first one writes, and does the rest alone.
    """
    with files.enough(out):
        yield from paced(inputs, _executed(inputs, out, resume, overwrite, log_with))


def _executed(
    inputs: Inputs, out: Path, resume: bool, overwrite: bool, log_with: Sequence[str]
) -> Generator[Progress, None, None]:
    with locked(out) if team().leads else nullcontext():
        final = yield from train(inputs, out, resume=resume, overwrite=overwrite, log_with=log_with)
        yield from _reported(inputs, out, final, inputs.recipe.lower)


def judge_again(inputs: Inputs, out: Path, before: Recipe) -> Generator[Progress, None, None]:
    """Make the report of the finished run in `out` anew, as `inputs` say how to evaluate; `before` is its recipe until now.

    Raises CompressorError where anything but that is another, or the run is not finished. What was benched is benched again.
    """
    with files.enough(out), locked(out):
        if not _is_whole(out / "model"):
            raise CompressorError(f"{out}: no whole model/", f"Finish the run first: {resume_command(out)}")
        facts = run_facts.read(out)
        kept = replace(inputs, recipe=inputs.recipe.model_copy(update={"evaluate": before.evaluate}))
        run_facts.refuse_other(facts, kept, out)
        benched = (out / "report.json").is_file() and read_report(out / "report.json").lowering is not None
        yield from _reported(inputs, out, None, inputs.recipe.lower or benched)
        run_facts.write(out, {**facts, **inputs.identity()})


def _reported(inputs: Inputs, out: Path, final: nn.Module | None, lowers: bool) -> Generator[Progress, None, None]:
    """Evaluate what is in `out`, or `final`, which is that, and write its report. The caller holds the directory."""
    finished = yield from build_report(inputs, out, final)
    if finished is None:  # not the first process: its part is done
        return
    if lowers:
        recipe = inputs.recipe
        benched = yield from measured(finished, [finished.batch], recipe.train.dtype, **recipe.lowering.model_dump())
        if inputs.piped is not None and inputs.recipe.evaluate.latency_rounds:
            judge = PairedJudge(inputs, inputs.piped)
            yield from judge.whole_lowered(finished.reported(benched.report), benched.plan)
    render(out)
    finish.refuse_lost(out)
    yield Progress("report", 1, 1)
    finish.clean(out)


def train(
    inputs: Inputs,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_one_shot: bool = True,
    log_with: Sequence[str] = (),
) -> Generator[Progress, None, nn.Module | None]:
    """The first part of `execute`: up to a whole `model/`. The caller holds the directory (`locked`).

    Returns the model that was trained; None where `model/` was whole already. With `keep_one_shot` the model before the first
    step stays in the directory, for the report.
    """
    here = team()
    facts = (yield from _begun(inputs, out, resume, overwrite)) if here.leads else {}
    whole = here.shared(here.leads and "train" in facts and _is_whole(out / "model"))
    if whole:
        there = (out / "pipeline").is_dir() or (out / NO_PIPELINE).is_file()
        if here.leads and inputs.adapter.writes_pipeline and not there:
            commit_pipeline(inputs.adapter, saving.load(out / "model", copy.deepcopy(inputs.model)), out)
        return None
    if here.leads and (out / "model").exists():
        yield Progress("fine-tune", 0, inputs.recipe.train.steps, "model/ is damaged and is made again")
    return (yield from _fine_tune(inputs, out, facts, keep_one_shot, log_with))


def _begun(inputs: Inputs, out: Path, resume: bool, overwrite: bool) -> Generator[Progress, None, dict[str, Any]]:
    """The facts of the run in `out`, which begins or goes on."""
    if resume:
        facts = yield from _resumed(inputs, out)
    else:
        refuse_used_directory(out, overwrite)
        refuse_own_sources(inputs.recipe, out, is_own if overwrite else None)
        clear(out)
        facts = run_facts.facts_of(inputs)
        run_facts.write(out, facts)
    text = recipes.dump(inputs.recipe)
    if not (out / RECIPE).is_file() or (out / RECIPE).read_text(encoding="utf-8") != text:
        files.write_text(out / RECIPE, text)  # last: with it, a run has begun; later, it may be evaluated otherwise
    return facts


def _resumed(inputs: Inputs, out: Path) -> Generator[Progress, None, dict[str, Any]]:
    """The facts of the run in `out`, which is that of `inputs`, with what has changed since. What processes that died left is
    cleared, or put back where it is whole."""
    files.recover_all(out)
    for leftover in files.strays(out):
        files.remove(leftover)
    now = run_facts.facts_of(inputs)
    if not (out / run_facts.FILE).is_file():
        run_facts.write(out, now)
        return now
    facts = run_facts.read(out)
    run_facts.refuse_other(facts, inputs, out)
    trained = facts["train"]["steps"] if "train" in facts and _is_whole(out / "model") else None
    done = trained if trained is not None else next((_step(folder) for folder in _checkpoints(out)), 0)
    if lines := run_facts.resumed(facts, now, done):
        run_facts.write(out, facts)
        for line in lines:
            yield Progress("prepare", 0, 1, f"changed since the run began: {line}")
    return facts


def _fine_tune(
    inputs: Inputs, out: Path, facts: Mapping[str, Any], keep_one_shot: bool, log_with: Sequence[str]
) -> Generator[Progress, None, nn.Module]:
    """Train from the newest whole checkpoint, or from the start, and commit `model/`."""
    settings, here = inputs.recipe.train, team()
    previous, skipped = _newest_checkpoint(inputs, out)
    for note in skipped:
        yield Progress("fine-tune", 0, settings.steps, note)
    yield Progress("prepare", 0, 1)
    run = inputs.fine_tuning(previous["run"] if previous else None)
    if previous is None:
        inputs.refuse_forgetful(run)
    every = inputs.recipe.checkpoint_every
    space.refuse_full_of(run, out, every, len(_checkpoints(out)), keep_one_shot)
    if keep_one_shot and settings.steps and not run.done:
        untrained = run.one_shot()
        if here.leads:
            one_shot.keep(untrained, out / one_shot.FOLDER, inputs)
        del untrained
    seconds = float(previous["seconds"]) if previous else 0.0
    del previous  # which is in `run` now
    if here.leads and (lost := run.done - _keep_first_lines(out / "metrics.jsonl", run.done)):
        yield Progress("fine-tune", 0, settings.steps, f"metrics.jsonl lacks {lost} of the steps before")
    made = run_facts.facts_of(inputs)
    tracking = Tracking(log_with if here.leads else (), out, inputs.recipe.model_dump(mode="json"))
    with (out / "metrics.jsonl" if here.leads else Path(os.devnull)).open("a", encoding="utf-8") as metrics:
        began = time.perf_counter()
        try:
            if run.done < settings.steps:  # what was prepared is worth a checkpoint, too
                yield from _stoppable(Progress("fine-tune", run.done, settings.steps, unbroken=True))
            for record in steps(run):
                metrics.write(_line(record))
                for failure in tracking.log(record):
                    yield Progress("trackers", 1, 1, failure)
                if record.step % every == 0 and record.step < record.steps:
                    seconds, began = seconds + time.perf_counter() - began, time.perf_counter()
                    metrics.flush()
                    _checkpoint(out, run, seconds, made)
                yield from _stoppable(Progress("fine-tune", record.step, record.steps, _note(record), unbroken=True))
        except Interrupted:
            metrics.flush()
            _checkpoint(out, run, seconds + time.perf_counter() - began, made)
            raise
        finally:
            failures = tracking.finish()
        for failure in failures:
            yield Progress("trackers", 1, 1, failure)
        seconds += time.perf_counter() - began
    result = run.finish()
    if here.leads:
        lost = _skipped(out / "metrics.jsonl")
        summary = {"steps": run.done, "seconds": seconds, "skipped": lost, "flipped": dict(result.flipped)}
        run_facts.write(out, {**facts, "train": summary})
    del run  # what it trained with is several times the model
    give_back()
    if here.leads:
        if keep_one_shot and not settings.steps:  # what it is then is not made twice
            one_shot.keep(result, out / one_shot.FOLDER, inputs)
        _commit_model(inputs, out, result)
    return result.model


def _stoppable(event: Progress) -> Generator[Progress, None, None]:
    """`event`, after a step. Where Interrupted is thrown in at it, all processes of the launch get it after this very step, whenever
    each of them has heard the signal."""
    stop = 0
    try:
        yield event
    except Interrupted as interrupted:
        stop = 1 + interrupted.exit_code
    if stop := team().largest(stop):
        raise Interrupted(stop - 1)


def _line(record: Step) -> str:
    """A line of the metrics file; numbers that are not finite become null, as JSON has no word for them."""
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(record).items()}
    return json.dumps(values) + "\n"


def _skipped(path: Path) -> int:
    """How many steps of a metrics file changed nothing, as their loss or gradient was not finite."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return sum('"loss": null' in line or '"grad_norm": null' in line for line in lines)


def _note(record: Step) -> str:
    skipped = not (math.isfinite(record.loss) and math.isfinite(record.grad_norm))
    return f"loss {record.loss:.4f}" + (", not finite: step skipped" if skipped else "")


def _commit_model(inputs: Inputs, out: Path, result: Result) -> None:
    adapter = inputs.adapter
    commit_pipeline(adapter, result.model, out)
    # a model of the user's own file has no name to load it by: a saved model never says what to run
    name = None if is_file_reference(inputs.recipe.model) else inputs.recipe.model
    if inputs.piped is not None and not adapter.architecture:  # a part that no registered model stands for
        name = None
    if (out / "model").exists() and not _is_whole(out / "model"):
        files.remove(out / "model")  # only now: it may be mended while this run makes it again
    saving.save(out / "model", result.model, result.masks, name, architecture=adapter.architecture)


def commit_pipeline(adapter: Adapter, model: nn.Module, out: Path) -> None:
    """Write `pipeline/` into `out`, where models of the family have one; `pipeline.txt`, which says why, where this one has none."""
    if not adapter.writes_pipeline:
        return
    try:
        if surgery_of(model) is not None and not adapter.writes_reshaped:
            raise ReshapedError(
                f"{adapter.name} writes models of their original shape", "Load it with compressor.load."
            )
        files.commit(out / "pipeline", lambda folder: adapter.write_pipeline(model, folder), listed=False)
    except ReshapedError as error:
        files.write_text(out / NO_PIPELINE, f"There is no pipeline/ here: {error.message}.\n{error.hint}\n")


def _checkpoint(out: Path, run: FineTuning, seconds: float, made: Mapping[str, Any]) -> None:
    """Commit the state of `run`, with what its run is of; then remove all but the newest two, and those of later steps, which were
    damaged when this run went on without them."""
    state = {"run": run.state(), "seconds": seconds, "made": made}
    if not team().leads:
        return
    files.sync(out / "metrics.jsonl")  # whose lines up to here belong to it
    files.commit(
        out / f"{_CHECKPOINT}{run.done}",
        lambda folder: saving.save_state(folder, state),
        needs=space.nbytes(state),
    )
    later = [folder for folder in _checkpoints(out) if _step(folder) > run.done]
    older = [folder for folder in _checkpoints(out) if _step(folder) <= run.done][2:]
    for folder in (*later, *older):
        shutil.rmtree(folder, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_CHECKPOINT))


def _checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    found = [p for p in out.glob(f"{_CHECKPOINT}*") if p.name.removeprefix(_CHECKPOINT).isdecimal()]
    return sorted(found, key=_step, reverse=True)


def _newest_checkpoint(inputs: Inputs, out: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not.

    Raises CompressorError where it is of another run than that of `inputs`.
    """
    skipped: list[str] = []
    here, found = team(), None
    for folder in _checkpoints(out) if here.leads else ():
        try:
            state = _read_checkpoint(folder)
        except MemoryShortError:  # which says nothing of the checkpoint
            raise
        except CompressorError as error:
            skipped.append(f"skipped {folder.name}: {error.message}")
            continue
        run_facts.refuse_other_checkpoint(state.get("made"), inputs, folder)
        found = folder.name, state
        break
    name = here.shared(None if found is None else found[0])
    if name is None or found is not None:
        return (None if found is None else found[1]), skipped
    try:
        return _read_checkpoint(out / name), skipped
    except CompressorError as error:
        raise CompressorError(
            f"{error.message}: process {here.rank} does not see what the first one reads",
            "Processes on several nodes need a folder that all nodes share.",
        ) from error


def _read_checkpoint(folder: Path) -> dict[str, Any]:
    files.verify(folder, needs=("state.json", "state.safetensors"))
    return saving.load_state(folder, mapped=True)


def _is_whole(folder: Path) -> bool:
    try:
        files.verify(folder, needs=saving.MODEL_FILES)
    except CompressorError:
        return False
    return True


def _keep_first_lines(path: Path, count: int) -> int:
    """Cut a metrics file back to the steps that the checkpoint knows; how many lines it has then."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if path.exists() else []
    files.write_text(path, "".join(lines))
    return len(lines)
