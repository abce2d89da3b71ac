"""Trackers of experiments beside `metrics.jsonl`: TensorBoard and others, through accelerate. Their failures never end a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compressor import files
from compressor.errors import CompressorError, UsageError, did_you_mean, first_line
from compressor.runs.directory import FAILED, PROJECT, TRACKERS
from compressor.training.engine import Step

_HOW = {
    "tensorboard": "pip install 'diffusion-compressor[trackers]'",
    "wandb": "pip install wandb",
    "trackio": "pip install trackio",
    "mlflow": "pip install mlflow",
}
"""The trackers, whose packages are called like them, and how to get each."""


def checked(names: Sequence[str]) -> tuple[str, ...]:
    """`names`, each once. Raises UsageError for one that does not exist, CompressorError where its package is not installed."""
    for name in names:
        if name not in _HOW:
            raise UsageError(f"--log-with {name!r}", did_you_mean(name, list(_HOW)))
        if find_spec(name) is None:
            raise CompressorError(
                f"--log-with {name}: the package {name} is not installed", f"{_HOW[name]}, or leave --log-with out."
            )
    return tuple(dict.fromkeys(names))


class Tracking:
    """Sends the steps of a run to trackers, each of which is left out after its first failure."""

    def __init__(self, names: Sequence[str], out: Path, settings: Mapping[str, Any]) -> None:
        """Start the trackers `names` for the run in `out`, and tell them its `settings`."""
        self._out = out
        self._trackers: dict[str, Any] = dict.fromkeys(names)
        self._failures: list[str] = []
        for name in names:
            self._try(name, partial(self._start, name, settings))

    def _start(self, name: str, settings: Mapping[str, Any]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        folder = self._out / TRACKERS
        folder.mkdir(exist_ok=True)
        tracker = kind(PROJECT, str(folder)) if kind.requires_logging_directory else kind(PROJECT)
        if hasattr(tracker, "start"):  # accelerate from 1.10 on; earlier ones start when they are made
            tracker.start()
        self._trackers[name] = tracker
        tracker.store_init_configuration(flat(settings))

    def log(self, step: Step) -> list[str]:
        """Send one step; what is to be said of trackers that failed at it, or before."""
        values = {key: value for key, value in asdict(step).items() if key not in ("step", "steps")}
        known = {
            key: value for key, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for name, tracker in list(self._trackers.items()):
            self._try(name, partial(tracker.log, known, step=step.step))
        return self._said()

    def finish(self) -> list[str]:
        """End the trackers; as `log`."""
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)
        self._trackers = {}
        return self._said()

    def _try(self, name: str, call: Callable[[], object]) -> None:
        """Call a tracker. Where it fails, it is left out from now on, which is recorded once."""
        if name not in self._trackers:
            return
        try:
            call()
        except (Exception, SystemExit) as error:  # code of others, and a network
            del self._trackers[name]
            reason = first_line(error) if isinstance(error, Exception) else "it wanted to end the program"
            self._failures.append(f"{name} failed and gets no more steps: {reason}")
            self._record()

    def _record(self) -> None:
        path = self._out / TRACKERS / FAILED
        try:
            path.parent.mkdir(exist_ok=True)
            before = path.read_text(encoding="utf-8") if path.is_file() else ""
            files.write_text(path, before + self._failures[-1] + "\n")
        except (OSError, CompressorError):
            pass  # it is said all the same

    def _said(self) -> list[str]:
        said, self._failures = self._failures, []
        return said


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, bool | int | float | str]:
    """Nested settings as one level, `train.lr`; what is neither a number nor a text as text, None left out."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{key}.")
        elif value is not None:
            found[f"{before}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
