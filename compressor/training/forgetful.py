"""Whether a method is after a checkpoint what it was: what its `prepare` found has to be in its `state`, or in the masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from compressor.errors import CompressorError
from compressor.sparsity.pattern import Mask
from compressor.training.answers import masks_of
from compressor.training.engine import FineTuning
from compressor.training.pruner import Pruner
from compressor.training.rounding import sparse
from compressor.training.shadow import Shadow
from compressor.training.shards import local


@torch.no_grad()
def refuse_forgetful(run: FineTuning, anew: Pruner) -> None:
    """Raise CompressorError where `run`, which has begun, would go on from a checkpoint with other masks: where its prepared method
    and `anew`, the same method as a resumed run makes it, choose others for the same weights. Masks are pure, so that these tell."""
    if not isinstance(run.shadow, Shadow):
        return
    state = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), dict(run.pruner.state()))
    progress, masks = min(1.0, (run.done + 1) / max(1, run.training.steps)), dict(run.shadow.masks)
    # other weights than those that it was prepared with: by these, what only a module keeps would not be missed
    with _turned(run.shadow) as there:

        def chosen(pruner: Pruner) -> Mapping[str, Mask]:
            return masks_of(pruner, there, progress, masks)

        expected = chosen(run.pruner)
        try:
            found = chosen(anew.restored(state))
        except Exception as error:  # a plugin may raise anything
            raise _forgetful(run.pruner, f"fails: {type(error).__name__}: {error}") from error
    for name in {**expected, **found}:
        if name not in expected or name not in found or not torch.equal(expected[name].keep, found[name].keep):
            raise _forgetful(run.pruner, f"chooses another mask for {name}")


@contextmanager
def _turned(shadow: Shadow) -> Iterator[dict[str, Tensor]]:
    """While the block runs, the dense weights where the weights are, by name, with their rows in the opposite order.

    They are turned in their own memory, or, where that is another device's, in that of the sparse weights; after the block all is
    as it was.
    """
    own = {name: local(weight.data) for name, weight in shadow.weights.items()}
    there = {name: dense if dense.device == own[name].device else own[name] for name, dense in shadow.dense.items()}
    for name, dense in shadow.dense.items():
        there[name].copy_(dense.flip(0))
    try:
        yield there
    finally:
        for name, dense in shadow.dense.items():
            if there[name] is dense:
                dense.copy_(dense.flip(0))
            else:
                again, mask = dense.to(own[name].device), shadow.masks.get(name)
                own[name].copy_(again if mask is None else sparse(again, mask, shadow.pruner))


def _forgetful(pruner: Pruner, what: str) -> CompressorError:
    return CompressorError(
        f"{type(pruner).__name__} {what} where it goes on from a checkpoint, which does not hold what its prepare() found",
        "Give it `state` and `restored`, and let prepare() return a copy; `compressor check-plugin` checks it.",
    )
