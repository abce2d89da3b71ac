"""The compiled CPU kernels as operators of torch, which torch.compile and export accept."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressor.errors import CompressorError
from compressor.lower.backend import exporting
from compressor.lower.vnm_kernels import kernels, served
from compressor.lower.vnm_weight import Lanes, Layout

_torch_library: Any = torch.library  # it has no annotations
_library = _torch_library.Library("compressor", "DEF")
_MATRIX = "Tensor values{0}, Tensor index{0}, Tensor? bias{0}, Tensor? order{0}, Tensor? scale{0}, Tensor? total{0}, int[] numbers{0}"
_library.define(f"vnm_linear(Tensor x, {_MATRIX.format('')}, int tile) -> Tensor")
_library.define(f"vnm_pair(Tensor x, {_MATRIX.format('1')}, {_MATRIX.format('2')}, bool tanh, int tile) -> Tensor")
_library.define(
    f"vnm_conv(Tensor x, {_MATRIX.format('')}, Tensor? largest, int side, int stride, int padding, int tile) -> Tensor"
)
_library.define("attention(Tensor query, Tensor key, Tensor value, float scale, int lanes) -> Tensor")
# The same for compiled models, which the extension itself gives to torch: see _vnm_torch.h. A weight is its `packed`.
_library.define("vnm_linear_direct(Tensor x, Tensor weight, int out) -> Tensor")
_library.define("vnm_pair_direct(Tensor x, Tensor first, Tensor second, int out, bool tanh) -> Tensor")
_library.define(
    "vnm_conv_direct(Tensor x, Tensor weight, Tensor largest, int out, int side, int stride, int padding) -> Tensor"
)
_library.define("attention_direct(Tensor query, Tensor key, Tensor value, float scale, int lanes) -> Tensor")

_SERVED = served()


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
    """A weight as the extension takes it: its layout, and where its buffers lie."""
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


def _run(job: _Job, *matrices: tuple[int, ...]) -> None:
    extension, why = kernels()
    if extension is None:
        raise CompressorError("this model was lowered to compiled CPU kernels", why or "")
    extension.run(*job, *chain.from_iterable(matrices))


def _tokens(work: _Work, x: Tensor, y: Tensor, tokens: int, tile: int, tanh: int = 0) -> _Job:
    return _Job(
        work, x.data_ptr(), y.data_ptr(), HALF[x.dtype], tanh, 1, 1, 0, 1, 1, tokens, tile, torch.get_num_threads()
    )


def _linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
    numbers: Sequence[int],
    tile: int,
) -> Tensor:
    layout = Layout(*numbers)
    x = _check(x, layout.channels, -1)
    y = x.new_empty((*x.shape[:-1], layout.out))
    tokens = x.numel() // layout.channels
    if tokens:
        _run(_tokens(_Work.LINEAR, x, y, tokens, tile), _matrix(values, index, bias, order, scale, total, numbers))
    return y


def _pair(
    x: Tensor,
    values1: Tensor,
    index1: Tensor,
    bias1: Tensor | None,
    order1: Tensor | None,
    scale1: Tensor | None,
    total1: Tensor | None,
    numbers1: Sequence[int],
    values2: Tensor,
    index2: Tensor,
    bias2: Tensor | None,
    order2: Tensor | None,
    scale2: Tensor | None,
    total2: Tensor | None,
    numbers2: Sequence[int],
    tanh: bool,
    tile: int,
) -> Tensor:
    first, second = Layout(*numbers1), Layout(*numbers2)
    x = _check(x, first.channels, -1)
    y = x.new_empty((*x.shape[:-1], second.out))
    tokens = x.numel() // first.channels
    if tokens:
        _run(
            _tokens(_Work.PAIR, x, y, tokens, tile, int(tanh)),
            _matrix(values1, index1, bias1, order1, scale1, total1, numbers1),
            _matrix(values2, index2, bias2, order2, scale2, total2, numbers2),
        )
    return y


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


def _conv(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    scale: Tensor | None,
    total: Tensor | None,
    numbers: Sequence[int],
    largest: Tensor | None,
    side: int,
    stride: int,
    padding: int,
    tile: int,
) -> Tensor:
    layout = Layout(*numbers)
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
        _run(job, _matrix(values, index, bias, order, scale, total, numbers))
    return y


_KEYS = 128
"""Keys at a time: their scores stay in the first-level cache."""


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, lanes: int) -> Tensor:
    extension, why = kernels()
    if extension is None:
        raise CompressorError("this model was lowered to compiled CPU kernels", why or "")
    images, heads, queries, channels = query.shape
    out = _fake_attention(query, key, value, scale, lanes)
    numbers = (
        images,
        heads,
        queries,
        key.shape[2],
        channels,
        value.shape[3],
        _KEYS,
        torch.get_num_threads(),
        lanes,
    )
    strides = (stride for tensor in (query, key, value) for stride in tensor.stride()[:3])
    pointers = (tensor.data_ptr() for tensor in (query, key, value, out))
    extension.attend(*pointers, *numbers, scale, *strides)
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


def _fake_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Any,
    order: Any,
    scale: Any,
    total: Any,
    numbers: Sequence[int],
    tile: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], Layout(*numbers).out))


def _fake_pair(
    x: Tensor,
    values1: Tensor,
    index1: Tensor,
    bias1: Any,
    order1: Any,
    scale1: Any,
    total1: Any,
    numbers1: Sequence[int],
    values2: Tensor,
    index2: Tensor,
    bias2: Any,
    order2: Any,
    scale2: Any,
    total2: Any,
    numbers2: Sequence[int],
    tanh: bool,
    tile: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], Layout(*numbers2).out))


def _fake_conv(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Any,
    order: Any,
    scale: Any,
    total: Any,
    numbers: Sequence[int],
    largest: Any,
    side: int,
    stride: int,
    padding: int,
    tile: int,
) -> Tensor:
    return _image(x, Layout(*numbers).out, side, stride, padding)


def _fake_tokens(x: Tensor, weight: Tensor, out: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


def _fake_tokens_of_pair(x: Tensor, first: Tensor, second: Tensor, out: int, tanh: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], out))


def _fake_image(x: Tensor, weight: Tensor, largest: Tensor, out: int, side: int, stride: int, padding: int) -> Tensor:
    return _image(x, out, side, stride, padding)


for _name, _fake_direct in (
    ("vnm_linear_direct", _fake_tokens),
    ("vnm_pair_direct", _fake_tokens_of_pair),
    ("vnm_conv_direct", _fake_image),
    ("attention_direct", _fake_attention),
):
    _torch_library.register_fake(f"compressor::{_name}", _fake_direct, lib=_library)
for _name, _real, _fake in (
    ("vnm_linear", _linear, _fake_linear),
    ("vnm_pair", _pair, _fake_pair),
    ("vnm_conv", _conv, _fake_conv),
    ("attention", _attention, _fake_attention),
):
    _library.impl(_name, _real, "CPU")
    _torch_library.register_fake(f"compressor::{_name}", _fake, lib=_library)
