"""The compiled CPU kernels as operators of torch, which torch.compile and export accept."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import chain, starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.lower.backend import exporting
from compressor.lower.operators import define
from compressor.lower.vnm_kernels import kernels, served
from compressor.lower.vnm_weight import Lanes, Layout

_MATRIX = "Tensor values{0}, Tensor index{0}, Tensor? bias{0}, Tensor? order{0}, Tensor? scale{0}, Tensor? total{0}, int[] numbers{0}"
_PARTS, _SCALE = 7, 4
"""How many arguments a weight is, and which of them its scales are."""


def direct() -> bool:
    """Whether to call the operators that the extension itself gives to torch: in what torch compiles. Where they are not, and in what
    is run line by line, or exported to run elsewhere, those in Python do the same, and say more of what is wrong."""
    return _SERVED and torch.compiler.is_compiling() and not exporting()


HALF = {torch.float32: 0, torch.bfloat16: 1}
"""The dtypes of activations, as the kernels number them."""


class _Work(IntEnum):
    """What the kernels do, as they number it."""

    LINEAR = 0
    PAIR = 1
    CONVOLUTION = 2


class _Job(NamedTuple):
    """What the kernels must know of a call, in their order. `units` are tokens, or images of a convolution."""

    work: _Work
    x: int
    y: int
    half: int
    tanh: int
    side: int
    stride: int
    padding: int
    height: int
    width: int
    units: int
    tile: int
    threads: int
    largest: int = 0
    """Where the largest magnitude of each image lies, for weights of codes; for those of bytes the lowest number of each, then the
    highest."""


def _check(x: Tensor, inner: int, dim: int) -> Tensor:
    if x.dtype not in HALF or x.shape[dim] != inner:
        raise CompressorError(
            f"a lowered layer got {x.dtype} of shape {tuple(x.shape)}; it takes float32 or bfloat16 with {inner} channels",
            "Lower the model again for other inputs: compressor.lower(model, example_inputs, dtype=...).",
        )
    return x.contiguous()


@lru_cache(maxsize=4096)
def _layout(numbers: tuple[int, ...]) -> tuple[Layout, int, int, tuple[int, int]]:
    """The layout of these numbers; how many values and places it has, and the shape of its totals."""
    layout = Layout(*numbers)
    return (layout, *layout.lengths, (layout.blocks + 1, layout.out))


def _address(tensor: Tensor | None, dtype: torch.dtype, length: int) -> int:
    """Where a buffer of a weight lies; 0 for none. Looked at in every call: a model may be moved or cast after it was lowered."""
    if tensor is None:
        return 0
    if tensor.dtype != dtype and dtype == torch.float32:
        raise CompressorError("a lowered model was cast", "Lower the dense model again with dtype=... instead.")
    if tensor.dtype != dtype or tensor.numel() != length or not (tensor.is_cpu and tensor.is_contiguous()):
        raise CompressorError("a packed weight is not as its numbers say", "Lower the dense model again.")
    return tensor.data_ptr()


def _matrix(
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
    numbers: Sequence[int],
) -> tuple[int, ...]:
    """A weight, as `_MATRIX` says, as the extension takes it: its layout, and where its buffers lie."""
    layout, lanes, places, totals = _layout(tuple(numbers))
    if values.element_size() != 4 or (total is not None and total.shape != totals):
        raise CompressorError("a packed weight is not as its numbers say", "Lower the dense model again.")
    return (
        *layout,
        _address(values, values.dtype, lanes),
        _address(index, torch.uint16, places),
        _address(bias, torch.float32, layout.out),
        _address(order, torch.int32, layout.out),
        _address(scale, torch.float32, layout.out),
        _address(total, torch.int32, totals[0] * totals[1]),
    )


def _extension() -> Any:
    """The compiled kernels. Raises CompressorError where they are not here."""
    extension, why = kernels()
    if extension is None:
        raise CompressorError("this model was lowered to compiled CPU kernels", why or "")
    return extension


def _run(job: _Job, *matrices: tuple[int, ...]) -> None:
    _extension().run(*job, *chain.from_iterable(matrices))


def _on_tokens(work: _Work, x: Tensor, weights: Sequence[Sequence[Any]], tile: int, tanh: int = 0) -> Tensor:
    """x (..., in) -> (..., out) by one of `weights` after the other, each as `_MATRIX` says."""
    channels, out = weights[0][-1][1], weights[-1][-1][0]  # as Layout begins
    x = _check(x, channels, -1)
    y = x.new_empty((*x.shape[:-1], out))
    if tokens := x.numel() // channels:
        half, threads = HALF[x.dtype], torch.get_num_threads()
        job = _Job(work, x.data_ptr(), y.data_ptr(), half, tanh, 1, 1, 0, 1, 1, tokens, tile, threads)
        _run(job, *starmap(_matrix, weights))
    return y


def _linear(x: Tensor, *rest: Any) -> Tensor:
    *weight, tile = rest
    return _on_tokens(_Work.LINEAR, x, [weight], tile)


def _pair(x: Tensor, *rest: Any) -> Tensor:
    *weights, tanh, tile = rest
    return _on_tokens(_Work.PAIR, x, [weights[:_PARTS], weights[_PARTS:]], tile, int(tanh))


def _image(x: Tensor, channels: int, side: int, stride: int, padding: int) -> Tensor:
    """Room for a convolution's result."""
    height, width = x.shape[2:]
    if not (1 <= stride <= side and 0 <= padding < side) or min(height, width) + 2 * padding < side:
        raise CompressorError(
            f"a lowered convolution got {height} x {width} pixels and pads them by {padding}: "
            f"its kernel of {side} x {side} with stride {stride} does not fit"
        )
    sizes = ((size + 2 * padding - side) // stride + 1 for size in (height, width))
    return x.new_empty((x.shape[0], channels, *sizes))  # not len(): no tracer follows it


def _conv(x: Tensor, *rest: Any) -> Tensor:
    *weight, largest, side, stride, padding, tile = rest
    layout, scale = Layout(*weight[-1]), weight[_SCALE]
    x = _check(x, layout.channels, 1)
    batch, _, height, width = x.shape
    y = _image(x, layout.out, side, stride, padding)
    if y.numel():
        work, half, threads = _Work.CONVOLUTION, HALF[x.dtype], torch.get_num_threads()
        job = _Job(
            work, x.data_ptr(), y.data_ptr(), half, 0, side, stride, padding, height, width, batch, tile, threads
        )
        if scale is not None:
            shape = (2, batch) if layout.lanes == Lanes.BYTES else (batch,)
            if largest is None or largest.shape != shape or largest.dtype != torch.float32:
                what = "lowest and the highest number" if layout.lanes == Lanes.BYTES else "largest magnitude"
                raise CompressorError(f"a convolution in few bits needs the {what} of each image, in float32")
            largest = largest.contiguous()
            job = job._replace(largest=largest.data_ptr())
        _run(job, _matrix(*weight))
    return y


_KEYS = 128
"""Keys at a time: their scores stay in the first-level cache."""


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, lanes: int) -> Tensor:
    images, heads, queries, channels = query.shape
    out = _fake_attention(query, key, value, scale, lanes)
    sizes = (images, heads, queries, key.shape[2], channels, value.shape[3])
    strides = (stride for tensor in (query, key, value) for stride in tensor.stride()[:3])
    pointers = (tensor.data_ptr() for tensor in (query, key, value, out))
    _extension().attend(*pointers, *sizes, _KEYS, torch.get_num_threads(), lanes, scale, *strides)
    return out


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, lanes: Lanes) -> Tensor:
    """softmax(query key^T scale) value: (images, heads, tokens, channels) of each, in float32 with channels that follow each other.

    `lanes`: FLOATS, or in whole numbers. With CODES a query has a scale of its own, and all keys of a head have one, from the largest
    magnitude, and codes whose sum of products fits 31 bits, at most 16 of them; a channel of the values has a scale too, and codes up
    to 4,095, and a value's share of its query's largest is in 4,095ths. With BYTES codes of queries and keys are up to 127, and those
    of keys are of what differs from their mean; this needs VNNI, and is a ValueError elsewhere.
    """
    operators: Any = torch.ops.compressor
    operator = operators.attention_direct if direct() else operators.attention
    out: Tensor = operator(query, key, value, scale, int(lanes))
    return out


def _fake_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, lanes: int) -> Tensor:
    images, heads, queries, _ = query.shape
    return query.new_empty((images, queries, heads, value.shape[3])).transpose(1, 2)


def _fake_linear(x: Tensor, *rest: Any) -> Tensor:
    *weight, _ = rest
    return x.new_empty((*x.shape[:-1], Layout(*weight[-1]).out))


def _fake_pair(x: Tensor, *rest: Any) -> Tensor:
    *weights, _, _ = rest
    return x.new_empty((*x.shape[:-1], Layout(*weights[-1]).out))


def _fake_conv(x: Tensor, *rest: Any) -> Tensor:
    *weight, _, side, stride, padding, _ = rest
    return _image(x, Layout(*weight[-1]).out, side, stride, padding)


def _fake_tokens(x: Tensor, weight: Tensor, out: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


def _fake_tokens_of_pair(x: Tensor, first: Tensor, second: Tensor, out: int, tanh: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


def _fake_image(x: Tensor, weight: Tensor, largest: Tensor, out: int, side: int, stride: int, padding: int) -> Tensor:
    return _image(x, out, side, stride, padding)


_ATTENTION = "(Tensor query, Tensor key, Tensor value, float scale, int lanes) -> Tensor"
define(f"vnm_linear(Tensor x, {_MATRIX.format('')}, int tile) -> Tensor", _fake_linear, _linear, "CPU")
define(
    f"vnm_pair(Tensor x, {_MATRIX.format('1')}, {_MATRIX.format('2')}, bool tanh, int tile) -> Tensor",
    _fake_pair,
    _pair,
    "CPU",
)
define(
    f"vnm_conv(Tensor x, {_MATRIX.format('')}, Tensor? largest, int side, int stride, int padding, int tile) -> Tensor",
    _fake_conv,
    _conv,
    "CPU",
)
define(f"attention{_ATTENTION}", _fake_attention, _attention, "CPU")
# The same for compiled models, which the extension itself gives to torch: see _vnm_torch.h. A weight is its `packed`.
define("vnm_linear_direct(Tensor x, Tensor weight, int out) -> Tensor", _fake_tokens, None)
define(
    "vnm_pair_direct(Tensor x, Tensor first, Tensor second, int out, bool tanh) -> Tensor", _fake_tokens_of_pair, None
)
define(
    "vnm_conv_direct(Tensor x, Tensor weight, Tensor largest, int out, int side, int stride, int padding) -> Tensor",
    _fake_image,
    None,
)
define(f"attention_direct{_ATTENTION}", _fake_attention, None)

_SERVED = served()
