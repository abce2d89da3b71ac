"""What diffusers does for its users, on lowered parts of a pipeline: as on those that are not, or a clear word."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
from torch import nn

import compressor
from compressor import CompressorError

FLUX = {**tiny_pipelines.arguments("flux"), "num_inference_steps": 4, "output_type": "pt"}


def drawn(pipe: Any, **more: Any) -> torch.Tensor:
    """The picture that a pipeline draws from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**{"prompt": "a red cat", "generator": torch.Generator().manual_seed(1), **more}).images
    return made[0] if isinstance(made, list) else made


def first_block(module: Any) -> None:
    module.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.3))


def broadcast(module: Any) -> None:
    every = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001)}
    told = {"current_timestep_callback": lambda: 1, "spatial_attention_block_identifiers": ("transformer_blocks",)}
    module.enable_cache(diffusers.PyramidAttentionBroadcastConfig(**every, **told))


def by_layers(module: Any) -> None:
    module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def watched(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: None)
    module.register_forward_pre_hook(print)  # which has no name of a module of Python's


HOOKS = {"fbc_leader_block_hook": first_block, "pyramid_attention": broadcast, "layerwise_casting": by_layers}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_model_with_hooks_of_diffusers_is_not_lowered(hook: str, tmp_path: Path) -> None:
    pipe = tiny_pipelines.made("flux", tmp_path)
    example = compressor.example_inputs(pipe, "a red cat", steps=1, **tiny_pipelines.arguments("flux"))
    HOOKS[hook](pipe.transformer)
    with pytest.raises(CompressorError, match=rf"blocks\.0.*a hook of diffusers: {hook}|a hook of diffusers: {hook}"):
        compressor.lower(pipe.transformer, example)
    if hook != "layerwise_casting":
        pipe.transformer.disable_cache()
        compressor.lower(pipe.transformer, example, "eager")


@pytest.mark.parametrize(
    ("change", "said"),
    [(first_block, "hooks .fbc_leader_block_hook"), (by_layers, "layerwise casting"), (watched, "a hook of its own")],
)
def test_hooks_on_a_part_are_not_lost_without_a_word(change: Callable[[Any], None], said: str, tmp_path: Path) -> None:
    pipe = tiny_pipelines.made("flux", tmp_path)
    other = copy.deepcopy(pipe.transformer)
    change(pipe.transformer)
    before = pipe.transformer
    with pytest.raises(CompressorError, match=said):
        compressor.apply(pipe, compressor.Lowered(other, None))  # type: ignore[arg-type]
    assert pipe.transformer is before
    if change is not by_layers:
        with compressor.apply(pipe, copy.deepcopy(before)):
            pass


def test_an_example_leaves_nothing_in_a_cache(tmp_path: Path) -> None:
    pipe = tiny_pipelines.made("flux", tmp_path)
    broadcast(pipe.transformer)
    wanted = drawn(pipe, **FLUX)
    compressor.example_inputs(pipe, "an old house", part="vae.decoder", steps=1, **tiny_pipelines.arguments("flux"))
    assert torch.equal(drawn(pipe, **FLUX), wanted)
