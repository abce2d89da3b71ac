"""The layout of the DiT authors' own checkpoints, as a state and a configuration of diffusers' DiTTransformer2DModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError, UsageError
from compressor.model_zoo.generic.layout import Layout
from compressor.saving.plain import plain_state

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Attention heads by width, for the sizes S, B, L and XL. Source: Peebles & Xie 2023, table 1."""

_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


AUTHORS: dict[str, Any] = {"norm_eps": 1e-6, "downscale_freq_shift": 0}
"""Where the authors' network is another than diffusers' by default. The second is no setting of diffusers' class: it spaces
the frequencies of the time by 1/127 of their range, the authors by 1/128. Source: `models.py` of the authors' repository."""


class Authors(Layout):
    """The layout of the DiT authors."""

    own = ("downscale_freq_shift",)
    why_not_plain = (
        "The model is here as one file with the tensor names of DiT's authors, for their code.\n"
        "It is no folder for diffusers: its DiTTransformer2DModel spaces the frequencies of the time embedding by 1/127,\n"
        "has no setting for the 1/128 of this network, and would give wrong answers without any error.\n"
    )

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        return "x_embedder.proj.weight" in state and "final_layer.linear.weight" in state

    def configuration(
        self, state: Mapping[str, Tensor], config: Mapping[str, Any], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        if config and not self.recognises(state):  # by diffusers' names, and so for its network
            return {name: value for name, value in config.items() if name not in AUTHORS}
        return {**(config or configuration(state, given.get("num_attention_heads"))), **AUTHORS}

    def translated(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return translated(state)

    def prepare(self, model: nn.Module, config: Mapping[str, Any], trained: bool) -> None:
        share_embedders(model, trained)
        blocks: Any = model.transformer_blocks
        blocks[0].norm1.emb.time_proj.downscale_freq_shift = _shift(config)

    def is_plain(self, config: Mapping[str, Any]) -> bool:
        return _shift(config) == _DIFFUSERS_SHIFT

    def original(self, model: nn.Module) -> dict[str, Tensor]:
        positions: Any = model.pos_embed
        return original(plain_state(model), positions.pos_embed.detach().cpu())


_DIFFUSERS_SHIFT = 1


def _shift(config: Mapping[str, Any]) -> int:
    """By how much fewer than the frequencies their spacing is. Raises UsageError for what is neither network's."""
    shift = config.get("downscale_freq_shift", _DIFFUSERS_SHIFT)
    if shift not in (0, 1):
        raise UsageError(
            f"downscale_freq_shift is {str(shift)[:60]}", "Allowed: 0, as the authors have it, or 1, as diffusers."
        )
    return int(shift)


def configuration(state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
    """The configuration that a state in the authors' layout has. Raises CompressorError where it cannot be told."""
    try:
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        classes = state["y_embedder.embedding_table.weight"].shape[0] - 1
        out = state["final_layer.linear.weight"].shape[0] // patch**2
    except (KeyError, ValueError) as error:
        raise CompressorError(f"not a DiT checkpoint of its authors: {error}", "Use a DiT-XL-2 file.") from error
    heads = heads if heads is not None else _HEADS.get(width)
    if not heads or width % heads:
        raise CompressorError(
            f"a DiT of width {width}: its number of attention heads is not in the file",
            "Give it with --set architecture.num_attention_heads=N.",
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": out,
        "num_layers": 1 + max(int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))),
        "sample_size": int(tokens**0.5) * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": classes,
    }


def translated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state in the authors' layout by the names of diffusers, whose blocks share one embedder of time and label.

    Positions are sines and cosines, computed and not stored: others are refused. A name that is not known stays, so that
    strict loading names it.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        block = re.match(r"blocks\.(\d+)\.(.+)", module)
        if name == "pos_embed":
            _check_positions(value)
        elif module in _EMBEDDERS:
            found[f"transformer_blocks.0.norm1.emb.{_EMBEDDERS[module]}.{kind}"] = value
        elif module in _OUTSIDE:
            found[f"{_OUTSIDE[module]}.{kind}"] = value
        elif block and block[2] == "attn.qkv":
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                found[f"transformer_blocks.{block[1]}.attn1.to_{part}.{kind}"] = piece
        elif block and block[2] in _BLOCK:
            found[f"transformer_blocks.{block[1]}.{_BLOCK[block[2]]}.{kind}"] = value
        else:
            found[name] = value
    return found


def original(state: Mapping[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """The inverse of `translated`: a state by diffusers' names in the authors' layout; `positions` (1, tokens, width)."""
    back = {new: old for old, new in {**_OUTSIDE, **_BLOCK}.items()}
    embedders = {new: old for old, new in _EMBEDDERS.items()}
    found: dict[str, Tensor] = {"pos_embed": positions}
    for name, value in state.items():
        module, _, kind = name.rpartition(".")
        block = re.match(r"transformer_blocks\.(\d+)\.(.+)", module)
        if block is None:
            found[f"{back[module]}.{kind}"] = value
        elif block[2].startswith("norm1.emb."):
            found[f"{embedders[block[2].removeprefix('norm1.emb.')]}.{kind}"] = value
        elif block[2].startswith("attn1.to_") and block[2][-1] in "qkv":
            if block[2][-1] == "q":
                parts = [state[f"transformer_blocks.{block[1]}.attn1.to_{part}.{kind}"] for part in "qkv"]
                found[f"blocks.{block[1]}.attn.qkv.{kind}"] = torch.cat(parts)
        else:
            found[f"blocks.{block[1]}.{back[block[2]]}.{kind}"] = value
    return found


def share_embedders(model: nn.Module, trained: bool) -> None:
    """Let all blocks have the first one's embedder of time and label, as the authors' network does.

    diffusers gives each block a copy: 75 million parameters more in DiT-XL/2. Raises CompressorError where `trained` copies
    went different ways.
    """
    blocks: Any = model.transformer_blocks
    first = blocks[0].norm1.emb
    own = first.state_dict()
    for index, block in enumerate(blocks):
        other = block.norm1.emb.state_dict()
        if trained and not all(torch.equal(value, other[name]) for name, value in own.items()):
            raise CompressorError(
                f"transformer_blocks.{index}.norm1.emb differs from that of block 0, and a DiT has one for all",
                "Use --model diffusers, which keeps them apart.",
            )
        block.norm1.emb = first


def _check_positions(found: Tensor) -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    side = int(found.shape[1] ** 0.5)
    expected = get_2d_sincos_pos_embed(found.shape[-1], side, base_size=side, output_type="pt")
    if found.shape[1] != side * side or not torch.allclose(found[0].double(), expected.double(), atol=1e-4):
        raise CompressorError(
            "pos_embed is not the sine-cosine one of DiT", "Such a model needs an adapter of its own."
        )
