"""Export to ONNX: the graph is written, run in ONNX Runtime against PyTorch, and kept only where the two agree.

Two forms. `dense` is the ordinary graph, zeros and all, for engines that find an N:M pattern by themselves. `gathered`
computes with the kept channels only, in standard operators, for engines that do not (see `compressor.lower.gathered`).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compressor.adapter import Adapter
from compressor.environment import versions_of
from compressor.errors import UTF_8, CompressorError, GateError, UsageError, has_half
from compressor.export.graph import (
    OPSET,
    PACKAGES,
    OnnxRunner,
    graph_of,
    input_names_of,
    input_shapes,
    require_packages,
    stored_weights,
    write_described,
)
from compressor.export.int8 import integer_errors, quantize
from compressor.export.parity import BATCHES, TOLERANCE, Parity, float32_inputs, parity, random_inputs
from compressor.files import file_sha256, sync, workshop
from compressor.foreign.sound import copied, refuse_empty, refuse_kept
from compressor.lower.backend import Unit
from compressor.lower.gathered import GAINING_V, Gathered
from compressor.lower.units import find_units, pattern_of, put
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.layers import PRUNABLE
from compressor.sparsity.pattern import NM, Pattern
from compressor.sparsity.venom import Venom
from compressor.weights import bare, weights_sha256

if TYPE_CHECKING:
    import onnx

__all__ = ["FORMS", "Exported", "OnnxRunner", "Parity", "export_onnx", "random_inputs", "refuse"]

FORMS = ("dense", "gathered")
INT8_TOLERANCE = 0.5
"""The largest root mean square difference that int8 may show, in standard deviations of the output. Its rounding costs the
bundled models up to 0.26, at the lowest noise; at 0.5 a fifth of the answer's variance would be noise. That the file itself
is right is checked apart, product by product and to `TOLERANCE`: this bounds what the rounding alone costs."""

_DATA = re.compile(rf"-({'|'.join((*FORMS, 'int8', 'tensorrt'))})-[0-9a-f]{{12}}\.data")
_ADVICE = {
    "dense": "next: for TensorRT, which looks for zeros, --to tensorrt-ready; ONNX Runtime's own kernels do not skip any (--form "
    "gathered, --int8).",
    "gathered": "next: run it in ONNX Runtime, on a CPU; measure it there beside the dense form.",
    "int8": "next: run it in ONNX Runtime, on a CPU, and look at samples: int8 costs quality.",
}


@dataclass(frozen=True)
class Exported:
    """An ONNX file, and what is known of it. `data` is the file of its weights, where that is another one.

    `gathered` has the layers in gathered form; `left` those with a pattern that are not, and why. `inputs` has the shape
    of each input by its name.
    """

    path: Path
    data: Path | None
    form: str
    int8: bool
    gathered: tuple[str, ...]
    left: Mapping[str, str]
    size_bytes: int
    dense_size_bytes: int
    parity: Parity
    inputs: Mapping[str, tuple[str | int, ...]]
    opset: int
    sha256: str
    weights_sha256: str
    versions: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {**asdict(self), "path": str(self.path), "data": None if self.data is None else str(self.data)}

    def lines(self) -> list[str]:
        """What a user wants to know, and what to do with the file."""
        shapes = [f"{name} ({', '.join(map(str, shape))})" for name, shape in self.inputs.items()]
        found = [
            f"{self.path}: {self.size_bytes:,} bytes, {self.form} form, {'int8' if self.int8 else 'float32'}, opset {self.opset}",
            f"inputs: {', '.join(shapes)}",
            *self.parity.lines(),
        ]
        if self.data is not None:
            found.append(f"weights: {self.data}; keep it beside the graph")
        if self.form == "gathered":
            found.append(f"gathered: {len(self.gathered)} of {len(self.gathered) + len(self.left)} pruned layers")
            found += [f"not {name}: {reason}" for name, reason in list(self.left.items())[:3]]
            found += [f"and {len(self.left) - 3} more"] if len(self.left) > 3 else []
        return [*found, _ADVICE["int8" if self.int8 else self.form]]


@torch.no_grad()
def export_onnx(
    model: nn.Module,
    adapter: Adapter,
    path: str | Path,
    *,
    form: str = "dense",
    int8: bool = False,
    patterns: Mapping[str, Pattern] | None = None,
    input_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write `model` to `path` as ONNX, with a dynamic batch, in float32. `model` itself is left as it is.

    The graph computes `adapter.predict`, with the tensors of `adapter.example_inputs` as inputs, in their order. They are
    called as the keys of a dict that holds them; else `sample`, `timestep`, `label`, by their shapes; or `input_names`.
    `patterns` has the pattern of each pruned weight by its name; by default it is read from the zeros. `int8` quantizes the
    weights of matrix products.

    Raises UsageError for a form that does not exist and a path that is taken; GateError, leaving no new file, where
    the graph answers otherwise than PyTorch or lost a pattern; CompressorError where something is not installed, cannot be
    exported or cannot be written; LockedError where another process works on `path` or in its run's directory.
    """
    path = Path(path)
    refuse(path, form, int8, overwrite)
    given, model = model, in_float32_on_cpu(model)
    example = float32_inputs(adapter.example_inputs(2))
    if patterns is None:
        patterns = {name: p for name, layer in layers_of(model).items() if (p := pattern_of(layer.weight)) is not None}
    digest = weights_sha256(bare(given))  # as a saved model has it, in whatever precision
    forward = _gathered_form(model, adapter, example, patterns) if form == "gathered" else _Form(model, (), {})
    names = input_names_of(example, input_names)
    with committed(path) as folder:
        graph = graph_of(forward.module, adapter, example, names)
        if form == "dense":
            _verify_patterns(graph, model, adapter, example, patterns)
        file, inputs = folder / path.name, input_shapes(graph)
        write_described(graph, file, form, digest, int8)
        del graph  # and its weights
        if int8:
            quantize(file, digest)
        parity = _parity(model, adapter, file, int8)
        files = sorted(folder.iterdir())
        sizes, sha256 = sum(f.stat().st_size for f in files), file_sha256(file)
    data = [path.parent / f.name for f in files if f.name != path.name]
    return Exported(
        path=path,
        data=data[0] if data else None,
        form=form,
        int8=int8,
        gathered=forward.gathered,
        left=forward.left,
        size_bytes=sizes,
        dense_size_bytes=sum(t.nbytes for t in model.state_dict().values()),
        parity=parity,
        inputs=inputs,
        opset=OPSET,
        sha256=sha256,
        weights_sha256=digest,
        versions=versions_of(("torch", *PACKAGES)),
    )


def in_float32_on_cpu(model: nn.Module) -> nn.Module:
    """A copy of `model` as graphs are made of: bare, in float32 and eval mode, on the CPU. What parameters hold is the model's own
    where it is so already."""
    refuse_kept(model := bare(model))
    refuse_empty(model.state_dict())
    same = [p for p in model.parameters() if type(p) is nn.Parameter and p.dtype == torch.float32 and p.is_cpu]
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in same}
    return copied(model, shared).cpu().float().eval().requires_grad_(False)


# --- The gathered form. ---


@dataclass(frozen=True, eq=False)
class _Form:
    module: nn.Module
    gathered: tuple[str, ...]
    left: Mapping[str, str]


def _gathered_form(model: nn.Module, adapter: Adapter, example: Any, patterns: Mapping[str, Pattern]) -> _Form:
    """`model` with its V:N:M layers in gathered form, where that is faster."""
    module, backend = copy.deepcopy(model, {id(p): p for p in model.parameters()}), Gathered()
    found, unreached = find_units(module, lambda: adapter.predict(module, example))
    left = {one.weight: one.reason for one in unreached if one.weight in patterns}
    taken: list[str] = []
    for one in found:
        if one.unit.kind not in backend.takes:
            continue
        known = tuple(p if isinstance(p := patterns.get(w), (NM, Clustered, Venom)) else None for w in one.weights)
        unit = replace(one.unit, patterns=known)
        parts = [(one.at, unit, one.weights)]
        if _slower(unit) and len(one.weights) > 1:  # of a pair, one may do alone
            parts = [
                (w.removesuffix(".weight"), replace(unit, module=layer, patterns=(p,)), (w,))
                for w, layer, p in zip(one.weights, unit.layers, known, strict=True)
            ]
        for at, part, weights in parts:
            if reason := _slower(part) or backend.refusal(part):
                left |= {w: reason for w in weights if w in patterns}
            else:
                module = put(module, at, backend.build(part))
                taken += weights
    return _Form(module.eval(), tuple(taken), left)


def _slower(unit: Unit) -> str | None:
    """Why the gathered form of a unit would not be faster; None where it would."""
    for pattern in unit.patterns:
        if pattern is None:
            return "its weight obeys no N:M pattern"
        if isinstance(pattern, Venom):
            return pattern.no_kernel
        if pattern.v < GAINING_V:
            return (
                f"{pattern}: gathering channels pays from V = {GAINING_V} on, as in {GAINING_V}:{pattern.n}:{pattern.m}"
            )
    return None


# --- What is checked. ---


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The Linear and convolution layers of `model`, by the name of their weight."""
    return {f"{name}.weight".lstrip("."): layer for name, layer in model.named_modules() if isinstance(layer, PRUNABLE)}


def used_layers(model: nn.Module, adapter: Adapter, example: Any) -> set[str]:
    """Those of `layers_of` that run when `adapter.predict` does."""
    used = set[str]()
    hooks = [
        layer.register_forward_pre_hook(lambda _, __, name=name: used.add(name))
        for name, layer in layers_of(model).items()
    ]
    try:
        adapter.predict(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return used


def refuse_missing(name: str, model: nn.Module, adapter: Adapter, example: Any) -> None:
    """Raise GateError for the weight `name`, which is not in the graph, unless nothing reads what its layer gives: an auxiliary head,
    say, that `adapter.predict` leaves out."""
    inputs = random_inputs(example, adapter.num_classes, torch.Generator().manual_seed(0))
    wanted = adapter.predict(model, inputs)
    hook = layers_of(model)[name].register_forward_hook(
        lambda _, __, out: out + torch.arange(1.0, out.shape[-1] + 1) * (1 + out.abs().mean())
    )
    try:
        if torch.equal(adapter.predict(model, inputs), wanted):
            return
    finally:
        hook.remove()
    raise GateError(f"{name}: its zeros are not in the exported graph", "Please report this model.")


def _verify_patterns(
    graph: onnx.ModelProto, model: nn.Module, adapter: Adapter, example: Any, patterns: Mapping[str, Pattern]
) -> None:
    """Raise GateError unless the graph has every pruned weight that is used, as a constant that obeys its pattern where an
    engine looks for it: along the input channels."""
    layers, used = layers_of(model), used_layers(model, adapter, example)
    stored = stored_weights(graph)
    for name in sorted(used & patterns.keys()):
        zero = layers[name].weight == 0
        same = ((i, read()) for i, (shape, read) in enumerate(stored) if shape == zero.shape)
        found = next(((i, w) for i, w in same if not (w[zero] != 0).any()), None)
        if found is None:
            refuse_missing(name, model, adapter, example)
        else:
            place, weight = found
            del stored[place]
            patterns[name].verify(weight)


def _parity(model: nn.Module, adapter: Adapter, file: Path, int8: bool) -> Parity:
    """Compare the file with `model`, and an int8 file with its own arithmetic. Raises GateError where they differ by more
    than is allowed."""
    if not int8:
        return parity(model, adapter, OnnxRunner(file), Parity(), "Please report this model.")
    found = Parity(tolerance=INT8_TOLERANCE, bounded="rms_error", **_integer_parity(adapter, file))
    return parity(model, adapter, OnnxRunner(file), found, "int8 costs this model too much: leave --int8 out.")


def _integer_parity(adapter: Adapter, file: Path) -> dict[str, Any]:
    """How far the products of an int8 file are from its own arithmetic. Raises GateError where they differ by more than
    `TOLERANCE`."""
    rng, errors = torch.Generator().manual_seed(0), list[dict[str, float]]()
    for batch in BATCHES[:2]:  # one row and several go through different kernels
        inputs = random_inputs(adapter.example_inputs(batch), adapter.num_classes, rng)
        errors.append(integer_errors(file, inputs))
    if not errors[0]:
        raise CompressorError(
            f"int8: {adapter.name} has no matrix product with a constant weight",
            "Leave --int8 out: nothing would change.",
        )
    worst, name = max((error, name) for found in errors for name, error in found.items())
    if worst > TOLERANCE:
        raise GateError(
            f"{name}: ONNX Runtime is {worst:.1e} standard deviations away from the product in whole numbers; "
            f"{TOLERANCE:.0e} are allowed",
            "No file was written. Please report this model, and the processor.",
        )
    return {"integer_error": worst, "integer_products": len(errors[0])}


# --- The file. ---


def refuse(path: Path, form: str, int8: bool, overwrite: bool, *beside: Path) -> None:
    """Raise CompressorError for what `export_onnx` would refuse before any work: packages, form, path; and the files `beside` it."""
    require_packages()
    if form not in FORMS:
        raise UsageError(f"form {form!r} does not exist", f"Allowed: {', '.join(FORMS)}.")
    if int8 and form != "dense":
        raise UsageError(f"int8 with the {form} form", "Quantization takes the dense form: leave --form out.")
    if has_half(str(path)):
        raise UsageError(f"{path}: ONNX Runtime reads names in UTF-8 alone", f"{UTF_8}, or choose another --out.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "Give the file's name too.")
    if not overwrite and (there := [one for one in (path, *beside) if one.exists()]):
        raise UsageError(f"{there[0]} is there already", "Choose another file, or replace it with --overwrite.")
    if path.suffix != ".onnx":
        raise UsageError(f"{path} is not called NAME.onnx", "Choose another --out.")


@contextmanager
def committed(path: Path) -> Iterator[Path]:
    """A folder whose files are moved beside `path` when all is well, the one called as `path` last; else nothing is left."""
    with workshop(path) as partial:
        yield partial
        names = [file.name for file in partial.iterdir()]
        for file in sorted(partial.iterdir(), key=lambda file: file.name == path.name):
            sync(file)
            os.replace(file, path.parent / file.name)
        sync(path.parent)
        for former in path.parent.glob(f"{escape(path.stem)}-*.data"):  # weights of a graph that was replaced
            if former.name not in names and _DATA.fullmatch(former.name.removeprefix(path.stem)):
                former.unlink()
