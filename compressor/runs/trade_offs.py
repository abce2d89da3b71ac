"""Sparsity, caching and fewer steps, one beside the other: the time of a run's whole pipeline, and what its pictures lose."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from compressor import files
from compressor.adapter import to_device
from compressor.cost.timing import Times, side_by_side
from compressor.data.calls import Picture
from compressor.errors import CompressorError, UsageError
from compressor.lower import Plan, lowering
from compressor.lower.forms import dense_forms
from compressor.pipelines.adapter import CallsAdapter
from compressor.pipelines.caching import Cache, cached
from compressor.pipelines.opened import Opened
from compressor.pipelines.recording import sample
from compressor.progress import Progress
from compressor.quality import drift
from compressor.quality.similarity import ssim
from compressor.recipe import plain_assignments
from compressor.report.content import EAGER, FEW_BITS, PREPACKED, Report, TradeOff
from compressor.runs.saved import Finished

_ROUNDS = 3
FORMS = {"eager": EAGER, "dense": PREPACKED}
"""How the dense forms of a plan that caches can be put on are called in a report."""


@dataclass(frozen=True, eq=False)
class _Cell:
    """A way to draw pictures: the weights of a row in a form, a cache, a number of steps."""

    row: str
    form: str
    model: nn.Module
    cache: Cache | None
    steps: int | None

    @property
    def described(self) -> str:
        """In the words of progress."""
        return f"{self.row}, {self.cache.text if self.cache else 'no cache'}, {self.steps or 'all'} steps"


def calls_of(run: Finished) -> CallsAdapter:
    """The adapter of a pipeline's run. Raises UsageError where `run` is of a model alone."""
    if isinstance(run.adapter, CallsAdapter):
        return run.adapter
    raise UsageError(
        f"{run.out} is not the run of a pipeline", "Caches and steps are measured on pipelines: leave both out."
    )


def cache_of(text: str) -> Cache:
    """The cache that `NAME[:KEY=VALUE]…` means; values are YAML. Raises UsageError."""
    name, *pairs = text.split(":")
    return Cache(name, plain_assignments(pairs, f"cache {name}"), text)


def checked(run: Finished, caches: Sequence[str], steps: Sequence[int]) -> list[Cache]:
    """The caches of these names. Raises UsageError for what cannot be measured, before anything is."""
    found = [cache_of(text) for text in caches]
    adapter = calls_of(run)
    opened = adapter.opened_pipeline
    recorded = adapter.records.index.steps
    if recorded is None and steps:
        raise UsageError("steps: the run is of the pipeline's own number of steps", "Run with --set record.steps=N.")
    for cache in found:
        with cached(opened, opened.module, cache):
            _try(opened, adapter.held_out, recorded, cache)
    return found


def _try(opened: Opened, pictures: Sequence[Picture], steps: int | None, cache: Cache) -> None:
    """Draw one of `pictures` in two steps with `cache` on the model: there are pipelines that do not tell caches what they need."""
    for picture in pictures[:1]:
        try:
            sample(opened, picture, None if steps is None else min(2, steps))
        except CompressorError as error:
            raise UsageError(
                f"cache {cache.text or cache.name}: {error.message}", "Leave --cache out for this pipeline."
            ) from error


def traded(
    run: Finished,
    caches: Sequence[Cache],
    steps: Sequence[int],
    tolerance: float | None = None,
    max_error: float | None = None,
    fuse_projections: bool | None = None,
) -> Generator[Progress, None, Report]:
    """The run's report with a `TradeOff` for every pair of weights (dense, and the run's), each cache and none, and each of `steps`
    and the recorded number; it is written.

    All draw the held-out pictures from the same noise, and their pipelines are timed in turns. The weights run as `lower` has them
    without torch.compile, which the hooks of caches break up; `tolerance`, `max_error` and `fuse_projections` are its.
    """
    adapter = calls_of(run)
    opened, index = adapter.opened_pipeline, adapter.records.index
    pictures = adapter.held_out
    if not pictures:
        raise CompressorError(f"{run.out}: no picture was held out", "Run with record.unseen of at least 1.")
    models = yield from _models(run, tolerance, max_error, fuse_projections)
    ways = product(dict.fromkeys([index.steps, *steps]), [None, *caches], models.items())
    cells = [_Cell(row, form, model, cache, count) for count, cache, ((row, form), model) in ways]

    def draw(cell: _Cell, number: int) -> Tensor:
        with cached(opened, cell.model, cell.cache):
            images = sample(opened, pictures[number], cell.steps).images
        if images is None:
            raise CompressorError(f"{opened.name} gives no pictures", "Caches and steps cannot be compared.")
        return images

    drawn: list[Tensor] = []
    for done, cell in enumerate(cells):
        yield Progress("pictures", done, len(cells), cell.described)
        drawn.append(torch.cat([draw(cell, number) for number in range(len(pictures))]))
    yield Progress("latency of the pipelines", 0, 1)
    turns = {at: partial(draw, cell, 0) for at, cell in enumerate(cells)}
    times = side_by_side(turns, _ROUNDS, run.device, warm_up=0)  # each has drawn pictures already
    found = tuple(_entry(cell, drawn[at], drawn[0], times[at]) for at, cell in enumerate(cells))
    report = run.report.model_copy(update={"trade_offs": found})
    files.write_json(run.out / "report.json", report.as_json())
    return report


def called(plan: Plan, name: str) -> str:
    """What the form `name` of `plan` is called in a report."""
    return FORMS.get(name, name) + (FEW_BITS if name in plan.dense_in_few_bits else "")


def _models(
    run: Finished, tolerance: float | None, max_error: float | None, fuse_projections: bool | None
) -> Generator[Progress, None, dict[tuple[str, str], nn.Module]]:
    """The dense weights and the run's, by row and form. The first are dense weights in float; where an error is allowed, in few bits
    after them."""
    example = to_device(run.adapter.example_inputs(1), run.device)
    digest = run.report.final.weights_sha256
    lowered = yield from lowering(
        run.sparse,
        example,
        adapter=run.adapter,
        tolerance=tolerance,
        max_error=max_error,
        fuse_projections=fuse_projections,
        digest=digest,
    )
    plan = lowered.plan
    left: dict[str, str] = {}
    dense = dense_forms(run.dense, example, plan.only(FORMS), adapter=run.adapter, left_out=left, few_bits=False)
    few = "dense" in plan.dense_in_few_bits  # its time is not that of the form in float, which is no slower than eager
    known = {form.name: form.median_ms for form in plan.forms if form.name in FORMS and form.name in dense}
    best = "dense" if few and "dense" in dense else min(known, key=lambda name: known[name])
    models = {(run.dense_row.name, FORMS[best]): dense[best]}
    if few:
        coarse = dense_forms(run.dense, example, plan.only(["dense"]), adapter=run.adapter, left_out=left)
        if "dense" in coarse:
            models[run.dense_row.name, called(plan, "dense")] = coarse["dense"]
    if run.report.final.name != run.dense_row.name:
        models[run.report.final.name, called(plan, plan.choice)] = lowered.model
    for name, reason in left.items():
        yield Progress("pictures", 0, 1, f"dense weights, {FORMS[name]}, are left out: {reason}")
    return models


def _entry(cell: _Cell, images: Tensor, first: Tensor, times: Times) -> TradeOff:
    return TradeOff(
        row=cell.row,
        form=cell.form,
        cache=None if cell.cache is None else cell.cache.text,
        steps=cell.steps,
        median_ms=times.median_ms,
        iqr_ms=times.iqr_ms,
        sample_rmse=drift.sample_rmse(images, first).value,
        ssim=float(ssim(images, first).mean()),
        samples=len(images),
    )
