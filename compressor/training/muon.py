"""Muon: a matrix moves along its momentum, made orthogonal; what is no matrix is AdamW's.

Sources: K. Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (the step and its polynomial);
J. Liu et al. 2025, arXiv 2502.16982 (its size: with it, learning rates and weight decays of AdamW hold as they are).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_LEAST = 16
"""Rows and columns below which a weight is no matrix here: orthogonal vectors are what a wide layer gains from."""
_MOMENTUM = 0.95
_POLYNOMIAL = (3.4445, -4.775, 2.0315)
_ITERATIONS = 5
_AS_ADAMW = 0.2
"""The root mean square of AdamW's usual step, per learning rate."""


class Muon(torch.optim.Optimizer):
    """Muon for those of `matrices` that have at least 16 rows and 16 columns, AdamW for all else that is `trained`.

    Of kernels of convolutions the first dim counts as rows, all others as columns. `lr` and `weight_decay` hold for both, `betas` are
    AdamW's. All of it is in float32, on CPUs as on GPUs: torch's own Muon multiplies in bfloat16, 28 times slower on a CPU without
    such products, and takes no kernels.
    """

    def __init__(self, trained: Iterable[nn.Parameter], matrices: Collection[Tensor], **settings: Any) -> None:
        trained, known = list(trained), {id(weight) for weight in matrices}
        own = [weight for weight in trained if id(weight) in known and is_matrix(weight)]
        taken = {id(weight) for weight in own}
        rest = [weight for weight in trained if id(weight) not in taken]
        groups = [{"params": params, "muon": params is own} for params in (own, rest) if params]
        super().__init__(groups, settings)
        self._rest = torch.optim.AdamW(rest, **settings) if rest else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all that have a gradient."""
        for group in self.param_groups:
            if not group["muon"] and self._rest is not None:
                self._rest.param_groups[0].update(
                    {key: group[key] for key in ("params", "lr", "betas", "weight_decay")}
                )
                self._rest.state = self.state  # loading a state makes another one
                self._rest.step()
                continue
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, float(group["lr"]), float(group["weight_decay"]))

    def _move(self, weight: nn.Parameter, gradient: Tensor, lr: float, decay: float) -> None:
        own = self.state[weight]
        if not own:
            own["momentum"] = torch.zeros_like(weight)
        own["momentum"].lerp_(gradient, 1 - _MOMENTUM)
        direction = orthogonal(gradient.lerp(own["momentum"], _MOMENTUM).flatten(1))  # Nesterov's
        weight.mul_(1 - lr * decay)
        weight.add_(direction.view(weight.shape), alpha=-lr * _AS_ADAMW * max(direction.shape) ** 0.5)


def is_matrix(weight: Tensor) -> bool:
    """Whether a weight (out, …) has at least 16 rows, and 16 columns in each."""
    return weight.dim() > 1 and min(len(weight), weight[0].numel()) >= _LEAST


def orthogonal(matrix: Tensor) -> Tensor:
    """`matrix` (rows, columns) with its singular values between about 0.7 and 1.2: five steps of Newton and Schulz's iteration."""
    tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp_min(1e-7)
    a, b, c = _POLYNOMIAL
    for _ in range(_ITERATIONS):
        square = found @ found.T
        found = torch.addmm(found, torch.addmm(square, square, square, beta=b, alpha=c), found, beta=a)
    return (found.T if tall else found).contiguous()
