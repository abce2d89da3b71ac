"""Gradient estimators: what gradient a dense weight receives from the loss of its masked copy.

The forward pass uses `w * m`; the mask is a step function of the weights, so its true gradient is useless. An estimator
is the rule that replaces it: the E of STE. How much a weight matters is never called that here; that is its score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.sparsity.on_gpu import kernels_for
from compressor.sparsity.pattern import Mask


class Estimator(ABC):
    """Turns the gradient at the masked weight into the dense weight's. Subclasses are frozen dataclasses, and pure."""

    @abstractmethod
    def gradient(self, grad: Tensor, dense: Tensor, mask: Mask) -> Tensor:
        """The gradient of `dense`, given `grad` taken at `mask.apply(dense)`. All three have the weight's shape."""

    def shrink(self, dense: Tensor, mask: Mask, lr: float) -> Tensor:
        """`dense` after an optimizer step with learning rate `lr`; for decay decoupled from the gradient's moments."""
        return dense


@dataclass(frozen=True)
class StraightThrough(Estimator):
    """The gradient as it is, for kept and pruned weights alike. Source: Bengio et al. 2013."""

    def gradient(self, grad: Tensor, dense: Tensor, mask: Mask) -> Tensor:
        return grad


@dataclass(frozen=True)
class SRSTE(Estimator):
    """Sparse-refined straight-through: pruned weights are also pulled towards zero, which calms mask changes.

    `decay` is λ. As a term of the gradient it passes through the optimizer's moments, as published; `decoupled`
    applies it to the weight after the step instead, scaled by the learning rate.
    Source: Zhou et al. 2021, "Learning N:M fine-grained structured sparse neural networks from scratch", eq. 9.
    """

    decay: float = 2e-4
    decoupled: bool = False

    def gradient(self, grad: Tensor, dense: Tensor, mask: Mask) -> Tensor:
        """g + λ (1 - m) ⊙ w"""
        if self.decoupled:
            return grad
        if (kernels := kernels_for(dense, grad, mask.keep)) and grad.dtype == dense.dtype == torch.float32:
            return kernels.refined(grad, dense, mask.keep, self.decay)  # type: ignore[no-any-return]
        return grad + self.decay * mask.rest(dense)

    def shrink(self, dense: Tensor, mask: Mask, lr: float) -> Tensor:
        return dense.sub(mask.rest(dense), alpha=lr * self.decay) if self.decoupled else dense


@dataclass(frozen=True)
class Exact(Estimator):
    """The true gradient under a constant mask: pruned weights receive none, and so a frozen mask stays put."""

    def gradient(self, grad: Tensor, dense: Tensor, mask: Mask) -> Tensor:
        return mask.apply(grad)
