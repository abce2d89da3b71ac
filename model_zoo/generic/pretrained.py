"""Models of diffusers in the forms that people have them: a model's folder, a pipeline's folder, a name on the hub."""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor.data.outsized import check_built, check_config, check_pipeline, stored_bytes
from compressor.data.variants import outline_of, refuse_codes, variant_of
from compressor.environment import usual_torch
from compressor.errors import CompressorError, UsageError, did_you_mean, first_line
from compressor.files import read_json
from compressor.foreign.loaded import misfits, refuse_misfits
from compressor.foreign.sound import refuse_quantised_config
from compressor.weights import as_stored_, check_finite

_RENAMED = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_OLDER = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""The classes, by norm_type, that models of the class Transformer2DModel have since become; diffusers loads them so."""
_DENOISERS = ("unet", "transformer", "prior")


@dataclass(frozen=True)
class Pretrained:
    """Where a model of diffusers lies: `folder` has its config and weights; `pipeline` is the folder around it, or None."""

    folder: Path
    config: Mapping[str, Any]
    pipeline: Path | None = None
    scheduler: Mapping[str, Any] | None = None
    shares_times: bool = False
    """Whether it is one of two models, each of which was trained for some of the times (Wan 2.2)."""


def find(source: str) -> Pretrained:
    """The denoising model of a model's or a pipeline's folder, or of a name on the Hugging Face hub (`owner/name`).

    A model's folder that lies in its pipeline's is taken as that pipeline's. Raises CompressorError where nothing is there, or
    nothing that diffusers can build.
    """
    root = _folder(source)
    if root.name and _has_part(root.resolve().parent, root.resolve().name):
        return _part(root.resolve().parent, root.resolve().name)
    if (root / "model_index.json").is_file():
        index = read_json(root / "model_index.json")
        component = next((name for name in _DENOISERS if isinstance(index.get(name), list)), None)
        if component is None:
            raise CompressorError(
                f"{root}: the pipeline has no {' or '.join(_DENOISERS)}, found {[k for k in index if not k.startswith('_')]}",
                "Give the folder of the denoising model itself.",
            )
        return _part(root, component)
    check_pipeline(root)
    return Pretrained(root, _config(root))


def find_beside(file: Path) -> Pretrained | None:
    """The model that a file of weights is of, where its `config.json` lies beside it; else None."""
    return find(str(file.parent)) if (file.parent / "config.json").is_file() else None


def whole(source: str | None) -> str | None:
    """`source`, or the folder around it where it is one of the several files that make a model."""
    shard = source is not None and re.search(r"-\d{5}-of-\d{5}\.\w+$", source) and Path(source).is_file()
    return str(Path(source).parent) if source is not None and shard else source


def _has_part(root: Path, name: str) -> bool:
    """Whether `root` is a pipeline's folder, and `name` one of its parts that diffusers loads."""
    index = root / "model_index.json"
    return index.is_file() and isinstance(read_json(index).get(name), list) and (root / name / "config.json").is_file()


def _part(root: Path, component: str) -> Pretrained:
    """The model `component` of the pipeline in `root`."""
    check_pipeline(root)
    index, scheduler = read_json(root / "model_index.json"), root / "scheduler" / "scheduler_config.json"
    noise = _scheduler(scheduler) if scheduler.is_file() else None
    shares = index.get("boundary_ratio") is not None
    return Pretrained(root / component, _config(root / component), root, noise, shares)


def _scheduler(path: Path) -> dict[str, Any]:
    """A scheduler's configuration. Those of DPM-Solver clip at minus infinity, their default, which JSON cannot say."""
    found = read_json(path, infinite=True)
    if found.get("lambda_min_clipped") == -math.inf:
        del found["lambda_min_clipped"]
    for key, value in found.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise CompressorError(f"{path}: {key} is {value}", "The file is damaged; use another copy.")
    return found


def model_class(config: Mapping[str, Any]) -> Any:
    """diffusers' class of the name in `config`."""
    import diffusers

    name = str(config.get("_class_name", ""))
    found = getattr(diffusers, name, None) if re.fullmatch(r"[A-Za-z]\w*", name) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise CompressorError(
            f"_class_name {name!r} is not a model of diffusers {diffusers.__version__}",
            "Its config.json names the class as _class_name; a newer diffusers may know it.",
        )
    return found


def check_settings(config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise UsageError unless `names` are settings of the class in `config`, which would leave out others in silence."""
    known = set(inspect.signature(model_class(config).__init__).parameters) - {"self"} | {"_class_name"}
    for name in names:
        if name not in known:
            raise UsageError(
                f"architecture: {config['_class_name']} has no setting {name!r}", did_you_mean(name, known)
            )


@usual_torch()
def build(config: Mapping[str, Any]) -> nn.Module:
    """A model of this configuration with random weights. Raises CompressorError where diffusers refuses it."""
    made = model_class(config)
    check_config(config, "config.json")
    check_built(made, config, "config.json", None)
    try:
        with quiet():
            model: nn.Module = made.from_config(dict(config))
    except Exception as error:  # diffusers raises whatever its constructors meet
        raise CompressorError(
            f"{made.__name__} cannot be built: {error}", "Its configuration is not one that this diffusers knows."
        ) from error
    return model


@usual_torch()
def load(found: Pretrained, settings: Mapping[str, Any]) -> nn.Module:
    """The model with its weights, strictly: a weight that is missing or left over is an error that names it.

    Where `settings`, which name the class, differ from the folder's own configuration, they are taken.
    """
    made = model_class(settings)
    stored = stored_bytes(found.folder)
    check_config(settings, found.folder / "config.json", stored)
    check_built(made, settings, found.folder / "config.json", stored)
    changed = {name: value for name, value in settings.items() if found.config.get(name, found) != value}
    changed.pop("_class_name", None)
    outline = outline_of(found.folder, variant := variant_of(found.folder))
    refuse_codes(outline, found.folder)
    try:
        with quiet():
            model, report = made.from_pretrained(
                found.folder,
                output_loading_info=True,
                local_files_only=True,
                variant=variant,
                **changed,
            )
    except Exception as error:  # a dozen types, from missing files to damaged ones
        reason = first_line(error)
        raise CompressorError(
            f"{found.folder}: {made.__name__} cannot be loaded: {reason[:200]}", "The folder is incomplete or damaged."
        ) from error
    refuse_misfits(model, misfits(model, report), found.folder)
    check_finite(model.state_dict(), found.folder)
    result: nn.Module = as_stored_(model, modern_names(model, outline)).eval()
    return result


def modern_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` by today's names where it has those that attention of diffusers had until 2022, as its folders are read."""
    found = dict(state)
    for name in model.state_dict():
        for new, old in _RENAMED.items():
            module, dot, kind = name.rpartition(f".{new}.")
            if dot and name not in found and f"{module}.{old}.{kind}" in found:
                found[name] = found.pop(f"{module}.{old}.{kind}")
    return found


def _folder(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists():
        raise CompressorError(f"{path} is a file", "Give the folder of a diffusers model or pipeline.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise CompressorError(f"{path}: no such folder", "Give a diffusers folder, or a name on the hub (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, ignore_patterns=["*.msgpack", "*.onnx*", "*.ckpt", "*.h5"]))
    except Exception as error:  # offline, not found, not allowed: a type each
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise CompressorError(
            f"{source}: no such folder, and not to be had from the hub{offline}: {type(error).__name__}",
            "Give a folder; or check the name and the connection.",
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    refuse_quantised_config(config, folder / "config.json")
    if config.get("_class_name") == "Transformer2DModel":
        config["_class_name"] = _OLDER.get(str(config.get("norm_type")), "Transformer2DModel")
    model_class(config)
    return {key: value for key, value in config.items() if key != "_name_or_path"}


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers warns of keys that it does not know; those that matter are errors here."""
    logger = logging.getLogger("diffusers")
    before, logger.level = logger.level, logging.ERROR
    try:
        yield
    finally:
        logger.setLevel(before)
