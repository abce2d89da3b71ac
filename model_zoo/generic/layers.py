"""Which layers of a model of diffusers are pruned by default: attention and feed-forward, and of UNets the blocks' convolutions.

Left dense are those that run once per picture, or that everything goes through: embedders of patches, time and text, modulation,
norms, and the first and last projections. diffusers calls these parts alike in nearly all of its models, which differ in
the classes; so the rule goes by name.
"""

from __future__ import annotations

_OUTSIDE = "embed|norm|modulation|adaln|time_cond|controlnet"
_ATTENTION = r"(\w+_)?(attn|attention)\d*\.[\w.]+"
_ATTENTION_OF_UNETS = (
    r"attentions\.\d+\.(to_[\w.]+|query|key|value|proj_attn)"  # the module itself, no block of its own
)
_FEED_FORWARD = r"(\w+_)?(ff|ffn|mlp|feed_forward)\d*(_context|_moe_gen|_in|_out|_[it])?(\.[\w.]+)?"
_WITHOUT_A_MODULE = r"(single_\w*)?blocks\.\d+\.(gate|up|down)_proj"
# in these, attention's last layer and feed-forward's are one
_FUSED = r"single_\w*blocks\.\d+\.(proj_mlp|proj_out)"
_CONVOLUTIONS = (
    r"resnets\.\d+\.((spatial|temporal)_res_block\.)?conv[\w.]*"
    r"|temp_convs\.\d+\.conv\d\.\d+"
    r"|resnet_blocks\.\d+\.projection"
    r"|channelwise(_linear_\d+)?(\.\d+)?"
)
_INSIDE = "|".join((_ATTENTION, _ATTENTION_OF_UNETS, _FEED_FORWARD, _WITHOUT_A_MODULE, _FUSED, _CONVOLUTIONS))

BLOCK_LAYERS = rf"re:^(?!.*({_OUTSIDE}))(.*\.)?({_INSIDE})$"
"""A rule of `compressor.sparsity.layers` for those layers."""
