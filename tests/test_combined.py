"""A pruned part is in the pictures: in pipelines that are combined from others, and with what users set on the part since."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_pipelines
import torch
import transformers
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

import compressor
from compressor.errors import CompressorError, UsageError
from compressor.pipelines import opened as pipelines
from compressor.pipelines.opened import must_be_called, opened
from compressor.plugins.magnitude import Magnitude

SIZES = {"prior_num_inference_steps": 2, "height": 64, "width": 64}
PROMPTS = ["a red cat", "a blue house", "an old boat"]


def kandinsky(folder: Path) -> Any:
    """A tiny KandinskyV22CombinedPipeline: it runs a pipeline for the prior and one that decodes."""
    torch.manual_seed(0)
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=16, embedding_dim=32, num_layers=1)
    prior.clip_std.data.fill_(1.0)
    unet = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = diffusers.VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, image_size=32, projection_dim=32, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=2, patch_size=14,
    )  # fmt: skip
    pipe = diffusers.KandinskyV22CombinedPipeline(
        unet=unet.eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        movq=movq.eval(),
        prior_prior=prior.eval(),
        prior_image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        prior_text_encoder=tiny_pipelines._clip(True),
        prior_tokenizer=tiny_pipelines._clip_tokenizer(folder),
        prior_scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        prior_image_processor=transformers.CLIPImageProcessor(crop_size=32, size={"shortest_edge": 32}),
    )
    for part in (unet, prior, movq):
        for value in part.parameters():
            if not value.detach().any():
                value.data.normal_(0, 0.02)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, **more: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipe(PROMPTS[0], num_inference_steps=2, generator=generator, output_type="np", **more).images
    )


@pytest.fixture(scope="module")
def combined(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return kandinsky(tmp_path_factory.mktemp("kandinsky"))


def by_hand(module: nn.Module, masks: Any) -> nn.Module:
    made = copy.deepcopy(module)
    for name, mask in masks.items():
        weight = made.get_parameter(name)
        weight.data = mask.apply(weight.data)
    return made


@pytest.mark.parametrize("part", ["unet", "prior_prior"])
def test_a_combined_pipeline_draws_with_its_pruned_part(part: str, combined: Any, tmp_path: Path) -> None:
    dense = drawn(combined, **SIZES)
    records = compressor.record(combined, PROMPTS, tmp_path / "records", n=2, unseen=1, steps=2, part=part, **SIZES)
    result = compressor.prune(combined, Magnitude(), data=records, steps=0, part=part)
    original = getattr(combined, part)
    with compressor.apply(combined, result, part=part):
        sparse = drawn(combined, **SIZES)
    assert torch.equal(drawn(combined, **SIZES), dense)
    assert getattr(combined, part) is original
    holder, name = (combined.decoder_pipe, "unet") if part == "unet" else (combined.prior_pipe, "prior")
    assert getattr(holder, name) is original
    setattr(holder, name, by_hand(original, result.masks))
    wanted = drawn(combined, **SIZES)
    setattr(holder, name, original)
    assert not torch.equal(sparse, dense) and torch.equal(sparse, wanted)


def test_pictures_that_are_drawn_without_the_part_are_not_judged(
    combined: Any, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CompressorError, match="draws pictures without its unet"), must_be_called(opened(combined)):
        pass
    combined.save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    monkeypatch.setattr(pipelines, "_combined", lambda *_: ())  # a pipeline that holds its model where nobody looks
    settings = [f"record.arguments.{name}={value}" for name, value in SIZES.items()]
    options = [f"--set={one}" for one in (*settings, "record.n=2", "record.unseen=1", "record.steps=2")]
    outcome = cli(
        *("run", "--pipeline", tmp_path / "pipe", "--prompts", tmp_path / "prompts.txt", "--method", "magnitude"),
        *("--steps", "0", "--out", tmp_path / "run", *options),
    )
    assert outcome.code == 1
    assert "KandinskyV22CombinedPipeline draws pictures without its unet" in outcome.err


class Scaled(AttnProcessor2_0):
    """A user's own, with a number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = [scale]

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.scale[0] * super().__call__(attn, hidden_states, *args, **kwargs)


def test_numbers_that_were_set_on_processors_since_are_not_undone(tmp_path: Path) -> None:
    pipe = tiny_pipelines.made("sd", tmp_path)
    pipe.unet.set_attn_processor(Scaled(1.0))
    sizes = tiny_pipelines.arguments("sd")
    records = compressor.record(pipe, PROMPTS, tmp_path / "records", n=2, unseen=1, steps=2, **sizes)
    result = compressor.prune(pipe, Magnitude(), data=records, steps=0)
    with compressor.apply(pipe, result):
        assert {one.scale[0] for one in pipe.unet.attn_processors.values()} == {1.0}
    pipe.unet.set_attn_processor(Scaled(0.5))
    with pytest.raises(UsageError, match=r"processor \(Scaled\(scale=\[0\.5\]\)\)"):
        compressor.apply(pipe, result)
    result.model.set_attn_processor(Scaled(0.5))
    with compressor.apply(pipe, result):
        assert {one.scale[0] for one in pipe.unet.attn_processors.values()} == {0.5}
