"""Weights that are trained in 8 bits: fake quantisation of what masks leave."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.errors import UsageError, one_of
from compressor.sparsity.codes import QUANTISE, fake_quantised
from compressor.sparsity.pattern import Mask
from compressor.training.pruner import Pruner
from compressor.weights import HALF


def sparse(weight: Tensor, mask: Mask, pruner: Pruner) -> Tensor:
    """The dense `weight` as a finished model has it: under its `mask`, and in 8-bit codes where `pruner` quantises."""
    return rounded(mask.apply(weight), pruner)


def rounded(masked: Tensor, pruner: Pruner) -> Tensor:
    """`masked` as it is, or `fake_quantised` where `pruner` quantises."""
    return fake_quantised(masked) if pruner.quantise == "int8" else masked


def check_quantise(pruner: Pruner, dtypes: Mapping[str, torch.dtype], mode: str = "full") -> None:
    """Refuse what `quantise` cannot mean: `dtypes` has, by name, that of each weight that may get a mask, as it is saved.

    Raises UsageError for values that do not exist, adapters, and half precision, whose own rounding would change the codes.
    """
    one_of("quantise", pruner.quantise, QUANTISE)
    if pruner.quantise == "none":
        return
    if mode == "lora":
        raise UsageError(
            "quantise int8 with train.mode lora: adapters of weights in 8 bits are not made",
            "Set train.mode=full, or quantise=none.",
        )
    for name, dtype in dtypes.items():
        if dtype in HALF:
            raise UsageError(
                f"quantise int8: {name} is {str(dtype).removeprefix('torch.')}, whose own rounding would change its 8-bit codes",
                "Give the model in float32 (model.float()), or quantise=none.",
            )
