"""Which layers of diffusers' models are pruned by default: attention and feed-forward of every class, and nothing around them."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch
from torch import nn

import compressor
from compressor import registry
from compressor.adapter import with_rules
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.obs import OBS
from compressor.sparsity.layers import matches, survey
from compressor.sparsity.notation import parse
from compressor.training.engine import choose_layers

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
UNET = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
ACROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
JOINT = {"joint_attention_dim": 32, "pooled_projection_dim": 16}
ROPE = {"axes_dims_rope": (4, 4, 8)}
TINY = {
    "UNet2DModel": {**UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    "UNet2DConditionModel": {**UNET, **ACROSS, "cross_attention_dim": 16, "attention_head_dim": 8},
    "UNet2DConditionModel (SDXL)": {**UNET, **ACROSS, "cross_attention_dim": 16, "attention_head_dim": (2, 4)}
    | {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    | {"use_linear_projection": True, "transformer_layers_per_block": 2},
    "SD3Transformer2DModel": {
        **HEADS,
        **JOINT,
        "sample_size": 8,
        "in_channels": 4,
        "num_layers": 2,
        "qk_norm": "rms_norm",
    }
    | {"caption_projection_dim": 32, "pos_embed_max_size": 16, "dual_attention_layers": (0,)},
    "FluxTransformer2DModel": {**HEADS, **JOINT, **ROPE, "in_channels": 16, "num_layers": 1, "num_single_layers": 1}
    | {"guidance_embeds": True},
    "PixArtTransformer2DModel": {**HEADS, "num_layers": 1, "sample_size": 8, "cross_attention_dim": 32}
    | {"caption_channels": 16},
    "DiTTransformer2DModel": {**HEADS, "num_layers": 1, "sample_size": 8},
    "SanaTransformer2DModel": {**HEADS, "num_layers": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4}
    | {
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 16,
    },
    "QwenImageTransformer2DModel": {**HEADS, **ROPE, "num_layers": 1, "in_channels": 16, "joint_attention_dim": 32},
    "HunyuanDiT2DModel": {
        **HEADS,
        "num_layers": 2,
        "sample_size": 8,
        "hidden_size": 32,
        "in_channels": 4,
        "patch_size": 2,
    }
    | {"activation_fn": "gelu-approximate", "cross_attention_dim": 16, "cross_attention_dim_t5": 16}
    | {"pooled_projection_dim": 16, "text_len": 8, "text_len_t5": 8},
    "WanTransformer3DModel": {**HEADS, "num_layers": 1, "ffn_dim": 64, "text_dim": 16, "freq_dim": 32, "image_dim": 16}
    | {"added_kv_proj_dim": 32, "in_channels": 4, "out_channels": 4},
    "Lumina2Transformer2DModel": {"hidden_size": 24, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 3}
    | {"num_kv_heads": 1, "multiple_of": 2, "cap_feat_dim": 32, "axes_dim_rope": (4, 2, 2), "axes_lens": (8, 8, 8)},
    "AuraFlowTransformer2DModel": {**HEADS, "sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1}
    | {"joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 64},
    "ChromaTransformer2DModel": {**HEADS, **ROPE, "in_channels": 16, "num_layers": 1, "num_single_layers": 1}
    | {
        "joint_attention_dim": 32,
        "approximator_num_channels": 8,
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    },
    "CogVideoXTransformer3DModel": {
        **HEADS,
        "num_layers": 1,
        "text_embed_dim": 16,
        "sample_width": 8,
        "sample_height": 8,
    },
    "UNetSpatioTemporalConditionModel": {"num_attention_heads": (2, 4), "sample_size": 8, "layers_per_block": 1}
    | {
        "block_out_channels": (32, 64),
        "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
    }
    | {
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
    },
}
INSIDE = re.compile(r"\w*(Attention|FeedForward|GLUMBConv)|(Temporal)?ResnetBlock(2D)?")
OUTSIDE = re.compile(r"\w*Embed\w*|\w*TokenRefiner|\w*TimestepTextEmb")


def by_class(model):
    """The layers inside of attention, feed-forward and residual blocks, by diffusers' classes of the modules around them."""
    modules, found = dict(model.named_modules()), set()
    for name, module in modules.items():
        if not isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            continue
        parts = name.split(".")
        around = [type(modules[".".join(parts[:i])]).__name__ for i in range(1, len(parts))]
        block = type(modules[".".join(parts[:-1])]).__name__ if len(parts) > 1 else ""
        inside = any(INSIDE.fullmatch(one) for one in around) and not name.endswith("time_emb_proj")
        inside |= "SingleTransformerBlock" in block and parts[-1] in ("proj_mlp", "proj_out")
        if inside and not any(OUTSIDE.fullmatch(one) for one in around):
            found.add(name)
    return found


@pytest.mark.parametrize("case", TINY)
def test_attention_feed_forward_and_residual_convolutions_are_the_default(case):
    with torch.device("meta"):
        model = getattr(diffusers, case.partition(" ")[0])(**TINY[case])
    rules = registry.adapter("diffusers").targets
    chosen = {layer.module_name for layer in survey(model, parse("2:4")) if any(matches(rule, layer) for rule in rules)}
    assert chosen == by_class(model)
    assert len(chosen) >= 6
    outer = re.compile(
        r"embed|norm|mod\b|modulation|adaln|^proj_(in|out)|^conv_(in|out)$|time_emb_proj|context_embedder"
    )
    assert not [name for name in chosen if outer.search(name)]


def test_the_rest_is_pruned_where_it_is_named(tmp_path):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**TINY["SD3Transformer2DModel"])
    model.save_pretrained(tmp_path / "model")
    adapter = registry.adapter("diffusers").opened(str(tmp_path / "model"))

    def pruned(targets):
        found = choose_layers(model, Magnitude(), adapter, targets, None)
        return {layer.module_name for layer in found if layer.reason is None}

    usual = pruned(None)
    assert "transformer_blocks.0.attn.to_q" in usual and "transformer_blocks.1.ff.net.2" in usual
    assert pruned([*adapter.targets, "context_embedder"]) == usual | {"context_embedder"}


def test_pruning_the_default_layers_moves_predictions_far_less_than_pruning_all(tmp_path):
    """Measured over seeds 0 to 2, obs at 2:4: 0.15 to 0.24 of the prediction's variance for all layers, 0.0002 to 0.0004 for these."""
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**TINY["SD3Transformer2DModel"]).eval()
    model.save_pretrained(tmp_path / "model")
    adapter = registry.adapter("diffusers").opened(str(tmp_path / "model"))
    rng = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (4, 8, 8), "encoder_hidden_states": (20, 32), "pooled_projections": (16,)}
    data = [{name: torch.randn(16, *shape, generator=rng) for name, shape in shapes.items()} for _ in range(3)]
    inputs, _ = adapter.noised(data.pop(), rng)
    errors = []
    for rules in (adapter, with_rules(adapter, (), ())):
        result = compressor.prune(model, OBS(), adapter=rules, data=data, steps=0)
        with torch.no_grad():
            expected, found = adapter.predict(model, inputs), adapter.predict(result.model, inputs)
        errors.append(float((found - expected).pow(2).mean() / expected.pow(2).mean()))
    assert errors[0] < 0.01
    assert errors[1] > 0.05
