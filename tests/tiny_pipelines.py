"""Tiny pipelines of diffusers' own classes, with random weights and real (tiny) text encoders, tokenizers and autoencoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WIDTH = 32
PROMPTS = [f"a {colour} {thing}" for colour in ("red", "blue", "green", "old") for thing in ("cat", "house", "boat")]


def _clip_tokenizer(folder: Path) -> Any:
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>", "ca"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def _clip(projected: bool) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=200, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=WIDTH, bos_token_id=188, eos_token_id=189, pad_token_id=189,
    )  # fmt: skip
    made = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return made(config).eval()


def _words(special: list[str]) -> Tokenizer:
    words = [*special, *"abcdefghijklmnopqrstuvwxyz", *sorted({word for prompt in PROMPTS for word in prompt.split()})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token=special[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _t5() -> tuple[Any, Any]:
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_words(["<pad>", "</s>", "<unk>"]),
        pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],  # as T5's own; transformers 4 gives token_type_ids besides
    )  # fmt: skip
    config = transformers.T5Config(
        vocab_size=100, d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return made, transformers.T5EncoderModel(config).eval()


def _gemma() -> tuple[Any, Any]:
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_words(["<pad>", "<eos>", "<bos>", "<unk>"]),
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", padding_side="right",
    )  # fmt: skip
    config = transformers.Gemma2Config(
        vocab_size=100, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=320,
    )  # fmt: skip
    return made, transformers.Gemma2Model(config).eval()


def _vae(latents: int = 4, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=latents, block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8, layers_per_block=1, sample_size=32, **more,
    ).eval()  # fmt: skip


def _unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, **more,
    ).eval()  # fmt: skip


_DDIM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def stable_diffusion(folder: Path) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(False), tokenizer=_clip_tokenizer(folder), unet=_unet(cross_attention_dim=WIDTH),
        scheduler=diffusers.DDIMScheduler(**_DDIM, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path) -> Any:
    unet = _unet(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=6 * 8 + WIDTH, use_linear_projection=True,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip(False), text_encoder_2=_clip(True), tokenizer=_clip_tokenizer(folder / "1"),
        tokenizer_2=_clip_tokenizer(folder / "2"), unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )  # fmt: skip


def stable_diffusion_3(folder: Path) -> Any:
    tokenizer, encoder = _t5()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * WIDTH, out_channels=4,
        pos_embed_max_size=16,
    ).eval()  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(shift_factor=0.06),
        text_encoder=_clip(True), tokenizer=_clip_tokenizer(folder / "1"), text_encoder_2=_clip(True),
        tokenizer_2=_clip_tokenizer(folder / "2"), text_encoder_3=encoder, tokenizer_3=tokenizer,
    )  # fmt: skip


def flux(folder: Path) -> Any:
    tokenizer, encoder = _t5()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ).eval()  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=_vae(shift_factor=0.1), text_encoder=_clip(False),
        tokenizer=_clip_tokenizer(folder), text_encoder_2=encoder, tokenizer_2=tokenizer, transformer=transformer,
    )  # fmt: skip


def pixart(folder: Path) -> Any:
    tokenizer, encoder = _t5()
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16, num_attention_heads=2, caption_channels=WIDTH,
        in_channels=4, cross_attention_dim=32, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    ).eval()  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=_vae(), transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(beta_schedule="linear"),
    )  # fmt: skip


def sana(folder: Path) -> Any:
    tokenizer, encoder = _gemma()
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
        sample_size=16,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    ).eval()  # fmt: skip
    return diffusers.SanaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


MAKERS = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
}
SIZES = {"sd3": 32, "flux": 16, "sana": 32}
"""Pixels, where they are not the pipeline's own default."""


def arguments(name: str) -> dict[str, Any]:
    """What each picture of the pipeline `name` is asked for besides a prompt, so that it is quickly made."""
    own: dict[str, Any] = {"height": SIZES.get(name, 16), "width": SIZES.get(name, 16)}
    if name in ("sd3", "flux"):
        own["max_sequence_length"] = 16
    if name == "pixart":
        own |= {"use_resolution_binning": False, "max_sequence_length": 16, "clean_caption": False}
    if name == "sana":
        own |= {
            "use_resolution_binning": False,
            "max_sequence_length": 16,
            "complex_human_instruction": None,
            "clean_caption": False,
        }
    return own


def made(name: str, folder: Path, seed: int = 0) -> Any:
    """The tiny pipeline `name`, with random weights of `seed`; `folder` takes the files that tokenizers need."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = MAKERS[name](folder)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                for value in part.parameters():
                    if not value.detach().any():  # what starts at zero would hide the rest
                        value.data.normal_(0, 0.02)
    return pipe


def saved(name: str, base: Path) -> Path:
    """The folder of a tiny pipeline in `base`, made once; beside it is NAME.jsonl, its prompts."""
    target = base / name
    if not target.is_dir():
        made(name, base / f"{name}-files").save_pretrained(target)
        lines = [json.dumps({"prompt": prompt, **arguments(name)}) for prompt in PROMPTS]
        (base / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return target
