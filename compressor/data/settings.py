"""How data is read: the recipe's section `loading`."""

from __future__ import annotations

from typing import Annotated

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
