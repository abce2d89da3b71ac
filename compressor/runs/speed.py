"""The speed of a finished run: its model lowered, timed beside every dense form, and written into the run's report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import cost, files
from compressor.adapter import to_device
from compressor.cost.latency import latency
from compressor.cost.timing import side_by_side
from compressor.errors import UsageError
from compressor.lower import Lowered, Plan, lowering
from compressor.lower.forms import dense_forms
from compressor.lower.job import in_dtype
from compressor.lower.plan import FILE
from compressor.progress import Progress
from compressor.report import render
from compressor.report.content import EAGER, LOWERED, Latency, Lowering, Report
from compressor.report.limitations import limitations
from compressor.runs import trade_offs
from compressor.runs.saved import Finished, finished
from compressor.sparsity.notation import parse
from compressor.weights import HALF, dtypes_of

__all__ = ["Benched", "Finished", "bench", "finished", "measured"]

DTYPES = {"auto": None, "float32": None, "bfloat16": torch.bfloat16}
ONNX = "ONNX Runtime"
_ROUNDS = 15
_Form = tuple[str, str]  # the row of the weights, and the backend


@dataclass(frozen=True)
class Benched:
    """A run's new report, its plan, and its new latency entries, each with the name of its row."""

    report: Report
    plan: Plan
    entries: Sequence[tuple[str, Latency]]

    def as_json(self) -> Any:
        """The entries; with the report's trade-offs where it has some."""
        entries = [{"row": row, **entry.as_json()} for row, entry in self.entries]
        trades = [entry.as_json() for entry in self.report.trade_offs]
        return {"latency": entries, "trade_offs": trades} if trades else entries


def bench(
    run: Finished,
    batches: Sequence[int],
    dtype: str = "auto",
    compiled: bool = False,
    onnx: bool = False,
    cache: bool = True,
    caches: Sequence[str] = (),
    steps: Sequence[int] = (),
) -> Generator[Progress, None, Benched]:
    """As `measured`, and write the report's pages. With `caches` or `steps`, the trade-offs of the run's pipeline too."""
    wanted = trade_offs.checked(run, caches, steps) if caches or steps else None
    found = yield from measured(run, batches, dtype, compiled, onnx, cache)
    if wanted is not None:
        report = yield from trade_offs.traded(run.reported(found.report), wanted, steps)
        found = replace(found, report=report)
    render(run.out)
    return found


def measured(
    run: Finished,
    batches: Sequence[int],
    dtype: str = "auto",
    compiled: bool = False,
    onnx: bool = False,
    cache: bool = True,
) -> Generator[Progress, None, Benched]:
    """Lower the run's model for each batch size, time all forms side by side, and add them to `report.json`.

    The first batch's plan is saved with the run.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r}", f"Allowed: {', '.join(DTYPES)}.")
    if not batches or min(batches) < 1:
        raise UsageError(f"batches {list(batches)}", "Give sizes of at least 1.")
    if run.adapter.fixed_batch and list(batches) != [run.batch]:
        raise UsageError(
            f"batches {list(batches)}: a pipeline's model is timed on a call as it was recorded", "Leave the size out."
        )
    precision = _precision(run, dtype)
    entries: list[tuple[str, Latency]] = []
    plan: Plan | None = None
    with tempfile.TemporaryDirectory() as folder:
        graphs = _onnx_forms(run, Path(folder)) if onnx else {}
        for done, batch in enumerate(batches):
            example = to_device(run.adapter.example_inputs(batch), run.device)
            lowered: Lowered = yield from lowering(
                run.sparse,
                example,
                dtype=precision,
                adapter=run.adapter,
                compiled=compiled,
                cache=cache,
                digest=run.report.final.weights_sha256,
            )
            yield Progress("time", done, len(batches), f"batch {batch}")
            entries += _timed(run, example, lowered, precision, batch, graphs, of_plan=plan is None)
            plan = plan or lowered.plan
    assert plan is not None  # there is a batch
    plan.save(run.out / FILE)
    left = cost.lowered_macs(run.sparse, run.adapter, _densities(plan))
    report = _added(run.report, plan, left, entries)
    files.write_json(run.out / "report.json", report.as_json())
    return Benched(report, plan, entries)


def _precision(run: Finished, dtype: str) -> torch.dtype | None:
    """The dtype that the run's models are cast to; None where they are in it. CPUs have no kernels for float16: float32 there."""
    own = set(dtypes_of(run.sparse).values()) & set(HALF)
    if dtype == "auto" and own:
        return (
            torch.bfloat16 if own == {torch.bfloat16} else torch.float16 if run.device.type == "cuda" else torch.float32
        )
    return torch.float32 if dtype == "float32" and own else DTYPES[dtype]


@torch.no_grad()
def _timed(
    run: Finished,
    example: Any,
    lowered: Lowered,
    dtype: torch.dtype | None,
    batch: int,
    graphs: Mapping[_Form, Callable[[Any], Tensor]],
    of_plan: bool,
) -> list[tuple[str, Latency]]:
    """The forms of the dense and the sparse weights, timed in turns."""
    first, last = run.dense_row.name, run.report.final.name
    forms: dict[_Form, Callable[[], object]] = {}

    def torch_form(model: nn.Module) -> Callable[[], object]:
        return lambda: run.adapter.predict(model, example)

    found = dense_forms(run.dense, example, lowered.plan, dtype=dtype, adapter=run.adapter)
    dense = {_NAMES.get(name, name): model for name, model in found.items()}
    for name, model in dense.items():
        forms[first, name] = torch_form(model)
    if last != first:
        forms[last, EAGER] = torch_form(in_dtype(run.sparse, dtype))
        forms[last, LOWERED] = torch_form(lowered.model)
    for key, graph in graphs.items():
        forms[key] = lambda graph=graph: graph(example)  # type: ignore[misc]
    times = side_by_side(forms, _ROUNDS, run.device)
    opponent = min(dense, key=lambda name: times[first, name].median_ms)
    kept = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    entries = []
    for (row, backend), own in times.items():
        against = ONNX if backend.startswith(ONNX) else opponent
        precision = "float32" if backend.startswith(ONNX) else kept
        entry = latency(backend, run.device, precision, batch, own, against, times[first, against])
        if backend == LOWERED and of_plan:
            entry = entry.model_copy(update={"of_plan": True})
        entries.append((row, entry))
    return entries


_NAMES = {**trade_offs.FORMS, "eager, compiled": "compiled"}
"""How a dense form is called in a report's latency."""


def _onnx_forms(run: Finished, folder: Path) -> dict[_Form, Callable[[Any], Tensor]]:
    """The dense and the sparse model in ONNX Runtime, the latter with what the gathered form can do for it."""
    from compressor.export.onnx import OnnxRunner, export_onnx

    export_onnx(run.dense, run.adapter, folder / "dense.onnx")
    sparse = export_onnx(run.sparse, run.adapter, folder / "sparse.onnx", form="gathered")
    name = f"{ONNX}, gathered" if sparse.gathered else ONNX
    return {
        (run.dense_row.name, ONNX): OnnxRunner(folder / "dense.onnx"),
        (run.report.final.name, name): OnnxRunner(sparse.path),
    }


def _densities(plan: Plan) -> dict[str, float]:
    """What kernels leave of each weight whose zeros they skip."""
    skipping = plan.skipping()
    found = {}
    for layer in plan.layers:
        for name, text in zip(layer.weights, layer.patterns, strict=True):
            if name in skipping and text is not None:
                found[name] = parse(text).density
    return found


def _added(report: Report, plan: Plan, macs: int, entries: Sequence[tuple[str, Latency]]) -> Report:
    """`report` with the new `entries` in place of former ones of the same setting, the plan, and the MACs that its kernels leave."""
    rows = []
    for row in report.rows:
        new = [entry for name, entry in entries if name == row.name]
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
