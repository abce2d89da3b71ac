"""Nested dicts of tensors, numbers and strings as safetensors and JSON: what checkpoints hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import CompressorError, memory
from compressor.files import read_json
from compressor.foreign.bounded import check_regular, mapping
from compressor.saving.plain import apart

_DAMAGED = "It is damaged, or of another version; use another copy."


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers and strings into `folder`: safetensors and JSON, no pickle."""
    tensors: dict[str, Tensor] = {}
    try:
        text = json.dumps(_stored(state, tensors), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CompressorError(
            f"a state holds what cannot be saved: {error}", "Allowed: tensors, finite numbers, strings, lists, dicts."
        ) from error
    save_file(apart(tensors), folder / "state.safetensors")
    (folder / "state.json").write_text(text, encoding="utf-8")


@memory("loading")
def load_state(folder: Path, mapped: bool = False) -> dict[str, Any]:
    """What `save_state` wrote. Keys are strings, and tuples lists. Raises CompressorError for anything else.

    Tensors that are `mapped` are read when they are used, and take no memory; as long as there is one, a file that is deleted keeps
    its space on the disk.
    """
    try:
        check_regular(folder / "state.safetensors")
        with mapping():
            tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise CompressorError(f"{folder / 'state.safetensors'}: {error}", _DAMAGED) from error

    try:
        tree: dict[str, Any] = _restored(read_json(folder / "state.json"), tensors, mapped)
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CompressorError(f"{folder / 'state.json'}: not a saved state: {error!r}", _DAMAGED) from error
    return tree


def _stored(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON has it. Its tensors go to `tensors`, by the names that stand in their place."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _stored(inner, tensors) for key, inner in value.items()}}
    return [_stored(inner, tensors) for inner in value] if isinstance(value, (list, tuple)) else value


def _restored(value: Any, tensors: Mapping[str, Tensor], mapped: bool) -> Any:
    """What `_stored` was given; copies of the `tensors` unless they shall stay `mapped`."""
    if isinstance(value, dict):
        if "tensor" in value:
            tensor = tensors[value["tensor"]]
            return tensor if mapped else tensor.clone()
        return {key: _restored(inner, tensors, mapped) for key, inner in value["dict"].items()}
    return [_restored(inner, tensors, mapped) for inner in value] if isinstance(value, list) else value
