"""Dense products as operators of torch that torch.compile leaves as they are: oneDNN's with packed weights, cuBLASLt's with a GELU.

A packed weight is opaque: a compiler can neither look into it nor make one up. So these operators take its number, and
weights are found by that for as long as a module holds them. Only compiled models call them: torch's own take the weight itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from compressor.errors import CompressorError
from compressor.lower.operators import define


class PackedWeight:
    """A weight (out, in, *kernel) as oneDNN has packed it, `how`: for about so many rows, or for a convolution's padding, stride,
    dilation, groups and input shape. Operators know it by its `number`."""

    def __init__(self, weight: Tensor, how: tuple[Any, ...], number: int) -> None:
        pack = torch.ops.mkldnn._reorder_linear_weight
        if len(how) > 1:
            pack = torch.ops.mkldnn._reorder_convolution_weight
        self.tensor = pack(weight.clone(), *how)
        self.shape, self.dtype, self.how, self.number = tuple(weight.shape), weight.dtype, how, number

    def __reduce__(self) -> tuple[Any, ...]:
        return packed, (self.plain(), self.how)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def plain(self) -> Tensor:
        """The weight as it was: a tensor of its own."""
        with _disable_current_modes():
            plain: Tensor = self.tensor.to_dense(self.dtype)
            return plain


_held: WeakValueDictionary[int, PackedWeight] = WeakValueDictionary()


def packed(weight: Tensor, how: tuple[Any, ...]) -> PackedWeight:
    """`weight`, packed; one and the same where this process has such a one.

    Its number is of what it holds: what torch has compiled for one weight, and kept on disk, is never run with another.
    """
    weight = weight.detach().contiguous()
    digest = hashlib.blake2b(f"{weight.dtype} {tuple(weight.shape)} {how}".encode(), digest_size=7)
    digest.update(weight.flatten().view(torch.uint8).numpy().data)
    number = int.from_bytes(digest.digest())
    return _held.get(number) or _held.setdefault(number, PackedWeight(weight, how, number))


def _weight(number: int) -> PackedWeight:
    try:
        return _held[number]
    except KeyError as error:
        raise CompressorError(
            "what was compiled needs a packed weight that this process does not have",
            "Compile the lowered model here, where it was lowered or read.",
        ) from error


def _linear(x: Tensor, bias: Tensor | None, weight: int, attribute: str, algorithm: str) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, _weight(weight).tensor, bias, attribute, [], algorithm)
    return out.contiguous()


def _fake_linear(x: Tensor, bias: Tensor | None, weight: int, attribute: str, algorithm: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], _weight(weight).shape[0]))


def _conv(
    x: Tensor,
    bias: Tensor | None,
    weight: int,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    where = (list(padding), list(stride), list(dilation), groups)
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, _weight(weight).tensor, bias, *where, "none", [], "")
    return out.contiguous()


def _fake_conv(
    x: Tensor,
    bias: Tensor | None,
    weight: int,
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    out, _, *kernel = _weight(weight).shape
    sides = zip(x.shape[-len(kernel) :], kernel, padding, stride, dilation, strict=True)
    after = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, p, s, d in sides]
    return x.new_empty((*x.shape[: -len(kernel) - 1], out, *after))


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (tokens, in), weight (out, in), bias (out,) -> (tokens, out). A compiler would take torch's operator apart again."""
    out: Tensor = torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return out


def _fake_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


define("linear_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor", _fake_linear_gelu, _linear_gelu)
define(
    "packed_linear(Tensor x, Tensor? bias, int weight, str attribute, str algorithm) -> Tensor",
    _fake_linear,
    _linear,
    "CPU",
)
define(
    "packed_conv(Tensor x, Tensor? bias, int weight, int[] padding, int[] stride, int[] dilation, int groups) -> Tensor",
    _fake_conv,
    _conv,
    "CPU",
)
