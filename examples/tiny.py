"""A tiny class-conditional pipeline of diffusers' own classes, with random weights: stands for yours in the other examples."""

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel


def pipeline(width: int = 32) -> DiTPipeline:
    """A DiT of two blocks over latents of 4x8x8, with an autoencoder to pictures of 16x16."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=width // 2, in_channels=4, out_channels=4, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000, norm_elementwise_affine=False,
    ).eval()  # fmt: skip
    autoencoder = AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=8, sample_size=16,
    ).eval()  # fmt: skip
    made = DiTPipeline(transformer, autoencoder, DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made
