"""The Backend interface: one way to run a layer. A backend says what it cannot do and why; the chooser measures the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from compressor.errors import CompressorError
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.pattern import NM, Pattern
from compressor.sparsity.venom import Venom


class Kind(StrEnum):
    """What a unit is."""

    LINEAR = "linear"
    PAIR = "pair"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"


@dataclass(frozen=True, eq=False)
class Unit:
    """What is lowered as one: a layer, a feed-forward pair whose activation lies between its two layers, or an attention.

    `module` is the dense form: an `nn.Linear`, an `nn.Conv2d`, an `nn.Sequential` of Linear, GELU, Linear, or a `SelfAttention` or
    `CrossAttention`, which have no weight. It takes one tensor of `input_shape` (as seen in the example) and `dtype` on `device`.
    `patterns` has the pattern that each of its weights obeys, in order; None where there is none.
    """

    name: str
    module: nn.Module
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    patterns: tuple[NM | Clustered | Venom | None, ...]

    @property
    def layers(self) -> tuple[nn.Linear | nn.Conv2d, ...]:
        """The layers with a weight, in the order in which they are applied."""
        return tuple(m for m in self.module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))

    @property
    def activation(self) -> nn.GELU:
        """The GELU of a pair."""
        (found,) = (m for m in self.module.modules() if isinstance(m, nn.GELU))
        return found

    @property
    def tokens(self) -> int:
        """Rows of its products in the example, one number per input channel in each; one at least."""
        channels = self.input_shape[-3] if isinstance(self.module, nn.Conv2d) else self.input_shape[-1]
        return max(1, torch.Size(self.input_shape).numel() // max(1, channels))

    @property
    def kind(self) -> Kind:
        """What it is, by its layers."""
        if len(self.layers) != 1:
            return Kind.PAIR if self.layers else Kind.ATTENTION
        return Kind.CONVOLUTION if isinstance(self.layers[0], nn.Conv2d) else Kind.LINEAR


class Backend(ABC):
    """One way to run a unit. Stateless: registered under `compressor.backends` and built without arguments."""

    name: str
    takes: frozenset[Kind] = frozenset({Kind.LINEAR, Kind.PAIR, Kind.CONVOLUTION})
    """The kinds of units that it is asked about; `refusal` may still decline."""
    skips_zeros: bool = True
    """Whether a multiplication by a masked weight is really left out; False for dense forms."""
    version: str = ""
    """What its times depend on besides shapes, machine and torch: times measured with another version are not used."""
    products: str | None = None
    """What it multiplies in where that is not the layer's dtype: "int8". A speed-up names it."""
    quantises: bool = False
    """Whether it gives other numbers than rounding explains: tried only where it is named, or an error is allowed."""

    @abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot run on `device` of this machine, and what would help; None where it can."""

    def remark(self, device: torch.device) -> str | None:
        """What a user of `device` should know about this backend, missing parts for example; it goes into the plan's notes."""
        return None

    @abstractmethod
    def refusal(self, unit: Unit) -> str | None:
        """Why this backend does not take `unit`; None where `build` will work."""

    def left(self, pattern: Pattern) -> float:
        """The share of the multiplications by a weight of `pattern` that it still does, where it `skips_zeros`."""
        return pattern.density

    def prepare(self, units: Sequence[Unit]) -> None:  # noqa: B027
        """What is better done once for all `units` that will be built, a search in another process for example; nothing by default.
        `build` works without it."""

    @abstractmethod
    def build(self, unit: Unit) -> nn.Module:
        """A module that takes and gives what `unit.module` does, for inference, and shares no memory with it that could
        change: weights are packed now. Its buffers are on `unit.device`. Other input shapes than the example's work too."""


def exporting() -> bool:
    """Whether torch.export traces what is called: what comes of it may run elsewhere."""
    # not is_exporting(), which is True in all that torch 2.10 compiles
    return torch.compiler.is_compiling() and bool(getattr(torch.compiler, "_is_exporting_flag", True))


def was_cast() -> CompressorError:
    """The error of a lowered model that has another dtype than it was lowered in."""
    return CompressorError("a lowered model was cast", "Lower the dense model again with dtype=... instead.")


def other_input(found: str, takes: str) -> CompressorError:
    """The error of a lowered layer that got an input which it does not take."""
    return CompressorError(
        f"a lowered layer got {found}; it takes {takes}",
        "Lower the model again for other inputs: compressor.lower(model, example_inputs, dtype=...).",
    )


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode differentiation goes through `x` (torch.func.jvp, for one)."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def refuse_gradients(x: Tensor) -> None:
    """Raise CompressorError where a gradient is wanted of `x`, or it has a tangent: lowered layers have none, and torch would go on
    without."""
    if (torch.is_grad_enabled() and x.requires_grad) or has_tangent(x):
        raise CompressorError(
            "a lowered model is for inference: it has no gradients",
            "Call it under torch.no_grad(); take gradients from the model that was lowered.",
        )
