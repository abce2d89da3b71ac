"""What feeds the steps: noised batches, pure functions of seed and step, made on the CPU while a GPU works at the step before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from compressor.adapter import Adapter, Shared, checked_pair
from compressor.data.batches import Batches
from compressor.errors import CompressorError
from compressor.seeds import generator, repeatable
from compressor.training.settings import Training


@dataclass(eq=False)
class Feed:
    """(inputs, target) of each step, as `adapter` noises the batch. Work ahead needs no thread: a GPU's work is only queued by the
    process that asks for it, so that `ahead`, called once the backward pass is in the queue, runs beside it."""

    adapter: Adapter
    batches: Batches
    training: Training
    device: torch.device
    over: bool = False
    """Whether the run has been finished: a step after that would train weights that nobody masks."""
    _ready: tuple[int, Any] | None = field(default=None, init=False, repr=False)

    def at(self, step: int) -> tuple[Any, Tensor]:
        """What `step` learns from, on the CPU. Raises what reading the data, or noising it, raises; CompressorError after the last."""
        if self.over or step >= self.training.steps:
            how = "finish() has ended the run" if self.over else "that is all"
            raise CompressorError(
                f"{step} of {self.training.steps} steps are done, and {how}", "Make another FineTuning for more steps."
            )
        ready, self._ready = self._ready, None
        if ready is None or ready[0] != step:
            return self._made(step)
        if isinstance(ready[1], Exception):
            raise ready[1]
        inputs, target = ready[1]
        return inputs, target

    def ahead(self, step: int) -> None:
        """Make what `step` will need, in pinned memory, where a GPU works meanwhile. What fails is raised when it is needed."""
        if self.device.type != "cuda" or step >= self.training.steps:
            return
        try:
            self._ready = step, tree_map_only((Tensor, Shared), _pinned, self._made(step))
        except Exception as error:
            self._ready = step, error

    def _made(self, step: int) -> tuple[Any, Tensor]:
        batch = self.batches.batch(step)
        # an adapter that draws from the global generator too repeats itself all the same
        with repeatable(self.training.seed, "model", step):
            noised = self.adapter.noised_evenly if self.training.times == "even" else self.adapter.noised
            found = noised(batch, generator(self.training.seed, "noise", step))
        return tree_map_only(Tensor, _trainable, checked_pair(self.adapter, batch, found))  # type: ignore[no-any-return]


def _trainable(tensor: Tensor) -> Tensor:
    """A tensor that the backward pass may keep: what was made in inference mode is copied."""
    return tensor.clone() if tensor.is_inference() else tensor


def _pinned(leaf: Tensor | Shared) -> Tensor | Shared:
    if isinstance(leaf, Shared):
        return Shared(leaf.tensor.pin_memory())
    return leaf.pin_memory()
