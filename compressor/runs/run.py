"""A run: from a recipe to a directory with a checked model, samples and a report. `execute` yields progress.

Directory: `recipe.yaml` (resolved), `run.json` (versions, hardware, hashes), `metrics.jsonl`, `checkpoint-<step>/`,
`model/` (what `compressor.load` reads), `pipeline/` (what diffusers reads, where the model is one of its), `samples/`,
`report.json`, `report.md`, `report.html`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from compressor import files, saving
from compressor import recipe as recipes
from compressor.adapter import Adapter
from compressor.discovery import is_file_reference
from compressor.environment import environment, resolve_device
from compressor.errors import CompressorError, ReshapedError
from compressor.processes import Interrupted
from compressor.progress import Progress
from compressor.report import render
from compressor.runs import one_shot
from compressor.runs.directory import NO_PIPELINE, clear, locked, refuse_used_directory
from compressor.runs.inputs import Inputs
from compressor.runs.pace import paced
from compressor.runs.paired import PairedJudge
from compressor.runs.rows import build_report
from compressor.runs.speed import measured
from compressor.sparsity.surgery import surgery_of
from compressor.training.engine import FineTuning, Result, Step, steps


def execute(
    inputs: Inputs, out: Path, *, resume: bool = False, overwrite: bool = False
) -> Generator[Progress, None, None]:
    """Carry out the run in `out`, yielding its progress. The caller may throw `Interrupted` into it at any time."""
    yield from paced(inputs, _executed(inputs, out, resume, overwrite))


def _executed(inputs: Inputs, out: Path, resume: bool, overwrite: bool) -> Generator[Progress, None, None]:
    with locked(out):
        final = yield from train(inputs, out, resume=resume, overwrite=overwrite)
        finished = yield from build_report(inputs, out, final)
        if inputs.recipe.lower:
            benched = yield from measured(finished, [finished.batch], inputs.recipe.train.dtype)
            if inputs.piped is not None and inputs.recipe.evaluate.latency_rounds:
                judge = PairedJudge(inputs, inputs.piped)
                yield from judge.whole_lowered(finished.reported(benched.report), benched.plan)
        render(out)
        yield Progress("report", 1, 1)
        for folder in (*out.glob("checkpoint-*"), out / one_shot.FOLDER):
            shutil.rmtree(folder, ignore_errors=True)


def train(
    inputs: Inputs, out: Path, *, resume: bool = False, overwrite: bool = False, keep_one_shot: bool = True
) -> Generator[Progress, None, nn.Module | None]:
    """The first part of `execute`: up to a whole `model/`. The caller holds the directory (`locked`).

    Returns the model that was trained; None where `model/` was whole already. With `keep_one_shot` the model before the first
    step stays in the directory, for the report.
    """
    if resume:
        _check_identity(inputs, out)
        for leftover in out.glob(".partial-*"):  # of a process that died while saving
            files.remove(leftover)
    else:
        refuse_used_directory(out, overwrite)
        clear(out)
        identity = {
            **environment(resolve_device(inputs.recipe.train.device)),
            **inputs.identity(),
            "seed": inputs.recipe.train.seed,
        }
        files.write_json(out / "run.json", identity)
        files.write_text(out / "recipe.yaml", recipes.dump(inputs.recipe))
    if _is_whole(out / "model"):
        return None
    if (out / "model").exists():
        yield Progress("fine-tune", 0, inputs.recipe.train.steps, "model/ is damaged and is made again")
    return (yield from _fine_tune(inputs, out, keep_one_shot))


def _fine_tune(inputs: Inputs, out: Path, keep_one_shot: bool) -> Generator[Progress, None, nn.Module]:
    """Train from the newest whole checkpoint, or from the start, and commit `model/`."""
    settings = inputs.recipe.train
    previous, skipped = _newest_checkpoint(out)
    for note in skipped:
        yield Progress("fine-tune", 0, settings.steps, note)
    yield Progress("prepare", 0, 1)
    run = inputs.fine_tuning(previous["run"] if previous else None)
    if keep_one_shot and not run.done:
        one_shot.keep(run.one_shot(), out / one_shot.FOLDER)
    seconds = float(previous["seconds"]) if previous else 0.0
    _keep_first_lines(out / "metrics.jsonl", run.done)
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
        began = time.perf_counter()
        try:
            if run.done < settings.steps:  # what was prepared is worth a checkpoint, too
                yield Progress("fine-tune", run.done, settings.steps, unbroken=True)
            for record in steps(run):
                metrics.write(_line(record))
                if record.step % inputs.recipe.checkpoint_every == 0 and record.step < record.steps:
                    seconds, began = seconds + time.perf_counter() - began, time.perf_counter()
                    metrics.flush()
                    _checkpoint(out, run, seconds)
                yield Progress("fine-tune", record.step, record.steps, _note(record), unbroken=True)
        except Interrupted:
            metrics.flush()
            _checkpoint(out, run, seconds + time.perf_counter() - began)
            raise
        seconds += time.perf_counter() - began
    result = run.finish()
    _commit_model(inputs, out, result, run.done, seconds)
    return result.model


def _line(record: Step) -> str:
    """A line of the metrics file; numbers that are not finite become null, as JSON has no word for them."""
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(record).items()}
    return json.dumps(values) + "\n"


def _note(record: Step) -> str:
    skipped = not (math.isfinite(record.loss) and math.isfinite(record.grad_norm))
    return f"loss {record.loss:.4f}" + (", not finite: step skipped" if skipped else "")


def _commit_model(inputs: Inputs, out: Path, result: Result, done: int, seconds: float) -> None:
    summary = {"steps": done, "seconds": seconds, "flipped": dict(result.flipped)}
    files.write_json(out / "run.json", {**files.read_json(out / "run.json"), "train": summary})
    adapter = inputs.adapter
    commit_pipeline(adapter, result.model, out)
    # a model of the user's own file has no name to load it by: a saved model never says what to run
    name = None if is_file_reference(inputs.recipe.model) else inputs.recipe.model
    if inputs.piped is not None and not adapter.architecture:  # a part that no registered model stands for
        name = None
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


def _checkpoint(out: Path, run: FineTuning, seconds: float) -> None:
    target = out / f"checkpoint-{run.done}"
    state = {"run": run.state(), "seconds": seconds}
    files.commit(target, lambda folder: saving.save_state(folder, state))
    for older in _checkpoints(out)[2:]:
        shutil.rmtree(older, ignore_errors=True)


def _checkpoints(out: Path) -> list[Path]:
    """The checkpoint folders, newest first."""
    found = [p for p in out.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def _newest_checkpoint(out: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    skipped: list[str] = []
    for folder in _checkpoints(out):
        try:
            files.verify(folder, needs=("state.json", "state.safetensors"))
            return saving.load_state(folder), skipped
        except CompressorError as error:
            skipped.append(f"skipped {folder.name}: {error.message}")
    return None, skipped


def _is_whole(folder: Path) -> bool:
    try:
        files.verify(folder, needs=saving.MODEL_FILES)
    except CompressorError:
        return False
    return True


def _keep_first_lines(path: Path, count: int) -> None:
    """Cut a metrics file back to the steps that the checkpoint knows."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:count] if path.exists() else []
    files.write_text(path, "".join(lines))


def _check_identity(inputs: Inputs, out: Path) -> None:
    before, now = files.read_json(out / "run.json"), inputs.identity()
    for key, value in now.items():
        if before.get(key) != value:
            raise CompressorError(
                f"{out}: the {key.removesuffix('_sha256')} changed: its hash was {before.get(key)}, and is now {value}",
                "Resume with the same files and settings, or start a new run.",
            )
