"""Whether a pipeline is the one that was recorded: by what it is made of, and by what its part answers."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from compressor.adapter import Adapter, to_device
from compressor.data.calls import Recording
from compressor.errors import CompressorError, UsageError, first_line
from compressor.foreign.sound import refuse_hooks
from compressor.pipelines.adapter import CallsAdapter
from compressor.pipelines.opened import Opened
from compressor.weights import HALF, bare_name, state_sha256, untied_state

PIPELINE = "pipeline"
"""Under which name the settings of the pipeline itself are, beside its components."""
_AFTERWARDS = frozenset({"safety_checker", "watermark"})
_NOT_ASKED = frozenset({"architectures", "dtype", "torch_dtype", "transformers_version", "requires_safety_checker"})
_OFFLOADED = (
    "Move it there: pipe.to(device), without enable_sequential_cpu_offload(); enable_model_cpu_offload() is fine."
)
_COMING_AND_GOING = ("group_offloading", "layer_execution_tracker")
_TOLERANCE = 0.01
_HALF_TOLERANCE = 0.05


def components_of(opened: Opened) -> dict[str, str]:
    """A hash of each component of the pipeline by its name: its class, its settings, and its weights without those of the part.

    What is looked at after a picture is drawn (`safety_checker`) is left out. Raises CompressorError where weights cannot be read.
    """
    pipe: Any = opened.pipe
    refuse_away(opened)  # now, as hashes of large weights take a while
    found = {name: value for name, value in pipe.components.items() if value is not None and name not in _AFTERWARDS}
    own = {name: value for name, value in _config(pipe).items() if name not in pipe.components}
    described = {PIPELINE: {"class": opened.name, "config": _plain(own)}}
    for name, value in found.items():
        part = opened.part.partition(".")[2] if name == opened.component else None
        described[name] = _module(value, name, part) if isinstance(value, nn.Module) else _other(value)
    return {name: _digest(value) for name, value in described.items()}


def refuse_away(opened: Opened) -> None:
    """Raise UsageError where a component of the pipeline is not in memory."""
    for name, module in opened.pipe.components.items():
        state = module.state_dict() if isinstance(module, nn.Module) else {}
        if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
            raise UsageError(f"{name} is not in memory: its weights are on the meta device", _OFFLOADED)


def refuse_changed(opened: Opened, records: Recording) -> None:
    """Raise CompressorError where the part of `opened` does not answer the first call of `records` as it did: then it is told what no
    argument says.

    An answer may be off by 1% of its root mean square, as the machine may be another: a GPU multiplies float32 in TF32, of 10 bits.
    In half precision it may be 5%.
    """
    if not len(records):
        raise UsageError(f"{records.folder}: no call to fine-tune on", "Record at least one picture.")
    (call,) = records.take(torch.arange(1))
    adapter: Adapter = CallsAdapter(opened, records)
    inputs, expected = adapter.noised([call], torch.Generator())
    device = next((value.device for value in opened.module.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            found = adapter.predict(opened.module, to_device(inputs, device)).float().cpu()
    except Exception as error:  # whatever a model raises
        raise CompressorError(
            f"{opened.part} cannot be called as it was recorded: {first_line(error)}", "Record the pipeline again."
        ) from error
    scale = float(expected.square().mean().sqrt()) or 1.0
    limit = _HALF_TOLERANCE if records.index.torch_dtype in HALF else _TOLERANCE
    # not ">", which a NaN is not
    if found.shape != expected.shape or not float((found - expected).square().mean().sqrt()) <= limit * scale:
        raise CompressorError(
            f"{opened.part} does not answer a recorded call as it did then",
            "Something beside its arguments changes it (hooks, a state, an attention processor). Record it without that.",
        )


def refuse_hooked(opened: Opened, copied: bool) -> None:
    """Raise UsageError for hooks of diffusers on the part with which its answers or weights are not its own: caches, weights in
    another dtype; and where it is to be `copied`, weights that come and go (group offloading), too."""
    refuse_hooks(opened.module, opened.part, () if copied else _COMING_AND_GOING)


def _module(module: nn.Module, name: str, part: str | None) -> Any:
    """A module, described; `part` is the path in it of what is left out, "" for all of its weights, None for nothing."""
    module = getattr(module, "_orig_mod", module)
    state = {} if part == "" else untied_state(module)
    values = {
        bare_name(key): value
        for key, value in state.items()
        if isinstance(value, Tensor) and (part is None or not bare_name(key).startswith(f"{part}."))
    }
    return {
        "class": type(module).__name__,
        "config": _plain(_config(module)),
        "weights": _weights(values, name),
        "adapters": _plain(_adapters(module)),
    }


def _weights(state: Mapping[str, Tensor], name: str) -> str:
    """The hash of the weights of the component `name`."""
    try:
        return state_sha256(dict(one for key, value in state.items() for one in _inner(key, value)))
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise CompressorError(
            f"{name}: its weights cannot be read, so that records cannot say what they are of: {first_line(error)}",
            "Load that component in plain floating-point numbers.",
        ) from error


def _inner(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`value` under its name; where it is made of other tensors, as quantised ones are, those."""
    if not is_traceable_wrapper_subclass(value):
        yield name, value
        return
    flat: Any = value
    for inner in flat.__tensor_flatten__()[0]:
        yield from _inner(f"{name}.{inner}", getattr(value, inner))


def _other(value: Any) -> Any:
    """A scheduler, a tokenizer or a processor, described."""
    found = {"class": type(value).__name__, "config": _plain(_config(value))}
    found["shift"] = _plain(getattr(value, "shift", None))  # a flow scheduler's `set_shift` leaves its config as it was
    vocabulary = getattr(value, "get_vocab", None)
    if callable(vocabulary):
        found["tokenizer"] = _tokenizer(value, vocabulary())
    for name in ("tokenizer", "image_processor"):  # a processor is made of these
        if (inner := getattr(value, name, None)) is not None and inner is not value:
            found[f"its {name}"] = _other(inner)
    return found


def _tokenizer(value: Any, vocabulary: Mapping[str, int]) -> Any:
    backend = getattr(value, "backend_tokenizer", None)
    rules = {} if backend is None else json.loads(backend.to_str())
    names = ("model_max_length", "padding_side", "truncation_side", "special_tokens_map", "chat_template")
    return {
        "vocabulary": None if rules else sorted(vocabulary.items()),
        "rules": {key: rule for key, rule in rules.items() if key not in ("padding", "truncation")},  # of the last call
        **{name: _plain(getattr(value, name, None)) for name in names},
    }


def _adapters(module: nn.Module) -> list[Any]:
    """What says how much each adapter of peft in `module` counts, which no weight does."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    layers = module.named_modules() if tuners is not None else ()
    return [
        [name, layer.active_adapters, layer.merged_adapters, layer.disable_adapters, getattr(layer, "scaling", None)]
        for name, layer in layers
        if isinstance(layer, tuners.BaseTunerLayer)
    ]


def _config(value: Any) -> dict[str, Any]:
    """The settings of a component, as its library keeps them; none where it keeps none."""
    config = getattr(value, "config", None)
    if isinstance(config, Mapping):
        return dict(config)
    for one in (config, value):
        if one is not None and not isinstance(one, nn.Module) and callable(getattr(one, "to_dict", None)):
            return dict(one.to_dict())
    return {}


def _plain(value: Any) -> Any:
    """`value` as JSON, without what only says from which file it was read and by which version it was written."""
    if isinstance(value, Mapping):
        return {
            str(key): _plain(one)
            for key, one in value.items()
            if one is not None and not str(key).startswith("_") and key not in _NOT_ASKED
        }
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, Tensor):
        return state_sha256({"": value})
    if isinstance(value, torch.dtype):
        return str(value)
    return type(value).__name__


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
