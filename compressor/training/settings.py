"""The settings of fine-tuning, and the pure functions of the step count that they give."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_Share = Annotated[float, Field(ge=0, lt=1)]
_NotNegative = Annotated[float, Field(ge=0)]


class Lora(BaseModel):
    """The adapters of `Training.mode` lora: products of `rank`, scaled by `alpha` / `rank`; None makes that 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    rank: Annotated[int, Field(ge=1, le=100_000)] = 16
    alpha: Annotated[float, Field(gt=0)] | None = None

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Training(BaseModel):
    """How to fine-tune. `batch_size` is samples per optimizer step; `accumulate` splits each into that many pieces.

    `mode`: `full` trains every weight; `lora` trains adapters of the masked weights alone, under their masks, which stay as
    they were at the start.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    steps: Annotated[int, Field(ge=0, le=100_000_000)] = 300
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 128
    accumulate: Annotated[int, Field(ge=1)] = 1
    lr: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[_Share, _Share] = (0.99, 0.999)
    weight_decay: _NotNegative = 0.03
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    ema: _Share = 0.9999
    clip: _NotNegative = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward passes; auto is bfloat16 autocast on GPUs that have it, else float32."""
    gradient_checkpointing: bool = False
    """Whether blocks are computed again in the backward pass, which saves memory for time; for models of diffusers."""
    compiled: bool = False
    """Whether student and teacher run under torch.compile, whose numbers differ from eager ones by rounding."""
    mode: Literal["full", "lora"] = "full"
    lora: Lora = Lora()
    optimizer: Literal["adamw", "adamw-8bit", "muon"] = "adamw"
    """`adamw-8bit` keeps AdamW's two moments in 8 bits; `muon` makes the steps of matrices orthogonal (`compressor.training.muon`)."""
    times: Literal["independent", "even"] = "independent"
    """How the times of a batch are drawn: each for itself, or one in each n-th of their range (`Adapter.noised_evenly`)."""
    offload: list[Literal["ema", "optimizer", "shadow"]] = Field(default_factory=list)
    """What is kept in the machine's memory while a GPU trains: the average, the optimizer's state, the dense weights."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the run: a copy of the model in each, or (FSDP2) some rows of every weight."""

    def lr_at(self, step: int) -> float:
        """The learning rate of `step` (from 0): linear warm-up, then the schedule down to zero at the end.

        Warm-up takes at most a quarter of the steps, so that a short trial of a long recipe trains at all.
        """
        warmup = min(self.warmup, self.steps // 4)
        if step < warmup:
            return self.lr * (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.steps - warmup)
        match self.schedule:
            case "constant":
                return self.lr
            case "linear":
                return self.lr * (1 - done)
            case "cosine":
                return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def ema_at(self, step: int) -> float:
        """The EMA decay of `step`: `ema`, reached gradually so that a short run does not average in its start."""
        return gradual(self.ema, step)


def gradual(decay: float, step: int) -> float:
    """The decay of an average at its update number `step`, from 0: `decay`, reached gradually."""
    return min(decay, (1 + step) / (10 + step))
