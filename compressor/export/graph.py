"""ONNX graphs: made from a module, run, asked for their weights, written. `export` puts these together."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import MappingKey, tree_flatten, tree_flatten_with_path, tree_unflatten

from compressor.adapter import Adapter, tensors_of
from compressor.errors import CompressorError, UsageError, causes, first_line
from compressor.export.batch import dynamic, limit
from compressor.export.repairs import put_right

if TYPE_CHECKING:
    import numpy
    import onnx

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INSTALL = 'pip install "diffusion-compressor[onnx]"'
OPSET = 20
OUTPUT = "prediction"
LARGEST_FILE = 1_900_000_000
"""Protocol buffers end at 2 GiB: larger weights go into a file of their own, beside the graph."""


def require_packages() -> None:
    """Raise CompressorError unless what ONNX needs is installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise CompressorError(f"ONNX needs {', '.join(missing)}, not installed here", f"Install it: {INSTALL}")


class OnnxRunner:
    """Runs an exported file in ONNX Runtime on the CPU, with as many threads as PyTorch has now.

    Called with an adapter's inputs, it answers as `adapter.predict` does. Raises CompressorError where the file is not one
    that ONNX Runtime reads. Instead of a path it takes a file's content. `as_written` carries out node by node, and fuses nothing.
    """

    def __init__(self, path: str | Path | bytes, as_written: bool = False) -> None:
        require_packages()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        if as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Its threads wait by spinning, also after a run: whatever is timed next would be timed against them.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            content = path if isinstance(path, bytes) else str(path)
            self.session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            name = "a graph in memory" if isinstance(path, bytes) else path
            raise CompressorError(f"{name}: ONNX Runtime: {first_line(error)}", "Export the model again.") from error
        self.names = [one.name for one in self.session.get_inputs()]

    def __call__(self, inputs: Any) -> Tensor:
        return next(iter(self.outputs(inputs).values()))

    def feed(self, inputs: Any) -> dict[str, Tensor]:
        """The tensors of `inputs` by the names of the graph's."""
        return dict(zip(self.names, tensors_of(inputs), strict=True))

    def outputs(self, inputs: Any) -> dict[str, Tensor]:
        """Every output of the graph by its name; a graph of this package has one, `prediction`."""
        feed = {name: array_of(tensor) for name, tensor in self.feed(inputs).items()}
        names = [one.name for one in self.session.get_outputs()]
        try:
            found = self.session.run(names, feed)
        except Exception as error:  # its exceptions have no common base
            shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in feed.items())
            raise CompressorError(
                f"ONNX Runtime does not run the graph on {shapes}: {first_line(error)}",
                "Give inputs as those that it was exported with; dim 0 of each is the batch.",
            ) from error
        return dict(zip(names, map(torch.from_numpy, found), strict=True))


class Flat(nn.Module):
    """`adapter.predict` as a module of the tensors alone; what else the inputs hold is constant."""

    def __init__(self, model: nn.Module, adapter: Adapter, example: Any) -> None:
        super().__init__()
        self.model = model
        leaves, spec = tree_flatten(example)

        def predict(tensors: Sequence[Tensor]) -> Tensor:
            rest = iter(tensors)
            whole = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return adapter.predict(self.model, tree_unflatten(whole, spec))

        self.predict = predict
        first, *others = tensors_of(example)
        self.batched = [
            place for place, other in enumerate(others, 1) if other.dim() and first.shape[:1] == other.shape[:1]
        ]

    def forward(self, *tensors: Tensor) -> Tensor:
        for place in self.batched:  # torch.export learns it only when it has followed the model, which may rely on it
            torch._check(tensors[place].shape[0] == tensors[0].shape[0])  # type: ignore[no-untyped-call]
        return self.predict(tensors)


def graph_of(module: nn.Module, adapter: Adapter, example: Any, names: Sequence[str]) -> onnx.ModelProto:
    """What `adapter.predict` computes with `module`, as a graph whose inputs are called `names`.

    Dim 0 of an input is the batch where the example has as many entries there as in its first input. Where torch cannot follow the
    model for any batch, and the adapter has one alone (`fixed_batch`), the graph is for that.
    """
    flat, tensors = Flat(module, adapter, example).eval(), tuple(tensors_of(example))
    try:
        graph = _exported(flat, tensors, torch.export.Dim("batch"), adapter.fixed_batch)
    except Exception as error:
        raise CompressorError(
            f"{adapter.name} cannot be exported: {_reason(error)}",
            "torch.export must be able to follow the model; see https://docs.pytorch.org/docs/stable/export.html",
        ) from error
    if not adapter.fixed_batch:
        with silence():
            most = limit(flat, tensors)
        if most is not None:
            raise CompressorError(
                f"{adapter.name} cannot be exported for any batch: torch follows it for {most} samples alone",
                "Dim 0 of the example inputs has to be the batch, and the model to do the same with any: x.shape[0], say, and not "
                "len(x).",
            )
    put_right(graph, names, OUTPUT)
    for node in graph.graph.node:  # traces of the exporting machine's source files
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return graph


def _exported(flat: Flat, tensors: tuple[Tensor, ...], batch: Any, may_be_fixed: bool = False) -> onnx.ModelProto:
    """`flat` as a graph; for the number of samples in `tensors` where torch cannot follow it for any `batch` and it `may_be_fixed`."""
    try:
        with silence():
            program = torch.onnx.export(
                flat,
                tensors,
                dynamo=True,
                opset_version=OPSET,
                input_names=[f"given:{place}" for place in range(len(tensors))],
                output_names=["given:out"],
                dynamic_shapes=dynamic(tensors, batch),
                verbose=False,
            )
    except Exception:
        if not may_be_fixed:
            raise
        return _exported(flat, tensors, None)
    if program is None:
        raise CompressorError("the exporter gave nothing")
    graph: onnx.ModelProto = program.model_proto
    return graph


def _reason(error: BaseException) -> str:
    """What stopped the exporter, and where in the model's code: behind its own error, which tells how to report it."""
    *_, error = causes(error)
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1] / "export"))
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith((*own, "<"))]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{first_line(error)}{place}"


def input_names_of(example: Any, given: Sequence[str] | None) -> list[str]:
    """A name for each tensor of the example: `given`, or its key where it lies in a dict, or by its shape."""
    leaves = [(path, leaf) for path, leaf in tree_flatten_with_path(example)[0] if isinstance(leaf, Tensor)]
    if given is not None:
        if len(given) != len(leaves) or len({*given, "", OUTPUT}) != len(leaves) + 2:
            raise UsageError(
                f"input_names {list(given)}",
                f"Give {len(leaves)} different names, one for each tensor, and none {OUTPUT!r}, as the output is called.",
            )
        return list(given)
    keys = [str(path[-1].key) if path and isinstance(path[-1], MappingKey) else None for path, _ in leaves]
    names: list[str] = []
    for place, (key, (_, tensor)) in enumerate(zip(keys, leaves, strict=True)):
        taken = {"", OUTPUT, *names}
        if key is None or key in taken:
            shaped = (
                ["sample"] if tensor.dim() > 1 else ["timestep", *([] if tensor.is_floating_point() else ["label"])]
            )
            ways = chain(shaped if key is None else [], (f"input_{number}" for number in count(place)))
            key = next(name for name in ways if name not in {*taken, *keys})
        names.append(key)
    return names


def constants_in(
    graph: onnx.ModelProto, folder: Path | None = None
) -> dict[str, Callable[[], numpy.ndarray[Any, Any]]]:
    """What reads each constant of a graph, by its name: a large model is not held twice. `folder` is that of the graph's file, where
    weights may lie beside it."""
    from onnx import numpy_helper

    return {one.name: partial(numpy_helper.to_array, one, str(folder or "")) for one in graph.graph.initializer}


def stored_weights(graph: onnx.ModelProto) -> list[tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """The constants that products and convolutions of the graph take as weights: the shape of each, (out, in, *kernel), and what
    reads it."""
    shapes, read = {i.name: tuple(i.dims) for i in graph.graph.initializer}, constants_in(graph)
    transposed = {n.output[0]: n.input[0] for n in graph.graph.node if n.op_type == "Transpose"}

    def weight(name: str, turned: bool) -> Tensor:
        value = torch.from_numpy(read[name]().copy())
        return value.t() if turned else value

    found: list[tuple[tuple[int, ...], Callable[[], Tensor]]] = []
    for node in graph.graph.node:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        name, output_first = node.input[1], node.op_type == "Conv"
        if node.op_type == "Gemm":
            output_first = any(a.name == "transB" and a.i for a in node.attribute)
        if name in transposed and node.op_type != "Conv":
            name, output_first = transposed[name], not output_first
        if name in shapes:
            turned = not output_first and len(shapes[name]) == 2
            found.append((shapes[name][::-1] if turned else shapes[name], partial(weight, name, turned)))
    return found


def write(graph: onnx.ModelProto, file: Path, data: str) -> None:
    """Write the graph to `file`, and its weights to `data` beside it where they are too large for one file: `graph` is then left
    without them.

    The name `data` belongs to the weights, so that a graph never meets another's.
    """
    import onnx

    apart = sum(len(one.raw_data) for one in graph.graph.initializer) > LARGEST_FILE
    onnx.save_model(graph, file, save_as_external_data=apart, location=data)


def write_described(graph: onnx.ModelProto, file: Path, form: str, digest: str, int8: bool) -> None:
    """As `write`, with what the graph is in its metadata: its `form`, whether in `int8`, and the `digest` of the model's weights."""
    facts = {
        "form": form,
        "int8": str(int8).lower(),
        "weights_sha256": digest,
        "version": version("diffusion-compressor"),
    }
    for key, value in facts.items():
        graph.metadata_props.add(key=f"compressor.{key}", value=value)
    write(graph, file, f"{file.stem}-{form}-{digest[:12]}.data")


def array_of(tensor: Tensor) -> numpy.ndarray[Any, Any]:
    tensor = tensor.detach().cpu()
    array: numpy.ndarray[Any, Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return array


@contextmanager
def silence() -> Iterator[None]:
    """Without the exporter's and the quantizer's words: which operators torchvision would have, what might be optimized, whole graphs
    of what it could not follow. Standard output is where --json is written."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "onnxscript", "onnx_ir", None)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def input_shapes(graph: onnx.ModelProto) -> dict[str, tuple[str | int, ...]]:
    """The shape of each input by its name; the batch has a name instead of a number."""
    return {i.name: tuple(d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.graph.input}
