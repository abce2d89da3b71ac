"""A GPU over plain CPU tensors: those with a mark say that they are on `cuda:0`. What mixes devices raises, and so does what waits for
the GPU while a graph is recorded; a graph replays operators, and none of the code that called them.

As a plugin of pytest (`-p gpu_imitated`) it lets the tests of a GPU run anywhere, but for what a GPU alone can show. torch.compile
does nothing, Triton's kernels are left to torch, and times are a CPU's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA = torch.device("cuda", 0)
NAME, CAPABILITY = "NVIDIA H200", (9, 0)
_Base: Any = torch._C.TensorBase
_WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "bincount"}
_WAITING |= {"item", "allclose"}  # inside of operators of our own, what others are made of is not taken apart
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_own: dict[str, Callable[..., Any]] = {}
"""What operators of `compressor` do, by name: called with the devices watched, as torch's own are not inside of them."""
_instead: dict[str, Callable[..., Any]] = {}
"""What is imitated of torch's, on tensors without marks."""
_recorded: list[list[tuple[Callable[..., Any], Any, Any, Any]]] = []
"""The operators of the graph that is being recorded."""


def marked(tensor: Tensor) -> bool:
    """Whether it says that it is on the GPU."""
    return "_on_gpu" in tensor.__dict__


def _mark(tensor: Tensor, on: bool = True) -> Tensor:
    tensor.__dict__.update(_on_gpu=True) if on else tensor.__dict__.pop("_on_gpu", None)
    return tensor


def _plain(tensor: Tensor) -> Any:
    return _Base.data.__get__(tensor)


def _waits(what: str) -> None:
    if _recorded:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


# --- Operators. ---


class Devices(TorchDispatchMode):
    """Marks what operators give where they were given marked tensors or the device, and refuses what a GPU would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: value for key, value in (kwargs or {}).items() if key != "pin_memory"}
        space, _, name = func._schema.name.partition("::")
        given = _tensors((args, kwargs))
        on = [one for one in given if marked(one)]
        device = kwargs.get("device")
        here = _is_gpu(device) or (bool(on) and not (device is not None and torch.device(device).type == "meta"))
        if _is_gpu(device):
            kwargs["device"] = torch.device("cpu")
        self._refuse(func, name, args, given, here)
        if space == "compressor" and on and name in _own:
            with self:
                return _own[name](*args, **kwargs)
        made = _instead.get(name, func) if on else func
        out = made(*args, **kwargs)
        for one in _tensors(out) if here else ():
            if not any(one is other and not marked(other) for other in given):
                _mark(one)
        if _recorded and here:
            _recorded[-1].append((made, args, kwargs, out))
        return out

    def _refuse(self, func: Any, name: str, args: Any, given: list[Tensor], here: bool) -> None:
        off = [one for one in given if not marked(one) and one.device.type == "cpu"]
        if name in _WAITING and here:
            _waits(name)
        if name in ("_to_copy", "copy_", "copy"):
            if here and any(one.dim() and not one.is_pinned() for one in off):
                _waits("a copy from or to the CPU")
        elif here and len(off) < len(given) and (mixed := [one for one in off if one.dim()]):
            if name not in _INDEXING or not marked(args[0]):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {func} {[one.shape for one in mixed]}"
                )
            _waits("an index from the CPU")


class Graph:
    """A CUDA graph: the operators that were called while it was recorded."""

    def __init__(self) -> None:
        self.steps: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def replay(self) -> None:
        for made, args, kwargs, out in self.steps:
            for kept, new in zip(_tensors(out), _tensors(made(*args, **kwargs)), strict=True):
                if kept is not new and kept.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    with torch.no_grad():
                        _plain(kept).copy_(_plain(new))


@contextmanager
def _recording(graph: Graph, **_: Any) -> Iterator[None]:
    _recorded.append(graph.steps)
    try:
        yield
    finally:
        _recorded.pop()


def _imitated(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return function(*tree_map_only(Tensor, _plain, args), **tree_map_only(Tensor, _plain, kwargs))

    return run


def _scaled(
    x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, bias: Tensor | None = None, *rest: Any, **how: Any
) -> Tensor:
    """`torch._scaled_mm` with a scale for each row and column, which not every torch has on CPUs."""
    assert x.is_contiguous() and weight.t().is_contiguous() and (rows.shape[1], columns.shape[0]) == (1, 1)
    out = x.float() @ weight.float() * rows * columns
    return (out if bias is None else out + bias.float()).bfloat16()


# --- What torch does in C++, without operators. ---


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    copy, other = kwargs.pop("copy", False), kwargs.pop("other", None)
    if args and isinstance(args[0], Tensor):
        other, args = args[0], args[1:]
    if other is not None:
        device, dtype, layout = other.device, other.dtype, None
    else:
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
    more = {} if layout is None else {"memory_format": layout}
    dtype = dtype or tensor.dtype
    if device is not None and device.type == "meta":
        return _Base.to(tensor, device, dtype)
    if device is None or _is_gpu(device) == marked(tensor):
        return _Base.to(tensor, dtype, copy=copy, **more)
    if tensor.dim() and not tensor.is_pinned():
        _waits("a copy from or to the CPU")
    return _mark(_Base.to(tensor, dtype, copy=True, **more), _is_gpu(device))


def _numpy(tensor: Tensor, **kwargs: Any) -> Any:
    if marked(tensor):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return _Base.numpy(tensor, **kwargs)


def _pinned(tensor: Tensor) -> Tensor:
    if marked(tensor):
        raise RuntimeError("cannot pin a tensor on a GPU")
    pinned = tensor.clone()
    pinned.__dict__["_pinned"] = True
    return pinned


def _set_data(tensor: Tensor, value: Tensor) -> None:
    _Base.data.__set__(tensor, value)
    _mark(tensor, marked(value))


def _marked_as(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    """`function`, whose result is where the argument at `place` is."""

    def run(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        like = args[place] if len(args) > place else None
        return _mark(out) if isinstance(like, Tensor) and marked(like) else out

    return run


def _built(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.tensor or torch.as_tensor, which builds on the CPU and copies."""

    def run(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        device = torch.get_default_device() if device is None and not isinstance(data, Tensor) else device
        with torch.device("cpu"):
            out: Tensor = function(data, *args, **kwargs)
        return out if device is None else out.to(device)

    return run


def _patch_tensors() -> None:
    own: Any = Tensor
    own.device = property(lambda one: CUDA if marked(one) else _Base.device.__get__(one))
    own.is_cuda = property(marked)
    own.is_cpu = property(lambda one: not marked(one) and _Base.device.__get__(one).type == "cpu")
    own.get_device = lambda one: 0 if marked(one) else -1
    own.data = property(lambda one: _mark(_plain(one)) if marked(one) else _plain(one), _set_data)
    own.to, own.numpy, own.pin_memory = _to, _numpy, _pinned
    own.cpu, own.cuda = lambda one: _to(one, "cpu"), lambda one, *_: _to(one, CUDA)
    own.is_pinned = lambda one: "_pinned" in one.__dict__
    own.record_stream = lambda one, stream: None
    own.__deepcopy__ = _marked_as(own.__deepcopy__, 0)
    nn.Parameter.__deepcopy__ = _marked_as(nn.Parameter.__deepcopy__, 0)  # type: ignore[method-assign]
    nn.Parameter.__new__ = _marked_as(nn.Parameter.__new__, 1)  # type: ignore[method-assign]
    torch.tensor, torch.as_tensor = _built(torch.tensor), _built(torch.as_tensor)


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: Any) -> None:
        self.at = 0.0

    def wait_stream(self, other: Any) -> None: ...

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        _waits("synchronize")

    def elapsed_time(self, other: Any) -> float:
        return max(1e-4, 1000 * (other.at - self.at))


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _patch_torch() -> None:
    cuda: Any = torch.cuda
    answers = {"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0}
    answers |= {"get_device_name": NAME, "get_device_capability": CAPABILITY, "is_bf16_supported": True}
    answers |= {"max_memory_allocated": 2**30, "memory_allocated": 2**30, "mem_get_info": (2**37, 2**37)}
    answers |= dict.fromkeys(("_lazy_init", "set_device", "empty_cache", "reset_peak_memory_stats", "manual_seed_all"))
    for name, value in answers.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    cuda.get_device_properties = lambda *_: SimpleNamespace(name=NAME, total_memory=2**37, multi_processor_count=132)
    cuda.get_rng_state, cuda.set_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8), lambda *_: None
    cuda.Stream, cuda.Event = _Stream, lambda **_: _Stream()
    cuda.current_stream = cuda.default_stream = _Stream
    cuda.stream = cuda.device = cuda.device_of = lambda *_: nullcontext()
    cuda.synchronize = lambda *_: _waits("synchronize")
    cuda.is_current_stream_capturing = lambda: bool(_recorded)
    cuda.CUDAGraph, cuda.graph = Graph, _recording
    forked = torch.random.fork_rng
    torch.random.fork_rng = lambda devices=None, **_: forked([])  # type: ignore[assignment, misc]
    torch.version.cuda = "13.0"
    torch.Generator, torch.autocast = _Generator, _Autocast  # type: ignore[misc]
    torch.compile = lambda model=None, **_: model  # type: ignore[assignment]
    nn.Module.compile = lambda self, **_: None  # type: ignore[method-assign]
    torch.backends.cusparselt.is_available = lambda: True
    torch.backends.cusparselt.version = lambda: 801


def install() -> None:
    """Let this process have such a GPU, with cuSPARSELt, until it ends."""
    from compressor.lower import operators

    define = operators.define

    def watched(schema: str, fake: Any, real: Any, *where: str) -> None:
        _own[schema.partition("(")[0]] = real
        define(schema, fake, real, *where)

    operators.define = watched
    from imitated import Library

    from compressor.cost import timing
    from compressor.lower import chooser, contest, cusparselt, cusparselt_library, forms, quantised
    from compressor.sparsity import on_gpu

    assert {"cslt_linear", "quantised_rows"} <= set(_own), (cusparselt, quantised)
    cusparselt_library._loaded = lambda: 801
    on_gpu.checked = quantised.checked = lambda *_: None  # Triton's kernels
    chooser._ROUNDS = forms._ROUNDS = 2  # times mean nothing
    contest._MOST, timing._AWAKE = 1, 0.0
    library = Library(CAPABILITY)
    _instead.update(_cslt_compress=_imitated(library.compress), _cslt_sparse_mm=_imitated(library.sparse_mm))
    _instead["_scaled_mm"] = _imitated(_scaled)
    _patch_tensors()
    _patch_torch()
    Devices().__enter__()


install()
