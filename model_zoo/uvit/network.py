"""U-ViT: a vision transformer that takes noise, time and label as tokens and joins shallow and deep blocks by long skips.

Written so that the authors' released checkpoints load strictly. Source: Bao et al. 2023, "All are Worth Words".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_FEW_TOKENS = 512


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention over (batch, heads, tokens, channels).

    For bfloat16 inference on a CPU and few tokens it is written out: torch's fused kernel takes about twice as long there
    (4.3 against 1.9 ms for 4 x 8 heads of 257 tokens). The scores are then rounded to bfloat16 once more.
    """
    few = query.shape[-2] <= _FEW_TOKENS and query.dtype == torch.bfloat16 and query.device.type == "cpu"
    if few and not torch.is_grad_enabled():
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        mixed: Tensor = scores.softmax(-1) @ value
        return mixed
    return F.scaled_dot_product_attention(query, key, value)


class Attention(nn.Module):
    """Multi-head self-attention over (batch, tokens, dim)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = rearrange(self.qkv(x), "b l (k h d) -> k b h l d", k=3, h=self.num_heads)
        mixed = attend(query, key, value)
        out: Tensor = self.proj(rearrange(mixed, "b h l d -> b l (h d)"))
        return out


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block; with `skip`, its input is joined with the matching early block's output."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """(batch, channels, height, width) -> (batch, patches, dim)."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = rearrange(self.proj(x), "b d h w -> b (h w) d")
        return out


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of `timesteps` (batch,) at `dim // 2` frequencies: (batch, dim), zero-padded where odd."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps[:, None].float() * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class UViT(nn.Module):
    """The noise-prediction network. `forward(x, timesteps, y=None)`: x (batch, in_chans, img_size, img_size), timesteps
    (batch,) from 0 to 999, y (batch,) class indices where `num_classes` is above zero; the output has the shape of x.

    `depth` counts the in and out blocks, half each, around one middle block, and so must be even.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        mlp_time_embed: bool = False,
        num_classes: int = -1,
        conv: bool = True,
        skip: bool = True,
    ) -> None:
        super().__init__()
        if img_size % patch_size or embed_dim % num_heads or depth % 2:
            raise ValueError(
                f"img_size {img_size} must be divisible by patch_size {patch_size}, "
                f"embed_dim {embed_dim} by num_heads {num_heads}, and depth {depth} by 2"
            )
        self.in_chans, self.patch_size, self.num_classes = in_chans, patch_size, num_classes
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.time_embed = (
            nn.Sequential(nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, embed_dim))
            if mlp_time_embed
            else nn.Identity()
        )
        self.label_emb = nn.Embedding(num_classes, embed_dim) if num_classes > 0 else None
        self.extras = 2 if num_classes > 0 else 1
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + (img_size // patch_size) ** 2, embed_dim))

        def block(joined: bool) -> Block:
            return Block(embed_dim, num_heads, mlp_ratio, qkv_bias, skip=joined)

        self.in_blocks = nn.ModuleList(block(False) for _ in range(depth // 2))
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList(block(skip) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        height = x.shape[-2] // self.patch_size
        tokens = self.patch_embed(x)
        dim = tokens.shape[-1]
        time = self.time_embed(timestep_embedding(timesteps, dim).to(tokens.dtype))
        extras = [time[:, None]]
        if self.label_emb is not None:
            if y is None:
                raise ValueError("this U-ViT is class-conditional: give the class indices y")
            extras.insert(0, self.label_emb(y)[:, None])
        tokens = torch.cat([*extras, tokens], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
        tokens = self.mid_block(tokens)
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop())
        patches = self.decoder_pred(self.norm(tokens))[:, self.extras :]
        p = self.patch_size
        image = rearrange(patches, "b (h w) (p1 p2 c) -> b c (h p1) (w p2)", h=height, p1=p, p2=p)
        out: Tensor = self.final_layer(image)
        return out


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
