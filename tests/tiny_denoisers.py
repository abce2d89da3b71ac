"""Pipelines of diffusers with tiny random denoisers, without text encoders: prompts are given as embeddings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = {"axes_dims_rope": (4, 4, 8)}
JOINT = {"joint_attention_dim": 32, "pooled_projection_dim": 16}
UNET = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}
CROSS = {
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@dataclass
class Case:
    """A pipeline, its denoiser's place in it, the shape of its latents as the denoiser takes them, and a call's arguments."""

    pipeline: Any
    shape: tuple[int, ...]
    call: dict[str, Any] = field(default_factory=dict)
    part: str = "transformer"


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def text(features: int, pooled: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": randn(1, 7, features),
        **({"pooled_prompt_embeds": randn(1, 16)} if pooled else {}),
        **more,
    }


def size(pixels: int) -> dict[str, Any]:
    return {"height": pixels, "width": pixels}


def vae(blocks: int = 1) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=8,
        layers_per_block=1,
        shift_factor=0.0,
    )


def ddpm() -> Case:
    unet = diffusers.UNet2DModel(
        **UNET, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
    )
    return Case(
        diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(**ZERO, clip_sample=False)), (1, 3, 8, 8), {}, "unet"
    )


def sd() -> Case:
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**UNET, **CROSS),
        scheduler=diffusers.DDIMScheduler(**SCALED),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Case(pipeline, (1, 4, 8, 8), text(16, guidance_scale=1.0, **size(8)), "unet")


def sdxl() -> Case:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=1,
    )
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(config),  # it is asked for its width
        tokenizer=None,
        tokenizer_2=None,
        unet=diffusers.UNet2DConditionModel(
            **UNET,
            **CROSS,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )
    return Case(pipeline, (1, 4, 8, 8), text(16, True, guidance_scale=1.0, **size(8)), "unet")


def dit() -> Case:
    model = diffusers.DiTTransformer2DModel(**HEADS, num_layers=1, sample_size=8, in_channels=4, out_channels=8)
    scheduler = diffusers.DDIMScheduler(**ZERO, clip_sample=False)
    call = {"class_labels": [1], "guidance_scale": 1.0}
    return Case(diffusers.DiTPipeline(model, vae(), scheduler), (1, 4, 8, 8), call)


def pixart() -> Case:
    model = diffusers.PixArtTransformer2DModel(
        **HEADS, num_layers=1, sample_size=8, cross_attention_dim=32, caption_channels=16, in_channels=4, out_channels=8
    )
    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae(),
        transformer=model,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    call = text(16, prompt_attention_mask=torch.ones(1, 7), negative_prompt=None, guidance_scale=1.0, **size(8))
    return Case(pipeline, (1, 4, 8, 8), {**call, "use_resolution_binning": False})


def hunyuan() -> Case:
    model = diffusers.HunyuanDiT2DModel(
        **HEADS,
        num_layers=2,
        sample_size=8,
        hidden_size=32,
        in_channels=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        text_len=8,
        text_len_t5=8,
    )
    pipeline = diffusers.HunyuanDiTPipeline(
        vae=vae(4),
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        scheduler=diffusers.DDIMScheduler(**SCALED, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    mask = torch.ones(1, 8, dtype=torch.int64)
    call = {"prompt_embeds": randn(1, 8, 16), "prompt_embeds_2": randn(1, 8, 16), "prompt_attention_mask": mask}
    call |= {"prompt_attention_mask_2": mask, "guidance_scale": 1.0, "use_resolution_binning": False, **size(64)}
    return Case(pipeline, (1, 4, 8, 8), call)


def cogvideox() -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        **HEADS,
        num_layers=1,
        text_embed_dim=16,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        max_text_seq_length=7,
    )
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4,) * 4,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        temporal_compression_ratio=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(**ZERO, snr_shift_scale=3.0, clip_sample=False)
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=autoencoder, transformer=model, scheduler=scheduler
    )
    return Case(pipeline, (1, 2, 4, 8, 8), text(16, guidance_scale=1.0, num_frames=5, **size(64)))


def sd3() -> Case:
    model = diffusers.SD3Transformer2DModel(
        **JOINT,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        pos_embed_max_size=16,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=model,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return Case(pipeline, (1, 4, 8, 8), text(32, True, guidance_scale=1.0, **size(8)))


def flux() -> Case:
    model = diffusers.FluxTransformer2DModel(
        **HEADS, **ROPE, **JOINT, in_channels=16, num_layers=1, num_single_layers=1, guidance_embeds=True
    )
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
    )
    return Case(pipeline, (1, 16, 16), text(32, True, **size(8)))


def chroma() -> Case:
    model = diffusers.ChromaTransformer2DModel(
        **HEADS,
        **ROPE,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=32,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipeline = diffusers.ChromaPipeline(
        scheduler=scheduler, vae=vae(), text_encoder=None, tokenizer=None, transformer=model
    )
    given = text(32, prompt_attention_mask=torch.ones(1, 7), guidance_scale=0.0, **size(8))
    given |= {"negative_prompt_embeds": randn(1, 7, 32), "negative_prompt_attention_mask": torch.ones(1, 7)}
    return Case(pipeline, (1, 16, 16), given)


def qwen_image() -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        **HEADS, **ROPE, num_layers=1, in_channels=16, out_channels=4, joint_attention_dim=32
    )
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=autoencoder, text_encoder=None, tokenizer=None, transformer=model
    )
    mask = torch.ones(1, 7, dtype=torch.int64)
    return Case(pipeline, (1, 64, 16), text(32, prompt_embeds_mask=mask, true_cfg_scale=1.0, **size(16)))


def aura_flow() -> Case:
    model = diffusers.AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pos_embed_max_size=64,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    pipeline = diffusers.AuraFlowPipeline(
        tokenizer=None, text_encoder=None, vae=vae(), transformer=model, scheduler=scheduler
    )
    return Case(pipeline, (1, 4, 8, 8), text(32, prompt_attention_mask=torch.ones(1, 7), guidance_scale=1.0, **size(8)))


def lumina2() -> Case:
    model = diffusers.Lumina2Transformer2DModel(
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        cap_feat_dim=32,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        in_channels=4,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    pipeline = diffusers.Lumina2Pipeline(
        transformer=model, scheduler=scheduler, vae=vae(), text_encoder=None, tokenizer=None
    )
    mask = torch.ones(1, 7, dtype=torch.bool)
    return Case(pipeline, (1, 4, 2, 2), text(32, prompt_attention_mask=mask, guidance_scale=1.0, **size(16)))


def z_image() -> Case:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = diffusers.ZImagePipeline(
        transformer=model, scheduler=scheduler, vae=vae(), text_encoder=None, tokenizer=None
    )
    return Case(
        pipeline, (1, 4, 16, 16), {"prompt": None, "prompt_embeds": [randn(7, 16)], "guidance_scale": 0.0, **size(16)}
    )


def sana(**changes: Any) -> Case:
    model = diffusers.SanaTransformer2DModel(
        **HEADS,
        num_layers=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        **changes,
    )
    autoencoder = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",),
        decoder_block_types=("ResBlock",),
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        encoder_qkv_multiscales=((),),
        decoder_qkv_multiscales=((),),
        encoder_layers_per_block=(1,),
        decoder_layers_per_block=(1,),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    pipeline = diffusers.SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder,
        transformer=model,
        scheduler=diffusers.DPMSolverMultistepScheduler(**FLOW),
    )
    call = text(16, prompt_attention_mask=torch.ones(1, 7), negative_prompt=None, guidance_scale=1.0, **size(32))
    return Case(pipeline, (1, 4, 32, 32), {**call, "use_resolution_binning": False})


def sana_scaled() -> Case:
    return sana(timestep_scale=0.5)


def wan() -> Case:
    model = diffusers.WanTransformer3DModel(
        **HEADS, num_layers=1, ffn_dim=32, text_dim=16, freq_dim=32, in_channels=4, out_channels=4
    )
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=autoencoder,
        transformer=model,
        scheduler=diffusers.UniPCMultistepScheduler(**FLOW),
    )
    return Case(pipeline, (1, 4, 2, 2, 2), text(16, guidance_scale=1.0, num_frames=5, **size(16)))


CASES = {
    make.__name__: make
    for make in (ddpm, sd, sdxl, dit, pixart, hunyuan, cogvideox, sd3, flux, chroma, qwen_image, aura_flow, lumina2)
} | {make.__name__: make for make in (z_image, sana, sana_scaled, wan)}
