"""Gradient estimators: what gradient a dense weight receives from the loss of its masked copy.

The forward pass uses `w * m`; the mask is a step function of the weights, so its true gradient is useless. An estimator
is the rule that replaces it: the E of STE. How much a weight matters is never called that here; that is its score.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

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
class Exact(Estimator):
    """The true gradient under a constant mask: pruned weights receive none, and so a frozen mask stays put."""

    def gradient(self, grad: Tensor, dense: Tensor, mask: Mask) -> Tensor:
        return mask.apply(grad)
