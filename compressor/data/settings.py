"""How data is read, and how calls of a pipeline are recorded: the recipe's sections `loading` and `record`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Loading(BaseModel):
    """How data is read: `size` of pictures (None: the model's), and whether training mirrors them (`flip`).

    `workers` decode (None: as many as pay); sets that take more than `cache_mb` MiB are decoded batch by batch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    size: Annotated[int, Field(ge=1, le=4096)] | None = None
    flip: bool = False
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    skip_damaged: bool = False
    cache_mb: Annotated[int, Field(ge=0)] = 4096


class Record(BaseModel):
    """What is recorded of a pipeline: the calls of `n` pictures to learn from, and of `unseen` others to be judged on, each in
    `steps` sampler steps (None: the pipeline's own number). Of each picture `keep` calls are kept, by chance (None: all). `seed`
    chooses prompts and noise; `arguments` are the pipeline's own,
    for every picture (`height`, `guidance_scale`, …)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    n: Annotated[int, Field(ge=1, le=100_000)] = 16
    unseen: Annotated[int, Field(ge=1, le=10_000)] = 4
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    keep: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    arguments: dict[str, Any] = Field(default_factory=dict)
