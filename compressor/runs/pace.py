"""How long a run will take: a short probe of its phases, before and at the start of fine-tuning, and what is left of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter, to_device
from compressor.cost.timing import WARM_UP
from compressor.environment import resolve_device
from compressor.errors import CompressorError
from compressor.processes import team
from compressor.progress import Progress, duration
from compressor.quality.evaluate import can_sample, checked_images, refuse_bytes
from compressor.quality.settings import Evaluation
from compressor.report.content import DENSE, ONE_SHOT
from compressor.runs.inputs import Inputs
from compressor.seeds import generator
from compressor.weights import in_float32

_FIRST, _LAST = 2, 8  # the steps of fine-tuning that are timed: the first ones are slower
_LONG = 2.0  # seconds; a probe that would take longer is made smaller, and its time scaled
_SMALL = 4  # samples
_SILENT = 1.0  # seconds; shorter phases are not named


def paced(inputs: Inputs, events: Generator[Progress, None, None]) -> Generator[Progress, None, None]:
    """`events` of a run, each with the seconds that its stage is expected to take; after the first steps of fine-tuning, one
    that says what the whole will take. What the caller throws in goes on to `events`."""
    if not team().leads:  # who prints nothing need not know
        yield from events
        return
    expected: dict[str, float] = {}
    probed = told = False
    began, steps = time.perf_counter(), Clock()
    for event in events:
        if not probed:  # the run holds its directory by now, so that what is stopped here can be resumed
            probed = True
            yield from _handed(Progress("probe", 0, 1, "how long a sample and a forward pass take"), events)
            expected.update(evaluation_seconds(inputs))
        if event.stage == "fine-tune":
            steps.tick(event.done)
            if (each := steps.seconds) is not None:
                expected["fine-tune"] = each * event.total
        if not told and (steps.seconds is not None or event.stage not in ("fine-tune", "prepare", "one-shot")):
            told = True
            sentence = _sentence(inputs, expected, time.perf_counter() - began)
            yield from _handed(Progress("estimate", 1, 1, sentence, unbroken=event.unbroken), events)
        yield from _handed(replace(event, seconds=expected.get(event.stage)), events)


def _handed(event: Progress, events: Generator[Progress, None, None]) -> Iterator[Progress]:
    """`event`; what the caller throws in at it is thrown into `events`."""
    try:
        yield event
    except BaseException as thrown:
        events.throw(thrown)


class Clock:
    """The median time of a step, from when each was done: known once a few have been, one after another."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._done = -1
        self.seconds: float | None = None

    def tick(self, done: int) -> None:
        """Step number `done` has just ended. Where it does not follow on the one before, as where a run goes on, it is a beginning."""
        if self.seconds is not None or done == self._done:
            return
        if done != self._done + 1:
            self._times = []
        self._done = done
        self._times.append(time.perf_counter())
        if len(self._times) > _LAST:
            self.seconds = median(self._times[n + 1] - self._times[n] for n in range(_FIRST, _LAST))


def evaluation_seconds(inputs: Inputs) -> dict[str, float]:
    """The expected seconds of each stage of a run's evaluation that can be foretold, by the stage's name: sampling of each row, and
    `latency`. Not of a whole pipeline's pictures, nor of the metric."""
    recipe, adapter = inputs.recipe, inputs.adapter
    settings = recipe.evaluate
    device = resolve_device(recipe.train.device)
    home = next(inputs.model.parameters()).device
    model = in_float32(inputs.model).to(device).eval()
    seconds: dict[str, float] = {}
    if can_sample(adapter) and settings.drawn:
        row = sampling_seconds(adapter, model, settings)
        seconds |= {f"sample {name}": row for name in drawn_rows(inputs)}
    if settings.latency_rounds:
        with suppress(CompressorError), torch.no_grad():  # no example inputs: nothing will be timed
            example = to_device(adapter.example_inputs(settings.latency_batch), device)
            adapter.predict(model, example)
            forward = _timed(lambda: adapter.predict(model, example), device)
            seconds["latency"] = len(drawn_rows(inputs)) * (settings.latency_rounds + WARM_UP) * forward
    inputs.model.to(home)  # training needs the memory of the device for itself
    return seconds


def sampling_seconds(adapter: Adapter, model: nn.Module, settings: Evaluation) -> float:
    """How long a row's samples will take: two and four sampler steps are timed, and the rest is counted on from there.

    Raises what the adapter raises when it samples in as many steps as the run will.
    """
    device = next(model.parameters()).device

    def draw(count: int, steps: int) -> float:
        drawn: list[Tensor] = []
        seconds = _timed(
            lambda: drawn.append(adapter.sample(model, count, generator(settings.seed, "probe"), steps)), device
        )
        refuse_bytes(adapter, checked_images(adapter, drawn[0], count))
        return seconds

    batch = min(settings.batch_size, settings.drawn)
    small = min(_SMALL, batch)
    try:
        draw(small, 2)
    except Exception:  # a sampler may want more steps; what fails with the run's own number would fail after training
        return draw(small, settings.sampler_steps) * settings.drawn / small
    if draw(small, 2) * batch / small > _LONG:
        scale, count = batch / small, small
    else:
        scale, count = 1.0, batch
    two, four = draw(count, 2), draw(count, 4)
    each = max((four - two) / 2, two / 8)
    whole = scale * (max(two - 2 * each, 0.0) + settings.sampler_steps * each)
    return whole * settings.drawn / batch


def _timed(call: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _rows(inputs: Inputs) -> tuple[str, ...]:
    """The rows that the report will have."""
    return (inputs.method,) if inputs.recipe.from_scratch else (DENSE, ONE_SHOT, inputs.method)


def drawn_rows(inputs: Inputs) -> tuple[str, ...]:
    """Those that are sampled and timed: weights that are those of the row before are not once more."""
    names = _rows(inputs)
    if len(names) == 1:
        return names
    same = ONE_SHOT if inputs.starts_dense else None, None if inputs.recipe.train.steps else inputs.method
    return tuple(name for name in names if name not in same)


def _sentence(inputs: Inputs, expected: dict[str, float], gone: float) -> str:
    """What the run will take, in all and by phase, and what was chosen for it."""
    settings = inputs.recipe.evaluate
    sampling = sum(value for stage, value in expected.items() if stage.startswith("sample "))
    phases = {
        "so far": gone,
        f"fine-tuning ({inputs.recipe.train.steps:,} steps)": expected.get("fine-tune", 0.0),
        f"sampling ({len(drawn_rows(inputs))} rows of {settings.drawn:,} in {settings.sampler_steps} steps)": sampling,
        "latency": expected.get("latency", 0.0),
    }
    parts = [f"{name} {duration(value)}" for name, value in phases.items() if value >= _SILENT]
    total = duration(sum(phases.values()))
    return f"about {total} in all: {', '.join(parts)}" if parts else f"about {total} in all"
