"""What models of diffusers are called with: the names of their arguments, and example values from their configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from compressor.adapter import Shared
from compressor.errors import CompressorError
from compressor.model_zoo.generic.conventions import Convention
from compressor.model_zoo.generic.pretrained import model_class

_TEXT_TOKENS = 77
_Config = Mapping[str, Any]


def noisy_name(config: _Config) -> str:
    """The argument that takes the noised images: the first of the model's forward."""
    parameters = list(inspect.signature(model_class(config).forward).parameters)
    return parameters[1]


def called(told: Convention | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` in the form in which the class takes them: lists of samples, and nested lists of sizes."""
    given = dict(inputs)
    if told is None:
        return given
    for name in told.listed:
        if isinstance(value := given.get(name), Tensor):
            given[name] = list(value.unsqueeze(2) if name == told.noisy and value.dim() == 4 else value)
    for name in told.sizes:
        if isinstance(value := given.get(name), Tensor):
            rows = value.tolist() if value.dim() == 3 else value.unsqueeze(1).tolist()
            given[name] = [[tuple(size) for size in row] for row in rows]
    return given


def marked(told: Convention | None, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` with those marked as shared that the class takes without a dim for the batch."""
    given = dict(inputs)
    for name in () if told is None else told.shared:
        if name in given:  # places have two dims; with three they have one for the batch, as older files do
            given[name] = tree_map_only(Tensor, lambda leaf: Shared(leaf) if leaf.dim() == 2 else leaf, given[name])
    return given


def example(config: _Config, batch: int) -> dict[str, Any]:
    """Arguments for a model of `config`, by name. Raises CompressorError for a class whose needs are not known here."""
    made = model_class(config)
    full = {**defaults(made), **config}
    make = _EXAMPLES.get(made.__name__)
    if make is None:
        raise CompressorError(
            f"what {made.__name__} is called with is not known here",
            f"Known: {', '.join(sorted(_EXAMPLES))}. For others, give the adapter a batch: adapter.exampled(inputs).",
        )
    return make(full, batch)


def defaults(made: Any) -> dict[str, Any]:
    """What a class of models takes where its configuration says nothing."""
    parameters = inspect.signature(made.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _square(config: _Config, batch: int) -> Tensor:
    size = config.get("sample_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return torch.zeros(batch, int(config["in_channels"]), int(height), int(width))


def _time(config: _Config, batch: int) -> Tensor:
    return torch.full((batch,), 500)


def _unet(config: _Config, batch: int) -> dict[str, Any]:
    found = {"sample": _square(config, batch), "timestep": _time(config, batch)}
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        found["class_labels"] = torch.zeros(batch, dtype=torch.int64)
    return found


def _conditioned_unet(config: _Config, batch: int) -> dict[str, Any]:
    width = config["cross_attention_dim"]
    width = width[0] if isinstance(width, (list, tuple)) else width
    width = config.get("encoder_hid_dim") or width
    found: dict[str, Any] = {
        **_unet(config, batch),
        "encoder_hidden_states": torch.zeros(batch, _TEXT_TOKENS, int(width)),
    }
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        found["added_cond_kwargs"] = {"text_embeds": torch.zeros(batch, pooled), "time_ids": torch.zeros(batch, 6)}
    return found


def _dit(config: _Config, batch: int) -> dict[str, Any]:
    labels = torch.zeros(batch, dtype=torch.int64)
    return {"hidden_states": _square(config, batch), "timestep": _time(config, batch), "class_labels": labels}


def _pixart(config: _Config, batch: int) -> dict[str, Any]:
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    additional = config.get("use_additional_conditions")
    if additional or (additional is None and config["sample_size"] == 128):
        sizes = {"resolution": torch.full((batch, 2), 1024.0), "aspect_ratio": torch.ones(batch, 1)}
    return {
        "hidden_states": _square(config, batch),
        "encoder_hidden_states": torch.zeros(batch, 120, int(config["caption_channels"])),
        "timestep": _time(config, batch),
        "added_cond_kwargs": sizes,
    }


def _sd3(config: _Config, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": _square(config, batch),
        "encoder_hidden_states": torch.zeros(batch, 2 * _TEXT_TOKENS, int(config["joint_attention_dim"])),
        "pooled_projections": torch.zeros(batch, int(config["pooled_projection_dim"])),
        "timestep": _time(config, batch),
    }


def _flux(config: _Config, batch: int) -> dict[str, Any]:
    tokens, text = 1024, 512  # 512 x 512 pixels: 64 x 64 latents in patches of 2
    found = {
        "hidden_states": torch.zeros(batch, tokens, int(config["in_channels"])),
        "encoder_hidden_states": torch.zeros(batch, text, int(config["joint_attention_dim"])),
        "pooled_projections": torch.zeros(batch, int(config["pooled_projection_dim"])),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.zeros(tokens, 3),
        "txt_ids": torch.zeros(text, 3),
    }
    return {**found, "guidance": torch.full((batch,), 3.5)} if config.get("guidance_embeds") else found


_EXAMPLES: Mapping[str, Callable[[_Config, int], dict[str, Any]]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _conditioned_unet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
}
