"""One job of a comparison, in a process of its own: `python -m compressor.comparison.worker FOLDER`.

The folder has `job.json`. Progress goes to stdout, a JSON object a line; what is to be said of a failure to `error.txt`.
The process stops after a checkpoint on SIGTERM, and when its stdin ends: then the one that started it is gone.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor import files, saving, validation
from compressor.adapter import to_device
from compressor.errors import CompressorError, first_line
from compressor.progress import Progress
from compressor.quality import drift, evaluate
from compressor.quality.similarity import ssim
from compressor.recipe import Recipe
from compressor.runs import directory
from compressor.runs import run as runs
from compressor.runs.inputs import Inputs, load_inputs, one_shot
from compressor.runs.judge import Judge, Seen
from compressor.runs.rows import layer_rows
from compressor.seeds import generator

JOB, ROW, SEEN, RUN = "job.json", "row.json", "seen.safetensors", "run"
TIMES = tuple((index + 0.5) / 10 for index in range(10))
_LOOKED_AT = 128


def read_row(folder: Path) -> dict[str, Any]:
    """What a finished job left. Raises CompressorError, with what to do, where it is damaged."""
    path = folder / ROW
    hint = f"Remove {path}: what is missing is judged again."
    try:
        found = files.read_json(path)
    except CompressorError as error:
        raise CompressorError(error.message, hint) from error
    row = found.get("row")
    if not isinstance(row, dict) or not {"weights_sha256", "quality", "drift", "train", "macs_dense"} <= row.keys():
        raise CompressorError(f"{path}: not the row of a finished cell", hint)
    return found


def dense(found: Inputs, folder: Path, steps: list[int]) -> Iterator[Progress]:
    """Judge the dense model, and keep what it drew and predicted for the others to be held against."""
    judge = Judge(found)
    yield from judge.look()
    model = found.model.to(judge.device).eval()
    row = judge.costs("dense", model, {}, {"steps": 0, "seconds": 0.0})
    seen = yield from judge.judge(row, model, folder / "samples.png")
    images = {} if seen.images is None else {"images": seen.images.contiguous()}
    save_file({**images, "predictions": seen.predictions.contiguous()}, folder / SEEN)
    by_steps = yield from _by_steps(judge, "dense", model, steps)
    metric = None
    if found.metric is not None and judge.floor is not None:
        metric = {"name": found.metric.name, "extractor_sha256": found.metric.sha256, "floor": judge.floor}
    files.write_json(folder / ROW, {"row": row, "by_steps": by_steps, "metric": metric})


def cell(found: Inputs, folder: Path, job: Mapping[str, Any]) -> Iterator[Progress]:
    """Fine-tune, then judge against the dense model."""
    run = folder / RUN
    with directory.locked(run):
        yield from runs.train(found, run, resume=(run / "run.json").is_file())
    seen = load_file(Path(job["dense"]) / SEEN)
    judge = Judge(found, Seen(seen.get("images"), seen["predictions"]))
    yield from judge.look()
    final = saving.load(run / "model", copy.deepcopy(found.model)).to(judge.device)
    trained = files.read_json(run / "run.json")["train"]
    train = {"steps": trained["steps"], "seconds": round(trained["seconds"], 3)}
    patterns = saving.read_config(run / "model").patterns
    content: dict[str, Any] = {"patterns": sorted(set(patterns.values()))}
    content["row"] = yield from _row(judge, job["label"], final, patterns, train, folder / "samples.png")
    content["by_steps"] = yield from _by_steps(judge, job["label"], final, job["sampler_steps"])
    if job["first"]:
        yield Progress("one-shot", 0, 1)
        result = one_shot(found)
        masks = {name: str(mask.pattern) for name, mask in result.masks.items()}
        bare = result.model.to(judge.device)
        content["one_shot"] = yield from _row(
            judge, f"{job['label']} one-shot", bare, masks, {"steps": 0, "seconds": 0.0}, None
        )
        content["layers"] = layer_rows(result, patterns, final, trained["flipped"])
        if masks:
            content["sensitivity"] = yield from _sensitivity(judge, bare, list(masks))
    files.write_json(folder / ROW, content)


def _row(
    judge: Judge, name: str, model: nn.Module, patterns: Mapping[str, str], train: Mapping[str, Any], sheet: Path | None
) -> Generator[Progress, None, dict[str, Any]]:
    """The report row, with drift by time and by structural similarity."""
    row = judge.costs(name, model, patterns, train)
    seen = yield from judge.judge(row, model, sheet)
    dense_images = judge.dense.images if judge.dense is not None else None
    if seen.images is not None and dense_images is not None:
        value = float(ssim(seen.images, dense_images).mean())
        row["drift"].append({"metric": "ssim", "value": value, "samples": len(seen.images)})
    yield Progress(f"times of {name}", 0, 1)
    for entry in row["drift"]:
        if entry["metric"] == "prediction_error":
            entry["by_time"] = [[time, _error_at(judge, model, time)] for time in TIMES]
    return row


@torch.no_grad()
def _error_at(judge: Judge, model: nn.Module, time: float) -> float:
    """The prediction error on real images noised at `time`."""
    found = judge.inputs
    batch = found.data.take(torch.arange(min(_LOOKED_AT, len(found.data))))
    given, _ = found.adapter.noised_at(batch, time, generator(found.recipe.evaluate.seed, "time", round(1000 * time)))
    given = to_device(given, judge.device)
    expected = found.adapter.predict(found.model.to(judge.device).eval(), given).float()
    return float(drift.prediction_error(found.adapter.predict(model, given).float(), expected)["value"])


def _by_steps(
    judge: Judge, name: str, model: nn.Module, steps: list[int]
) -> Generator[Progress, None, dict[str, dict[str, Any]]]:
    """The metric at other numbers of sampler steps."""
    found, entries = judge.inputs, {}
    if found.metric is not None and judge.reference is not None:
        for count in steps:
            images = yield from judge.drawn(f"{name} in {count} steps", model, count)
            settings = found.recipe.evaluate.model_copy(update={"sampler_steps": count})
            entries[str(count)] = evaluate.quality(found.metric, images, judge.reference.gaussian, settings)
    return entries


@torch.no_grad()
def _sensitivity(judge: Judge, bare: nn.Module, names: list[str]) -> Generator[Progress, None, dict[str, float]]:
    """For each weight, the prediction error where it alone is as the method leaves it without fine-tuning."""
    model = copy.deepcopy(judge.inputs.model).to(judge.device).eval()
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


def main(folder: Path) -> int:
    """Do the job; the exit code is 0, 1 for a failure, or 143 when it was stopped."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        sys.stdin.read()
        stopped.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        (folder / "error.txt").unlink(missing_ok=True)
        job = files.read_json(folder / JOB)
        found = load_inputs(validation.validated(Recipe, job["recipe"], str(folder / JOB)))
        events = dense(found, folder, job["sampler_steps"]) if job["kind"] == "dense" else cell(found, folder, job)
        for event in events:
            print(json.dumps(asdict(event)), flush=True)
            if stopped.is_set():
                events.throw(runs.Interrupted(143))  # type: ignore[attr-defined]
    except runs.Interrupted as interrupted:
        return interrupted.exit_code
    except Exception as error:  # whatever a model, a plugin or the machine raises: the others shall go on
        kind = "" if isinstance(error, CompressorError) else f"{type(error).__name__}: "
        text = f"{kind}{first_line(error)}\n\n{traceback.format_exc()}"
        (folder / "error.txt").write_text(text, encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)  # a thread may still wait for stdin
