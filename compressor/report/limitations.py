"""What a report cannot say, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.report.content import DENSE, ONNX, Report

QUADRATIC = "Quadratic spacing of DDIM's steps is not among those of diffusers' schedulers"


FEWEST_DRAWS = 40
"""Of fewer draws none lies outside of the 95% in the middle."""


def few_draws(metric: str, settings: Mapping[str, Any]) -> list[str]:
    """The sentence on an interval that too few draws made, by the `settings` of `evaluate`; none where there were enough."""
    draws = settings.get("bootstrap", 0)
    if not 0 < draws < FEWEST_DRAWS:
        return []
    return [
        f"The interval of {metric} over samples is from {draws} draws of the bootstrap, too few for 95%: it is too narrow."
    ]


def _of_training(report: Report) -> list[str]:
    """The sentences on steps that were skipped, and on a batch that holds samples more than once; none where nothing was trained."""
    found, trained, samples = [], report.final.train, report.data.samples
    if trained.skipped:
        found.append(
            f"{trained.skipped} of {trained.steps} steps changed nothing, as their loss or gradient was not finite: the model was "
            "trained for less than its recipe says."
        )
    settings = report.recipe.get("train", {})
    if settings.get("steps") and (batch := settings.get("batch_size", 0)) > samples:
        found.append(
            f"A batch of {batch} is larger than the data: each step learned from all {samples} samples, from some of them more than "
            "once, with another noise each time."
        )
    return found


def limitations(report: Report) -> tuple[str, ...]:
    """What the reader must know, said from the facts of this run."""
    final, dense, lowering = report.final, report.dense, report.lowering
    found = _of_training(report)
    if (
        report.pattern is None
        and dense is not None
        and (final.params, final.macs_dense) == (dense.params, dense.macs_dense)
    ):
        found.append(
            "Nothing was removed: the model has every weight and every multiply-accumulate of the dense one, so what differs from it "
            "comes of training alone."
        )
    if lowering is None and final.macs_effective < final.macs_lowered:
        found.append(
            "The weights are sparse but were not lowered: no kernel skips their zeros, so no speed-up is claimed. "
            "Effective MACs say what such a kernel could save; `compressor lower` measures it."
        )
    if lowering is not None:
        if final.macs_lowered == final.macs_dense:
            found.append(f"No kernel skips a zero of this model on this machine: {lowering.reason}.")
        refused = {
            candidate.refused
            for layer in lowering.layers
            for candidate in layer.candidates
            if candidate.refused and "shares no choice between rows" in candidate.refused
        }
        found += [f"{reason[0].upper()}{reason[1:]}." for reason in sorted(refused)]
        if any(row.latency for row in report.rows if row.name not in (DENSE, report.method)):
            found.append(
                "Rows between the first and the last were timed before the model was lowered: compare their ratios, not their times."
            )
        engine = [entry for entry in final.latency if entry.backend.startswith(ONNX)]
        if engine and not any(entry.is_gain for entry in engine):
            found.append(
                "ONNX Runtime gains nothing from these zeros: it has no sparse kernels, and the gathered form needs rows that "
                "share a choice in groups of 64 or more (128:2:4)."
            )
        found.append(
            "Speed-ups hold for this machine, these batch sizes and this number of threads; another machine has to measure anew."
        )
    if final.quality:
        found.append(
            f"{final.quality[0].metric} is measured on {final.quality[0].samples} samples against {report.data.samples} real images; "
            "compare it only with values of the same number of samples, sampler and steps."
        )
        found.append(
            "The interval covers the drawing of samples, not the randomness of fine-tuning: that takes more seeds."
        )
        if final.quality[0].ci95 is not None:
            found += few_draws(final.quality[0].metric, report.recipe.get("evaluate", {}))
    if "quadratic" in report.sampler and any(row.quality for row in report.rows):
        found.append(
            f"{QUADRATIC}; figures that diffusers can repeat come from `compressor evaluate DIR --spacing trailing`."
        )
    if final.latency and lowering is None:
        found.append("Latency is one machine's, in eager mode; the machine may have been busy with other work.")
    return tuple(found)
