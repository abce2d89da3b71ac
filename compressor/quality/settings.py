"""How quality, drift and latency are measured: the recipe's section `evaluate`."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Measure = Literal["kid", "precision", "recall", "density", "coverage", "sfd"]


class Evaluation(BaseModel):
    """How quality, drift and latency are measured. `samples` images per row, in `sampler_steps` steps each; `sampler`,
    `spacing` and `guidance` are the model's own where None. `measures` are taken besides the metric, in its features.
    `inception_weights` is a file, for a metric whose `weights_setting` it is."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    metric: str | None = None
    measures: list[Measure] = list(get_args(Measure))
    inception_weights: str | None = None
    samples: Annotated[int, Field(ge=0)] = 1024
    sampler: str | None = None
    spacing: str | None = None
    guidance: Annotated[float, Field(ge=0)] | None = None
    sampler_steps: Annotated[int, Field(ge=1, le=999)] = 25
    batch_size: Annotated[int, Field(ge=1)] = 256
    bootstrap: Annotated[int, Field(ge=0, le=10_000)] = 200
    seed: Annotated[int, Field(ge=0)] = 1234
    latency_batch: Annotated[int, Field(ge=1)] = 16
    latency_rounds: Annotated[int, Field(ge=0, le=10_000)] = 30
