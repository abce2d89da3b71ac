"""Bundled weights with the facts of their training beside them."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor.weights import weights_sha256


def save_with_facts(model: nn.Module, path: Path, recipe: str, began: float, facts: Mapping[str, Any]) -> str:
    """Write the weights of `model` to `path` and, as JSON beside it, what they were made by; the JSON's text.

    `recipe` is the command; `began` when it did, by `time.perf_counter`; `facts` what else is to be known: seed, settings, data.
    """
    save_tensors(model.state_dict(), path)
    provenance = {
        "file": path.name,
        "recipe": recipe,
        **facts,
        "weights_sha256": weights_sha256(model),
        "seconds": round(time.perf_counter() - began),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    text = json.dumps(provenance, indent=2) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")
    return text


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes 0600
