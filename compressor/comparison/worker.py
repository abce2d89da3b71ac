"""Jobs of a comparison, in a process of their own: `python -m compressor.comparison`, with folders on stdin, as JSON, a line each.

Such a folder has `job.json`. Progress goes to stdout, a JSON object a line, and `ENDED` after each job; what is to be said of a
failure to `error.txt`. The process stops after a checkpoint on SIGTERM, and when its stdin ends: then the one that started it is gone.
"""

from __future__ import annotations

import copy
import json
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor import files, processes, saving, validation
from compressor.adapter import to_device
from compressor.comparison.made_of import KEY, changed, made_of
from compressor.discovery import blamed
from compressor.environment import environment
from compressor.errors import CompressorError, first_line, memory_behind
from compressor.progress import Progress
from compressor.quality import drift, evaluate
from compressor.quality.similarity import ssim
from compressor.recipe import Recipe
from compressor.report.compared import Judged
from compressor.report.content import DENSE, Drift, Environment, Quality, Row
from compressor.runs import directory, facts, finish
from compressor.runs import run as runs
from compressor.runs.inputs import Inputs, load_inputs, same_source, sharing
from compressor.runs.judge import Judge, Seen, Variant
from compressor.runs.one_shot import FOLDER, layer_rows, one_shot
from compressor.runs.rows import trained_as
from compressor.seeds import generator
from compressor.weights import weights_sha256

JOB, ROW, SEEN, RUN = "job.json", "row.json", "seen.safetensors", "run"
ENDED = "ended"
TIMES = tuple((index + 0.5) / 10 for index in range(10))
_LOOKED_AT = 128
_PATIENCE = 60.0  # seconds
_AGAIN = "Remove {path}: what is missing is judged again."


def read_row(folder: Path) -> Judged:
    """What a finished job left. Raises CompressorError, with what to do, where it is damaged, or of other weights than are there."""
    path, model = folder / ROW, folder / RUN / "model"
    found = validation.from_file(Judged, path, "the row of a finished cell", _AGAIN.format(path=path))
    if (model / "config.json").is_file() and saving.read_config(model).weights_sha256 != found.row.weights_sha256:
        raise CompressorError(
            f"{path}: it is of other weights than those in {model}", f"Remove {folder}; it is made again."
        )
    return found


def dense(found: Inputs, folder: Path, steps: list[int]) -> Generator[Progress, None, None]:
    """Judge the dense model, and keep what it drew and predicted for the others to be held against."""
    judge = Judge(found)
    yield from judge.look()
    variant = Variant(DENSE, found.model.to(judge.device).eval(), found.weights_sha256)
    seen = yield from judge.seen(variant)
    row = yield from judge.row(variant, seen, None, folder / "samples.png")
    images = {} if seen.images is None else {"images": seen.images.contiguous()}
    save_file({**images, "predictions": seen.predictions.contiguous()}, folder / SEEN)
    by_steps = yield from _by_steps(judge, variant, steps)
    judged = Judged(row=row, by_steps=by_steps, metric=judge.metric, seen_sha256=files.file_sha256(folder / SEEN))
    files.write_json(folder / ROW, judged.as_json())


def cell(
    found: Inputs, folder: Path, job: Mapping[str, Any], host: str | None = None
) -> Generator[Progress, None, None]:
    """Fine-tune, then judge against the dense model. `host`: what this computer is called, where it is to be recorded."""
    run = folder / RUN
    with directory.locked(run, _PATIENCE):  # a former worker may be about to end: nobody waits for it any more
        resumed = (run / "run.json").is_file()
        final = yield from runs.train(found, run, resume=resumed, keep_one_shot=job["first"])
    judge = Judge(found)
    yield from judge.look()
    if job.get("tuning"):  # on other noise than the dense model's row
        given = Seen(None, judge.predicted(found.working.to(judge.device).eval()))
    else:
        given = _seen_of(folder / job["dense"])
    if final is None:
        final = saving.load(run / "model", copy.deepcopy(found.model))
    trained = facts.read(run)
    config = saving.read_config(run / "model")
    variant = Variant(
        job["label"], final.to(judge.device).eval(), config.weights_sha256, config.patterns, trained_as(trained)
    )
    row = yield from _row(judge, variant, given, folder / "samples.png")
    by_steps = yield from _by_steps(judge, variant, job["sampler_steps"])
    judged = Judged(row=row, by_steps=by_steps, patterns=tuple(sorted(set(config.patterns.values()))))
    if job["first"]:
        yield Progress("one-shot", 0, 1)
        bare = one_shot(found, run / FOLDER)
        model = bare.model.to(judge.device)
        without = Variant(f"{job['label']} one-shot", model, weights_sha256(model), bare.patterns)
        further: dict[str, Any] = {"one_shot": (yield from _row(judge, without, given, None))}
        further["layers"] = layer_rows(bare.layers, config.patterns, final, trained["train"]["flipped"])
        if bare.patterns:
            further["sensitivity"] = yield from _sensitivity(judge, model, list(bare.patterns))
        judged = judged.model_copy(update=further)
    judged = judged.model_copy(update={"environment": Environment(**environment(judge.device))})
    if host is not None:
        judged = judged.model_copy(update={"host": host})
    files.write_json(folder / ROW, judged.as_json())
    finish.settle(run)


def _seen_of(dense: Path) -> Seen:
    """What the model of the finished job `dense` drew and predicted. Raises CompressorError where that is damaged."""
    path, written = dense / SEEN, read_row(dense).seen_sha256
    if written is not None and files.file_sha256(path) != written:  # of files of before, nobody knows
        raise CompressorError(f"{path}: its bytes are not those that were saved", _AGAIN.format(path=dense / ROW))
    stored = load_file(path)
    return Seen(stored.get("images"), stored["predictions"])


def _row(judge: Judge, variant: Variant, dense: Seen, sheet: Path | None) -> Generator[Progress, None, Row]:
    """The report row, with drift by time and by structural similarity."""
    seen = yield from judge.seen(variant)
    row = yield from judge.row(variant, seen, dense, sheet)
    drifts = list(row.drift)
    if seen.images is not None and dense.images is not None:
        value = float(ssim(seen.images, dense.images).mean())
        drifts.append(Drift(metric="ssim", value=value, samples=len(seen.images)))
    yield Progress(f"times of {variant.name}", 0, 1)
    by_time = {"by_time": tuple((time, _error_at(judge, variant.working, time)) for time in TIMES)}
    drifts = [d.model_copy(update=by_time) if d.metric == "prediction_error" else d for d in drifts]
    return row.model_copy(update={"drift": tuple(drifts)})


@torch.no_grad()
def _error_at(judge: Judge, model: nn.Module, time: float) -> float:
    """The prediction error on real images noised at `time`."""
    found = judge.inputs
    batch = found.data.take(torch.arange(min(_LOOKED_AT, len(found.data))))
    given, _ = found.adapter.noised_at(batch, time, generator(found.recipe.evaluate.seed, "time", round(1000 * time)))
    given = to_device(given, judge.device)
    expected = found.adapter.predict(found.working.to(judge.device).eval(), given).float()
    return drift.prediction_error(found.adapter.predict(model, given).float(), expected).value


def _by_steps(judge: Judge, variant: Variant, steps: list[int]) -> Generator[Progress, None, dict[str, Quality]]:
    """The metric at other numbers of sampler steps."""
    found, entries = judge.inputs, {}
    if found.metric is not None and judge.reference is not None:
        for count in steps:
            images = yield from judge.drawn(f"{variant.name} in {count} steps", variant.working, count)
            settings = found.recipe.evaluate.model_copy(update={"sampler_steps": count})
            entries[str(count)] = evaluate.quality(found.metric, images, judge.reference.gaussian, settings)
    return entries


@torch.no_grad()
def _sensitivity(judge: Judge, bare: nn.Module, names: list[str]) -> Generator[Progress, None, dict[str, float]]:
    """For each weight, the prediction error where it alone is as the method leaves it without fine-tuning."""
    model = copy.deepcopy(judge.inputs.working).to(judge.device).eval()
    own, pruned = dict(model.named_parameters()), dict(bare.named_parameters())
    found = {}
    for done, name in enumerate(names):
        yield Progress("sensitivity", done, len(names), name)
        if name not in own or own[name].shape != pruned[name].shape:
            continue
        kept = own[name].detach().clone()
        own[name].data.copy_(pruned[name])
        found[name] = sum(_error_at(judge, model, time) for time in (0.1, 0.5, 0.9)) / 3
        own[name].data.copy_(kept)
    return found


def main(given: TextIO, told: TextIO, host: str | None = None) -> int:
    """Do the jobs of the folders whose names `given` has, a line each; what there is to say of them goes to `told`.

    The exit code is 0, or 143 where a job was stopped.
    """
    folders: queue.Queue[Path | None] = queue.Queue()
    busy = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        try:
            for line in given:
                folders.put(Path(json.loads(line)))
        finally:
            folders.put(None)
            if busy.is_set():
                os.kill(os.getpid(), signal.SIGTERM)  # nobody waits for the job

    def tell(text: str) -> None:
        try:
            print(text, file=told, flush=True)
        except OSError:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    loaded: Inputs | None = None
    try:
        with processes.terminated():
            while (folder := folders.get()) is not None:
                busy.set()
                loaded = _tried(folder, loaded, tell, host)
                busy.clear()
                tell(ENDED)
    except processes.Interrupted as interrupted:
        return interrupted.exit_code
    return 0


def _tried(folder: Path, loaded: Inputs | None, tell: Callable[[str], None], host: str | None) -> Inputs | None:
    """`_done`; why it failed is left in the folder."""
    with (folder / "error.txt").open("w", encoding="utf-8") as errors:
        os.dup2(errors.fileno(), 2)  # what libraries say of their end is kept with the job
    try:
        found = _done(folder, loaded, tell, host)
    except (Exception, SystemExit) as error:  # whatever a model, a plugin or the machine raises: the others shall go on
        known = isinstance(error, CompressorError) and memory_behind(error) is None
        reason = error if known else blamed(error)
        text = f"{first_line(reason)}\n\n{traceback.format_exc()}"
        (folder / "error.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
        return loaded
    (folder / "error.txt").unlink(missing_ok=True)
    return found


def _done(folder: Path, loaded: Inputs | None, tell: Callable[[str], None], host: str | None) -> Inputs:
    """Do the job of `folder`, with the model and the data of the one before (`loaded`) where they are the same."""
    job = files.read_json(folder / JOB)
    recipe = validation.validated(Recipe, job["recipe"], str(folder / JOB))
    if loaded is not None and same_source(recipe, loaded.recipe):
        found = sharing(recipe, loaded, loaded.adapter)
    else:
        found = load_inputs(recipe)
    if what := changed(job.get(KEY), made_of(found, recipe, trains=job["kind"] == "cell")):
        raise CompressorError(
            f"since the comparison was called, {what}", "Put back what it was, and give the same command again."
        )
    events = dense(found, folder, job["sampler_steps"]) if job["kind"] == "dense" else cell(found, folder, job, host)
    processes.drive(events, lambda event: tell(json.dumps(asdict(event))), processes.TERMINATING)
    return found
