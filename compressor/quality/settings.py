"""How quality, drift and latency are measured: the recipe's section `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Measure = Literal["kid", "precision", "recall", "density", "coverage", "sfd"]
Budget = Literal["auto", "quick", "full"]

LOOK, USUAL, PUBLISHED = 64, 1024, 50_000
"""The most samples per row of each budget. 50,000 is what published values of FID are measured on."""
FEWEST = 16
QUICK_STEPS, MOST_STEPS = 25, 999
CPU_MACS, GPU_MACS = 1e12, 1e15
"""Multiply-accumulates that one row may take where the budget is `auto`: some tens of seconds on two cores, or on a GPU."""


class Evaluation(BaseModel):
    """How quality, drift and latency are measured. `samples` images per row, in `sampler_steps` steps each; `sampler`,
    `spacing` and `guidance` are the model's own where None. `measures` are taken besides the metric, in its features.
    `inception_weights` is a file, for a metric whose `weights_setting` it is. `samples` of None are chosen by `budget`, see
    `samples_for`. `scores` are of a pipeline's pictures with their prompts: by name, the file or folder of each one's network."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    budget: Budget = "auto"
    metric: str | None = None
    measures: list[Measure] = list(get_args(Measure))
    inception_weights: str | None = None
    scores: dict[str, str | None] = {}
    samples: Annotated[int, Field(ge=0)] | None = None
    sampler: str | None = None
    spacing: str | None = None
    guidance: Annotated[float, Field(ge=0)] | None = None
    sampler_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 25
    batch_size: Annotated[int, Field(ge=1)] = 256
    bootstrap: Annotated[int, Field(ge=0, le=10_000)] = 200
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    latency_batch: Annotated[int, Field(ge=1)] = 16
    latency_rounds: Annotated[int, Field(ge=0, le=10_000)] = 30

    @property
    def drawn(self) -> int:
        """`samples`, which must have been chosen: `load_inputs` does."""
        if self.samples is None:
            raise ValueError("the number of samples is not chosen yet")
        return self.samples


def of_budget(budget: Budget, own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `evaluate` that a budget brings, over a model's `own` and below the user's."""
    if budget == "quick":
        steps = min(QUICK_STEPS, int(own.get("sampler_steps", QUICK_STEPS)))
        return {"measures": [], "bootstrap": 50, "latency_rounds": 7, "sampler_steps": steps}
    return {"bootstrap": 1000, "latency_rounds": 100} if budget == "full" else {}


def samples_for(budget: Budget, real: int, macs: float, on_gpu: bool) -> int:
    """How many samples a row takes, for `real` images to compare with and `macs` multiply-accumulates per sample.

    A pure function, so that the same recipe gives the same number everywhere (but on a GPU more). `auto`: half of the real
    images, as the floor is measured on, up to 1,024, and no more than the cost allows; `quick`: up to 64; `full`: as many as
    there are real images, up to 50,000, whatever they cost. At least 16 in any case.
    """
    if budget == "full":
        return max(FEWEST, min(PUBLISHED, real))
    most = LOOK if budget == "quick" else USUAL
    affordable = int((GPU_MACS if on_gpu else CPU_MACS) / max(macs, 1.0))
    return max(FEWEST, min(most, real // 2, affordable))
