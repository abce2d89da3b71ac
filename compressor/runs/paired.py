"""Judging a pipeline's variants on pictures that fine-tuning did not see: the same prompts and the same noise for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.cost.latency import latency
from compressor.cost.timing import Times, interleaved, iqr_ms, median_ms
from compressor.errors import CompressorError
from compressor.pipelines.recording import sample
from compressor.progress import Progress
from compressor.quality import drift
from compressor.quality.similarity import ssim
from compressor.report import SIDE_BY_SIDE
from compressor.report.content import DENSE, PIPELINE, Drift, Latency, Row
from compressor.runs.inputs import Inputs
from compressor.runs.judge import Judge, Seen, Variant
from compressor.runs.pictures import save_side_by_side
from compressor.runs.piped import Piped


class PairedJudge(Judge):
    """Makes the report rows of a pipeline's variants: each is put into the pipeline and draws the held-out pictures."""

    def __init__(self, inputs: Inputs, piped: Piped) -> None:
        super().__init__(inputs)
        self.piped = piped
        self.pictures = [picture for picture in piped.records.index.pictures if picture.unseen]
        self.latents: dict[str, list[Sequence[Tensor]]] = {}
        self.drawn_by: dict[str, Tensor] = {}

    def seen(self, variant: Variant) -> Generator[Progress, None, Seen]:
        inputs, steps = self.inputs, self.inputs.recipe.record.steps
        images: list[Tensor] = []
        latents: list[Sequence[Tensor]] = []
        with self.piped.opened.having(variant.model):
            for number, picture in enumerate(self.pictures):
                yield Progress(f"sample {variant.name}", number, len(self.pictures))
                found = sample(self.piped.opened, picture, steps)
                latents.append(found.latents)
                if found.images is not None:
                    images.append(found.images)
        self.latents[variant.name] = latents
        yield Progress(f"drift of {variant.name}", 0, 1)
        predictions = drift.predictions(inputs.adapter, variant.model, inputs.data, inputs.recipe.evaluate, self.device)
        if images:
            self.drawn_by[variant.name] = torch.cat(images)
        return Seen(self.drawn_by.get(variant.name), predictions)

    def row(
        self, variant: Variant, seen: Seen, dense: Seen | None, sheet: Path | None
    ) -> Generator[Progress, None, Row]:
        row = yield from super().row(variant, seen, dense, sheet)
        if sheet is not None and len(self.drawn_by) > 1:
            save_side_by_side(self.drawn_by, sheet.with_name(SIDE_BY_SIDE))
        if dense is None:
            return row
        drifts = list(row.drift)
        if seen.images is not None and dense.images is not None:
            drifts.append(
                Drift(metric="ssim", value=float(ssim(seen.images, dense.images).mean()), samples=len(seen.images))
            )
        first = next(iter(self.latents.values()))
        if (by_step := latent_errors(self.latents[variant.name], first)) is not None:
            drifts.append(
                Drift(metric="latent_error", value=by_step[-1][1], samples=len(self.pictures), by_time=tuple(by_step))
            )
        return row.model_copy(update={"drift": tuple(drifts)})

    def whole(self, variants: Sequence[Variant]) -> Generator[Progress, None, dict[str, Latency]]:
        """The time of the pipeline for one held-out picture, with each variant in it; they take turns."""
        opened, settings = self.piped.opened, self.inputs.recipe.evaluate

        def run(model: nn.Module) -> None:
            with opened.having(model):
                sample(opened, self.pictures[0], self.inputs.recipe.record.steps)

        calls: dict[str, Callable[[], None]] = {v.name: partial(run, v.model) for v in variants}
        rounds = max(3, settings.latency_rounds // 3)
        yield Progress("latency of the pipeline", 0, 1)
        seconds = interleaved(list(calls.values()), rounds, self.device, warm_up=1)
        times = dict(zip(calls, (Times(median_ms(own), iqr_ms(own)) for own in seconds), strict=True))
        dtype = self.piped.records.index.dtype
        return {
            name: latency(PIPELINE, self.device, dtype, 1, own, PIPELINE, times[DENSE]) for name, own in times.items()
        }


def latent_errors(
    found: Sequence[Sequence[Tensor]], dense: Sequence[Sequence[Tensor]]
) -> list[tuple[float, float]] | None:
    """After each step of the sampler, (the share of the steps that is left, the mean square difference of the latents from the
    dense model's, relative to their mean square); None where there are none, or their numbers differ."""
    steps = {len(own) for own in (*found, *dense)}
    if len(steps) != 1 or not (count := steps.pop()):
        return None
    errors = []
    for step in range(count):
        pairs = [(a[step], b[step]) for a, b in zip(found, dense, strict=True)]
        if any(a.shape != b.shape or not a.numel() for a, b in pairs):
            return None
        total = sum(float((a - b).square().mean() / b.square().mean().clamp_min(1e-12)) for a, b in pairs)
        errors.append((1 - (step + 1) / count, total / len(pairs)))
    if not all(math.isfinite(error) for _, error in errors):
        raise CompressorError(
            "the latents of a variant are not finite", "Prune less, or fine-tune with a lower learning rate."
        )
    return errors
