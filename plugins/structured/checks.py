"""Whether channels can be removed is tried, on a copy with random weights: it must answer as if nothing read them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_map_only

from compressor.adapter import Adapter, cloned, to_device
from compressor.errors import CompressorError, first_line
from compressor.seeds import generator
from compressor.sparsity.surgery import Surgery
from compressor.weights import twin

from .graph import Refused
from .removal import Group, removal

HALF = 0.5
"""The density at which every group is tried."""


class Trial:
    """A copy of `model` with random weights, in which no part is silent as in models that start at zero.

    Raises CompressorError where that copy does not run.
    """

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        self.adapter = adapter
        self.probe = copy.deepcopy(model).eval().requires_grad_(False)
        for index, value in enumerate(self.probe.parameters()):
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator("structured", "probe", index)).to(value)
                value.copy_(value + 0.1 * noise if value.dim() < 2 else noise / math.sqrt(value[0].numel()))
        for index, module in enumerate(self.probe.modules()):
            if isinstance(module, (_BatchNorm, _InstanceNorm)) and module.track_running_stats:
                rng = generator("structured", "statistics", index)
                module.get_buffer("running_mean").copy_(torch.randn(module.num_features, generator=rng))
                module.get_buffer("running_var").copy_(0.5 + torch.rand(module.num_features, generator=rng))
        rng = generator("structured", "inputs")
        example = tree_map_only(
            Tensor,
            lambda t: t + torch.randn(t.shape, generator=rng).to(t) if t.is_floating_point() else t,
            adapter.example_inputs(2),
        )
        self.inputs = to_device(example, next(self.probe.parameters()).device)
        try:
            with torch.no_grad():
                self.whole = adapter.predict(self.probe, cloned(self.inputs))
        except Exception as error:  # whatever the user's model raises
            raise CompressorError(
                f"structured: with random weights the model does not run: {first_line(error)}",
                "What can be removed is tried on a copy with random weights, on the adapter's example inputs and noise.",
            ) from error

    @torch.no_grad()
    def check(self, groups: Sequence[Group], density: float) -> None:
        """Raise Refused unless the copy, with the share `density` of each of the `groups`, answers in its shape; and, with every
        GroupNorm that has these channels replaced by a factor and an offset per channel, exactly as if nothing read the others.

        So a norm that is no layer, a split whose parts were taken for one another, or an attention whose heads are not known is found.
        """
        scores = [
            torch.rand(group.width, generator=generator("structured", "trial", i)) for i, group in enumerate(groups)
        ]
        surgery = removal(self.probe, groups, scores, density)
        try:
            whole, found = self.whole, self._answer(twin(self.probe), surgery)
            if found.shape != whole.shape:
                raise Refused("the model would answer in another shape")
            norms = {m.name for group in groups for m in group.members if isinstance(m.module, nn.GroupNorm)}
            if norms:
                plain = _without_norms(twin(self.probe), norms)
                whole, found = self.adapter.predict(plain, cloned(self.inputs)), self._answer(twin(plain), surgery)
            else:
                plain = twin(self.probe)
            expected = self.adapter.predict(_silenced(plain, groups, surgery), cloned(self.inputs))
        except Refused:
            raise
        except Exception as error:  # whatever a model raises whose shapes do not fit
            raise Refused("with fewer of them the model does not run") from error
        exact = whole.dtype == torch.float32 and whole.device.type == "cpu"
        change, scale = float((whole - expected).abs().max()), float(whole.abs().max())
        if density == HALF and change <= 1e-3 * scale:  # then rounding hides whether they went rightly
            raise Refused("on the example inputs the model's answer hardly depends on them, so that it cannot be tried")
        if not float((found - expected).abs().max()) <= (1e-3 if exact else 0.02) * change + 1e-4 * scale:
            raise Refused("without them the model does not answer as if they were zero")

    def _answer(self, model: nn.Module, surgery: Surgery) -> Tensor:
        surgery.apply(model)
        return self.adapter.predict(model, cloned(self.inputs))


class _Scaled(nn.Module):
    """A factor and an offset for every channel, with the names and counts of a GroupNorm."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.num_channels, self.weight, self.bias = norm.num_channels, norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return x
        shape = (-1, *[1] * (x.dim() - 2))
        return x * self.weight.view(shape) + self.bias.view(shape)


def _without_norms(model: nn.Module, norms: set[str]) -> nn.Module:
    """`model`, whose GroupNorms of these names are replaced in place: their statistics change with what is removed."""
    for name in norms:
        norm = model.get_submodule(name)
        if isinstance(norm, nn.GroupNorm):
            model.set_submodule(name, _Scaled(norm))
    return model


def _silenced(model: nn.Module, groups: Sequence[Group], surgery: Surgery) -> nn.Module:
    """`model`, in place, in which no layer reads what the surgery removes."""
    for member in (member for group in groups for member in group.members if not member.out):
        weight = model.get_parameter(f"{member.name}.weight")
        dim = member.tensors[f"{member.name}.weight"]
        kept = surgery.kept.get(f"{member.name}.weight", {}).get(dim)
        if kept is not None:
            mask = torch.zeros(weight.shape[dim], device=weight.device, dtype=weight.dtype)
            mask[list(kept)] = 1
            shape = [-1 if at == dim else 1 for at in range(weight.dim())]
            model.get_submodule(member.name).weight = nn.Parameter(weight * mask.view(shape), False)
    return model
