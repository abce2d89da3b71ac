"""Files that survive: folders are committed whole or not at all, and read back only where every byte is as written.

A folder is written beside its target, each file flushed to disk, a manifest of hashes written last, and the folder
renamed. A reader that finds a manifest which verifies has exactly what the writer had.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import packing, registry
from compressor.adapter import Adapter
from compressor.errors import CompressorError
from compressor.pattern import Mask, parse
from compressor.recipe import validated
from compressor.surgery import FILE as SURGERY
from compressor.surgery import Surgery, surgery_of
from compressor.weights import (
    FILE_METADATA,
    load_strictly,
    plain_state,
    refuse_misfit,
    sketch,
    state_sha256,
    untied_state,
)

MANIFEST = "manifest.json"
MODEL_FILES = ("config.json", "model.safetensors")
_MAX_JSON_BYTES = 16 * 1024 * 1024


def commit(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder, and make it `target` in one step. A folder that was there before is replaced.

    Raises CompressorError where the disk is full or not writable; what was at `target` is then still there.
    """
    partial = target.parent / f".partial-{target.name}"
    old = target.parent / f".old-{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore_old(old, target)  # of a process that died between the two renames below
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        write(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        entries = {}
        for path in files:
            path.chmod(0o644)  # safetensors writes 0600
            sync(path)
            entries[path.relative_to(partial).as_posix()] = {"sha256": file_sha256(path), "size": path.stat().st_size}
        manifest = partial / MANIFEST
        manifest.write_text(json.dumps({"schema_version": 1, "files": entries}, indent=1), encoding="utf-8")
        sync(manifest)
        sync(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
        free = shutil.disk_usage(_existing(target)).free
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CompressorError(
            f"{target}: cannot be written: {reason} ({written:,} bytes written so far, {free:,} bytes free)",
            "Free some space or choose another folder; what was saved before is intact.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # there only where something failed
        _restore_old(old, target)


def verify(folder: Path, needs: Sequence[str] = ()) -> None:
    """Raise CompressorError unless `folder` has a manifest that lists `needs`, and every file in it is as listed."""
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if manifest.get("schema_version") != 1 or not isinstance(files, dict):
        raise CompressorError(
            f"{folder / MANIFEST}: not a manifest of version 1", "The folder is damaged, or from a newer version."
        )
    if lost := [name for name in needs if name not in files]:
        raise CompressorError(
            f"{folder / MANIFEST}: {lost[0]} is not listed", "The folder is damaged; use another copy."
        )
    for name, entry in files.items():
        path = folder / name
        try:
            inside = not Path(name).is_absolute() and path.resolve() == folder.resolve() / name
            found = inside and path.is_file()
            same = found and isinstance(entry, dict) and path.stat().st_size == entry.get("size")
            same = same and file_sha256(path) == entry.get("sha256")
        except (OSError, ValueError) as error:
            raise CompressorError(
                f"{folder / MANIFEST}: {name[:80]!r}: {error}", "Do not trust this folder."
            ) from error
        if not inside:
            raise CompressorError(
                f"{folder / MANIFEST}: the path {name!r} is not one inside the folder", "Do not trust this folder."
            )
        if not found:
            raise CompressorError(f"{path}: missing", "The folder is incomplete; use another copy.")
        if not same:
            raise CompressorError(
                f"{path}: its bytes are not those that were saved", "The file is damaged; use another copy."
            )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CompressorError where it is missing, too large, not JSON, or not an object."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CompressorError(
                f"{path}: larger than {_MAX_JSON_BYTES:,} bytes", "This is not a file of this toolkit."
            )
        loaded = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise CompressorError(f"{path}: {error.strerror}", "Give the folder of a run, or its model/ folder.") from error
    except (ValueError, RecursionError) as error:
        raise CompressorError(f"{path}: not JSON: {error}", "The file is damaged; use another copy.") from error
    if not isinstance(loaded, dict):
        raise CompressorError(f"{path}: not a JSON object", "The file is damaged; use another copy.")
    return loaded


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` in one step."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Replace the JSON file at `path` in one step; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


class ModelConfig(BaseModel):
    """`config.json` of a saved model: which registered model it is, what was pruned, and which weights are packed.

    `weights_sha256` is of the plain state, whatever is packed. `architecture` is the adapter's, where the name of the model
    does not say all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1]
    model: str | None
    patterns: dict[str, str]
    weights_sha256: str
    packed: list[str] = []
    architecture: dict[str, Any] = {}


def save(
    path: str | Path,
    model: nn.Module,
    masks: Mapping[str, Mask],
    name: str | None = None,
    packed: bool = True,
    architecture: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Save a pruned model as the folder `path`: `model.safetensors`, `config.json` and a manifest.

    `name` is the registered model that it is, and `architecture` what its adapter says of it (`Adapter.architecture`);
    without a name, `load` needs the module. N:M weights are stored as what is kept and where it was, or with
    `packed=False` as plain tensors, which other libraries read. What a method removed of the model's structure is stored
    as `surgery.json`. A model saved at `path` before is replaced; any other folder there is refused. Raises
    CompressorError where a weight breaks its mask's pattern or is not finite, and where the disk does not take it.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise CompressorError(f"{path} is there already, and is not a saved model", "Choose another folder.")
    state = plain_state(model)
    patterns = {key: str(mask.pattern) for key, mask in masks.items()}
    _check(state, patterns, path)
    tensors, names = packing.packed_state(state, patterns) if packed else (state, [])
    config = ModelConfig(
        schema_version=1,
        model=name,
        patterns=patterns,
        weights_sha256=state_sha256(state),
        packed=names,
        architecture=dict(architecture),
    )

    def write(folder: Path) -> None:
        save_file(tensors, folder / "model.safetensors", metadata=FILE_METADATA)
        text = config.model_dump_json(indent=2, exclude_defaults=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        if (surgery := surgery_of(model)) is not None:
            (folder / SURGERY).write_text(json.dumps(surgery.to_json()) + "\n", encoding="utf-8")

    commit(path, write)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The pruned model saved at `path` (a run directory or its `model/` folder), ready to use, in eval mode.

    `model` is filled and returned where given (with its original shape, whatever the method removed of it); else the
    registered model named in the file is built. Every hash and
    every pattern is verified first; nothing in the files is executed, and nothing larger than the model is made of
    them. Raises CompressorError, and leaves `model` as it was, where anything is missing, damaged or does not fit.
    """
    folder = model_folder(Path(path))
    verify(folder, needs=MODEL_FILES)
    config = read_config(folder)
    surgery = _read_surgery(folder)

    def build() -> nn.Module:
        return model if model is not None else adapter_at(folder).build()

    if model is None:
        with torch.device("meta"):
            tried = build()
    else:
        tried = model if surgery is None else sketch(model)
    if surgery is not None and surgery_of(tried) != surgery:
        surgery.apply(tried)
    state = _read_state(folder, config, tried)  # what does not fit is refused before memory is taken for it
    _check(state, config.patterns, folder)
    if state_sha256(state) != config.weights_sha256:
        raise CompressorError(f"{folder}: weights_sha256 is not that of the weights", "Files of two models were mixed.")
    loaded = build()
    if surgery is not None and surgery_of(loaded) != surgery:
        surgery.apply(loaded)
    load_strictly(loaded, state, folder)
    return loaded.eval()


def model_folder(path: Path) -> Path:
    """The folder of a saved model, given a run's directory or that folder itself."""
    return path / "model" if (path / "model").is_dir() else path


def adapter_at(folder: Path) -> Adapter:
    """The adapter of the registered model that was saved in `folder`."""
    config = read_config(folder)
    if config.model is None:
        raise CompressorError(
            f"{folder} was saved without a model name",
            "Load it in Python, and give the module: load(path, model=module).",
        )
    return registry.adapter(config.model).rebuilt(config.architecture)


def read_config(folder: Path) -> ModelConfig:
    """The validated `config.json` of a saved model."""
    path = folder / "config.json"
    return validated(ModelConfig, read_json(path), str(path))


def _read_surgery(folder: Path) -> Surgery | None:
    path = folder / SURGERY
    return Surgery.from_json(read_json(path), str(path)) if path.is_file() else None


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


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote. Keys are strings, and tuples lists."""
    tensors = load_file(folder / "state.safetensors")

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            if "tensor" in value:
                return tensors[value["tensor"]]
            return {key: restored(inner) for key, inner in value["dict"].items()}
        return [restored(inner) for inner in value] if isinstance(value, list) else value

    tree: dict[str, Any] = restored(read_json(folder / "state.json"))
    return tree


def _read_state(folder: Path, config: ModelConfig, model: nn.Module) -> dict[str, Tensor]:
    """The plain state in a saved model's folder. It has the names, the shapes and the kinds of numbers of `model`'s."""
    path = folder / "model.safetensors"
    with _reading(folder / "config.json"):
        rules = packing.rules(config.packed, config.patterns)
    with _reading(path), safe_open(path, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        shapes = packing.unpacked_shapes(found, rules)
    refuse_misfit(model, shapes, path)  # before anything is read, or made of what was read
    with _reading(path):
        state = packing.unpacked_state(load_file(path), rules)
    for name, own in untied_state(model).items():
        if _kind(state[name]) != _kind(own):
            raise CompressorError(
                f"{path}: {name} is {state[name].dtype}, the model's {own.dtype}",
                f"Allowed: {_kind(own)} numbers. Choose the model that was saved.",
            )
    return state


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong in the block is a CompressorError that names `path`."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CompressorError(f"{path}: {error}", "The file is damaged; use another copy.") from error
    except CompressorError as error:
        raise CompressorError(f"{path}: {error.message}", error.hint) from error


def _kind(tensor: Tensor) -> str:
    """What kind of numbers a tensor holds: loading may round them, but not drop a part of each."""
    return "floating-point" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def _check(state: Mapping[str, Tensor], patterns: Mapping[str, str], where: Path) -> None:
    """Raise unless every tensor is finite and every pruned one obeys its pattern."""
    for name, tensor in state.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        try:
            # not every 8-bit float knows whether it is finite
            finite = torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all()
        except NotImplementedError as error:
            raise CompressorError(f"{where}: {name} is {tensor.dtype}", "Convert it to another dtype first.") from error
        if not bool(finite):
            raise CompressorError(f"{where}: {name} holds NaN or infinity", "Such weights are not saved or loaded.")
    for name, text in patterns.items():
        if name not in state:
            raise CompressorError(f"{where}: {name} should be {text}, but is missing", "The folder is damaged.")
        try:
            parse(text).verify(state[name])
        except CompressorError as error:
            raise CompressorError(
                f"{where}: {name}: {error.message}", "It was changed after pruning; prune again."
            ) from error


def _restore_old(old: Path, target: Path) -> None:
    if old.is_dir() and not target.exists():
        old.rename(target)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have what was written to `path` on the disk before anything else is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
