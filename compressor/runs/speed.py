"""The speed of a finished run: its model lowered, timed beside every dense form, and written into the run's report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import cost, files, registry
from compressor.adapter import to_device
from compressor.cost.latency import latency
from compressor.cost.timing import side_by_side
from compressor.errors import CompressorError, UsageError
from compressor.lower import Lowered, Plan, lowering
from compressor.lower.forms import dense_forms
from compressor.lower.job import in_dtype, lively
from compressor.lower.plan import FILE
from compressor.progress import Progress
from compressor.report import render
from compressor.report.content import EAGER, FEW_BITS, LOWERED, ONNX, TENSORRT, Latency, Lowering, Report
from compressor.report.limitations import limitations
from compressor.runs import trade_offs
from compressor.runs.saved import Finished, finished
from compressor.sparsity.notation import parse
from compressor.weights import HALF, dtypes_of, in_float32

__all__ = ["Benched", "Finished", "bench", "finished", "measured"]

DTYPES = {"auto": None, "float32": None, "bfloat16": torch.bfloat16}
_ROUNDS = 15
_ROUNDING = 1e-4
"""An error up to here is that of float32: no form is more exact than another."""


@dataclass(frozen=True)
class Benched:
    """A run's new report, its plan, and its new latency entries, each with the name of its row."""

    report: Report
    plan: Plan
    entries: Sequence[tuple[str, Latency]]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Engines that were not timed, and why."""

    def as_json(self) -> Any:
        """The entries; with the report's trade-offs where it has some."""
        entries = [{"row": row, **entry.as_json()} for row, entry in self.entries]
        trades = [entry.as_json() for entry in self.report.trade_offs]
        return {"latency": entries, "trade_offs": trades} if trades else entries


def bench(
    run: Finished,
    batches: Sequence[int],
    dtype: str = "auto",
    compiled: bool | None = None,
    onnx: bool = False,
    cache: bool = True,
    caches: Sequence[str] = (),
    steps: Sequence[int] = (),
    tolerance: float | None = None,
    max_error: float | None = None,
    fuse_projections: bool | None = None,
) -> Generator[Progress, None, Benched]:
    """As `measured`, and write the report's pages. With `caches` or `steps`, the trade-offs of the run's pipeline too."""
    wanted = trade_offs.checked(run, caches, steps) if caches or steps else None
    found = yield from measured(run, batches, dtype, compiled, onnx, cache, tolerance, max_error, fuse_projections)
    if wanted is not None:
        given = run.reported(found.report)
        report = yield from trade_offs.traded(given, wanted, steps, tolerance, max_error, fuse_projections)
        found = replace(found, report=report)
    render(run.out)
    return found


def measured(
    run: Finished,
    batches: Sequence[int],
    dtype: str = "auto",
    compiled: bool | None = None,
    onnx: bool = False,
    cache: bool = True,
    tolerance: float | None = None,
    max_error: float | None = None,
    fuse_projections: bool | None = None,
) -> Generator[Progress, None, Benched]:
    """Lower the run's model for each batch size, time all forms side by side, and add them to `report.json`.

    The first batch's plan is saved with the run. `tolerance`, `max_error` and `fuse_projections` are those of `compressor.lower`.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r}", f"Allowed: {', '.join(DTYPES)}.")
    if not batches or min(batches) < 1:
        raise UsageError(f"batches {list(batches)}", "Give sizes of at least 1.")
    if run.adapter.fixed_batch and list(batches) != [run.batch]:
        raise UsageError(
            f"batches {list(batches)}: a pipeline's model is timed on a call as it was recorded", "Leave the size out."
        )
    precision = precision_of(run.sparse, run.device, dtype)
    entries: list[tuple[str, Latency]] = []
    plan: Plan | None = None
    with tempfile.TemporaryDirectory() as folder:
        others, left_out = _engine_forms(run, Path(folder)) if onnx else ([], {})
        for done, batch in enumerate(batches):
            example = to_device(run.adapter.example_inputs(batch), run.device)
            lowered: Lowered = yield from lowering(
                run.sparse,
                example,
                dtype=precision,
                adapter=run.adapter,
                compiled=compiled,
                tolerance=tolerance,
                max_error=max_error,
                cache=cache,
                fuse_projections=fuse_projections,
                digest=run.report.final.weights_sha256,
            )
            yield Progress("time", done, len(batches), f"batch {batch}")
            further, missing = _tensorrt_forms(run, example) if run.device.type == "cuda" else ([], {})
            left_out |= missing
            found, failed = _timed(run, example, lowered, precision, batch, [*others, *further], of_plan=plan is None)
            entries += found
            left_out |= failed
            plan = plan or lowered.plan
    assert plan is not None  # there is a batch
    plan.save(run.out / FILE)
    left = cost.lowered_macs(run.sparse, run.adapter, _densities(plan))
    report = _added(run.report, plan, left, entries)
    files.write_json(run.out / "report.json", report.as_json())
    return Benched(report, plan, entries, left_out)


def precision_of(model: nn.Module, device: torch.device, dtype: str) -> torch.dtype | None:
    """The dtype that a run's models are cast to; None where they are in it. CPUs have no kernels for float16: float32 there."""
    own = set(dtypes_of(model).values()) & set(HALF)
    if dtype == "auto" and own:
        return torch.bfloat16 if own == {torch.bfloat16} else torch.float16 if device.type == "cuda" else torch.float32
    return torch.float32 if dtype == "float32" and own else DTYPES[dtype]


@dataclass(frozen=True, eq=False)
class _Form:
    """Weights of a row in a backend, with the dtype of its products, and a call on an adapter's inputs."""

    row: str
    backend: str
    dtype: str
    run: Callable[[Any], Tensor]


@torch.no_grad()
def _timed(
    run: Finished,
    example: Any,
    lowered: Lowered,
    dtype: torch.dtype | None,
    batch: int,
    others: Sequence[_Form],
    of_plan: bool,
) -> tuple[list[tuple[str, Latency]], dict[str, str]]:
    """The forms of the dense and the sparse weights, timed in turns, each with its error; and why others were left out.

    A speed-up is over the fastest form of the dense weights that is no less exact; that of sparse weights in another engine, over the
    dense ones there. Dense forms in few bits, which were chosen within the same error of the pruned weights, count for the lowered
    form whatever their own error is.
    """
    first, last = run.dense_row.name, run.report.final.name
    exact = {first: in_float32(run.dense), last: in_float32(run.sparse)}
    example = lively(example, partial(run.adapter.predict, exact[last]))
    kept = "float32" if dtype is None else str(dtype).removeprefix("torch.")

    def form(row: str, backend: str, model: nn.Module) -> _Form:
        return _Form(row, backend, kept, partial(run.adapter.predict, model))

    left_out: dict[str, str] = {}
    plan, made = lowered.plan, partial(dense_forms, run.dense, example, dtype=dtype, adapter=run.adapter)
    found = made(plan, left_out=left_out, few_bits=False)
    forms = [form(first, _NAMES.get(name, name), model) for name, model in found.items()]
    if few := plan.dense_in_few_bits:
        failed: dict[str, str] = {}
        found = made(plan.only(few), left_out=failed)
        forms += [form(first, _NAMES.get(name, name) + FEW_BITS, found[name]) for name in few if name in found]
        left_out |= {_NAMES.get(name, name) + FEW_BITS: reason for name, reason in failed.items() if name in few}
    del found
    if last != first:
        forms += [form(last, EAGER, in_dtype(run.sparse, dtype)), form(last, LOWERED, lowered.model)]
    forms += others
    wanted = {row: run.adapter.predict(model, example).double().cpu() for row, model in exact.items()}
    errors = [relative_rms(one.run(example), wanted[one.row]) for one in forms]
    times = side_by_side({at: partial(one.run, example) for at, one in enumerate(forms)}, _ROUNDS, run.device)
    entries = []
    for at, one in enumerate(forms):
        rivals = [
            other
            for other, rival in enumerate(forms)
            if rival.row == first
            and (errors[other] <= max(errors[at], _ROUNDING) or _kept_to(rival, one, kept))
            and (rival.backend == ONNX or not one.backend.startswith(ONNX) or one.row == first)
        ]
        best = min(rivals, key=lambda other: times[other].median_ms)
        entry = latency(one.backend, run.device, one.dtype, batch, times[at], forms[best].backend, times[best])
        update = {"error": errors[at]} | ({"of_plan": True} if one.backend == LOWERED and of_plan else {})
        entries.append((one.row, entry.model_copy(update=update)))
    return entries, {_NAMES.get(name, name): reason for name, reason in left_out.items()}


def _kept_to(rival: _Form, one: _Form, dtype: str) -> bool:
    """Whether `rival` was held to what `one` was: to the model's dtype, or in few bits to the same error of the pruned weights."""
    return one.backend == LOWERED if rival.backend.endswith(FEW_BITS) else rival.dtype == dtype


_NAMES = {**trade_offs.FORMS, "eager, compiled": "compiled", "dense, compiled": "prepacked, compiled"}
"""How a dense form is called in a report's latency."""


def relative_rms(found: Tensor, wanted: Tensor) -> float:
    """The root mean square difference from `wanted` (float64, on the CPU), in standard deviations of it."""
    difference = found.double().cpu() - wanted
    return float(difference.square().mean().sqrt()) / (float(wanted.std(correction=0)) or 1.0)


def _engine_forms(run: Finished, folder: Path) -> tuple[list[_Form], dict[str, str]]:
    """The dense model in other engines, and the sparse one in ONNX Runtime with what the gathered form can do for it; and why some
    were left out."""
    from compressor.export.engines import engines, has_openvino
    from compressor.export.onnx import OnnxRunner, export_onnx

    made, left = engines(run.dense, run.adapter, folder, has_openvino())
    found = [_Form(run.dense_row.name, one.name, one.dtype, one.run) for one in made]
    if ONNX in left:
        return found, left
    try:
        sparse = export_onnx(run.sparse, run.adapter, folder / "sparse.onnx", form="gathered")
    except CompressorError as error:
        return found, {**left, f"{ONNX}, gathered": error.message}
    name = f"{ONNX}, gathered" if sparse.gathered else ONNX
    return [*found, _Form(run.report.final.name, name, "float32", OnnxRunner(sparse.path))], left


def _tensorrt_forms(run: Finished, example: Any) -> tuple[list[_Form], dict[str, str]]:
    """The dense and the sparse model in TensorRT, on a GPU; or why not."""
    from compressor.export.engines import tensorrt

    rows = [(run.dense_row.name, run.dense, False), (run.report.final.name, run.sparse, True)]
    try:
        made = [(row, tensorrt(model, run.adapter, example, sparse)) for row, model, sparse in dict.fromkeys(rows)]
    except CompressorError as error:
        return [], {TENSORRT: f"{error.message}. {error.hint or ''}".strip()}
    return [_Form(row, one.name, one.dtype, one.run) for row, one in made], {}


def _densities(plan: Plan) -> dict[str, float]:
    """What kernels leave of each weight: of one that several layers share, as much as that of them which leaves most."""
    found = dict.fromkeys(plan.left_out, 1.0)
    for layer in plan.layers:
        skips = plan.lowered and layer.skips_zeros
        for name, text in zip(layer.weights, layer.patterns, strict=True):
            left = registry.backend(layer.choice).left(parse(text)) if skips and text is not None else 1.0
            found[name] = max(left, found.get(name, 0.0))
    return found


def _added(report: Report, plan: Plan, macs: int, entries: Sequence[tuple[str, Latency]]) -> Report:
    """`report` with the new `entries` in place of former ones of the same setting, the plan, and the MACs that its kernels leave."""
    rows = []
    timed = 1 + max((entry.timed for row in report.rows for entry in row.latency), default=0)
    for row in report.rows:
        new = [entry.model_copy(update={"timed": timed}) for name, entry in entries if name == row.name]
        settings = {entry.setting for entry in new}
        kept = [_of_no_plan(entry) for entry in row.latency if entry.setting not in settings]
        # readers from before `of_plan` take the first lowered entry for that of the plan
        ordered = sorted((*kept, *new), key=lambda entry: entry.backend == LOWERED and not entry.of_plan)
        update: dict[str, Any] = {"latency": tuple(ordered)}
        rows.append(row.model_copy(update=update | ({"macs_lowered": macs} if row is report.final else {})))
    lowered = Lowering.model_validate(plan.model_dump(mode="json"))
    found = report.model_copy(update={"rows": tuple(rows), "lowering": lowered})
    return found.model_copy(update={"limitations": limitations(found)})


def _of_no_plan(entry: Latency) -> Latency:
    return entry.model_copy(update={"of_plan": False}) if entry.of_plan else entry
