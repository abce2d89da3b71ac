"""Whether a method is after a checkpoint what it was: what its `prepare` found has to be in its `state`, or in the masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from compressor.errors import CompressorError
from compressor.sparsity.pattern import Mask
from compressor.training.engine import FineTuning
from compressor.training.pruner import Pruner
from compressor.training.shadow import Shadow, checked_masks


@torch.no_grad()
def refuse_forgetful(run: FineTuning, anew: Pruner) -> None:
    """Raise CompressorError where `run`, which has begun, would go on from a checkpoint with other masks: where its prepared method
    and `anew`, the same method as a resumed run makes it, choose others for the same weights. Masks are pure, so that these tell."""
    if not isinstance(run.shadow, Shadow):
        return
    state = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), dict(run.pruner.state()))
    # other weights than those that it was prepared with: by these, what only a module keeps would not be missed
    there = {name: dense.to(run.shadow.weights[name].device).flip(0) for name, dense in run.shadow.dense.items()}
    progress = (run.done + 1) / max(1, run.training.steps)

    def chosen(pruner: Pruner) -> Mapping[str, Mask]:
        return checked_masks(pruner.masks(there, progress, dict(run.shadow.masks)), there)

    expected = chosen(run.pruner)
    try:
        found = chosen(anew.restored(state))
    except Exception as error:  # a plugin may raise anything
        raise _forgetful(run.pruner, f"fails: {type(error).__name__}: {error}") from error
    for name in {**expected, **found}:
        if name not in expected or name not in found or not torch.equal(expected[name].keep, found[name].keep):
            raise _forgetful(run.pruner, f"chooses another mask for {name}")


def _forgetful(pruner: Pruner, what: str) -> CompressorError:
    return CompressorError(
        f"{type(pruner).__name__} {what} where it goes on from a checkpoint, which does not hold what its prepare() found",
        "Give it `state` and `restored`, and let prepare() return a copy; `compressor check-plugin` checks it.",
    )
