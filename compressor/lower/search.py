"""The fastest plan whose whole model stays within an error: which layers stay in few bits, and which go back to a slower form.

Errors of layers add up in squares, nearly. So each layer is put into its fastest form alone, and the model's output compared; those
whose squared error is large for the time that they save go back first, to the form that gains most error for its time, until what is
left should fit. Slower forms in few bits are compared where they come into question. What really is left is then measured: more go
back one by one until it fits, and those that fit in all the same go forward again.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from compressor.lower.chooser import deviation, held, seeded
from compressor.lower.job import Job, built
from compressor.lower.plan import LayerPlan, Search
from compressor.lower.replayed import Replayed
from compressor.lower.units import Found
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
    bound, trial = share * max_error, _Trial(job, layers)
    step = partial(Progress, "error of the model")
    yield step(0, 1, "each layer at its fastest")
    free = found = trial.whole([])
    back: list[_Move] = []
    if trial.ladders and not free <= bound:
        if trial.can_replay:
            yield step(0, 1, "what layers answer")
            trial.watch()
        for done, ladder in enumerate(trial.ladders):
            yield step(done, len(trial.ladders), ladder.name)
            trial.measure(ladder, 0)
        while not back or not (found := trial.whole(back)) <= bound:
            if not (more := (yield from trial.next_moves(back, bound))):
                break
            back += more
            yield step(0, 1, f"{len(back)} steps back")
        for move in back[::-1] if found <= bound else ():  # errors may make up for each other
            if any(other.ladder is move.ladder and other.start >= move.end for other in back):
                continue  # it went on from there
            for end in range(move.start, move.end):
                forward = [replace(other, end=end) if other is move else other for other in back]
                yield step(0, 1, f"{move.ladder.name} in {move.ladder.forms[end].choice} again")
                if (less := trial.whole(forward)) <= bound:
                    back, found = [other for other in forward if other.end > other.start], less
                    break
    alone = {ladder.name: trial.alone[ladder.name, 0] for ladder in trial.ladders if trial.alone}
    slower: dict[str, dict[str, float | None]] = {}
    for ladder in trial.ladders:
        for place, form in enumerate(ladder.forms[1:-1], 1):
            if (error := trial.alone.get((ladder.name, place))) is not None:
                slower.setdefault(ladder.name, {})[form.choice] = _finite(error)
    search = Search(
        max_error=max_error,
        free=_finite(free),
        error=_finite(found),
        alone={name: _finite(error) for name, error in alone.items()},
        slower=slower,
    )
    return _with(layers, back, alone), search


class _Trial:
    """The layers of a job in trial: what forms of the whole model are off by, and what a layer's forms in few bits are `alone`, by the
    layer's name and the form's place on its ladder, so far as it was asked for."""

    def __init__(self, job: Job, layers: Sequence[LayerPlan]) -> None:
        self.ladders = _ladders(job, layers)
        self.alone: dict[tuple[str, int], float] = {}
        self._job, self._layers = job, layers
        self._units = {one.at: one for one in job.found}
        self._wanted = seeded(job.forward, job.base)
        self._made: dict[tuple[str, str], nn.Module] = {}
        self._exact: dict[str, str] = {}
        self._replayed: Replayed | None = None

    def whole(self, moves: Sequence[_Move]) -> float:
        """The model's error after `moves`."""
        return self._error({layer.name: layer.choice for layer in _with(self._layers, moves)})

    @property
    def can_replay(self) -> bool:
        """Whether, where one layer differs, those before it need not run again: on CPUs, where models keep nothing of calls."""
        return self._job.device.type == "cpu" and not self._job.forward.changed

    def watch(self) -> None:
        """Keep what layers answer where none is in few bits, each in its fastest form: the dense model takes longer."""
        self._exact |= {layer.name: layer.choice for layer in self._layers}
        self._exact |= {ladder.name: ladder.forms[-1].choice for ladder in self.ladders}
        try:
            form = built(self._job, self._exact, made=self._made)
            self._replayed = Replayed(form, self._job.found, partial(seeded, self._job.forward))
        except Exception:  # a model may look into its layers
            self._replayed = None

    def measure(self, ladder: _Ladder, place: int) -> None:
        """Find what the form at `place` is off by alone."""
        choices = {ladder.name: ladder.forms[place].choice}
        found = math.inf
        if self._replayed is not None:
            before = self._replayed.before(self._units[ladder.name])
            # eager ones are the form's own, so that their answers may be set
            others = self._exact | dict.fromkeys((one.at for one in before), "eager")
            found = self._error(others | choices, self._replayed, before)
        # a model may take another way where a layer gives other numbers, and call others more often
        self.alone[ladder.name, place] = found if math.isfinite(found) else self._error(choices)

    def next_moves(self, back: Sequence[_Move], bound: float) -> Generator[Progress, None, list[_Move]]:
        """What goes back after `back`: the most squared error per millisecond that is lost first; of those equal to three digits, the
        layers nearest to the model's ends. One move; at first so many that squared errors add up to no more than that of `bound`; none
        where all are in float.

        A form whose error is not known yet counts as exact: only what would be first all the same is measured.
        """
        at = {ladder.name: 0 for ladder in self.ladders} | {move.ladder.name: move.end for move in back}
        moves: list[_Move] = []
        while not moves or (not back and sum(self._square(one, at[one.name]) for one in self.ladders) > bound**2):
            possible = [
                _Move(ladder, start, end)
                for ladder in self.ladders
                for start in [at[ladder.name]]
                for end in range(start + 1, len(ladder.forms))
                if end == len(ladder.forms) - 1 or self._square(ladder, end) < self._square(ladder, start)
            ]
            if not possible:
                break
            move = min(possible, key=self._key)
            if move.end < len(move.ladder.forms) - 1 and (move.ladder.name, move.end) not in self.alone:
                yield Progress(
                    "error of the model", 0, 1, f"{move.ladder.name} in {move.ladder.forms[move.end].choice}"
                )
                self.measure(move.ladder, move.end)
                continue
            moves.append(move)
            at[move.ladder.name] = move.end
        return moves

    def _key(self, move: _Move) -> tuple[float, int, int]:
        before, after = (self._square(move.ladder, place) for place in (move.start, move.end))
        price = math.inf if move.costs <= 0 or not math.isfinite(before) else (before - after) / move.costs
        place = move.ladder.place
        return -float(f"{price:.2e}"), min(place, len(self._layers) - 1 - place), place

    def _square(self, ladder: _Ladder, place: int) -> float:
        """The squared error of a form; none of the float form, and of one that was not measured."""
        return self.alone.get((ladder.name, place), 0.0) ** 2

    def _error(
        self, choices: Mapping[str, str], replayed: Replayed | None = None, before: Sequence[Found] = ()
    ) -> float:
        """That of the model with `choices`, all others eager; with `replayed` from what it gave, layers `before` as they answered."""
        try:
            form = built(self._job, choices, made=self._made)
            if replayed is not None:
                replayed.answer(form, before)
            return deviation(seeded(self._job.forward, form), self._wanted if replayed is None else replayed.out)
        except Exception:  # a model may look into its layers: the guard, which runs the same form, says so
            return math.inf


def _with(
    layers: Sequence[LayerPlan], moves: Sequence[_Move], alone: Mapping[str, float] | None = None
) -> list[LayerPlan]:
    """`layers` after `moves`; with the reason where the errors that each makes `alone` are given."""
    last = {move.ladder.name: move for move in moves}
    found = []
    for layer in layers:
        move = last.get(layer.name)
        if move is not None:
            layer = move.ladder.forms[move.end] if alone is None else _returned(move, alone[layer.name])
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
