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

_DAMAGED = "It is damaged, or of another version; use another copy."


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts and lists of tensors, numbers and strings into `folder`: safetensors and JSON, no pickle."""
    tensors: dict[str, Tensor] = {}

    def stored(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = str(len(tensors))
            tensors[key] = value.detach().cpu().contiguous().clone()
            return {"tensor": key}
        if isinstance(value, Mapping):
            return {"dict": {str(key): stored(inner) for key, inner in value.items()}}
        return [stored(inner) for inner in value] if isinstance(value, (list, tuple)) else value

    try:
        text = json.dumps(stored(state), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CompressorError(
            f"a state holds what cannot be saved: {error}", "Allowed: tensors, finite numbers, strings, lists, dicts."
        ) from error
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(text, encoding="utf-8")


@memory("loading")
def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote. Keys are strings, and tuples lists. Raises CompressorError for anything else."""
    try:
        check_regular(folder / "state.safetensors")
        with mapping():
            tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise CompressorError(f"{folder / 'state.safetensors'}: {error}", _DAMAGED) from error

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            if "tensor" in value:
                return tensors[value["tensor"]]
            return {key: restored(inner) for key, inner in value["dict"].items()}
        return [restored(inner) for inner in value] if isinstance(value, list) else value

    try:
        tree: dict[str, Any] = restored(read_json(folder / "state.json"))
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CompressorError(f"{folder / 'state.json'}: not a saved state: {error!r}", _DAMAGED) from error
    return tree
