"""Export for TensorRT: a strongly typed ONNX file whose 2:4 zeros it finds, and the command that builds an engine from it.

Types are in the file, as TensorRT 11 wants it: float16, or float16 with 8 bits around the products that are 2:4. What it takes and
gives stays float32. bfloat16 and fp8 are left out: ONNX has no bfloat16 convolution at this opset and ONNX Runtime none on a CPU, so
such a file could not be checked, and NVIDIA's documentation names float16 and int8 for sparse weights.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.environment import versions_of
from compressor.errors import CompressorError, GateError, UsageError
from compressor.export.graph import (
    OPSET,
    PACKAGES,
    OnnxRunner,
    graph_of,
    input_names_of,
    input_shapes,
    write,
    write_described,
)
from compressor.export.onnx import (
    INT8_TOLERANCE,
    committed,
    in_float32_on_cpu,
    layers_of,
    refuse,
    refuse_missing,
    used_layers,
)
from compressor.export.parity import Parity, float32_inputs, parity, random_inputs
from compressor.export.tensorrt_graph import (
    Product,
    around,
    name_layers,
    not_sparse,
    quantise,
    straighten,
    verify,
)
from compressor.files import file_sha256
from compressor.lower.job import in_dtype
from compressor.sparsity.pattern import Pattern
from compressor.weights import bare, weights_sha256

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-2
"""The largest root mean square difference from PyTorch in float32 that float16 may show, in standard deviations of the output; the
bundled models show 1e-3."""
_DRAWS = 16  # of inputs, that ranges are read from
_SHOWN = 3


@dataclass(frozen=True)
class ReadyForTensorRT:
    """An ONNX file for TensorRT, and what is known of it; `description` is the JSON file beside it that says the same.

    `eligible` has the shape (out, in, *kernel) of each layer whose weight is 2:4 where TensorRT looks, by the name that its log has;
    `left` why each other layer is not. Whether a sparse kernel is taken for an eligible one, TensorRT's own timing decides.
    `command` builds the engine, in the file's folder, for up to `batch` samples; times are measured at that. `calibration` says what
    the ranges of 8-bit tensors were read from.
    """

    path: Path
    data: Path | None
    description: Path
    int8: bool
    command: str
    batch: int
    eligible: Mapping[str, tuple[int, ...]]
    left: Mapping[str, str]
    calibration: str | None
    size_bytes: int
    parity: Parity
    inputs: Mapping[str, tuple[str | int, ...]]
    opset: int
    sha256: str
    weights_sha256: str
    versions: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        paths = {name: None if (path := getattr(self, name)) is None else str(path) for name in _PATHS}
        return {**asdict(self), **paths}

    def lines(self) -> list[str]:
        """What a user wants to know, and what to do with the file."""
        every = len(self.eligible) + len(self.left)
        shapes = [f"{name} ({', '.join(map(str, shape))})" for name, shape in self.inputs.items()]
        found = [
            f"{self.path}: {self.size_bytes:,} bytes, {'float16 and int8' if self.int8 else 'float16'}, opset {self.opset}",
            f"inputs: {', '.join(shapes)}",
            f"cost: {self.parity.rms_error:.1e} standard deviations from PyTorch in float32 (root mean square; at most "
            f"{self.parity.max_error:.1e}), at batches {', '.join(map(str, self.parity.batches))}; "
            f"{self.parity.tolerance:.0e} are allowed",
            f"2:4 where TensorRT looks: {len(self.eligible)} of {every} layers",
            *(f"not {name}: {reason}" for name, reason in list(self.left.items())[:_SHOWN]),
            *([f"and {len(self.left) - _SHOWN} more, all in {self.description}"] if len(self.left) > _SHOWN else []),
        ]
        found += [f"ranges of 8 bits: {self.calibration}"] if self.calibration else []
        found += [f"weights: {self.data}; keep it beside the graph"] if self.data else []
        return [
            *found,
            f"build, in {self.path.parent}: {self.command}",
            "next: look for lines with (Sparsity) in its output: eligible layers, and those for which a sparse kernel was faster.",
        ]


_PATHS = ("path", "data", "description")


@torch.no_grad()
def export_tensorrt(
    model: nn.Module,
    adapter: Adapter,
    path: str | Path,
    *,
    int8: bool = False,
    batch: int = 16,
    patterns: Mapping[str, Pattern] | None = None,
    calibration: Iterable[Any] | None = None,
    input_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> ReadyForTensorRT:
    """Write `model` to `path` as ONNX for TensorRT, and `NAME.build.json` beside it, which says what is known of it. `model` itself is
    left as it is.

    The graph is that of `export_onnx` in its dense form, in float16. `int8` puts 8 bits around the products whose weights are 2:4:
    what they read, their weights and what they give. The ranges of 8-bit tensors are the largest magnitudes that occur for
    `calibration`, inputs as `adapter.predict` takes them; without it for random inputs, which says less. `batch` is what the engine
    is tuned for. `patterns` has the pattern of each pruned weight by its name: those have to be in the file.

    Raises UsageError for a path that is taken and a batch below 1; GateError, leaving no new file, where the graph answers otherwise
    than PyTorch or lost a pattern; CompressorError where something is not installed, cannot be exported or cannot be written, and
    where `int8` finds no 2:4 weight; LockedError where another process works on `path` or in its run's directory.
    """
    path = Path(path)
    refuse(path, "dense", False, overwrite, description_of(path))
    if batch < 1:
        raise UsageError(f"batch {batch}", "Give how many samples the engine is used with at once: 1 or more.")
    dense = in_float32_on_cpu(model)
    example, digest = float32_inputs(adapter.example_inputs(2)), weights_sha256(bare(model))
    half, names = in_dtype(dense, torch.float16).requires_grad_(False), input_names_of(example, input_names)
    with committed(path) as folder:
        graph = graph_of(half, adapter, example, names)
        straighten(graph)
        eligible, left = _sorted(graph, dense, adapter, example, patterns or {})
        seen = _in_8_bits(graph, eligible.values(), adapter, calibration, folder / "ranges") if int8 else None
        write_described(graph, file := folder / path.name, "tensorrt", digest, int8)
        _check(file, eligible, int8)
        files, inputs = list(folder.iterdir()), input_shapes(graph)
        ready = ReadyForTensorRT(
            path=path,
            data=next((path.parent / f.name for f in files if f.name != path.name), None),
            description=description_of(path),
            int8=int8,
            command=build_command(path.name, inputs, batch),
            batch=batch,
            eligible={name.removesuffix(".weight"): tuple(one.weight.shape) for name, one in eligible.items()},
            left=left,
            calibration=seen,
            size_bytes=sum(f.stat().st_size for f in files),
            parity=_parity(dense, adapter, file, int8),
            inputs=inputs,
            opset=OPSET,
            sha256=file_sha256(file),
            weights_sha256=digest,
            versions=versions_of(("torch", *PACKAGES)),
        )
        here = {**ready.as_json(), **{n: p.name for n in _PATHS if (p := getattr(ready, n)) is not None}}
        (folder / ready.description.name).write_text(json.dumps(here, indent=1) + "\n")
    return ready


def description_of(path: Path) -> Path:
    """The file beside a graph for TensorRT, which says what is known of it."""
    return path.with_name(f"{path.stem}.build.json")


def build_command(name: str, inputs: Mapping[str, tuple[str | int, ...]], batch: int) -> str:
    """The command that builds an engine from the file `name` in its own folder, for 1 to `batch` samples, tuned for `batch`.

    TensorRT 10 needs `--stronglyTyped`; for 11 it is always on, and the flag is accepted.
    """

    def shapes(samples: int) -> str:
        moving = {name: shape for name, shape in inputs.items() if any(isinstance(side, str) for side in shape)}
        sides = {n: "x".join(str(samples if isinstance(s, str) else s) for s in shape) for n, shape in moving.items()}
        return ",".join(f"{n}:{text}" for n, text in sides.items())

    stem = name.removesuffix(".onnx")
    words = ["trtexec", f"--onnx={name}", "--stronglyTyped", "--sparsity=enable"]
    if shapes(1):
        words += [f"--minShapes={shapes(1)}", f"--optShapes={shapes(batch)}", f"--maxShapes={shapes(batch)}"]
    words += ["--builderOptimizationLevel=4", "--profilingVerbosity=detailed", f"--exportLayerInfo={stem}.layers.json"]
    return shlex.join([*words, f"--saveEngine={stem}.plan", "--verbose"])


def _sorted(
    graph: onnx.ModelProto, model: nn.Module, adapter: Adapter, example: Any, patterns: Mapping[str, Pattern]
) -> tuple[dict[str, Product], dict[str, str]]:
    """The layers that TensorRT may take as 2:4, by their weight's name, and why it will not take others. Raises GateError where the
    zeros of a weight in `patterns` are not in the graph."""
    layers, used = layers_of(model), used_layers(model, adapter, example)
    there = name_layers(graph, {name: layers[name].weight.half() for name in layers if name in used})
    eligible, left = dict[str, Product](), dict[str, str]()
    for name, layer in layers.items():
        reason = not_sparse(layer.weight, getattr(layer, "groups", 1))
        if name not in used:
            left[name.removesuffix(".weight")] = "it does not run"
        elif name not in there:
            if name in patterns:
                refuse_missing(name, model, adapter, example)
            left[name.removesuffix(".weight")] = "its weight is no constant that the graph multiplies by"
        elif reason is not None:
            left[name.removesuffix(".weight")] = reason
        else:
            eligible[name] = there[name]
    return eligible, left


def _in_8_bits(
    graph: onnx.ModelProto, found: Collection[Product], adapter: Adapter, given: Iterable[Any] | None, folder: Path
) -> str:
    """Put 8 bits around the products `found`; what their ranges were read from, in words."""
    if not found:
        raise CompressorError("int8: no layer is 2:4", "Leave --int8 out, or prune the model as in --pattern 2:4.")
    inputs, seen = _calibration(adapter, given)
    quantise(graph, found, _ranges(graph, found, inputs, folder))
    return seen


def _calibration(adapter: Adapter, given: Iterable[Any] | None) -> tuple[list[Any], str]:
    """Inputs to read ranges from, and what they are."""
    if given is None:
        rng = torch.Generator().manual_seed(0)
        draws = [random_inputs(adapter.example_inputs(2), adapter.num_classes, rng) for _ in range(_DRAWS)]
        return (
            draws,
            f"{_DRAWS} draws of random inputs, seed 0; noisy data as the model gets it says more (in Python: calibration=)",
        )
    found = [float32_inputs(one) for one in given]
    if not found:
        raise UsageError("calibration is empty", "Give inputs as adapter.predict takes them.")
    return found, f"{len(found)} inputs that were given"


def _ranges(graph: onnx.ModelProto, found: Iterable[Product], inputs: list[Any], folder: Path) -> dict[str, float]:
    """The largest magnitude of each tensor that gets 8 bits, over all `inputs`."""
    import onnx

    read, written = around(graph, found)
    whole = onnx.ModelProto()
    whole.CopyFrom(graph)
    given = {one.name for one in graph.graph.input}
    whole.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys([*read, *written]) if n not in given)
    folder.mkdir()
    try:
        write(whole, folder / "ranges.onnx", "ranges.data")
        runner = OnnxRunner(folder / "ranges.onnx", as_written=True)
        largest = dict.fromkeys([*read, *written], 0.0)
        for one in inputs:
            values = runner.outputs(one) | runner.feed(one)
            largest = {name: max(most, _largest(values[name])) for name, most in largest.items()}
    finally:
        shutil.rmtree(folder)
    if beyond := [name for name, most in largest.items() if not most < math.inf]:
        raise GateError(
            f"{beyond[0]}: not finite in float16", "No file was written. This model needs more than float16."
        )
    return largest


def _largest(values: Tensor) -> float:
    most = float(values.abs().max())
    return math.inf if math.isnan(most) else most


def _check(file: Path, eligible: Mapping[str, Product], int8: bool) -> None:
    """Raise GateError unless the file is ONNX, and has its 2:4 weights where TensorRT looks."""
    import onnx

    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise GateError(f"{file.name} is no valid ONNX: {error}", "Please report this model.") from error
    verify(onnx.load(file), {one.constant: one.weight for one in eligible.values()}, int8)


def _parity(model: nn.Module, adapter: Adapter, file: Path, int8: bool) -> Parity:
    """How far the file is from `model` in float32. It is carried out as it is written, not as CPUs would rather have it: what ONNX
    Runtime 1.32 makes of a product in float16 behind a Transpose ends the process."""
    found = Parity(tolerance=INT8_TOLERANCE if int8 else TOLERANCE, bounded="rms_error")
    hint = "int8 costs this model too much: leave --int8 out." if int8 else "This model needs more than float16."
    return parity(model, adapter, OnnxRunner(file, as_written=True), found, hint)
