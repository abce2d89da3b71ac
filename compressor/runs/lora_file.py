"""A LoRA file as what it adds to the weights of a model, whatever layout it has; or a refusal that names what is not read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from compressor.errors import CompressorError, UsageError, first_line
from compressor.files import read_json
from compressor.runs.lora_marks import aligned, left_out, numbered
from compressor.weights import read_weights, ties

_PREFIXES = ("transformer.", "unet.", "prior.", "diffusion_model.", "base_model.model.")
_PART = re.compile(
    r"(text_encoder|image_encoder|lora_te)\w*|transformer_\w+|unconditional_transformer|text_conditioner"
    r"|connectors|decoder|controlnet"
)
"""The first part of a name that is of another part of a pipeline."""
_READERS = {
    "UNet2DConditionModel": "StableDiffusion",
    "UNet3DConditionModel": "StableDiffusion",
    "UNetMotionModel": "StableDiffusion",
    "Kandinsky3UNet": "StableDiffusion",
    "AnyFlow": "Wan",
    "AnyFlowFAR": "Wan",
    "BriaFibo": "Flux",
    "Chroma": "Flux",
    "ChronoEdit": "Wan",
    "ConsisID": "CogVideoX",
    "HunyuanVideoFramepack": "HunyuanVideo",
    "Kandinsky5": "Kandinsky",
    "LTX2Video": "LTX2",
    "Mochi": "Mochi1",
    "QwenImage21": "QwenImage",
    "SanaVideo": "Sana",
    "WanAnimate": "Wan",
    "WanVACE": "Wan",
}
"""Whose reader of LoRA files the pipelines of a class of diffusers use, where it has not the name of the class."""
_MOVED = re.compile("pissa|olora|corda|loftq", re.IGNORECASE)
"""What peft starts matrices with while it changes the weights of the model: without that change they mean something else."""
_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "lora_mid": "a decomposed convolution of LyCORIS",
    "lora_embedding": "an embedding",
    ".diff": "a whole difference",
}


@dataclass(frozen=True, eq=False)
class Change:
    """What is added to one tensor: `scale` times the product of two matrices, or times a bias."""

    scale: float
    out: Tensor
    into: Tensor | None

    def made(self, shape: torch.Size) -> Tensor:
        """The change in float32, of the `shape` of its weight (out, in, *kernel)."""
        out = self.out.float()
        product = out if self.into is None else out.flatten(1) @ self.into.float().flatten(1)
        return (self.scale * product).view(shape)


@dataclass(frozen=True)
class _Names:
    """A LoRA's tensors by peft's names of them, its alphas by layer, how many tensors others have, by part, and the prefix."""

    tensors: dict[str, Tensor]
    alphas: dict[str, float]
    others: dict[str, int]
    prefix: str


def read_lora(path: Path, model: nn.Module) -> tuple[dict[str, Change], dict[str, int]]:
    """What the LoRA at `path` (a file, or a folder of peft) adds to each parameter of `model`, by name; and how many of its
    tensors are of other parts of a pipeline, by part.

    Every tensor of the file is used, is of another part, or adds nothing as it is all zeros. Raises UsageError, with the first
    names, for any other, and where a layer or a shape is not the model's.
    """
    file, config = _found(path)
    raw = _plain_names(read_weights(file), file)
    noted = _configuration(file, config)
    found = _named(raw, model)
    if not _fits(found.tensors, model):
        found = _converted(raw, model, file)
    _refuse_misfit(file, found, model)
    layers = {name.rpartition(".lora_")[0] for name in found.tensors}
    own = _own_configuration(noted, found.prefix, str(file if config is None else config))
    changes: dict[str, Change] = {}
    for layer in sorted(layers, key=list(dict(model.named_modules())).index):
        out, into = (found.tensors.get(f"{layer}.lora_{half}.weight") for half in "BA")
        rank = None if into is None else len(into)
        scale = _scale(layer, rank, found.alphas, own, file)
        if out is not None:
            changes[f"{layer}.weight"] = Change(scale, out, into)
        if (bias := found.tensors.get(f"{layer}.lora_B.bias")) is not None:
            changes[f"{layer}.bias"] = Change(scale, bias, None)
    return changes, found.others


def weights_file(path: Path) -> Path:
    """The file with the tensors of the LoRA at `path`."""
    return _found(path)[0]


def _found(path: Path) -> tuple[Path, Path | None]:
    """The file of the tensors, and that of peft's configuration, where it is one of peft's folders."""
    if path.is_dir():
        names = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
        file = next((path / name for name in names if (path / name).is_file()), None)
        if file is None:
            raise UsageError(f"{path} is a folder without {names[0]}", "Give the file of a LoRA, or a folder of peft.")
        path = file
    config = path.with_name("adapter_config.json")
    return path, config if path.stem == "adapter_model" and config.is_file() else None


def _plain_names(raw: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """`raw` without the names that peft's adapters have in a program. Raises UsageError for two of them, and for whole numbers."""
    state: dict[str, Tensor] = {}
    for name, value in raw.items():
        plain = re.sub(r"\.lora_([AB])\.[^.]+\.(weight|bias)$", r".lora_\1.\2", name)
        if plain in state:
            raise UsageError(f"{file}: {name}: a second adapter in one file", "Save each LoRA in a file of its own.")
        if not value.is_floating_point() and not plain.endswith(".alpha"):
            raise UsageError(
                f"{file}: {name} is {value.dtype}", "Quantised matrices are not read: save floating-point numbers."
            )
        if plain.endswith(".alpha") and value.numel() != 1:
            raise UsageError(f"{file}: {name} is {tuple(value.shape)}", "An alpha is one number.")
        state[plain] = value
    return state


# --- Names. ---


def _layer_of(name: str) -> str:
    """The layer of a tensor's or an alpha's name."""
    return re.sub(r"(\.lora_[AB](\.weight|\.bias)?)?(\.alpha)?$", "", name)


def _named(state: Mapping[str, Any], model: nn.Module, alphas: Mapping[str, Any] = MappingProxyType({})) -> _Names:
    """`state` by the names of `model`'s layers: without prefixes, and where it has diffusers' older names, with peft's."""
    from diffusers.utils import state_dict_utils

    convert: Any = state_dict_utils.convert_unet_state_dict_to_peft
    both = convert({**state, **{f"{name.removesuffix('.alpha')}.alpha": value for name, value in alphas.items()}})
    modules, children = dict(model.named_modules()), dict(model.named_children())
    found = _Names({}, {}, {}, "")
    for given, value in both.items():
        name, part = given, given.partition(".")[0]
        while _layer_of(name) not in modules and (cut := next((p for p in _PREFIXES if name.startswith(p)), None)):
            name = name.removeprefix(cut)
        if _layer_of(name) not in modules and _PART.fullmatch(part) and part not in children:
            found.others[part] = found.others.get(part, 0) + (not name.endswith(".alpha"))
        elif name in found.tensors:
            raise UsageError(f"{given} is there twice", "Save each LoRA in a file of its own.")
        elif name.endswith(".alpha"):
            found.alphas[_layer_of(name)] = float(value)
        else:
            found.tensors[name] = value
            found = replace(found, prefix=found.prefix or given.removesuffix(name))
    return found


def _fits(tensors: Iterable[str], model: nn.Module) -> bool:
    """Whether `tensors` are matrices of layers of `model` alone, so that no other layout need be thought of."""
    modules = set(dict(model.named_modules()))
    halves = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")
    return bool(tensors) and all(name.endswith(halves) and _layer_of(name) in modules for name in tensors)


def _converted(raw: Mapping[str, Tensor], model: nn.Module, file: Path) -> _Names:
    """`raw` as diffusers reads it for a pipeline with `model`. Raises UsageError where diffusers leaves something out."""
    import diffusers

    stem = re.sub(r"Transformer[123]DModel$", "", type(model).__name__)
    if type(model).__module__.startswith("diffusers.") and find_spec("transformers") is None:
        raise CompressorError(
            f"{file} has not the model's own names, and diffusers reads no others without transformers",
            'pip install "diffusion-compressor[lora]"',
        )
    reader = getattr(diffusers.loaders, f"{_READERS.get(stem, stem)}LoraLoaderMixin", None)
    if reader is None:
        return _named(raw, model)
    ask: dict[str, Any] = {"return_alphas": True} if "Flux" in reader.__name__ else {}
    ask |= {"unet_config": model.config} if reader.__name__.startswith("StableDiffusion") else {}

    def read(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        found = reader.lora_state_dict(dict(state), **ask)
        tensors, alphas = (found[0], found[1] or {}) if isinstance(found, tuple) else (found, {})
        inside = {name: value for name, value in tensors.items() if name.endswith(".alpha")}
        return {name: value for name, value in tensors.items() if name not in inside}, {**inside, **alphas}

    try:
        (tensors, alphas), left = read(raw), left_out(raw, read)
        tensors = aligned(tensors, read(numbered(raw))[0])
    except Exception as error:  # whatever its converters meet
        raise UsageError(
            f"{file}: diffusers cannot read it{_kind_of(raw)}: {first_line(error)}", "Is it a plain LoRA of this model?"
        ) from error
    found = _named(tensors, model, alphas)
    apart = [name for name in left if _PART.fullmatch(name.partition(".")[0])]
    for name in apart:
        part = "text_encoder" if name.startswith("lora_te") else name.partition(".")[0]
        found.others[part] = found.others.get(part, 0) + (not name.endswith(".alpha"))
    if left := [name for name in left if name not in apart and bool(raw[name].any())]:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise UsageError(
            f"{file}: diffusers leaves out {', '.join(left[:3])}{more}{_kind_of(left)}",
            "Nothing is merged, as it would be another LoRA. Give a plain one.",
        )
    return found


def _kind_of(names: Iterable[str]) -> str:
    """What kind of adapter `names` are of, where it is a known one that is not read."""
    found = next((kind for name in names for part, kind in _KINDS.items() if part in name), None)
    return f" ({found})" if found else ""


def _refuse_misfit(file: Path, found: _Names, model: nn.Module) -> None:
    """Raise UsageError, with the first names, unless `found` has two matrices for each of some layers of `model`."""
    modules, tied = dict(model.named_modules()), ties(model)
    shared = {*tied, *tied.values()}
    wrong = [
        reason
        for name, value in found.tensors.items()
        if (reason := _misfit(name, value, found.tensors, modules.get(_layer_of(name)), shared)) is not None
    ]
    layers = {_layer_of(name) for name in found.tensors}
    wrong += [f"{layer}.alpha is of no layer of the file" for layer in found.alphas if layer not in layers]
    if wrong or not found.tensors:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(
            f"{file} does not fit {type(model).__name__}: {'; '.join(wrong[:3]) or 'it holds nothing for it'}{more}",
            "Give a plain LoRA (no DoRA, LoHa, LoKr) that was trained for this very model.",
        )


def _misfit(
    name: str, value: Tensor, state: Mapping[str, Tensor], module: nn.Module | None, shared: set[str]
) -> str | None:
    layer, dot, kind = name.rpartition(".lora_")
    if not dot or kind not in ("A.weight", "B.weight", "B.bias"):
        return f"{name} is no matrix of a plain LoRA{_kind_of([name])}"
    weight = getattr(module, "weight", None)
    if weight is None:
        return f"{name}: the model has no layer {layer!r}"
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"{name}: a {type(module).__name__} has no LoRA that is read"
    if f"{layer}.weight" in shared:
        return f"{name}: other layers share that weight"
    if kind == "B.bias":
        bias = module.bias
        same = bias is not None and bias.shape == value.shape
        return (
            None if same else f"{name} is {tuple(value.shape)}, the bias {None if bias is None else tuple(bias.shape)}"
        )
    other = state.get(f"{layer}.lora_{'B' if kind[0] == 'A' else 'A'}.weight")
    if other is None:
        return f"{name} is there without its other half"
    rank = len(other) if kind[0] == "B" else other.flatten(1).shape[1]
    wanted = (rank, weight.flatten(1).shape[1]) if kind[0] == "A" else (len(weight), rank)
    if value.dim() < 2 or tuple(value.flatten(1).shape) != wanted:
        return f"{name} is {tuple(value.shape)}, the weight {tuple(weight.shape)}"
    return None


# --- How strong it is. ---


def _configuration(file: Path, config: Path | None) -> dict[str, Any]:
    """What peft or diffusers noted of the LoRA: in a file beside it, or in its header."""
    if config is not None:
        return read_json(config)
    if file.suffix != ".safetensors":
        return {}
    with safe_open(file, framework="pt") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata")
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise CompressorError(
            f"{file}: its header's lora_adapter_metadata is no JSON", "The file is damaged."
        ) from error
    return found if isinstance(found, dict) else {}


def _own_configuration(noted: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    """What of `noted` is of the matrices under `prefix`. Raises UsageError where they are no plain LoRA's."""
    known = next((p for p in (prefix, *_PREFIXES) if f"{p}lora_alpha" in noted), "")
    own = {name.removeprefix(known): value for name, value in noted.items() if name.startswith(known)}
    wrong = [
        f"{key}={own[key]}"
        for key in ("use_dora", "use_qalora", "layer_replication", "alora_invocation_tokens")
        if own.get(key)
    ]
    if own.get("peft_type", "LORA") != "LORA":
        wrong.append(f"peft_type={own['peft_type']}")
    if _MOVED.search(str(own.get("init_lora_weights"))):
        wrong.append(f"init_lora_weights={own['init_lora_weights']}: it moved the model's own weights too")
    if wrong:
        raise UsageError(f"{where}: {', '.join(wrong)}", "Give a plain LoRA; peft converts some while it saves them.")
    return own


def _scale(layer: str, rank: int | None, alphas: Mapping[str, float], noted: Mapping[str, Any], file: Path) -> float:
    """The factor of the product of `layer`: alpha / rank; 1 where no alpha is known of it, as in the programs that write them."""
    if layer in alphas or not noted or rank is None:
        scale = alphas[layer] / rank if layer in alphas and rank else 1.0
    else:
        known = _of_layer(layer, noted.get("rank_pattern"), noted.get("r", rank), file)
        if known != rank:
            raise UsageError(
                f"{file}: {layer} has rank {rank}, its configuration says {known}", "Is it of another LoRA?"
            )
        alpha = _of_layer(layer, noted.get("alpha_pattern"), noted.get("lora_alpha", rank), file)
        good = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        scale = alpha / (math.sqrt(rank) if noted.get("use_rslora") else rank) if good else math.nan
    if not math.isfinite(scale):
        raise UsageError(f"{file}: {layer} has no finite alpha", "Is the file damaged?")
    return float(scale)


def _of_layer(layer: str, patterns: Any, usual: Any, file: Path) -> Any:
    """The value of `layer`: that of the first of `patterns` which its name ends with (or is: `^`), as in peft; else `usual`."""
    for pattern, value in (patterns or {}).items():
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.-]+", name):
            raise UsageError(f"{file}: the pattern {pattern!r} of its configuration", "Allowed are names of layers.")
        if layer == name or (not pattern.startswith("^") and layer.endswith(f".{name}")):
            return value
    return usual
