"""cuSPARSELt without torch in between: a product is planned once, with its bias and GELU, through `nvmath.bindings.cusparseLt`.

torch plans every call anew, which takes the host about half a millisecond, and knows no GELU. Here a plan is kept for as long as its
layer lives, and all that it is made of is destroyed with it. Weights are packed and algorithms searched by torch's operators as for
`cusparselt`: it is the same library, in the same file, which is checked. What has no plan goes through them too.

Source: the functions, attributes and their sizes are those of nvmath-python 1.0.0; layouts and operations are the ones that torch's
own cuSPARSELtOps.cpp asks for.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.errors import CompressorError, first_line
from compressor.lower import cusparselt_library
from compressor.lower.cusparselt_tuning import Algorithm, multiply
from compressor.lower.operators import define

_PACKAGE = "nvmath"
_INSTALL = 'pip install "diffusion-compressor[cusparselt]"'
_FIRST = 800
"""cuSPARSELt 0.8.0: the first that can destroy the choice of an algorithm."""
_KEPT = 4
"""Plans of a layer: one for every number of tokens that it is called with, the latest ones."""
_ALIGNMENT = 16  # bytes; torch's allocator gives 512
_lock = threading.RLock()
_numbers = count()


@cache
def bindings() -> Any:
    """The module `nvmath.bindings.cusparseLt`. Raises ImportError."""
    return import_module(f"{_PACKAGE}.bindings.cusparseLt")


@cache
def _cusparse() -> Any:
    return import_module(f"{_PACKAGE}.bindings.cusparse")


@cache
def _number(dtype: torch.dtype) -> int:
    """cudaDataType of a 16-bit dtype."""
    names = {torch.bfloat16: "CUDA_R_16BF", torch.float16: "CUDA_R_16F"}
    return int(getattr(import_module(_PACKAGE).CudaDataType, names[dtype]))


def missing() -> str | None:
    """Why the library cannot be called directly; None where it can. To be asked where torch's way to it is there."""
    if find_spec(_PACKAGE) is None:
        return f"nvmath-python is not installed here: {_INSTALL}"
    try:
        own = cusparselt_library.numbered(*(bindings().get_property(part) for part in range(3)))
    except Exception as error:  # its own exceptions, and those of its loader
        return f"nvmath-python finds no cuSPARSELt: {first_line(error)}"
    theirs, dotted = cusparselt_library.version(), cusparselt_library.dotted
    if own != theirs:
        other = "none" if theirs is None else dotted(theirs)
        return (
            f"nvmath-python has loaded cuSPARSELt {dotted(own)}, torch {other}: weights that one packs are not for the other; leave "
            "one of the two installed"
        )
    if own < _FIRST:
        return f"cuSPARSELt {dotted(own)} cannot destroy all that it makes: install {dotted(_FIRST)} or later"
    return None


@cache
def _handle(index: int) -> int:
    """The library's context on the current GPU, `index`; it lives as long as the process."""
    handle: int = bindings().init()
    return handle


class Planned:
    """One product, planned: x (tokens, inner) times a packed 2:4 weight (out, inner) plus `bias` (out,), then GELU with `gelu`.

    It holds `bias`, whose memory the plan points to. Raises what the bindings raise where the library does not take it.
    """

    def __init__(self, x: Tensor, out: int, bias: Tensor | None, gelu: bool, algorithm: Algorithm) -> None:
        self.made: list[tuple[Callable[[int], None], int]] = []
        self.bias, self.algorithm = bias, algorithm
        self.tokens, self.out = x.shape[0], out
        self.recorded = False  # by a CUDA graph, which may use what the plan has on the GPU
        self.one, self.zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
        with _lock:
            try:
                self._plan(x, gelu)
            except BaseException:
                self.close()
                raise

    def _plan(self, x: Tensor, gelu: bool) -> None:
        lt, handle = bindings(), _handle(x.device.index or 0)
        self.handle = handle
        (tokens, inner), kind = x.shape, _number(x.dtype)
        half, order, operation = lt.Sparsity.SPARSITY_50_PERCENT, _cusparse().Order, _cusparse().Operation
        rows = int(order.ROW)
        weight = self._own(
            lt.structured_descriptor_init(handle, self.out, inner, inner, _ALIGNMENT, kind, rows, int(half)),
            lt.mat_descriptor_destroy,
        )
        # As it lies, x is the transpose of what is multiplied.
        dense = self._own(
            lt.dense_descriptor_init(handle, tokens, inner, inner, _ALIGNMENT, kind, rows), lt.mat_descriptor_destroy
        )
        turned = self.algorithm.transposed
        result = self._own(
            lt.dense_descriptor_init(
                *(handle, self.out, tokens, self.out if turned else tokens, _ALIGNMENT, kind),
                int(order.COL) if turned else rows,
            ),
            lt.mat_descriptor_destroy,
        )
        matmul = self._own(
            lt.matmul_descriptor_init(
                *(handle, int(operation.NON_TRANSPOSE), int(operation.TRANSPOSE), weight, dense, result, result),
                int(lt.ComputeType.COMPUTE_32F),
            ),
            lt.matmul_descriptor_destroy,
        )

        def say(attribute: Any, value: Any) -> None:
            lt.matmul_desc_set_attribute(handle, matmul, int(attribute), ctypes.addressof(value), ctypes.sizeof(value))

        if self.bias is not None:
            say(lt.MatmulDescAttribute.BIAS_POINTER, ctypes.c_void_p(self.bias.data_ptr()))
        if gelu:
            say(lt.MatmulDescAttribute.ACTIVATION_GELU, ctypes.c_int(1))
        chosen = self._own(
            lt.matmul_alg_selection_init(handle, matmul, int(lt.MatmulAlg.DEFAULT)), lt.matmul_alg_selection_destroy
        )
        for attribute, number in self._choice(lt):
            value = ctypes.c_int(number)
            lt.matmul_alg_set_attribute(handle, chosen, int(attribute), ctypes.addressof(value), ctypes.sizeof(value))
        self.plan = self._own(lt.matmul_plan_init(handle, matmul, chosen), lt.matmul_plan_destroy)
        self.workspace = int(lt.matmul_get_workspace(handle, self.plan))

    def _choice(self, lt: Any) -> list[tuple[Any, int]]:
        """What is set of an algorithm; what it leaves to the library is not."""
        of, attributes = self.algorithm, lt.MatmulAlgAttribute
        found = [(attributes.CONFIG_ID, of.alg_id)]
        if of.split_k != 1:
            found.append((attributes.SPLIT_K, of.split_k))
            found += [(attributes.SPLIT_K_MODE, of.split_k_mode)] if of.split_k_mode > 0 else []
        return found

    def _own(self, made: int, destroy: Callable[[int], None]) -> int:
        self.made.append((destroy, made))
        return made

    def __call__(self, x: Tensor, packed: Tensor) -> Tensor:
        """x (tokens, inner), contiguous -> (tokens, out), on the current stream."""
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            self.recorded = True
        turned = self.algorithm.transposed
        out = x.new_empty((self.tokens, self.out) if turned else (self.out, self.tokens))
        room = torch.empty(max(1, self.workspace), dtype=torch.uint8, device=x.device)
        stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None)
        one, zero = ctypes.addressof(self.one), ctypes.addressof(self.zero)
        with _lock:  # a context takes one call at a time
            bindings().matmul(
                *(self.handle, self.plan, one, packed.data_ptr(), x.data_ptr(), zero, out.data_ptr(), out.data_ptr()),
                *(room.data_ptr(), ctypes.addressof(stream), 1),
            )
        return out if turned else out.t().contiguous()

    def close(self) -> None:
        """Destroy all that was made, the last first."""
        while self.made:
            destroy, made = self.made.pop()
            destroy(made)

    def __del__(self) -> None:
        with suppress(Exception):  # at the end of a process the library may be gone
            self.close()


class Plans:
    """The plans of a layer, made when they are first needed: for each number of tokens, and for the bias where it lies now.

    `gelu` is the `approximate` of the GELU that follows, None where none does: the library has one, and its two kinds are the same up
    to the rounding of 16 bits. An operator knows plans by their `number`, for as long as the layer lives. A copy of the layer gets
    plans of its own.
    """

    def __init__(self, gelu: str | None = None) -> None:
        self.gelu, self.number = gelu, next(_numbers)
        self.kept: OrderedDict[tuple[Any, ...], Planned] = OrderedDict()
        _held[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return Plans, (self.gelu,)

    def of(self, x: Tensor, out: int, bias: Tensor | None, algorithm: Algorithm) -> Planned:
        """The plan for x (tokens, inner). Raises what the bindings raise where the library does not take it."""
        key = (*x.shape, x.device, None if bias is None else bias.data_ptr(), algorithm)
        with _lock:
            if key not in self.kept:
                self.kept[key] = Planned(x, out, bias, self.gelu is not None, algorithm)
                for old in [old for old, plan in self.kept.items() if not plan.recorded][:-_KEPT]:
                    self.kept.pop(old).close()
            self.kept.move_to_end(key)
            return self.kept[key]

    def fitted(self, x: Tensor, out: int, bias: Tensor | None, algorithm: Algorithm) -> None:
        """Plan for x (tokens, inner). Raises CompressorError where the library does not take it."""
        try:
            self.of(x, out, bias, algorithm)
        except bindings().cuSPARSELtError as error:
            gelu = " with GELU" if self.gelu is not None else ""
            raise CompressorError(
                f"cuSPARSELt has no plan for {tuple(x.shape)} to {out} channels{gelu}: {error}"
            ) from error


_held: WeakValueDictionary[int, Plans] = WeakValueDictionary()


def _planned(
    x: Tensor, packed: Tensor, bias: Tensor | None, out: int, algorithm: list[int], plans: int, gelu: str | None
) -> Tensor:
    if not x.shape[0]:
        return _fake_planned(x, packed, bias, out, algorithm, plans, gelu)
    how, x = Algorithm.of(algorithm), x.contiguous()
    its, plan = _held.get(plans), None
    if its is not None and its.gelu == gelu:  # what was exported may run where those of its number are others, or none
        with suppress(bindings().cuSPARSELtError):  # for another number of tokens than when the model was lowered
            plan = its.of(x, out, bias, how)
    if plan is not None:
        return plan(x, packed)
    result = multiply(packed.view(x.dtype), x, bias, how)
    return result if gelu is None else F.gelu(result, approximate=gelu)


def _fake_planned(
    x: Tensor, packed: Tensor, bias: Tensor | None, out: int, algorithm: list[int], plans: int, gelu: str | None
) -> Tensor:
    return x.new_empty((x.shape[0], out))


define(
    "cslt_planned(Tensor x, Tensor packed, Tensor? bias, int out, int[] algorithm, int plans, str? gelu) -> Tensor",
    _fake_planned,
    _planned,
)
