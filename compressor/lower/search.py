"""The fastest plan whose whole model stays within an error: which layers stay in few bits, and which go back to a slower form.

Errors of layers add up in squares, nearly. So each layer is put into each of its forms in few bits alone, and the model's output
compared; those whose squared error is large for the time that they save go back first, to the form that gains most error for its time,
until what is left should fit. What really is left is then measured: more go back one by one until it fits, and those that fit in all
the same go forward again.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from compressor.lower.chooser import deviation, held, seeded
from compressor.lower.forms import built
from compressor.lower.job import Job
from compressor.lower.plan import LayerPlan, Search
from compressor.progress import Progress

_FINER = 0.95
"""What a slower form in few bits may have at most of the error of a faster one, to be worth a forward of the model."""


@dataclass(frozen=True)
class _Ladder:
    """What a layer may be run by: first the fastest form, which is in few bits, then slower ones that are more exact, and last a float
    form. `times` are their milliseconds, `place` is the layer's among all."""

    forms: tuple[LayerPlan, ...]
    times: tuple[float, ...]
    place: int

    @property
    def name(self) -> str:
        return self.forms[0].name


@dataclass(frozen=True)
class _Move:
    """A layer goes from one form to one that is slower and more exact."""

    ladder: _Ladder
    start: int
    end: int

    @property
    def costs(self) -> float:
        return self.ladder.times[self.end] - self.ladder.times[self.start]


@torch.no_grad()
def within(
    job: Job, layers: Sequence[LayerPlan], max_error: float, share: float = 1.0
) -> Generator[Progress, None, tuple[list[LayerPlan], Search]]:
    """`layers`, of which as few as needed have gone back to slower forms so that the model's output is off by `max_error` at most,
    and what was measured. Yields a step per forward. With a `share` the search leaves the rest of `max_error` to what comes after it.

    The error is the largest relative root mean square difference among the output's tensors, on the job's inputs. What rounding alone
    does may be more than `max_error`: then nothing is left in few bits, and the caller sees it in the form.
    """
    names, bound = [layer.name for layer in layers], share * max_error
    ladders = _ladders(job, layers)
    wanted = seeded(job.forward, job.base)

    def error(choices: Mapping[str, str]) -> float:
        try:
            return deviation(seeded(job.forward, built(job, dict.fromkeys(names, "eager") | dict(choices))), wanted)
        except Exception:  # a model may look into its layers: the guard, which runs the same form, says so
            return math.inf

    def whole(moves: Sequence[_Move]) -> float:
        return error({layer.name: layer.choice for layer in _with(layers, moves)})

    step = partial(Progress, "error of the model")
    yield step(0, 1, "each layer at its fastest")
    free = found = whole([])
    alone: dict[str, list[float]] = {}
    back: list[_Move] = []
    if ladders and not free <= bound:
        tried = [(ladder, form) for ladder in ladders for form in ladder.forms[:-1]]
        for done, (ladder, form) in enumerate(tried):
            yield step(done, len(tried), ladder.name)
            alone.setdefault(ladder.name, []).append(error({ladder.name: form.choice}))
        order = _order(ladders, alone, len(layers))
        back = _predicted(order, ladders, alone, bound)
        yield step(0, 1, f"{len(back)} steps back")
        while not (found := whole(back)) <= bound and len(back) < len(order):
            back.append(order[len(back)])
            yield step(0, 1, f"{len(back)} steps back")
        for move in back[::-1] if found <= bound else ():  # errors may make up for each other
            if any(other.ladder is move.ladder and other.start >= move.end for other in back):
                continue  # it went on from there
            for end in range(move.start, move.end):
                forward = [replace(other, end=end) if other is move else other for other in back]
                yield step(0, 1, f"{move.ladder.name} in {move.ladder.forms[end].choice} again")
                if (less := whole(forward)) <= bound:
                    back, found = [other for other in forward if other.end > other.start], less
                    break
    slower = {
        o.name: {f.choice: _finite(e) for f, e in zip(o.forms[1:-1], alone[o.name][1:], strict=True)}
        for o in ladders
        if alone
    }
    search = Search(
        max_error=max_error,
        free=_finite(free),
        error=_finite(found),
        alone={name: _finite(errors[0]) for name, errors in alone.items()},
        slower={name: own for name, own in slower.items() if own},
    )
    return _with(layers, back, alone), search


def _with(
    layers: Sequence[LayerPlan], moves: Sequence[_Move], alone: Mapping[str, Sequence[float]] | None = None
) -> list[LayerPlan]:
    """`layers` after `moves`; with the reason where the errors that each makes `alone` are given."""
    last = {move.ladder.name: move for move in moves}
    found = []
    for layer in layers:
        move = last.get(layer.name)
        if move is not None:
            layer = move.ladder.forms[move.end] if alone is None else _returned(move, alone[layer.name][0])
        found.append(layer)
    return found


def _ladders(job: Job, layers: Sequence[LayerPlan]) -> list[_Ladder]:
    quantising, skipping = job.quantising, job.skipping
    found = []
    for place, layer in enumerate(layers):
        if layer.choice not in quantising:
            continue
        times = {one.backend: one.median_ms for one in layer.candidates if one.median_ms is not None}
        errors = {one.backend: one.error for one in layer.candidates if one.error is not None}
        forms, taken = [layer], {layer.choice}
        while forms[-1].choice in quantising:
            verdict = held(layer, skipping, without=taken).verdict()
            if verdict.choice not in quantising:
                verdict = held(layer, skipping, without=quantising).verdict()
            taken.add(verdict.choice)
            before, after = (errors.get(name, 0.0) for name in (forms[-1].choice, verdict.choice))
            if verdict.choice in quantising and after > _FINER * before:
                continue  # nearly the same numbers in a slower way, as those of a sparse layer's dense form mostly are
            update = {"choice": verdict.choice, "reason": verdict.reason(), "skips_zeros": verdict.choice in skipping}
            forms.append(layer.model_copy(update=update))
        found.append(_Ladder(tuple(forms), tuple(times[form.choice] for form in forms), place))
    return found


def _order(ladders: Sequence[_Ladder], alone: Mapping[str, Sequence[float]], count: int) -> list[_Move]:
    """Who moves first, until all are in float: the most squared error per millisecond that is lost; of those equal to three digits,
    the layers nearest to the model's ends."""
    at = {ladder.name: 0 for ladder in ladders}
    moves: list[_Move] = []

    def key(move: _Move) -> tuple[float, int, int]:
        before, after = (_square(move.ladder, place, alone) for place in (move.start, move.end))
        price = math.inf if move.costs <= 0 or not math.isfinite(before) else (before - after) / move.costs
        place = move.ladder.place
        return -float(f"{price:.2e}"), min(place, count - 1 - place), place

    while True:
        possible = [
            _Move(ladder, start, end)
            for ladder in ladders
            for start in [at[ladder.name]]
            for end in range(start + 1, len(ladder.forms))
            if end == len(ladder.forms) - 1 or _square(ladder, end, alone) < _square(ladder, start, alone)
        ]
        if not possible:
            return moves
        moves.append(min(possible, key=key))
        at[moves[-1].ladder.name] = moves[-1].end


def _square(ladder: _Ladder, place: int, alone: Mapping[str, Sequence[float]]) -> float:
    """The squared error of a form; none of the float form."""
    own = alone[ladder.name]
    return own[place] ** 2 if place < len(own) else 0.0


def _predicted(
    order: Sequence[_Move], ladders: Sequence[_Ladder], alone: Mapping[str, Sequence[float]], max_error: float
) -> list[_Move]:
    """The first of `order`, at least one, after which squared errors add up to no more than that of `max_error`."""
    squares = {ladder.name: _square(ladder, 0, alone) for ladder in ladders}
    count = 0
    while count == 0 or sum(squares.values()) > max_error**2:
        squares[order[count].ladder.name] = _square(order[count].ladder, order[count].end, alone)
        count += 1
    return list(order[:count])


def _returned(move: _Move, alone: float) -> LayerPlan:
    ladder = move.ladder
    first, instead = ladder.forms[0], ladder.forms[move.end]
    reason = (
        f"{first.choice} would be {ladder.times[move.end] / ladder.times[0]:.2f}x as fast; left in {instead.choice} for the error "
        f"of the whole model: {alone:.1e} alone. {instead.choice}: {instead.reason}"
    )
    return instead.model_copy(update={"reason": reason})


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
