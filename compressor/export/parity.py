"""How far an exported file is from PyTorch: both are run on random inputs, and what a file may differ by is held."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from compressor.adapter import Adapter, samples_in, tensors_of
from compressor.errors import CompressorError, GateError
from compressor.export.graph import OnnxRunner

TOLERANCE = 1e-4
"""The largest difference from PyTorch that float32 may show, in standard deviations of the output."""
BATCHES = (1, 2, 5)


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime was from PyTorch: the largest difference of any output value, and the largest root mean square
    one, in standard deviations of the output; over `draws` random inputs at each of `batches`, every sample with a timestep
    of its own. `bounded` is the one of the two that `tolerance` bounds: "max_error", with int8 "rms_error".

    With int8, `integer_error` is how far any of the `integer_products` was from exact whole-number arithmetic on the same
    inputs, in standard deviations of the product.
    """

    max_error: float = 0.0
    rms_error: float = 0.0
    tolerance: float = TOLERANCE
    batches: tuple[int, ...] = BATCHES
    draws: int = 3
    bounded: str = "max_error"
    integer_error: float | None = None
    integer_products: int = 0

    def lines(self) -> list[str]:
        """What a user wants to know of it."""
        batches = ", ".join(map(str, self.batches))
        if self.integer_error is None:
            return [
                f"parity: at most {self.max_error:.1e} standard deviations from PyTorch (root mean square "
                f"{self.rms_error:.1e}), at batches {batches}; {self.tolerance:.0e} are allowed"
            ]
        return [
            f"int8's cost: {self.rms_error:.1e} standard deviations from PyTorch (root mean square; at most "
            f"{self.max_error:.1e}), at batches {batches}; {self.tolerance:.0e} are allowed",
            f"int8's arithmetic: {self.integer_products} products, at most {self.integer_error:.1e} standard deviations from "
            f"exact whole numbers; {TOLERANCE:.0e} are allowed",
        ]


def parity(model: nn.Module, adapter: Adapter, runner: OnnxRunner, found: Parity, hint: str) -> Parity:
    """`found` with how far `runner`'s file is from `model`. Raises GateError with `hint` where that is more than it allows."""
    rng = torch.Generator().manual_seed(0)
    if adapter.fixed_batch:
        found = replace(found, batches=(samples_in(adapter.example_inputs(1)),), draws=len(found.batches) * found.draws)
    root = "" if found.bounded == "max_error" else "(root mean square) "
    for batch in found.batches:
        example = adapter.example_inputs(batch)
        for draw in range(found.draws):
            inputs = random_inputs(example, adapter.num_classes, rng)
            wanted, answer = adapter.predict(model, inputs), runner(inputs)
            if wanted.is_complex() or answer.shape != wanted.shape:  # of complex numbers a graph answers pairs
                raise CompressorError(
                    f"the exported graph answers {answer.dtype} {tuple(answer.shape)}, PyTorch {wanted.dtype} {tuple(wanted.shape)}",
                    "No file was written. Let predict answer real numbers (torch.view_as_real), of a shape that follows the batch.",
                )
            wanted = wanted.double()
            difference = (answer.double() - wanted) / (float(wanted.std(correction=0)) or 1.0)
            errors = {"max_error": float(difference.abs().max()), "rms_error": float(difference.square().mean().sqrt())}
            if not errors[found.bounded] <= found.tolerance:
                raise GateError(
                    f"the exported graph differs from PyTorch by {errors[found.bounded]:.1e} standard deviations of the output "
                    f"{root}at batch {batch}, draw {draw + 1}; {found.tolerance:.0e} are allowed",
                    f"No file was written. {hint}",
                )
            found = replace(found, **{name: max(getattr(found, name), error) for name, error in errors.items()})
    return found


def float32_inputs(inputs: Any) -> Any:
    """`inputs` as graphs take them: on the CPU, and floating-point numbers in float32."""
    return tree_map_only(Tensor, lambda t: t.cpu().float() if t.is_floating_point() else t.cpu(), inputs)


def random_inputs(example: Any, classes: int, rng: torch.Generator) -> Any:
    """Inputs like `example`, but random: noise for what has two dims or more; for numbers per sample up to twice those of
    the example; for whole numbers up to those of the example, or `classes` where they are the last input."""
    leaves, spec = tree_flatten(example := float32_inputs(example))
    tensors = tensors_of(example)

    def drawn(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point():
            if leaf.dim() > 1:
                return torch.randn(leaf.shape, generator=rng).to(leaf.dtype)
            return (2 * leaf * torch.rand(leaf.shape, generator=rng)).to(leaf.dtype)
        top = classes if classes and leaf is tensors[-1] else int(leaf.max()) + 1
        return torch.randint(top, leaf.shape, generator=rng).to(leaf.dtype)

    return tree_unflatten([drawn(leaf) for leaf in leaves], spec)
