"""Saved models: a folder with the weights, packed, what was pruned of them, and which registered model it is."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.discovery import is_file_reference, made
from compressor.environment import usual_torch
from compressor.errors import CompressorError, UsageError, did_you_mean, memory, said_of
from compressor.files import MANIFEST, commit, read_json, recover, verify
from compressor.foreign.bounded import mapping
from compressor.foreign.sound import refuse_empty
from compressor.saving import packing
from compressor.saving.hub import fetched, is_repository
from compressor.saving.plain import plain_state
from compressor.sparsity.notation import parse, refuse_unreadable
from compressor.sparsity.pattern import Mask
from compressor.sparsity.surgery import FILE as SURGERY
from compressor.sparsity.surgery import Surgery, surgery_of
from compressor.validation import validated
from compressor.weights import (
    FILE_METADATA,
    as_stored_,
    bare,
    bare_name,
    check_finite,
    kind_of,
    load_strictly,
    refuse_misfit,
    sketch,
    state_sha256,
    ties,
    untied_state,
)

MODEL_FILES = ("config.json", "model.safetensors")
_BY_ITSELF = "Load it in Python, and give the module: load(path, model=module)."


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
    as `surgery.json`. A model saved at `path` before is replaced; any other folder there is refused, and so is one with other files.

    Several processes may save to one path, such as the ranks of torchrun: one waits for the other, each writes a whole model, and
    that of the last one stays. Where their weights differ, save on one rank alone.

    `masks` may have the names of `model` as it was wrapped (torch.compile, DataParallel, DistributedDataParallel).

    Raises UsageError for a path that no disk can have, a mask that is of no weight of `model`, and for what JSON cannot hold;
    CompressorError where a weight breaks its mask's pattern or is not finite, and where the disk does not take it: what was at
    `path` is then still there. LockedError where another process holds `path`, or the run directory around it, for longer than a
    writer waits (10 minutes).
    """
    path = _place(path)
    _refuse_unsavable(masks, name, architecture)
    for pattern in {mask.pattern for mask in masks.values()}:
        refuse_unreadable(pattern)
    recover(path)
    _refuse_other(path)
    model, given = bare(model), model
    refuse_empty(model.state_dict())
    own = _own_names(masks, given, model)
    state = plain_state(model)
    patterns = {own[key]: str(mask.pattern) for key, mask in masks.items()}
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

    commit(path, write, needs=sum(tensor.nbytes for tensor in tensors.values()))


def _place(path: str | Path) -> Path:
    """`path`. Raises UsageError where it can be that of nothing."""
    if not isinstance(path, str | os.PathLike):
        raise UsageError(f"path: a {type(path).__name__}", "Give a text, or a pathlib.Path.")
    try:
        os.lstat(path)
        if os.path.isdir(path):
            os.scandir(path).close()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{str(path)[:80]!r}: {reason}", "Choose another path.") from error
    return Path(path)


def _refuse_other(path: Path) -> None:
    """Raise CompressorError where saving to `path` would replace more than a former model, or what is write-protected."""
    if not path.exists():
        return
    inside = {one.name for one in path.iterdir()} if path.is_dir() else {""}
    if inside and MANIFEST not in inside:
        raise CompressorError(f"{path} is there already, and is not a saved model", "Choose another folder.")
    if other := sorted(inside - {*MODEL_FILES, SURGERY, MANIFEST}):
        raise CompressorError(
            f"{path} holds {other[0]}, which is no file of a saved model, and would be lost",
            "Choose another folder, or put it elsewhere.",
        )
    if not os.access(path, os.W_OK):
        raise CompressorError(f"{path} is write-protected", "Choose another folder, or allow it: chmod u+w.")


def _refuse_unsavable(masks: Any, name: Any, architecture: Any) -> None:
    """Raise UsageError unless `masks` are Masks by name, and `name` and `architecture` are what JSON can hold."""
    if not isinstance(masks, Mapping):
        raise UsageError(f"masks: a {type(masks).__name__}", "Give a mapping of weight name to Mask, as a Result has.")
    for key, mask in masks.items():
        if not isinstance(mask, Mask):
            raise UsageError(f"masks: {key!r} has a {type(mask).__name__}", "Give compressor.Mask(keep, pattern).")
    if name is not None and (not isinstance(name, str) or is_file_reference(name)):
        found = repr(name) if isinstance(name, str) else f"a {type(name).__name__}"
        raise UsageError(f"name: {found}", "Give that of a registered model, or none.")
    wrong = (
        "architecture: no mapping" if not isinstance(architecture, Mapping) else _no_json(architecture, "architecture")
    )
    if wrong is not None:
        raise UsageError(
            wrong, "Allowed: texts, finite numbers, True, False, None, and lists and mappings (by text) of them."
        )


def _no_json(value: Any, at: str) -> str | None:
    """What in `value` JSON cannot hold as it is, and where; None where there is nothing."""
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(key, str)]:
            return f"{at}: the key {wrong[0]!r}"
        return next(filter(None, (_no_json(one, f"{at}.{key}") for key, one in value.items())), None)
    if isinstance(value, (list, tuple)):
        return next(filter(None, (_no_json(one, f"{at}.{number}") for number, one in enumerate(value))), None)
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{at}: {value}"
    if isinstance(value, str):
        return None if value.isascii() or value == value.encode(errors="replace").decode() else f"{at}: {value!r}"
    return None if value is None or isinstance(value, int) else f"{at}: a {type(value).__name__}"


def _own_names(masks: Mapping[str, Mask], model: nn.Module, plain: nn.Module) -> dict[str, str]:
    """The name of each mask in `plain`, the `bare` form of `model`. Raises UsageError where it has no such weight, or one twice."""
    own, tied = untied_state(plain), ties(plain)
    first = {id(value): name for name, value in plain.named_parameters()}
    wrapped = {name: first[id(value)] for name, value in model.named_parameters() if id(value) in first}
    stripped = {bare_name(name): name for name in own}
    found: dict[str, str] = {}
    for name in masks:
        ways = (name, tied.get(name), wrapped.get(name), stripped.get(bare_name(name)))
        known = next((one for one in ways if one is not None and one in own), None)
        if known is None:
            raise UsageError(
                f"a mask is of {name!r}, which is no weight of this {type(plain).__name__}",
                did_you_mean(name, [one for one, value in own.items() if value.dim() > 1]),
            )
        if known in found.values():
            raise UsageError(f"two masks are of {known}", "Give one for each weight.")
        found[name] = known
    return found


@memory("loading")
def load(path: str | Path, model: nn.Module | None = None, *, revision: str | None = None) -> nn.Module:
    """The pruned model saved at `path` (a run directory or its `model/` folder), ready to use, in eval mode.

    A `path` that is not on the disk and reads OWNER/NAME is a repository of the hub of Hugging Face, `revision` a branch, a tag
    or a commit there; its safetensors and JSON alone are fetched.

    `model` is filled and returned where given (with its original shape, whatever the method removed of it), and keeps its
    dtypes; else the registered model named in the file is built, in the dtypes of the file (float64 becomes float32, in which
    adapters compute), whatever torch's default dtype is. Every hash and every pattern is verified first; nothing in the files is
    executed, and nothing larger than the model is made of them. Raises CompressorError, and leaves `model` as it was, where
    anything is missing, damaged or does not fit.
    """
    if is_repository(path):
        with fetched(str(path), revision) as folder:
            return _loaded(folder, model)
    path = _place(path)
    if revision is not None:
        raise UsageError(f"{path}: a revision is one of the hub, and this is a folder", "Leave revision out.")
    folder = model_folder(path)
    while True:
        before = _identity(folder)
        try:
            return _loaded(folder, model)
        except CompressorError:
            replaced, former, folder = recover(folder), folder, model_folder(path)
            if not replaced and folder == former and _identity(folder) == before:
                raise  # else another process replaced the folder meanwhile: what was read is of two models, or of none


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """What tells a folder from another one of the same name; None where there is none.

    With the time of its last renaming: one that was away and was put back is the same, and may have been missed meanwhile; and
    a new folder may have the number of one that is gone.
    """
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


@usual_torch()
def _loaded(folder: Path, model: nn.Module | None) -> nn.Module:
    """As `load`, once."""
    # what nobody listed is of another model, or of nobody
    verify(folder, needs=(*MODEL_FILES, SURGERY) if (folder / SURGERY).is_file() else MODEL_FILES)
    config = read_config(folder)
    surgery = _read_surgery(folder)

    given = None if model is None else bare(model)
    if surgery is not None and model is not None and all(part is not given for part in model.modules()):
        raise CompressorError(
            f"{folder}: structure was removed of it, and parts of the given model are compiled",
            "Give the model as it was before torch.compile.",
        )

    def built() -> nn.Module:
        if given is not None:
            return given
        adapter = adapter_at(folder)
        try:
            return adapter.build()
        except CompressorError as error:
            raise CompressorError(
                f"{folder}: {error.message}",
                "Give the module: load(path, model=module); or save with its architecture.",
            ) from error

    def cut(whole: nn.Module) -> nn.Module:
        if surgery is not None and surgery_of(whole) != surgery:
            surgery.apply(whole)
        return whole

    if given is None:
        with torch.device("meta"):
            tried = built()
    else:
        tried = given if surgery is None else sketch(given)
    state = _read_state(folder, config, cut(tried))  # what does not fit is refused before memory is taken for it
    _check(state, config.patterns, folder)
    if state_sha256(state) != config.weights_sha256:
        raise CompressorError(f"{folder}: weights_sha256 is not that of the weights", "Files of two models were mixed.")
    loaded = cut(built())
    if model is None:
        as_stored_(loaded, state)
    load_strictly(loaded, state, folder)
    return (loaded if model is None else model).eval()


def model_folder(path: Path) -> Path:
    """The folder of a saved model, given a run's directory or that folder itself.

    Where a process died while it was replacing the model, the former one is put back.
    """
    recover(path / "model")
    recover(path)
    return path / "model" if (path / "model").is_dir() else path


def adapter_at(folder: Path) -> Adapter:
    """The adapter of the registered model that was saved in `folder`."""
    name = model_name(folder)
    if name is None:
        raise CompressorError(f"{folder} was saved without a model name", _BY_ITSELF)
    return made("models", name, Adapter).rebuilt(read_config(folder).architecture)


def model_name(folder: Path) -> str | None:
    """The name of the registered model that was saved in `folder`, or None. Raises CompressorError for a file of code, which would
    be run."""
    name = read_config(folder).model
    if name is not None and is_file_reference(name):
        raise CompressorError(
            f"{folder / 'config.json'}: model {name!r} is a file of code, not a registered model", _BY_ITSELF
        )
    return name


def read_config(folder: Path) -> ModelConfig:
    """The validated `config.json` of a saved model."""
    path = folder / "config.json"
    return validated(ModelConfig, read_json(path), str(path), "It is damaged, or from a newer version.")


def _read_surgery(folder: Path) -> Surgery | None:
    path = folder / SURGERY
    return Surgery.from_json(read_json(path), str(path)) if path.is_file() else None


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
        if kind_of(state[name]) != kind_of(own):
            raise CompressorError(
                f"{path}: {name} is {state[name].dtype}, the model's {own.dtype}",
                f"Allowed: {kind_of(own)} numbers. Choose the model that was saved.",
            )
    return state


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong in the block is a CompressorError that names `path`."""
    try:
        with said_of(path), mapping():
            yield
    except (SafetensorError, OSError) as error:
        raise CompressorError(f"{path}: {error}", "The file is damaged; use another copy.") from error


def _check(state: Mapping[str, Tensor], patterns: Mapping[str, str], where: Path) -> None:
    """Raise unless every tensor is finite and every pruned one obeys its pattern."""
    check_finite(state, where)
    for name, text in patterns.items():
        if name not in state:
            raise CompressorError(f"{where}: {name} should be {text}, but is missing", "The folder is damaged.")
        try:
            parse(text).verify(state[name])
        except CompressorError as error:
            raise CompressorError(
                f"{where}: {name}: {error.message}", "It was changed after pruning; prune again."
            ) from error
