"""The chooser: times every backend on a layer, and takes a sparse kernel only where it pays.

A layer's candidates take turns on random data of the example's shape, with weights of the model that follow each other as
they do in it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.cost.contention import Cores
from compressor.errors import CompressorError, UsageError, first_line
from compressor.lower import contest
from compressor.lower.attention import SelfAttention
from compressor.lower.backend import Backend, Kind, Unit
from compressor.lower.contest import BASE, Contest, Verdict
from compressor.lower.graphs import Captured
from compressor.lower.job import SEED, Job, tensors_in
from compressor.lower.plan import Cache, Candidate, LayerPlan
from compressor.lower.units import Found

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
"""The largest relative error of a layer: rounding, in the order in which a kernel adds."""

_NOTHING = 1.0  # the error of an answer of zeros: from there on a layer is not rounded, but wrong
_ROUNDS = 25
_CHECKED_ROWS = 4096  # on which a candidate's error is measured
_MEMBERS = 4  # layers of one shape that take turns, so that weights come from memory as they do in the model


def groups(found: Sequence[Found]) -> list[list[Found]]:
    """Units that run alike: the same shapes, patterns and kind. They are timed together."""
    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(_key(one.unit), []).append(one)
    return list(groups.values())


def prepare(job: Job) -> None:
    """Let every backend do once what it needs for the layers that it takes. Where it cannot, it is heard of when it builds one.

    Raises UsageError where a setting of the user's is wrong.
    """
    first = [group[0].unit for group in groups(job.found)]
    for backend in job.backends:
        units = [unit for unit in first if refusal_of(backend, unit, job.device) is None]
        try:
            if units:
                backend.prepare(units)
        except UsageError:
            raise
        except (Exception, SystemExit):  # a plugin may raise anything
            continue


def _key(unit: Unit) -> str:
    return f"{unit.module!r} {unit.input_shape} {unit.dtype} {[str(p) for p in unit.patterns]}"


@dataclass(frozen=True)
class _Entry:
    """A backend that takes a group of layers which run alike: its modules for the first of them, its error of each, and a call that
    can be timed; or why it does not run."""

    backend: Backend
    allowed: float
    refused: str | None = None
    modules: Sequence[nn.Module] = ()
    errors: Sequence[float] = ()
    call: Callable[[], object] | None = None

    def candidate(self, place: int, timed: Contest) -> Candidate:
        """It beside the others for the layer at `place` of the group."""
        name = self.backend.name
        return Candidate(
            backend=name,
            median_ms=timed.medians.get(name),
            error=self.errors[place] if self.errors and math.isfinite(self.errors[place]) else None,
            refused=self.refused or self.wrong(place),
            against=dict(timed.against.get(name, {})),
        )

    def wrong(self, place: int) -> str | None:
        """Why it is not for the layer at `place` of the group; None where it is. The layer as it is always stands."""
        if self.refused or self.backend.name == BASE or self.errors[place] <= self.allowed:
            return None
        return f"its error is {self.errors[place]:.1e}, above {self.allowed:.0e}"


def choose(
    group: Sequence[Found], job: Job, tolerance: float | None, store: Cache, free: bool = False
) -> list[LayerPlan]:
    """Time the backends on the group, and choose for each of its layers.

    `free`: 8 bits whatever their error, where no `tolerance` is given.
    """
    unit, device = group[0].unit, job.device
    rng = torch.Generator().manual_seed(SEED)
    x = torch.randn(unit.input_shape, generator=rng).to(device, unit.dtype)
    entries = _entered(
        [_Entry(one, _allowed(one, unit, tolerance, free)) for one in job.backends if unit.kind in one.takes],
        group,
        x,
        _few_rows(x, -3 if isinstance(unit.module, nn.Conv2d) else -1, _CHECKED_ROWS),
    )
    calls = {one.backend.name: one.call for one in entries if one.call is not None}
    how = sorted(f"{one.backend.name} {one.backend.version}".strip() for one in entries if one.call is not None)
    key = f"{_key(unit)} {how} {min(len(group), _MEMBERS)}"
    share = min(len(group), _MEMBERS) if device.type == "cuda" else 1
    every = Contest.of(_rounds(key, calls, store, device, job.skipping, share), job.skipping)
    plans = []
    for place, layer in enumerate(group):
        timed = every.without([one.backend.name for one in entries if one.wrong(place)])
        candidates = tuple(one.candidate(place, timed) for one in entries)
        plans.append(_layer_plan(layer, candidates, timed.verdict(), job.skipping))
    return plans


def _entered(entries: Sequence[_Entry], group: Sequence[Found], x: Tensor, sample: Tensor) -> list[_Entry]:
    """`entries` for the group, tried on x; errors are those of `sample`, the first rows of x.

    They run on all of x: a kernel for fewer rows may be another one. Rounding is alike in all layers of a group; what few bits lose is
    each weight's own.
    """
    found = [_tried(entry, partial(_built, group=group, device=x.device)) for entry in entries]
    for place, one in enumerate(group):
        asked = [not entry.refused and (place == 0 or entry.backend.quantises) for entry in found]
        if any(asked):
            wanted = _reference(one.unit, sample)  # once for all of them: it takes long
            step = partial(_measured, place=place, unit=one.unit, x=x, wanted=wanted)
            found = [_tried(entry, step) if ask else entry for entry, ask in zip(found, asked, strict=True)]
    return [_tried(entry, partial(_ready, count=len(group), x=x)) for entry in found]


def _built(entry: _Entry, group: Sequence[Found], device: torch.device) -> _Entry:
    if refused := refusal_of(entry.backend, group[0].unit, device):
        return replace(entry, refused=refused)
    return replace(entry, modules=[entry.backend.build(one.unit) for one in group[:_MEMBERS]])


def _measured(entry: _Entry, place: int, unit: Unit, x: Tensor, wanted: Tensor) -> _Entry:
    module = entry.modules[place] if place < len(entry.modules) else entry.backend.build(unit)
    return replace(entry, errors=[*entry.errors, _error(module, unit, x, wanted)])


def _ready(entry: _Entry, count: int, x: Tensor) -> _Entry:
    errors = entry.errors if entry.backend.quantises else [*entry.errors] * count
    call = _calls(entry.modules, x)
    fits = min(errors) <= entry.allowed or entry.backend.name == BASE
    return replace(entry, errors=errors, call=call if fits else None)


def _tried(entry: _Entry, step: Callable[[_Entry], _Entry]) -> _Entry:
    """`entry` after the step, or with why it failed; as it is where it was refused before."""
    if entry.refused:
        return entry
    try:
        return step(entry)
    except (Exception, SystemExit) as failure:  # a kernel may refuse a shape only when it runs
        return replace(entry, refused=f"{type(failure).__name__}: {first_line(failure)}", errors=[])


def _rounds(
    key: str,
    calls: dict[str, Callable[[], object]],
    store: Cache,
    device: torch.device,
    skipping: set[str],
    share: int,
) -> contest.Rounds:
    """The times of `calls` by round, for one of `share` layers that each call runs: from the store, or measured.

    What is still open after the last round is not stored, nor what was measured on a busy machine."""
    found = store.get(key)
    if found is not None and set(found) == set(calls) and contest.decided(found, skipping):
        store.used = True
        return found
    began = Cores.now()
    measured = contest.timed(calls, _ROUNDS, device, skipping)
    found = {name: tuple(ms / share for ms in own) for name, own in measured.items()}
    taken = contest.taken_since(began, device)
    if taken is not None and contest.busy(taken):
        store.busy = max(store.busy, taken)
    elif contest.decided(found, skipping):
        store.put(key, found)
    return found


def refusal_of(backend: Backend, unit: Unit, device: torch.device) -> str | None:
    """Why `backend` does not run `unit` on `device`; one that fails to say so is refused for that."""
    if unit.kind not in backend.takes:
        return f"it takes no {unit.kind.value}"
    try:
        return backend.unavailable(device) or backend.refusal(unit)
    except (Exception, SystemExit) as failure:  # a plugin may raise anything
        return f"the backend failed when asked: {type(failure).__name__}: {failure}"


def _allowed(backend: Backend, unit: Unit, tolerance: float | None, free: bool) -> float:
    """The largest error of `unit` in `backend`."""
    if tolerance is not None:
        return tolerance
    return _NOTHING if free and backend.quantises else TOLERANCE.get(unit.dtype, 1e-5)


def _calls(modules: Sequence[nn.Module], x: Tensor) -> Callable[[], object]:
    """A call that runs the next of `modules`; on a GPU one that runs them all, as one launch: the host's cost of a launch is
    not the layer's."""
    if x.device.type == "cuda":
        return Captured(lambda given: [module(given) for module in modules], x).replay
    turn = itertools.cycle(modules)
    return lambda: next(turn)(x)


def _few_rows(x: Tensor, channels_dim: int, most: int) -> Tensor:
    """The first samples of x, so many that they have `most` rows or just more; a row is what has one number per channel, which
    `channels_dim`, counted from the last, tells. All of x where it has no batch."""
    if x.dim() <= -channels_dim or not x.numel():
        return x
    rows = x.numel() // x.shape[channels_dim] // len(x)
    return x[: -(-most // rows)]


def held(layer: LayerPlan, skipping: set[str], without: Collection[str] = ()) -> Contest:
    """The backends that were timed on `layer`, but for those in `without`."""
    timed = {c.backend: c for c in layer.candidates if c.median_ms is not None}
    medians = {name: c.median_ms for name, c in timed.items() if c.median_ms is not None}
    every = Contest(medians, {name: c.against for name, c in timed.items()}, frozenset(skipping & set(timed)))
    return every.without(without)


def _reference(unit: Unit, x: Tensor) -> Tensor:
    out: Tensor = copy.deepcopy(unit.module).double()(x.double())
    return out


def _error(module: nn.Module, unit: Unit, x: Tensor, wanted: Tensor) -> float:
    out = module(x)
    return relative(out[: len(wanted)] if wanted.dim() else out, wanted) if out.dtype == unit.dtype else math.inf


def relative(out: Tensor, wanted: Tensor) -> float:
    """The root mean square difference, relative to the wanted values; infinite where the shapes differ."""
    if out.shape != wanted.shape:
        return math.inf
    difference = (_wide(out) - wanted).norm()
    return float(difference / wanted.norm()) if wanted.any() else float(difference)


def _wide(x: Tensor) -> Tensor:
    """x in double precision; complex numbers keep their imaginary parts."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def seeded(forward: Callable[[nn.Module], Any], form: nn.Module) -> Any:
    """One forward, with whatever the model draws at random the same each time."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(SEED)
        return forward(form)


def deviation(out: Any, wanted: Any) -> float:
    """The largest relative error among the tensors of two outputs; infinite where they are not alike or not finite."""
    found, expected = tensors_in(out), tensors_in(wanted)
    if not expected:
        raise CompressorError(
            f"the model's output, {type(wanted).__name__}, holds no tensor that could be compared",
            "Return a tensor, or tuples, dicts or dataclasses of them.",
        )
    if [one.dtype for one in found] != [one.dtype for one in expected]:
        return math.inf
    errors = [relative(a, _wide(b)) for a, b in zip(found, expected, strict=True)]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _layer_plan(one: Found, candidates: tuple[Candidate, ...], verdict: Verdict, skipping: set[str]) -> LayerPlan:
    unit = one.unit
    shapes = _shapes(unit)
    return LayerPlan.model_validate(
        {
            "name": one.at,
            "kind": unit.kind.value,
            "weights": one.weights,
            "shapes": shapes,
            "patterns": [None if p is None else str(p) for p in one.patterns],
            "dtype": str(unit.dtype).removeprefix("torch."),
            "gflop": sum(2e-9 * m * n * k for m, n, k in shapes),
            "candidates": candidates,
            "choice": verdict.choice,
            "reason": verdict.reason(),
            "skips_zeros": verdict.choice in skipping,
            "fused": one.fused,
        }
    )


def _shapes(unit: Unit) -> list[tuple[int, int, int]]:
    """M, N and K of the unit's products."""
    if unit.kind == Kind.ATTENTION:  # scores, and the values' shares
        assert isinstance(unit.module, SelfAttention)
        query, key, _ = unit.module.parts(torch.empty(unit.input_shape, device="meta"))
        rows, channels, keys = query.numel() // query.shape[3], query.shape[3], key.shape[2]
        return [(rows, keys, channels), (rows, channels, keys)]
    positions = torch.Size(unit.input_shape).numel() // unit.input_shape[-1]
    shapes = []
    for layer in unit.layers:
        if isinstance(layer, nn.Conv2d):
            with torch.device("meta"):
                out = copy.deepcopy(layer).to("meta")(torch.empty(unit.input_shape, dtype=unit.dtype))
            positions = out.numel() // out.shape[1]
        shapes.append((positions, layer.weight.shape[0], layer.weight[0].numel()))
    return shapes
