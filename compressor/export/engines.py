"""Other engines that run a model's graph, in each precision: what a user would take instead of PyTorch."""

from __future__ import annotations

import ctypes
import io
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter, tensors_of
from compressor.errors import CompressorError, first_line
from compressor.export.graph import Flat, OnnxRunner, array_of
from compressor.export.onnx import export_onnx, random_inputs
from compressor.lower.job import in_dtype
from compressor.report.content import ONNX, OPENVINO, TENSORRT
from compressor.seeds import generator

OPENVINO_PACKAGES = ("openvino", "nncf")
_CALIBRATION = 16
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
_FLOAT = "dense.onnx"
_INT8 = {ONNX: "int8.onnx", OPENVINO: "int8.xml"}
_Made = TypeVar("_Made")


@dataclass(frozen=True, eq=False)
class Engine:
    """A model in an engine: its name in a report, the dtype of its products, and a call that takes an adapter's inputs."""

    name: str
    dtype: str
    run: Callable[[Any], Tensor]


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("at", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _signal_stack_kept() -> Iterator[None]:
    """Leave the calling thread the signal stack that it has.

    OpenVINO sets one of its own for the thread that compiles or runs a model, and frees it with the model, in whatever thread that
    happens: then the next signal, such as Ctrl-C, would end the process.
    """
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _Stack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


def has_openvino() -> bool:
    """Whether the extra `openvino` is installed."""
    return all(find_spec(name) is not None for name in OPENVINO_PACKAGES)


def engines(
    model: nn.Module, adapter: Adapter, folder: Path, openvino: bool = False
) -> tuple[list[Engine], dict[str, str]]:
    """`model` in ONNX Runtime (float32, int8) and, with `openvino`, in OpenVINO (float32, bfloat16 where the processor has it, int8
    as NNCF makes it); and why others were left out, by name. Files are written into `folder`.

    Each runs with as many threads as PyTorch has. Where the float32 graph cannot be exported, there are none.
    """
    left = written(model, adapter, folder, openvino)
    found, failed = opened(folder, openvino)
    return found, left | failed


def written(
    model: nn.Module, adapter: Adapter, folder: Path, openvino: bool = False, calibration: Sequence[Any] | None = None
) -> dict[str, str]:
    """Write the files of `engines` into `folder`, and tell why some are missing. That takes more memory than to run them.

    NNCF looks at the inputs `calibration`; None: at random ones of the adapter's kind."""
    makers: dict[str, Callable[[], object]] = {ONNX: lambda: export_onnx(model, adapter, folder / _FLOAT)}
    if left := _each(makers)[1]:  # the others are made of it
        return left
    makers = {f"{ONNX}, int8": lambda: export_onnx(model, adapter, folder / _INT8[ONNX], int8=True)}
    if openvino:
        makers[f"{OPENVINO}, int8"] = lambda: _quantise(
            folder / _FLOAT, calibration or _drawn(adapter), folder / _INT8[OPENVINO]
        )
    return _each(makers)[1]


@_signal_stack_kept()
def opened(
    folder: Path, openvino: bool = False, names: Collection[str] | None = None
) -> tuple[list[Engine], dict[str, str]]:
    """The engines of the files that `written` left in `folder`, or those of `names` alone; and why others cannot be opened."""
    makers: dict[str, Callable[[], Engine]] = {}
    for engine, dtypes in ((ONNX, ("float32", "int8")), (OPENVINO, tuple(_PRECISIONS) if openvino else ())):
        for dtype in dtypes:
            path = folder / (_INT8[engine] if dtype == "int8" else _FLOAT)
            name = engine if dtype == "float32" else f"{engine}, {dtype}"
            if path.exists() and (names is None or name in names):
                makers[name] = partial(_onnx if engine == ONNX else _openvino, name, dtype, path)
    return _each(makers)


def _each(makers: Mapping[str, Callable[[], _Made]]) -> tuple[list[_Made], dict[str, str]]:
    """What each of `makers` gives, and why some give nothing."""
    found, left = list[_Made](), dict[str, str]()
    for name, make in makers.items():
        try:
            found.append(make())
        except CompressorError as error:
            left[name] = error.message
    return found, left


def _onnx(name: str, dtype: str, path: Path) -> Engine:
    return Engine(name, dtype, OnnxRunner(path))


def _openvino(name: str, dtype: str, path: Path) -> Engine:
    import openvino

    core = openvino.Core()
    if dtype == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise CompressorError("OpenVINO has no bfloat16 products on this processor")
    return Engine(name, dtype, _compiled(core, core.read_model(path), _PRECISIONS[dtype]))


def _drawn(adapter: Adapter) -> list[Any]:
    rng = generator(0, "engines")
    return [random_inputs(adapter.example_inputs(2), adapter.num_classes, rng) for _ in range(_CALIBRATION)]


def _quantise(path: Path, calibration: Sequence[Any], out: Path) -> None:
    """Write a graph to `out` in int8 as NNCF quantizes: weights per channel, activations by `calibration`."""
    os.environ.setdefault("NNCF_CI", "1")  # it would report its use over the network
    import nncf
    import openvino

    nncf.set_log_level(40)
    core, kind = openvino.Core(), nncf.ModelType.TRANSFORMER
    data = nncf.Dataset([[array_of(tensor) for tensor in tensors_of(inputs)] for inputs in calibration])
    try:
        with _signal_stack_kept(), redirect_stdout(io.StringIO()):  # its bars
            made = nncf.quantize(core.read_model(path), data, model_type=kind, subset_size=len(calibration))
            openvino.save_model(made, out, compress_to_fp16=False)
    except Exception as error:  # whatever NNCF raises for a graph that it does not know
        raise CompressorError(f"NNCF: {first_line(error)}") from error


@_signal_stack_kept()
def _compiled(core: Any, graph: Any, precision: str) -> Callable[[Any], Tensor]:
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_HYPER_THREADING": False,
    }
    try:
        compiled = core.compile_model(graph, "CPU", settings)
    except Exception as error:  # openvino's own
        raise CompressorError(f"OpenVINO: {first_line(error)}") from error
    request = compiled.create_infer_request()

    def run(inputs: Any) -> Tensor:
        with _signal_stack_kept():
            found: Mapping[Any, Any] = request.infer([array_of(tensor) for tensor in tensors_of(inputs)])
        return torch.from_numpy(next(iter(found.values())))

    return run


def tensorrt(model: nn.Module, adapter: Adapter, example: Any, sparse: bool) -> Engine:
    """`model` in TensorRT, through torch-tensorrt, in float16, for inputs as large as `example` and on its device. `sparse`: it may
    take sparse kernels for weights of 2:4: TensorRT itself times both.

    Raises CompressorError where torch-tensorrt is not installed or cannot build it.
    """
    if find_spec("torch_tensorrt") is None:
        raise CompressorError(
            "torch-tensorrt is not installed here", "Install the version for your torch: pip install torch-tensorrt"
        )
    import torch_tensorrt

    flat = Flat(in_dtype(model, torch.float16).requires_grad_(False), adapter, example).eval()
    try:
        # Engines that can be refitted would not rely on where zeros are.
        built = torch_tensorrt.compile(
            flat, ir="dynamo", arg_inputs=tuple(tensors_of(example)), sparse_weights=sparse, immutable_weights=True
        )
    except Exception as error:  # whatever it raises for a model that it does not know
        raise CompressorError(f"torch-tensorrt: {first_line(error)}") from error
    return Engine(TENSORRT, "float16", lambda inputs: built(*tensors_of(inputs)))
