"""Judging a pipeline's variants on pictures that fine-tuning did not see: the same prompts and the same noise for all."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor import files
from compressor.adapter import to_device
from compressor.cost.latency import latency
from compressor.cost.timing import Times, side_by_side
from compressor.errors import CompressorError
from compressor.lower import Plan, lower
from compressor.pipelines.opened import must_be_called
from compressor.pipelines.recording import sample
from compressor.processes import team
from compressor.progress import Progress
from compressor.quality.score import scored
from compressor.quality.similarity import ssim
from compressor.report import SIDE_BY_SIDE
from compressor.report.content import DENSE, LOWERED, PIPELINE, PIPELINE_LOWERED, Drift, Latency, Row
from compressor.runs.inputs import Inputs
from compressor.runs.judge import Judge, Seen, Variant
from compressor.runs.pictures import save_side_by_side
from compressor.runs.piped import Piped
from compressor.runs.saved import Finished


class PairedJudge(Judge):
    """Makes the report rows of a pipeline's variants: each is put into the pipeline and draws the held-out pictures."""

    def __init__(self, inputs: Inputs, piped: Piped) -> None:
        super().__init__(inputs)
        self.piped = piped
        self.pictures = piped.adapter.held_out
        self.latents: dict[str, list[Sequence[Tensor]]] = {}
        self.drawn_by: dict[str, Tensor] = {}
        self.prompts: list[str] = []

    def seen(self, variant: Variant) -> Generator[Progress, None, Seen]:
        steps = self.inputs.recipe.record.steps
        mine: list[tuple[Sequence[Tensor], Tensor | None]] = []
        here = team()  # its processes share the pictures
        with self.piped.opened.having(variant.model):
            for number in range(here.rank, len(self.pictures), here.size):
                yield Progress(f"sample {variant.name}", number, len(self.pictures))
                with must_be_called(self.piped.opened):
                    found = sample(self.piped.opened, self.pictures[number], steps)
                mine.append((found.latents, found.images))
        every = here.in_turn(mine)
        latents = [own for own, _ in every]
        images = [own for _, own in every if own is not None]
        self.latents[variant.name] = latents
        yield Progress(f"drift of {variant.name}", 0, 1)
        predictions = self.predicted(variant.model)
        if images and here.leads:
            self.drawn_by[variant.name] = torch.cat(images)
            texts = [str(picture.arguments.get("prompt")) for picture in self.pictures]
            self.prompts = [text for text, own in zip(texts, images, strict=True) for _ in own]
        return Seen(self.drawn_by.get(variant.name), predictions)

    def renamed(self, seen: Seen, was: str, name: str) -> Seen:
        self.latents[name] = self.latents[was]
        if was in self.drawn_by:
            self.drawn_by[name] = self.drawn_by[was]
        return seen

    def row(
        self, variant: Variant, seen: Seen, dense: Seen | None, sheet: Path | None
    ) -> Generator[Progress, None, Row]:
        row = yield from super().row(variant, seen, dense, sheet)
        if sheet is not None and len(self.drawn_by) > 1:
            save_side_by_side(self.drawn_by, sheet.with_name(SIDE_BY_SIDE))
        if seen.images is not None and self.piped.scores:
            yield Progress(f"scores of {variant.name}", 0, 1)
            settings = self.inputs.recipe.evaluate
            found = [scored(score, seen.images, self.prompts, settings) for score in self.piped.scores]
            row = row.model_copy(update={"scores": tuple(found)})
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
        """The time of the pipeline with each variant in it."""
        yield Progress("latency of the pipeline", 0, 1)
        times = self.times({variant.name: variant.model for variant in variants})
        return {name: self._entry(PIPELINE, own, times[DENSE]) for name, own in times.items()}

    def whole_lowered(self, run: Finished, plan: Plan) -> Generator[Progress, None, Finished]:
        """`run` with the time of the pipeline with its lowered model, beside that with the dense one; its report is written again."""
        yield Progress("latency of the lowered pipeline", 0, 1)
        example = to_device(run.adapter.example_inputs(1), run.device)
        lowered = lower(run.sparse, example, adapter=run.adapter, plan=plan).model
        times = self.times({DENSE: run.dense, LOWERED: lowered})
        entry = self._entry(PIPELINE_LOWERED, times[LOWERED], times[DENSE])
        final = run.report.final
        report = run.report.with_rows(final.model_copy(update={"latency": (*final.latency, entry)}))
        files.write_json(run.out / "report.json", report.as_json())
        return run.reported(report)

    def times(self, models: Mapping[str, nn.Module]) -> dict[str, Times]:
        """The times of the pipeline for one held-out picture, with each of `models` in it; they take turns."""
        opened, steps = self.piped.opened, self.inputs.recipe.record.steps

        def run(model: nn.Module) -> None:
            with opened.having(model):
                sample(opened, self.pictures[0], steps)

        calls = {name: partial(run, model) for name, model in models.items()}
        rounds = max(3, self.inputs.recipe.evaluate.latency_rounds // 3)
        return side_by_side(calls, rounds, self.device, warm_up=1)

    def _entry(self, backend: str, own: Times, dense: Times) -> Latency:
        return latency(backend, self.device, self.piped.records.index.dtype, 1, own, PIPELINE, dense)


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
