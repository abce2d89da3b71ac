"""How much each channel matters: a score for every entry of every weight, summed over the channel's entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.adapter import Adapter, checked_answer, checked_pair, to_device
from compressor.data.batches import Batches
from compressor.errors import CompressorError
from compressor.seeds import generator

from .removal import Group


def channel_scores(group: Group, entries: Mapping[str, Tensor] | None, seed: int) -> Tensor:
    """The score (width,) of each of the group's channels: the sum of its `entries` in all members, or chance without."""
    if entries is None:
        return torch.rand(group.width, generator=generator(seed, "channels", group.members[0].name))
    scores = torch.zeros(group.width, dtype=torch.float64)
    for member in group.members:
        for name, dim in member.tensors.items():
            if name in entries:
                by_channel = entries[name].transpose(0, dim)
                sums = by_channel.reshape(by_channel.shape[0], -1).double().sum(1).cpu()
                scores.index_add_(0, member.root, sums[member.own])
    return scores


def entry_scores(
    model: nn.Module,
    adapter: Adapter,
    batches: Batches,
    kind: Literal["magnitude", "taylor", "diff-pruning", "diff-pruning-released"],
    timesteps: int,
    threshold: float,
) -> dict[str, Tensor]:
    """The score of every entry of every parameter, by its name. Raises CompressorError where one is not finite."""
    was_training = model.training
    model.eval()
    try:
        if kind == "magnitude":
            found = {name: value.detach().square() for name, value in model.named_parameters()}
        elif kind == "taylor":
            found = taylor(model, adapter, batches, timesteps)
        else:
            summed = kind == "diff-pruning-released"
            found = diff_pruning(model, adapter, batches, timesteps, threshold, summed=summed)
    finally:
        model.train(was_training)
    for name, score in found.items():
        if not bool(score.isfinite().all()):
            raise CompressorError(f"structured: scores of {name} are not finite", "Check the weights and the data.")
    return found


def taylor(model: nn.Module, adapter: Adapter, batches: Batches, timesteps: int) -> dict[str, Tensor]:
    """|w ∂L/∂w|, L being the mean loss over evenly spaced times. Source: Molchanov et al. 2019, eq. 8 without the square."""
    total: dict[str, Tensor] = {}
    for index in range(timesteps):
        for name, gradient in _gradients(model, adapter, batches, index, timesteps)[1].items():
            total[name] = total[name] + gradient if name in total else gradient
    weights = dict(model.named_parameters())
    return {name: (weights[name].detach() * gradient / timesteps).abs() for name, gradient in total.items()}


def diff_pruning(
    model: nn.Module, adapter: Adapter, batches: Batches, timesteps: int, threshold: float, *, summed: bool = False
) -> dict[str, Tensor]:
    """Σ_t |w ∂L_t/∂w|; or, where `summed`, |w Σ_t ∂L_t/∂w|, in which times that pull a weight to and fro cancel out.

    t goes over the times, from the least noise on, whose loss is at least `threshold` times the largest yet, and stops at the
    first that is below: what is mostly noise is easy to predict, and its gradients say little.
    Source: Fang, Ma, Wang 2023, "Structural Pruning for Diffusion Models" (|w ∂L_t/∂w| for each time, and which times count).
    Both of its released scripts, `ddpm_prune.py` and `ldm_exp/prune_ldm.py`, add the gradients of all times up before they take
    the absolute value: that is `summed`. The first of them also adds those of the time at which it stops.
    """
    weights = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in weights.items()}
    largest = 0.0
    for index in range(timesteps):
        loss, gradients = _gradients(model, adapter, batches, index, timesteps)
        largest = max(largest, loss)
        if loss < threshold * largest:
            break
        for name, gradient in gradients.items():
            change = weights[name].detach() * gradient
            total[name] += change if summed else change.abs()
    return {name: value.abs() for name, value in total.items()}


def _gradients(
    model: nn.Module, adapter: Adapter, batches: Batches, index: int, timesteps: int
) -> tuple[float, dict[str, Tensor]]:
    """The loss at the `index`-th of `timesteps` evenly spaced times, on a batch of its own, and its gradients."""
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    device = next(iter(weights.values())).device
    batch = batches.batch(index)
    noised = adapter.noised_at(batch, (index + 0.5) / timesteps, generator("structured", index))
    inputs, target = checked_pair(adapter, batch, noised)
    with torch.enable_grad():
        prediction = checked_answer(adapter, adapter.predict(model, to_device(inputs, device)), target)
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        loss = F.mse_loss(prediction.to(dtype), target.to(device, dtype))
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    found = {name: g for name, g in zip(weights, gradients, strict=True) if g is not None}
    return float(loss.detach()), found
