"""The CPU backend: V:N:M weights through compiled kernels (`_vnm.c`), as operators that torch.compile and export accept.

V rows of output share their kept channels, so a vector of activations is loaded once for V rows of multiplications, and the
gather is a row pointer into a panel. The kernels are an optional extension, built at installation where there is a C
compiler; without it this backend says so, and the gathered form remains.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.lower.backend import Backend, Unit, refuse_gradients
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.pattern import NM

_LARGEST_INDEX = 65_535
_LEVEL_VARIABLE = "COMPRESSOR_CPU_LEVEL"


@cache
def kernels() -> tuple[ModuleType | None, str | None]:
    """The extension, ready to run on torch's own threads, and what there is to say about it: why it is missing, or slow."""
    try:
        _vnm = import_module("compressor.lower._vnm")
    except ImportError as error:
        return None, (
            f"the compiled CPU kernels are not installed ({error}); install GCC and reinstall with "
            "`pip install --force-reinstall --no-deps diffusion-compressor`"
        )
    if level := os.environ.get(_LEVEL_VARIABLE):
        try:
            _vnm.set_level(level)
        except ValueError as error:
            raise CompressorError(f"{_LEVEL_VARIABLE}: {error}", f"It has {', '.join(_vnm.levels())}.") from error
    address, note = _threads()
    _vnm.set_parallel(address)
    return _vnm, note


def _threads() -> tuple[int, str | None]:
    """The address of GOMP_parallel in the one OpenMP runtime that is loaded; 0, and the reason, where that is not clear.

    A second runtime would bring threads of its own, and the two sets would fight for the cores.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0, "the loaded OpenMP runtime cannot be found on this system: the kernels run on one thread"
    mapped = {line.split(maxsplit=5)[-1] for line in lines if ".so" in line}
    runtimes = sorted(p for p in mapped if Path(p).name.startswith(("libgomp", "libomp", "libiomp")))
    if len(runtimes) != 1:
        found = "none" if not runtimes else ", ".join(runtimes)
        return 0, f"torch's OpenMP runtime is not the only one in this process ({found}): the kernels run on one thread"
    entry = getattr(ctypes.CDLL(runtimes[0]), "GOMP_parallel", None)
    if entry is None:
        return 0, f"{runtimes[0]} has no GOMP_parallel: the kernels run on one thread"
    return ctypes.cast(entry, ctypes.c_void_p).value or 0, None


# --- Weights in the kernels' layout. ---

_PAIRS = torch.tensor([[0, 0, 1, 2], [0, 0, 3, 4], [0, 0, 0, 5], [0, 0, 0, 0]])
"""The row of a pair of channels (i < j of four) among the six that a panel holds."""


class Packed(nn.Module):
    """A weight (out, in, *kernel) that obeys `pattern`, as buffers that the kernels read.

    `values` holds 32-bit lanes, one fp32 or a pair of bf16 (`dot`), ordered by block of channels, kernel position, group of
    V rows, step, row; `index` the panel row of each step. `numbers` describes them to the kernel. `together` is how many of
    the rows that share a choice the kernel takes at a time; None: all.
    """

    values: Tensor
    index: Tensor
    bias: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        pattern: NM | Clustered,
        *,
        block: int,
        together: int | None = None,
        dot: bool = False,
        tile: int = 6,
    ) -> None:
        super().__init__()
        order = None
        if isinstance(
            pattern, Clustered
        ):  # rows that share a choice follow each other here, and go back to their places after
            order = pattern.order(weight)
            weight, bias, pattern = weight[order], None if bias is None else bias[order], pattern.neighbours
        out, channels = weight.shape[:2]
        v, n, m = together or pattern.v, pattern.n, pattern.m  # a part of rows that share a choice shares one too
        # Exactly n survive of every m, also where a kept weight happens to be zero.
        survivors = replace(pattern, v=v).survivors(weight.abs())
        if bool(((weight != 0) & ~survivors).any()):
            raise CompressorError(
                f"a weight {tuple(weight.shape)} does not obey {pattern}", "Prune it by that pattern."
            )
        keep = survivors[::v].reshape(out // v, channels // m, m, -1)
        at = keep.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, :n].sort(dim=2).values
        taps = at.shape[-1]
        lanes = weight.reshape(out // v, v, channels // m, m, taps)
        kept = lanes.gather(
            3, at[:, None].expand(-1, v, -1, -1, -1)
        )  # (groups of rows, v, groups of channels, n, taps)
        values, index = [], []
        for start in range(0, channels, block):
            some = slice(start // m, min(channels, start + block) // m)
            here = at[:, some]
            group = torch.arange(here.shape[1])[None, :, None]
            if dot:
                rows = _PAIRS[here[:, :, 0], here[:, :, 1]] + 6 * group
                pairs = kept[:, :, some].permute(4, 0, 2, 1, 3).to(torch.bfloat16)
                values.append(pairs.contiguous().flatten().view(torch.int32))
                index.append(rows.permute(2, 0, 1).flatten())
            else:
                rows = here + m * group[..., None]
                values.append(kept[:, :, some].permute(4, 0, 2, 3, 1).float().contiguous().flatten().view(torch.int32))
                index.append(rows.permute(3, 0, 1, 2).flatten())
        self.register_buffer("values", torch.cat(values))
        self.register_buffer("index", torch.cat(index).to(torch.uint16))
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("order", None if order is None else order.to(torch.int32))
        self.numbers = [out, channels, v, taps, block, m, 1 if dot else n, 6 if dot else m, int(dot)]
        self.tile = tile

    def get_extra_state(self) -> Tensor:
        """How the values lie: a state of other numbers is none of this module's, whatever its shapes."""
        return torch.tensor(self.numbers)

    def set_extra_state(self, state: Tensor) -> None:
        if state.tolist() != self.numbers:
            raise CompressorError("a state of a model lowered otherwise", "Lower the dense model again instead.")


def _shape_of_work(pattern: NM | Clustered, dot: bool) -> tuple[int, int, int]:
    """How the kernels of this machine's level like to work: how many of the rows that share a choice at a time, about how
    many channels to a block, and how many vectors of tokens to a tile. Found by measuring."""
    wide = _level().startswith("avx512")
    most = next(v for v in ((8, 4, 2, 1) if wide else (4, 2, 1)) if pattern.v % v == 0)
    if not wide:
        channels, vectors = {1: (128, 9), 2: (128, 9), 4: (256, 6)}[most]
    elif dot:
        channels, vectors = {1: (96, 5), 2: (96, 5), 4: (512, 5), 8: (512, 6)}[most]
    else:
        channels, vectors = {1: (96, 6), 2: (96, 6), 4: (128, 5), 8: (512, 6)}[most]
    return most, channels, vectors


def _level() -> str:
    extension, _ = kernels()
    return "portable" if extension is None else str(extension.level())


def _block(channels: int, pattern: NM | Clustered, about: int) -> int:
    """Channels in a block: whole groups, and rows of every kernel, about `about` of them."""
    step = math.lcm(pattern.m, 8)
    return min(-(-channels // step), max(1, about // step)) * step


# --- Operators. ---

_torch_library: Any = torch.library  # it has no annotations
_library = _torch_library.Library("compressor", "DEF")
_MATRIX = "Tensor values{0}, Tensor index{0}, Tensor? bias{0}, Tensor? order{0}, int[] numbers{0}"
_library.define(f"vnm_linear(Tensor x, {_MATRIX.format('')}, int tile) -> Tensor")
_library.define(f"vnm_pair(Tensor x, {_MATRIX.format('1')}, {_MATRIX.format('2')}, bool tanh, int tile) -> Tensor")
_library.define(f"vnm_conv(Tensor x, {_MATRIX.format('')}, int side, int tile) -> Tensor")

_HALF = {torch.float32: 0, torch.bfloat16: 1}


def _check(x: Tensor, inner: int, dim: int) -> Tensor:
    if x.dtype not in _HALF or x.shape[dim] != inner:
        raise CompressorError(
            f"a lowered layer got {x.dtype} of shape {tuple(x.shape)}; it takes float32 or bfloat16 with {inner} channels",
            "Lower the model again for other inputs: compressor.lower(model, example_inputs, dtype=...).",
        )
    return x.contiguous()


def _matrix(
    values: Tensor, index: Tensor, bias: Tensor | None, order: Tensor | None, numbers: Sequence[int]
) -> list[int]:
    if bias is not None and bias.dtype != torch.float32:
        raise CompressorError("a lowered model was cast", "Lower the dense model again with dtype=... instead.")
    out, inner, v, taps, _, m, kept, *_ = numbers
    steps = out // max(1, v) * (inner // max(1, m)) * kept * taps
    whole = values.numel() == steps * v and index.numel() == steps and index.dtype == torch.uint16
    lengths = {out} | {tensor.numel() for tensor in (bias, order) if tensor is not None}
    if not whole or values.element_size() != 4 or len(lengths) != 1 or not values.is_cpu:
        raise CompressorError("a packed weight is not as its numbers say", "Lower the dense model again.")
    return [
        *numbers,
        values.data_ptr(),
        index.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if order is None else order.data_ptr(),
    ]


def _run(*job: int) -> None:
    extension, why = kernels()
    if extension is None:
        raise CompressorError("this model was lowered to compiled CPU kernels", why or "")
    extension.run(*job)


def _linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    numbers: Sequence[int],
    tile: int,
) -> Tensor:
    x = _check(x, numbers[1], -1)
    y = x.new_empty((*x.shape[:-1], numbers[0]))
    tokens = x.numel() // numbers[1]
    if tokens:
        matrix = _matrix(values, index, bias, order, numbers)
        job = (0, x.data_ptr(), y.data_ptr(), _HALF[x.dtype], 0, 1, 1, 1, tokens, tile, torch.get_num_threads())
        _run(*job, *matrix)
    return y


def _pair(
    x: Tensor,
    values1: Tensor,
    index1: Tensor,
    bias1: Tensor | None,
    order1: Tensor | None,
    numbers1: Sequence[int],
    values2: Tensor,
    index2: Tensor,
    bias2: Tensor | None,
    order2: Tensor | None,
    numbers2: Sequence[int],
    tanh: bool,
    tile: int,
) -> Tensor:
    x = _check(x, numbers1[1], -1)
    y = x.new_empty((*x.shape[:-1], numbers2[0]))
    tokens = x.numel() // numbers1[1]
    if tokens:
        first = _matrix(values1, index1, bias1, order1, numbers1)
        second = _matrix(values2, index2, bias2, order2, numbers2)
        job = (
            1,
            x.data_ptr(),
            y.data_ptr(),
            _HALF[x.dtype],
            int(tanh),
            1,
            1,
            1,
            tokens,
            tile,
            torch.get_num_threads(),
        )
        _run(*job, *first, *second)
    return y


def _conv(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    numbers: Sequence[int],
    side: int,
    tile: int,
) -> Tensor:
    x = _check(x, numbers[1], 1)
    batch, _, height, width = x.shape
    y = x.new_empty((batch, numbers[0], height, width))
    if y.numel():
        matrix = _matrix(values, index, bias, order, numbers)
        job = (
            2,
            x.data_ptr(),
            y.data_ptr(),
            _HALF[x.dtype],
            0,
            side,
            height,
            width,
            batch,
            tile,
            torch.get_num_threads(),
        )
        _run(*job, *matrix)
    return y


def _fake_linear(x: Tensor, *rest: Any) -> Tensor:
    numbers = rest[4]
    return x.new_empty((*x.shape[:-1], numbers[0]))


def _fake_pair(x: Tensor, *rest: Any) -> Tensor:
    numbers2 = rest[9]
    return x.new_empty((*x.shape[:-1], numbers2[0]))


def _fake_conv(x: Tensor, *rest: Any) -> Tensor:
    numbers = rest[4]
    return x.new_empty((x.shape[0], numbers[0], *x.shape[2:]))


for _name, _real, _fake in (
    ("vnm_linear", _linear, _fake_linear),
    ("vnm_pair", _pair, _fake_pair),
    ("vnm_conv", _conv, _fake_conv),
):
    _library.impl(_name, _real, "CPU")
    _torch_library.register_fake(f"compressor::{_name}", _fake, lib=_library)


class VNMLinear(nn.Module):
    """x (..., in) -> (..., out)."""

    def __init__(self, weight: Packed) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        w = self.weight
        out: Tensor = torch.ops.compressor.vnm_linear(x, w.values, w.index, w.bias, w.order, w.numbers, w.tile)
        return out


class VNMPair(nn.Module):
    """Linear, GELU, Linear: x (..., in) -> (..., out); the hidden channels never leave the cache."""

    def __init__(self, first: Packed, second: Packed, tanh: bool) -> None:
        super().__init__()
        self.first, self.second, self.tanh = first, second, tanh

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        a, b = self.first, self.second
        first = (a.values, a.index, a.bias, a.order, a.numbers)
        second = (b.values, b.index, b.bias, b.order, b.numbers)
        out: Tensor = torch.ops.compressor.vnm_pair(x, *first, *second, self.tanh, b.tile)
        return out


class VNMConv(nn.Module):
    """x (batch, in, height, width) -> (batch, out, height, width): stride 1, padding that keeps the size."""

    def __init__(self, weight: Packed, side: int) -> None:
        super().__init__()
        self.weight, self.side = weight, side

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        w = self.weight
        out: Tensor = torch.ops.compressor.vnm_conv(x, w.values, w.index, w.bias, w.order, w.numbers, self.side, w.tile)
        return out


# --- The backend. ---


class VNM(Backend):
    """Compiled CPU kernels for weights whose V rows share their N of M (4:2:4 and the like), fp32 and bf16."""

    name = "vnm"

    @property
    def version(self) -> str:  # type: ignore[override]
        return f"{_level()}{'' if kernels()[1] is None else ', one thread'}"

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"the kernels run on CPUs, the model is on {device}"
        extension, why = kernels()
        return None if extension is not None else why

    def remark(self, device: torch.device) -> str | None:
        return kernels()[1] if device.type == "cpu" else None

    def refusal(self, unit: Unit) -> str | None:
        if unit.dtype not in _HALF:
            return f"the kernels take float32 and bfloat16, not {unit.dtype}"
        for pattern, layer in zip(unit.patterns, unit.layers, strict=True):
            if pattern is None:
                return "its weight obeys no N:M pattern"
            if pattern.v % 2:
                return (
                    f"{pattern} shares no choice between rows: a CPU gains nothing from V = {pattern.v}; "
                    f"2:{pattern.n}:{pattern.m}, 4:{pattern.n}:{pattern.m} or 8:{pattern.n}:{pattern.m} would"
                )
            if math.lcm(pattern.m, 8) * 2 > _LARGEST_INDEX:
                return f"groups of {pattern.m} channels are too large for the kernels"
            if isinstance(layer, nn.Conv2d) and (reason := _no_plain_convolution(layer)):
                return reason
        return None

    def build(self, unit: Unit) -> nn.Module:
        extension, why = kernels()
        if extension is None:
            raise CompressorError(f"{unit.name} cannot be lowered", why or "")
        patterns = [pattern for pattern in unit.patterns if pattern is not None]
        linear = not any(isinstance(layer, nn.Conv2d) for layer in unit.layers)
        half = linear and unit.dtype == torch.bfloat16 and extension.level() == "avx512_bf16"
        dot = half and all((p.n, p.m) == (2, 4) for p in patterns)
        packed = []
        for layer, pattern in zip(unit.layers, patterns, strict=True):
            rows, channels, tile = _shape_of_work(pattern, dot)
            block = _block(layer.weight.shape[1], pattern, channels)
            packed.append(
                Packed(layer.weight.detach(), layer.bias, pattern, together=rows, block=block, dot=dot, tile=tile)
            )
        if isinstance(unit.module, nn.Conv2d):
            return VNMConv(packed[0], unit.module.kernel_size[0])
        if isinstance(unit.module, nn.Linear):
            return VNMLinear(packed[0])
        (activation,) = (m for m in unit.module.modules() if isinstance(m, nn.GELU))
        if packed[0].order is not None:  # its rows find their places only when all of them are there
            return nn.Sequential(VNMLinear(packed[0]), activation, VNMLinear(packed[1]))
        return VNMPair(packed[0], packed[1], activation.approximate == "tanh")


def _no_plain_convolution(layer: nn.Conv2d) -> str | None:
    side = layer.kernel_size[0]
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups"
    if layer.stride != (1, 1) or layer.dilation != (1, 1):
        return f"stride {layer.stride}, dilation {layer.dilation}: the kernels take 1"
    if layer.kernel_size != (side, side) or side not in (1, 3, 5, 7):
        return f"a kernel of {layer.kernel_size}: the kernels take squares of 1, 3, 5 or 7"
    if layer.padding not in ("same", (side // 2, side // 2)) or layer.padding_mode != "zeros":
        return f"padding {layer.padding} ({layer.padding_mode}): the kernels keep the size, with zeros"
    return None
