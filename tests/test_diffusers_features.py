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
from diffusers.hooks import LayerSkipConfig, apply_layer_skip
from torch import nn

import compressor
from compressor import CompressorError
from compressor.foreign.sound import is_lowered
from compressor.pipelines.opened import part_of

LORA = {"A": (2, 32), "B": (32, 2)}
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


@pytest.fixture(autouse=True)
def _sparse_wins(few_bits_fast: None) -> None:
    """Lowered forms are taken, whatever the times."""


def lowered(pipe: Any, part: str, arguments: dict[str, Any], **how: Any) -> Any:
    """The pipeline, with its `part` in few bits for good."""
    example = compressor.example_inputs(pipe, "a red cat", part=part, steps=1, **arguments)
    made = compressor.lower(part_of(pipe, part), example, tolerance=0.3, **how)
    assert any(map(is_lowered, made.model.modules()))
    compressor.apply(pipe, made, part=part)
    return pipe


@pytest.mark.parametrize("part", ["unet", "vae.decoder", "text_encoder"])
def test_a_lowered_part_is_not_saved_without_its_weights(part: str, tmp_path: Path) -> None:
    pipe = lowered(tiny_pipelines.made("sd", tmp_path), part, tiny_pipelines.arguments("sd"))
    component = getattr(pipe, part.partition(".")[0])
    for saved in (pipe, component):
        with pytest.raises(
            CompressorError, match=r"save_pretrained: .* is lowered .*, its weights packed\nGive the model"
        ):
            saved.save_pretrained(tmp_path / "saved")
    found = [path.relative_to(tmp_path / "saved").parts[0] for path in (tmp_path / "saved").rglob("*.safetensors")]
    assert part.partition(".")[0] not in found and not (tmp_path / "saved" / "model_index.json").exists()
    state = component.state_dict()  # of the model itself, for itself
    component.load_state_dict(state)


def test_no_other_model_is_made_of_a_lowered_one(tmp_path: Path) -> None:
    pipe = lowered(tiny_pipelines.made("sd", tmp_path), "unet", tiny_pipelines.arguments("sd"))
    with pytest.raises(CompressorError, match=r"from_unet: .* is lowered"):
        diffusers.ControlNetModel.from_unet(pipe.unet)
    pipe = lowered(tiny_pipelines.made("flux", tmp_path), "transformer", tiny_pipelines.arguments("flux"))
    with pytest.raises(CompressorError, match=r"from_transformer: .* is lowered"):
        diffusers.FluxControlNetModel.from_transformer(pipe.transformer, num_layers=1, num_single_layers=1)


def test_methods_that_pass_over_lowered_layers_say_so(tmp_path: Path) -> None:
    pipe = lowered(tiny_pipelines.made("flux", tmp_path), "transformer", tiny_pipelines.arguments("flux"))
    model = copy.deepcopy(pipe.transformer)
    with pytest.raises(CompressorError, match="enable_layerwise_casting: the model is lowered"):
        by_layers(model)
    with pytest.raises(CompressorError, match=r"fuse_qkv_projections: the model is lowered.*\n.*fuse_projections=True"):
        model.fuse_qkv_projections()
    with pytest.raises(
        CompressorError, match=r"add_adapter: the model is lowered, and a LoRA's products are not in its"
    ):
        model.add_adapter(None)
    weights = {f"transformer.proj_out.lora_{of}.weight": torch.zeros(shape) for of, shape in LORA.items()}
    with pytest.raises(CompressorError, match=r"load_lora_weights: .* is lowered"):
        pipe.load_lora_weights(weights)
    before = drawn(pipe, **FLUX)
    assert torch.equal(drawn(copy.deepcopy(pipe), **FLUX), before)


def test_blocks_that_are_looked_for_by_their_class_are_there(tmp_path: Path) -> None:
    pipe = tiny_pipelines.made("flux", tmp_path)
    skipped = LayerSkipConfig(indices=[0], skip_attention=False, skip_ff=True, fqn="transformer_blocks")
    plain, few = (
        pipe.transformer,
        lowered(copy.deepcopy(pipe), "transformer", tiny_pipelines.arguments("flux")).transformer,
    )
    assert is_lowered(few.transformer_blocks[0].ff.lowered)
    example = compressor.example_inputs(pipe, "a red cat", steps=1, **tiny_pipelines.arguments("flux"))
    answers = []
    with torch.no_grad():
        for model in (plain, few):
            whole = model(**example)[0]
            apply_layer_skip(model, skipped)
            answers.append(model(**example)[0])
            assert not torch.allclose(answers[-1], whole, rtol=1e-3)
    assert (answers[0] - answers[1]).norm() < 0.05 * answers[0].norm()
