"""`lower`: from a sparse model to one that is really faster on this machine."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import nn

from compressor.adapter import Adapter
from compressor.discovery import no_exit
from compressor.environment import give_back
from compressor.errors import UsageError, first_line, memory_in
from compressor.foreign.sound import refuse_empty, refuse_hooks, refuse_kept
from compressor.lower import contest
from compressor.lower.backend import Backend
from compressor.lower.chooser import TOLERANCE, choose, deviation, groups, prepare, seeded
from compressor.lower.forms import guarded, planned
from compressor.lower.job import Job, built, prepared
from compressor.lower.plan import Cache, LayerPlan, Plan, Search
from compressor.lower.search import within
from compressor.lower.units import Found
from compressor.progress import Progress, result_of
from compressor.weights import bare, weights_sha256

_WHOLE = 20.0  # the error of a whole model may be this many times that of a layer
_OF_ERROR = 0.97  # of the error that is allowed, the search uses this share where a compiler rounds its forms otherwise
_REORDERED = 3.0  # and this many times where products are the same, in another order of their sums


@dataclass(frozen=True, eq=False)
class Lowered:
    """`model` runs like the dense one, faster or at least not slower; `plan` says how it was made and measured.

    The model is for inference: it takes inputs of other batch sizes too, but its weights are packed, so save the sparse
    model and lower it again where it is used.
    """

    model: nn.Module
    plan: Plan


@no_exit("lowering")
def lower(
    model: nn.Module,
    example_inputs: Any,
    backends: str | Sequence[str | Backend] = "auto",
    dtype: torch.dtype | None = None,
    *,
    adapter: Adapter | None = None,
    plan: Plan | None = None,
    compiled: bool | None = None,
    tolerance: float | None = None,
    max_error: float | None = None,
    cache: bool = True,
    fuse_projections: bool | None = None,
) -> Lowered:
    """The sparse `model` with each layer on the fastest kernel of this machine. `model` itself is left as it is.

    `example_inputs` is what the model is called with (a tensor, a tuple of positional or a dict of named arguments; what
    `adapter.predict` takes where an adapter is given), in the size and on the device of its later use. `backends` names the
    ones to try, besides the dense layer itself; "auto" is all that are installed. `dtype` runs the model in another precision: its
    weights and its inputs of two or more dims are cast, its outputs cast back. `plan` applies the choices of an earlier
    lowering without measuring. With `compiled`, forms under torch.compile are timed too, which takes minutes; by default they are
    on a GPU, where they are the dense model at its best. `tolerance` is the largest relative error of a layer; by default that of
    rounding. `max_error` is that of the whole model's output on the example: kernels of few bits are tried, and layers go back to
    slower ones until it holds; with both, both hold. Measured times are kept on disk; with `cache=False` they are measured anew.
    With `fuse_projections`, Linears of one pattern that a module calls on one tensor (query, key and value) are one product, in dense
    forms and lowered ones; by default they are on a GPU. A `plan` has its own, and the errors that it was made with, where none are
    given.

    Raises UsageError for unknown backends, and errors that are not above 0 and up to 1; CompressorError where the example does
    not run or a plan does not fit.
    """
    steps = lowering(
        model,
        example_inputs,
        backends,
        dtype,
        adapter=adapter,
        plan=plan,
        compiled=compiled,
        tolerance=tolerance,
        max_error=max_error,
        cache=cache,
        fuse_projections=fuse_projections,
    )
    return result_of(steps)


@memory_in("lowering")
@torch.no_grad()
def lowering(
    model: nn.Module,
    example_inputs: Any,
    backends: str | Sequence[str | Backend] = "auto",
    dtype: torch.dtype | None = None,
    *,
    adapter: Adapter | None = None,
    plan: Plan | None = None,
    compiled: bool | None = None,
    tolerance: float | None = None,
    max_error: float | None = None,
    cache: bool = True,
    fuse_projections: bool | None = None,
    digest: str | None = None,
) -> Generator[Progress, None, Lowered]:
    """`lower` as a generator: yields its progress, and returns the `Lowered`.

    `digest` is the model's `weights_sha256`, where it is known already.
    """
    refuse_kept(model := bare(model))
    refuse_hooks(model)
    refuse_empty(model.state_dict())
    tolerance, max_error = _allowed(plan, tolerance, max_error)
    quantising = tolerance is not None or max_error is not None
    fuse: bool | Collection[Sequence[str]] | None = fuse_projections if plan is None else plan.fused
    prepare_with = partial(prepared, model, example_inputs, backends, dtype, adapter, quantising)
    job = prepare_with(fuse)
    if plan is None and (apart := _apart(job)):
        fuse = [one.fused for one in job.found if one.fused and one.fused not in apart]
        del job  # which may hold a copy of the weights
        job = prepare_with(fuse)
        job.notes.extend(_said(apart))
    allowed = max_error or _WHOLE * (tolerance or _rounding(job))
    if plan is not None:
        lowered = Lowered(planned(job, plan, allowed), plan)
        job.forward.rest(lowered.model)
        give_back()
        return lowered
    prepare(job)
    store = Cache(job.setting, read=cache)
    layers: list[LayerPlan] = []
    for done, group in enumerate(alike := groups(job.found)):
        yield Progress("lower", done, len(alike), group[0].at)
        layers += choose(group, job, tolerance, store, free=max_error is not None)
    places = {one.at: place for place, one in enumerate(job.found)}
    layers.sort(key=lambda layer: places[layer.name])
    compiled = job.device.type == "cuda" if compiled is None else compiled
    search: Search | None = None
    if max_error is not None:
        layers, search = yield from within(job, layers, max_error, _OF_ERROR if compiled else 1.0)
    yield Progress("lower", len(alike), len(alike), "whole model")
    if store.busy:
        job.notes.append(contest.doubtful(store.busy))
    form, made = guarded(job, layers, compiled, allowed, digest or weights_sha256(model), search, store.used)
    job.forward.rest(form)
    made = made.model_copy(update={"tolerance": None if tolerance is None else float(tolerance)})
    give_back()
    return Lowered(form, made)


def _allowed(plan: Plan | None, tolerance: float | None, max_error: float | None) -> tuple[float | None, float | None]:
    """The errors of a layer and of the whole model: those given, else those of the plan. Raises UsageError for what is none."""
    if not (plan is None or isinstance(plan, Plan)):
        raise UsageError(
            f"the plan is a {type(plan).__name__}", "Give a compressor.Plan: compressor.Plan.read(path) of a file."
        )
    if plan is not None:
        tolerance = plan.tolerance if tolerance is None else tolerance
        max_error = plan.search.max_error if max_error is None and plan.search is not None else max_error
    for name, value in (("tolerance", tolerance), ("max_error", max_error)):
        if value is not None and not (isinstance(value, Real) and 0 < value <= 1):
            raise UsageError(f"{name} {value!r}", "Give a relative error above 0, up to 1: 0.02 is two hundredths.")
    return tolerance, max_error


def _rounding(job: Job) -> float:
    """The relative error of the loosest layer by rounding alone."""
    return max((TOLERANCE.get(one.unit.dtype, 1e-5) for one in job.found), default=1e-5)


def _apart(job: Job) -> dict[tuple[str, ...], str]:
    """The fused projections without which the model does what it does with its layers apart, and why each has to go."""
    groups = [one for one in job.found if one.fused]
    if not groups:
        return {}
    wanted = seeded(job.forward, job.base)
    if (together := _unlike(job, groups, wanted)) is None:
        return {}
    found = {one.fused: why for one in groups if (why := _unlike(job, [one], wanted)) is not None}
    return found or dict.fromkeys((one.fused for one in groups), together)


def _unlike(job: Job, found: Sequence[Found], wanted: Any) -> str | None:
    """How the model with these units differs from `wanted`, the model's output; None where it does not, up to rounding."""
    try:
        error = deviation(seeded(job.forward, built(job, {}, found)), wanted)
    except Exception as failure:  # a model may look at strides, or into its layers
        return f"{type(failure).__name__}: {first_line(failure)}"
    return None if error <= _REORDERED * _rounding(job) else f"the output differs by {error:.1e}"


def _said(apart: Mapping[tuple[str, ...], str]) -> list[str]:
    """A note for every reason."""
    notes = []
    for why in dict.fromkeys(apart.values()):
        groups = [", ".join(fused) for fused, own in apart.items() if own == why]
        more = {1: "", 2: ", and 1 group more,"}.get(len(groups), f", and {len(groups) - 1} groups more,")
        notes.append(f"{groups[0]}{more} take the same tensor and stay apart: {why}")
    return notes
