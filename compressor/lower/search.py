"""The fastest plan whose whole model stays within an error: which layers stay in 8 bits, and which go back to a float form.

Errors of layers add up in squares, nearly. So each layer is put into 8 bits alone, and the model's output compared; those whose
squared error is large for the time that they save go back first, until what is left should fit. What really is left is then
measured: more go back one by one until it fits, and those that fit in all the same stay in 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from compressor.lower.chooser import held
from compressor.lower.forms import built, deviation, seeded
from compressor.lower.job import Job
from compressor.lower.plan import LayerPlan, Search
from compressor.progress import Progress


@dataclass(frozen=True)
class _Option:
    """A layer that 8 bits are fastest for, and what it would be without them. `saves` is in milliseconds, `place` among the layers."""

    layer: LayerPlan
    instead: LayerPlan
    saves: float
    place: int


@torch.no_grad()
def within(
    job: Job, layers: Sequence[LayerPlan], max_error: float
) -> Generator[Progress, None, tuple[list[LayerPlan], Search]]:
    """`layers`, of which as few as needed have gone back from 8 bits so that the model's output is off by `max_error` at most, and
    what was measured. Yields a step per forward.

    The error is the largest relative root mean square difference among the output's tensors, on the job's inputs. What rounding alone
    does may be more than `max_error`: then nothing is left in 8 bits, and the caller sees it in the form.
    """
    names = [layer.name for layer in layers]
    options = _options(job, layers)
    wanted = seeded(job.forward, job.base)

    def error(choices: Mapping[str, str]) -> float:
        try:
            return deviation(seeded(job.forward, built(job, dict.fromkeys(names, "eager") | dict(choices))), wanted)
        except Exception:  # a model may look into its layers: the guard, which runs the same form, says so
            return math.inf

    def whole(back: Sequence[_Option]) -> float:
        return error({layer.name: layer.choice for layer in _with(layers, back)})

    step = partial(Progress, "error of the model")
    yield step(0, 1, "each layer at its fastest")
    free = found = whole([])
    alone: dict[str, float] = {}
    back: list[_Option] = []
    if options and not free <= max_error:
        for done, option in enumerate(options):
            yield step(done, len(options), option.layer.name)
            alone[option.layer.name] = error({option.layer.name: option.layer.choice})
        order = _order(options, alone, len(layers))
        back = _predicted(order, alone, max_error)
        yield step(0, 1, f"{len(back)} layers back in float")
        while not (found := whole(back)) <= max_error and len(back) < len(order):
            back.append(order[len(back)])
            yield step(0, 1, f"{len(back)} layers back in float")
        for option in back[::-1] if found <= max_error else ():  # errors may make up for each other
            fewer = [other for other in back if other is not option]
            yield step(0, 1, f"{option.layer.name} in 8 bits again")
            if (less := whole(fewer)) <= max_error:
                back, found = fewer, less
    chosen = _with(layers, back, alone)
    return chosen, Search(max_error=max_error, free=_finite(free), error=_finite(found), alone=_all_finite(alone))


def _with(
    layers: Sequence[LayerPlan], back: Sequence[_Option], alone: Mapping[str, float] | None = None
) -> list[LayerPlan]:
    """`layers`, of which those in `back` have their float form; with the reason where the errors that each makes `alone` are
    given."""
    instead = {o.layer.name: o.instead if alone is None else _returned(o, alone[o.layer.name]) for o in back}
    return [instead.get(layer.name, layer) for layer in layers]


def _options(job: Job, layers: Sequence[LayerPlan]) -> list[_Option]:
    quantising = {backend.name for backend in job.backends if backend.quantises}
    skipping = {backend.name for backend in job.backends if backend.skips_zeros}
    found = []
    for place, layer in enumerate(layers):
        if layer.choice not in quantising:
            continue
        times = {one.backend: one.median_ms for one in layer.candidates if one.median_ms is not None}
        verdict = held(layer, skipping, without=quantising).verdict()
        choice = verdict.choice
        update = {"choice": choice, "reason": verdict.reason(), "skips_zeros": choice in skipping}
        saves = times[choice] - times[layer.choice]
        found.append(_Option(layer, layer.model_copy(update=update), saves, place))
    return found


def _order(options: Sequence[_Option], alone: Mapping[str, float], count: int) -> list[_Option]:
    """Who goes back first: the most squared error per millisecond saved; of those equal to three digits, the ones nearest to the
    model's ends."""

    def key(option: _Option) -> tuple[float, int, int]:
        price = alone[option.layer.name] ** 2 / option.saves if option.saves > 0 else math.inf
        return -float(f"{price:.2e}"), min(option.place, count - 1 - option.place), option.place

    return sorted(options, key=key)


def _predicted(order: Sequence[_Option], alone: Mapping[str, float], max_error: float) -> list[_Option]:
    """The first of `order`, at least one, without which the squares of the others' errors add up to no more than that of
    `max_error`."""
    squares = [alone[option.layer.name] ** 2 for option in order]
    count = 1
    while sum(squares[count:]) > max_error**2:
        count += 1
    return list(order[:count])


def _returned(option: _Option, alone: float) -> LayerPlan:
    layer, instead = option.layer, option.instead
    times = {one.backend: one.median_ms for one in layer.candidates if one.median_ms is not None}
    reason = (
        f"{layer.choice} would be {times[instead.choice] / times[layer.choice]:.2f}x as fast; left in {instead.choice} for the error "
        f"of the whole model: {alone:.1e} alone. {instead.choice}: {instead.reason}"
    )
    return instead.model_copy(update={"reason": reason})


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _all_finite(errors: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _finite(error) for name, error in errors.items()}
