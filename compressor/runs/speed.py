"""The speed of a finished run: its model lowered, timed beside every dense form, and written into the run's report."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor import cost, files, recipe, saving
from compressor.adapter import Adapter, to_device
from compressor.cost.timing import interleaved, median_ms
from compressor.environment import resolve_device
from compressor.errors import CompressorError, UsageError
from compressor.lower import Lowered, Plan, lowering
from compressor.lower.forms import dense_forms
from compressor.lower.job import in_dtype
from compressor.lower.plan import FILE
from compressor.progress import Progress
from compressor.report import render
from compressor.report.limitations import limitations
from compressor.runs import inputs
from compressor.sparsity.notation import parse
from compressor.weights import weights_sha256

DTYPES = {"auto": None, "float32": None, "bfloat16": torch.bfloat16}
ONNX = "ONNX Runtime"
_ROUNDS = 15


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished run: its dense and its sparse model, and the report that speaks of them."""

    out: Path
    adapter: Adapter
    dense: nn.Module
    sparse: nn.Module
    device: torch.device
    report: dict[str, Any]
    batch: int


def finished(out: Path) -> Finished:
    """The finished run in `out`. Raises CompressorError where it has no report, or its files belong to other weights."""
    if not (out / "report.json").is_file():
        raise CompressorError(
            f"{out}: no report.json", "Give the directory of a finished run; `compressor resume` finishes one."
        )
    report = files.read_json(out / "report.json")
    settings = inputs.resolve(recipe.read(out / "recipe.yaml"), str(out / "recipe.yaml"))
    adapter = inputs.adapter_of(settings)
    device = resolve_device(settings.train.device)
    dense = adapter.load(settings.weights).eval()
    sparse = saving.load(out / "model", copy.deepcopy(dense)).to(device)
    dense = dense.to(device)
    for row, model in ((report["rows"][0], dense), (report["rows"][-1], sparse)):
        if row["weights_sha256"] != weights_sha256(model):
            raise CompressorError(
                f"{out}: the report's row {row['name']!r} is of other weights than those found now",
                "The weights file changed since the run; run again.",
            )
    return Finished(out, adapter, dense, sparse, device, report, settings.evaluate.latency_batch)


def bench(
    run: Finished,
    batches: Sequence[int],
    dtype: str = "auto",
    compiled: bool = False,
    onnx: bool = False,
    cache: bool = True,
) -> Generator[Progress, None, list[dict[str, Any]]]:
    """Lower the run's model for each batch size, time all forms side by side, and add them to the report.

    The first batch's plan is saved with the run. Returns the new latency entries, each with the name of its `row`.
    """
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r}", f"Allowed: {', '.join(DTYPES)}.")
    if not batches or min(batches) < 1:
        raise UsageError(f"batches {list(batches)}", "Give sizes of at least 1.")
    entries: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        graphs = _onnx_forms(run, Path(folder)) if onnx else {}
        for done, batch in enumerate(batches):
            example = to_device(run.adapter.example_inputs(batch), run.device)
            lowered: Lowered = yield from lowering(
                run.sparse, example, dtype=DTYPES[dtype], adapter=run.adapter, compiled=compiled, cache=cache
            )
            if batch == batches[0]:
                lowered.plan.save(run.out / FILE)
                run.report["lowering"] = lowered.plan.model_dump(mode="json")
                left = cost.lowered_macs(run.sparse, run.adapter, _densities(lowered.plan))
                run.report["rows"][-1]["macs_lowered"] = left
            yield Progress("time", done, len(batches), f"batch {batch}")
            entries += _timed(run, example, lowered, DTYPES[dtype], batch, graphs)
    _add(run.report["rows"], entries)
    evaluation = run.report["recipe"].get("evaluate", {})
    run.report["limitations"] = limitations(
        run.report["rows"], evaluation.get("samples", 0), run.report["data"]["samples"], run.report["lowering"]
    )
    files.write_json(run.out / "report.json", run.report)
    render(run.out)
    return entries


@torch.no_grad()
def _timed(
    run: Finished,
    example: Any,
    lowered: Lowered,
    dtype: torch.dtype | None,
    batch: int,
    graphs: Mapping[tuple[str, str], Callable[[Any], Tensor]],
) -> list[dict[str, Any]]:
    """The forms of the dense and the sparse weights, timed in turns."""
    plan = lowered.plan
    first, last = run.report["rows"][0]["name"], run.report["rows"][-1]["name"]
    forms: dict[tuple[str, str], Callable[[], object]] = {}

    def torch_form(model: nn.Module) -> Callable[[], object]:
        return lambda: run.adapter.predict(model, example)

    found = dense_forms(run.dense, example, plan, dtype=dtype, adapter=run.adapter)
    dense = {_NAMES.get(name, name): model for name, model in found.items()}
    for name, model in dense.items():
        forms[first, name] = torch_form(model)
    if last != first:
        forms[last, "eager"] = torch_form(in_dtype(run.sparse, dtype))
        forms[last, "lowered"] = torch_form(lowered.model)
    for key, graph in graphs.items():
        forms[key] = lambda graph=graph: graph(example)  # type: ignore[misc]
    times = dict(zip(forms, interleaved(list(forms.values()), _ROUNDS, run.device), strict=True))
    medians = {form: median_ms(seconds) for form, seconds in times.items()}
    opponent = min(dense, key=lambda name: medians[first, name])
    kept = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    entries = []
    for (row, backend), seconds in times.items():
        against = ONNX if backend.startswith(ONNX) else opponent
        precision = "float32" if backend.startswith(ONNX) else kept
        entry = cost.latency_entry(backend, run.device, precision, batch, seconds, against, medians[first, against])
        entries.append({"row": row, **entry})
    return entries


_NAMES = {"eager": "eager", "dense": "prepacked", "eager, compiled": "compiled"}
"""How a dense form is called in a report's latency."""


def _onnx_forms(run: Finished, folder: Path) -> dict[tuple[str, str], Callable[[Any], Tensor]]:
    """The dense and the sparse model in ONNX Runtime, the latter with what the gathered form can do for it."""
    from compressor.export.onnx import OnnxRunner, export_onnx

    export_onnx(run.dense, run.adapter, folder / "dense.onnx")
    sparse = export_onnx(run.sparse, run.adapter, folder / "sparse.onnx", form="gathered")
    rows = run.report["rows"]
    name = f"{ONNX}, gathered" if sparse.gathered else ONNX
    return {
        (rows[0]["name"], ONNX): OnnxRunner(folder / "dense.onnx"),
        (rows[-1]["name"], name): OnnxRunner(sparse.path),
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


def _add(rows: list[dict[str, Any]], entries: Sequence[Mapping[str, Any]]) -> None:
    """Put `entries` into the rows in place of former ones of the same setting, before other settings' lowered ones: the
    first lowered entry of a row is that of the plan in the report."""
    same = ("backend", "device", "dtype", "batch")
    for row in rows:
        new = [{k: v for k, v in entry.items() if k != "row"} for entry in entries if entry["row"] == row["name"]]
        settings = {tuple(entry[k] for k in same) for entry in new}
        kept = [e for e in row["latency"] if tuple(e[k] for k in same) not in settings]
        former = [e for e in kept if e["backend"] == "lowered"]
        row["latency"] = [e for e in kept if e["backend"] != "lowered"] + new + former
