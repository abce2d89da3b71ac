"""What layers see: their inputs over the denoising times, for methods that choose masks by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from compressor.adapter import Adapter, checked_pair, cloned, to_device
from compressor.data.batches import Batches
from compressor.errors import CompressorError, UsageError, one_of
from compressor.foreign.kept import Kept
from compressor.seeds import generator
from compressor.training.arithmetic import in_own_precision


@dataclass(frozen=True)
class Visit:
    """One batch that a calibration looks at: its noised `inputs`, and how much it counts."""

    inputs: Any
    weight: float


Falls = Literal["early", "late"]
"""Where the weights of times fall most: after the first steps of sampling, or before the last."""


def visits(
    adapter: Adapter, batches: Batches, timesteps: int, last_weight: float = 1.0, falls: Falls = "early"
) -> Iterator[Visit]:
    """A batch at each of `timesteps` evenly spaced times, in the order of sampling: most noise first.

    Their weights fall from 1 to `last_weight` with a logarithm, since errors of early steps go through all later ones:
    that of the position from the start where it `falls` early, that of the position from the end where late.
    Source: Zhu et al. 2025, "OBS-Diff", which falls late, from 1.2 to 0.8 (`last_weight` 2/3: only ratios count), and looks at
    what its sampler draws, not at noised data.
    """
    for index in range(timesteps):
        time = 1 - (index + 0.5) / timesteps
        batch = batches.at(index, time)
        inputs, _ = checked_pair(adapter, batch, adapter.noised_at(batch, time, generator("calibration", index)))
        yield Visit(inputs, 1 - (1 - last_weight) * _fallen(index, timesteps, falls))


def _fallen(index: int, timesteps: int, falls: Falls) -> float:
    """How much of the way down the weight of time `index` is, 0 for the first and 1 for the last."""
    if timesteps == 1:
        return 0.0
    if falls == "early":
        return math.log1p(index) / math.log(timesteps)
    return 1 - math.log(timesteps - index) / math.log(timesteps)


def check_calibration(method: str, timesteps: int, last_weight: float, falls: Falls = "early") -> None:
    """Refuse settings of `visits` that mean nothing. Raises UsageError that names the `method`."""
    if not isinstance(timesteps, int) or timesteps < 1:
        raise UsageError(f"{method}: timesteps must be at least 1, got {timesteps}")
    if not 0 < last_weight <= 1:
        raise UsageError(f"{method}: last_weight must be above 0 and at most 1, got {last_weight!r}")
    one_of(f"{method}: falls", falls, ("early", "late"))
    if last_weight == 1 and falls != "early":
        raise UsageError(
            f"{method}: falls has no effect, as last_weight is 1", "Leave falls out, or give a last_weight."
        )


@torch.no_grad()
def observe(
    model: nn.Module,
    adapter: Adapter,
    seen: Iterator[Visit],
    layers: Mapping[str, nn.Module],
    take: Callable[[str, Tensor, float], None],
) -> None:
    """Call `take(name, columns, weight)` with what the weight of each of `layers` multiplies, at every visit.

    `columns` (positions, in x kernel) has, for every place where the weight is applied, the numbers it is applied to, in the
    order of `matrix(weight)`. Calls of a layer with a `forward` of its own that does otherwise (pads, folds dims) are passed over.
    """
    weight = 1.0

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: Any, named: Any, *answer: Any) -> None:
            given = inputs[0] if inputs else next(iter(named.values()))
            if not answer or _explains(module, given, answer[0]):
                take(name, columns(module, given.detach()), weight)

        return see

    was_training = model.training
    model.eval()
    names = {(type(module), id(module.weight)): name for name, module in layers.items()}
    handles = [
        (module.register_forward_pre_hook if _usual(module) else module.register_forward_hook)(
            hook(names[key]), with_kwargs=True
        )
        for module in model.modules()
        if (key := (type(module), id(getattr(module, "weight", None)))) in names  # also those that share the weight
    ]
    kept = Kept(model)
    try:
        for visit in seen:
            weight = visit.weight
            with in_own_precision():
                adapter.predict(model, cloned(to_device(visit.inputs, next(model.parameters()).device)))
            kept.put_back(model, kept.changed(model))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)


def check_seen(method: str, name: str, seen: Tensor) -> None:
    """Raise CompressorError where what was `seen` of the inputs of the weight `name` is not finite: it would choose by chance."""
    if not bool(seen.isfinite().all()):
        raise CompressorError(
            f"{method}: what {name} is multiplied with in the calibration is not finite",
            "Check that the data are finite, and that the model's answers to them are.",
        )


def observable(module: nn.Module) -> bool:
    """Whether `columns` knows the kind of this layer: Linear, and convolutions in 1 and 2 dims without groups."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def _usual(module: nn.Module) -> bool:
    """Whether a layer is called as torch wrote it."""
    usual = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward)
    return "forward" not in vars(module) and type(module).forward in usual


def _explains(module: nn.Module, given: Any, answer: Any) -> bool:
    """Whether a layer with a `forward` of its own has multiplied the columns of what it was `given`: as many numbers, in as many
    places, as its `answer` has."""
    weight: Any = module.weight
    if not isinstance(given, Tensor) or not isinstance(answer, Tensor):
        return False
    if isinstance(module, nn.Linear):
        inside, out = given.shape[-1], answer.shape[-1]
    elif given.dim() == answer.dim() == weight.dim():
        inside, out = given.shape[1], answer.shape[1]
    else:
        return False
    if (out, inside) != tuple(weight.shape[:2]):
        return False
    return len(columns(module, given.detach())) * out == answer.numel()


def columns(module: nn.Module, inputs: Tensor) -> Tensor:
    """The numbers (positions, kernel x in) that `module`, a layer that is `observable`, multiplies with its weight."""
    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1]).float()
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        raise TypeError(type(module).__name__)
    if inputs.dim() == module.weight.dim() - 1:  # one sample, without a dim for the batch
        inputs = inputs[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs.float(), module._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = (tuple(v) for v in (module.kernel_size, module.stride, module.dilation))
    if isinstance(module, nn.Conv1d):
        padded, kernel, stride, dilation = padded[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    patches = F.unfold(padded, kernel, dilation, 0, stride)
    return rearrange(patches, "n (i k) p -> (n p) (k i)", i=inputs.shape[1])


def matrix(weight: Tensor) -> Tensor:
    """`weight` (out, in, *kernel) as (out, kernel x in): input channels side by side, as patterns group them."""
    return rearrange(weight, "o i ... -> o (...) i").flatten(1)


def from_matrix(flat: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `matrix`, for a weight of `shape`."""
    if len(shape) == 2:
        return flat.reshape(shape)
    return flat.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
