"""Configurations of other people's models, looked at before anything is built: what is larger than its weights is refused.

A `config.json` is a few lines, and what libraries make of them may take days or all of the memory. What a model holds is also in
its files of weights, and those cannot be made large with a few lines.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compressor.environment import quiet_libraries
from compressor.errors import CompressorError
from compressor.files import read_json
from compressor.foreign.bounded import check_tree

_LARGEST = {
    "layers": 128,
    "depth": 128,
    "blocks": 128,
    "sample_size": 1024,
    "pos_embed": 4096,
    "timesteps": 100_000,
    "theta": 1_000_000_000,
}
"""By part of a setting's name; the largest models there are have 60 layers."""
_LARGEST_OF_ALL = 2**24
_WIDE = ("channels", "hidden", "dim", "d_model", "d_ff", "intermediate", "width", "embed")
_MANY = ("vocab", "num_embeds", "num_vector_embeds", "num_class_embeds", "max_position", "sample_size")
_MOST_ITEMS = 256
_MOST_LAYERS = 512
_MOST_DEEP = 8
_MOST_REAL = 2**26
"""Numbers that a constructor may compute while its weights have no memory: tables of places and frequencies."""
_SPARE = 256 * 2**20
_FACTOR = 64
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_HINT = "Use the configuration that came with the weights."


def check_config(config: Mapping[str, Any], where: str | Path, stored: int | None = None) -> None:
    """Raise CompressorError for settings that no model has: too many layers, too long lists, too deep nesting.

    With `stored`, the bytes of the weights that the configuration is of, also for widths of which a single matrix would be many
    times as large as all of them.
    """
    numbers = list(_numbers(config, where, 0))
    for key, one in numbers:
        largest = next((bound for part, bound in _LARGEST.items() if part in key), _LARGEST_OF_ALL)
        if abs(one) > largest and math.isfinite(one):  # DPM-Solver's schedulers clip at minus infinity
            raise CompressorError(f"{where}: {key} is {one:g}", f"Allowed: numbers up to {largest:,}. {_HINT}")
    for key, value in config.items():
        count = len(value) if isinstance(value, (list, tuple)) else 0
        if count > (_LARGEST["timesteps"] if key == "trained_betas" else _MOST_ITEMS):
            raise CompressorError(f"{where}: {key} has {count:,} entries", f"Allowed: {_MOST_ITEMS}. {_HINT}")
    _check_layers(config, where)
    if stored is not None:
        _check_widths(numbers, where, stored)


def check_pipeline(folder: Path, names: Iterable[str] | None = None) -> None:
    """Raise CompressorError unless the folder of a model or a pipeline may be opened by other libraries.

    All in it are regular files in it (`bounded.check_tree`), and the configuration of each of its folders of those `names` (None:
    of all) passes `check_config`.
    """
    check_tree(folder)
    inner = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and (names is None or entry.name in names)]
    for here in (folder, *inner):
        stored = stored_bytes(here)
        for path in (here / "config.json", here / "scheduler_config.json"):
            if path.is_file():
                check_config(read_json(path, infinite=True), path, stored if path.name == "config.json" else None)


def stored_bytes(folder: Path) -> int | None:
    """The size of the files of weights in `folder`; None where it has none."""
    sizes = [path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file()]
    return sum(sizes) if sizes else None


def check_built(made: Any, config: Mapping[str, Any], where: str | Path, stored: int | None) -> None:
    """Raise CompressorError where diffusers' class `made` would make far more of `config` than the `stored` bytes can fill.

    Without them, than this machine's memory can hold. It is built without memory, on the meta device. A class that cannot be is
    left to its builder: what is wrong with a configuration is told there.
    """
    if torch.empty(0).is_meta:
        return
    try:
        with quiet_libraries(), torch.device("meta"), _Bounded(where):
            model: nn.Module = made.from_config(dict(config))
    except CompressorError:
        raise
    except Exception:  # diffusers raises whatever its constructors meet
        return
    count = sum(parameter.numel() for parameter in model.parameters())
    if stored is not None and count > 2 * stored + 2**20:  # a number has half a byte in the smallest formats
        raise CompressorError(
            f"{where}: a {made.__name__} of this configuration has {count:,} numbers, and its weights have {stored:,} bytes",
            _HINT,
        )
    if stored is None and (memory := _memory()) is not None and 4 * count > memory:
        raise CompressorError(
            f"{where}: a {made.__name__} of this configuration takes {4 * count:,} bytes, and this machine has {memory:,}",
            "Choose a smaller model.",
        )


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ends a constructor that computes far more than tables, such as the places of a picture of a million pixels."""

    def __init__(self, where: str | Path) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where, self.made = where, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.made += sum(one.numel() for one in tree_leaves(out) if isinstance(one, torch.Tensor) and not one.is_meta)
        if self.made > _MOST_REAL:
            raise CompressorError(
                f"{self.where}: building the model computes more than {_MOST_REAL:,} numbers before its weights", _HINT
            )
        return out


def _numbers(value: Any, where: str | Path, depth: int, key: str = "") -> Iterator[tuple[str, float]]:
    """Each number in `value`, however nested, with the name of its setting."""
    if depth > _MOST_DEEP:
        raise CompressorError(f"{where}: {key}: nested deeper than {_MOST_DEEP} levels", _HINT)
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _numbers(one, where, depth + 1, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _numbers(one, where, depth + 1, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _check_layers(config: Mapping[str, Any], where: str | Path) -> None:
    """Raise CompressorError where the blocks and the layers in each make too many: building each takes time."""
    lists = [value for key, value in config.items() if "block_types" in key and isinstance(value, (list, tuple))]
    stages, total, inner = max(map(len, lists), default=1), 0.0, 1.0
    for key, value in config.items():
        own = [one for _, one in _numbers(value, where, 0, key)] if "layers" in key or "depth" in key else []
        if own and key.startswith("transformer_layers_per"):
            inner = max(1.0, *own)
        elif own and "per_block" in key:
            total += sum(own) if isinstance(value, (list, tuple)) else own[0] * stages
        elif own and (key.startswith("num_") or key.startswith("depth")):
            total += sum(own)
    if total * inner > _MOST_LAYERS:
        raise CompressorError(f"{where}: {total * inner:,.0f} layers in all", f"Allowed: {_MOST_LAYERS}. {_HINT}")


def _check_widths(numbers: list[tuple[str, float]], where: str | Path, stored: int) -> None:
    most = _FACTOR * stored + _SPARE
    many = [(one, key) for key, one in numbers if any(part in key for part in _MANY)]
    wide = [(one, key) for key, one in numbers if any(part in key for part in _WIDE) and (one, key) not in many]
    if not wide:
        return
    width, key = max(wide)
    rows, of_rows = max([(one**2 if "sample_size" in name else one, name) for one, name in many], default=(0.0, ""))
    for taken, told in ((4 * width * width, key), (4 * width * rows, f"{key} with {of_rows}")):
        if taken > most:
            raise CompressorError(
                f"{where}: {told}: one matrix of {taken:,.0f} bytes, and all weights beside it have {stored:,}", _HINT
            )


def _memory() -> int | None:
    """The bytes of this machine's memory, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
