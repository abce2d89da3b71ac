"""The models that are measured on GPUs: with random weights, what they are called with, and which of their layers are made 2:4.

python benchmarks/gpu/subjects.py            # anywhere: which layers qualify, and what to expect of them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from compressor import NM
from compressor.lower import units
from compressor.lower.cusparselt import CuSparseLt
from compressor.lower.units import Found, find_units
from compressor.model_zoo.uvit.sizes import cifar10, imagenet256_h, imagenet256_l

PATTERN = NM(2, 4)
PUBLISHED = (
    (10, "loses"),
    (20, "breaks even"),
    (40, "1.2x to 1.3x"),
    (80, "1.35x to 1.5x"),
    (float("inf"), "1.5x to 1.65x"),
)
"""Published for 2:4 in bfloat16 on an H100, both sides tuned, by GFLOP of a product. Not measured here, and not of an H200, whose
memory is faster."""


@dataclass(frozen=True)
class Subject:
    """A model with random weights, what it is called with, and which of its layers are made 2:4."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    sparse: Callable[[str, nn.Module], bool]


def uvit(adapter: Any) -> Subject:
    """A U-ViT; its blocks' linears are sparse, as its authors' sparse fine-tuning has it."""

    def inputs(batch: int) -> tuple[Any, ...]:
        labels = torch.zeros(batch, dtype=torch.int64) if adapter.num_classes else None
        return torch.randn(batch, *adapter.image_shape), torch.full((batch,), 500.0), labels

    return Subject(adapter.build, inputs, lambda name, module: ".attn." in name or ".mlp." in name)


def dit(layers: int = 28, heads: int = 16, channels: int = 72) -> Subject:
    """DiT-XL/2 for 256x256 images: diffusers' DiTTransformer2DModel with the published model's sizes, or smaller ones."""

    def build() -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            **{"num_attention_heads": heads, "attention_head_dim": channels, "num_layers": layers, "sample_size": 32},
            **{"in_channels": 4, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000},
            **{"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "attention_bias": True},
        )

    def inputs(batch: int) -> tuple[Any, ...]:
        return torch.randn(batch, 4, 32, 32), torch.full((batch,), 500), torch.zeros(batch, dtype=torch.int64)

    return Subject(build, inputs, lambda name, module: ".attn1." in name or ".ff." in name)


def ddpm() -> Subject:
    """The DDPM UNet for CIFAR-10, with the sizes of google/ddpm-cifar10-32. Every layer but the first and last is sparse."""

    def build() -> nn.Module:
        from diffusers import UNet2DModel

        return UNet2DModel(
            **{"sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2},
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            **{"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
            **{"norm_eps": 1e-6, "mid_block_scale_factor": 1},
        )

    def inputs(batch: int) -> tuple[Any, ...]:
        return torch.randn(batch, 3, 32, 32), torch.full((batch,), 500)

    return Subject(build, inputs, lambda name, module: name not in ("conv_in", "conv_out"))


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "uvit-s": lambda: uvit(cifar10()),
    "uvit-l": lambda: uvit(imagenet256_l()),
    "uvit-h": lambda: uvit(imagenet256_h()),
    "dit-xl": dit,
    "ddpm-cifar10": ddpm,
}


def sparse_names(model: nn.Module, subject: Subject) -> list[str]:
    """The layers that are made 2:4."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and subject.sparse(name, module)
        and PATTERN.misfit(tuple(module.weight.shape)) is None
    ]


def plain(model: nn.Module) -> Callable[..., Tensor]:
    """The model's call with a tensor in place of diffusers' output."""
    return lambda *inputs: next(leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor))


def made_sparse(subject: Subject, device: torch.device) -> nn.Module:
    """The model with random weights, its layers' smallest halves of every four removed, in float32 on `device`."""
    torch.manual_seed(0)
    with device:
        model = subject.build().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # some layers begin as zeros, on which hardware is faster
            nn.init.normal_(parameter, std=0.02)
    for name in sparse_names(model, subject):
        weight: Any = model.get_submodule(name).weight
        weight.copy_(PATTERN.mask(weight.abs()).apply(weight))
    return model.to(device)


class Tensors(nn.Module):
    """A model that takes and gives tensors, in the dtype of its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Tensor:
        return plain(self.model)(*inputs)


# --- What to expect, without a GPU. ---


def expected(gflop: float) -> str:
    """The published gain of a product of that size."""
    return next(text for limit, text in PUBLISHED if gflop < limit)


def layers(subject: Subject, batch: int) -> tuple[list[Found], list[str], float]:
    """The units of the model at that batch, the layers that are sparse, and the GFLOP of its products: on no device at all."""
    with torch.device("meta"):
        model = subject.build().to(torch.bfloat16).eval().requires_grad_(False)
        inputs = tree_map_only(Tensor, lambda x: x.to("meta"), subject.inputs(batch))
        inputs = tree_map_only(Tensor, lambda x: x.bfloat16() if x.dim() > 1 else x, inputs)
    # Zeros cannot be looked for where there are no numbers: what would be made 2:4 is told by name.
    found, _ = find_units_without_numbers(model, lambda: plain(model)(*inputs))
    return found, sparse_names(model, subject), sum(gflops(one)[1] for one in found)


def find_units_without_numbers(model: nn.Module, forward: Callable[[], Any]) -> Any:
    """`find_units` with fused projections, with no pattern in any weight."""
    looked, units.pattern_of = units.pattern_of, lambda weight: None
    try:
        return find_units(model, forward, fuse=True)
    finally:
        units.pattern_of = looked


def gflops(one: Found) -> tuple[list[float], float]:
    """GFLOP of each product of a unit, and their sum."""
    shape, each = one.unit.input_shape, []
    for layer in one.unit.layers:
        if isinstance(layer, nn.Conv2d):
            rows = layer(torch.empty(shape, dtype=one.unit.dtype, device="meta")).numel() // layer.out_channels
        else:
            rows = torch.Size(shape).numel() // shape[-1]
        each.append(2e-9 * rows * layer.weight.numel())
    return each, sum(each)


def dry_run(models: list[str], batches: list[int]) -> None:
    """Print the layers that qualify, grouped by shape, with what is published for products of that size."""
    backend = CuSparseLt()
    for name in models:
        for batch in batches:
            subject = SUBJECTS[name]()
            found, sparse, total = layers(subject, batch)
            groups: dict[tuple[Any, ...], list[str]] = {}
            covered = 0.0
            for one in found:
                wanted = all(weight.rpartition(".")[0] in sparse for weight in one.weights)
                patterns = tuple(PATTERN if wanted else None for _ in one.unit.patterns)
                reason = backend.refusal(type(one.unit)(**{**vars(one.unit), "patterns": patterns}))
                each, sum_ = gflops(one)
                covered += 0.0 if reason else sum_
                sizes = " + ".join("x".join(map(str, layer.weight.shape)) for layer in one.unit.layers)
                text = reason or ", ".join(expected(g) for g in dict.fromkeys(each))
                groups.setdefault((sizes, one.unit.input_shape, round(sum_, 2), text), []).append(one.at)
            click.echo(
                f"\n{name}, batch {batch}: {total:.0f} GFLOP in products, {covered / total:.0%} of them 2:4 on a GPU"
            )
            for (sizes, shape, sum_, text), names in groups.items():
                click.echo(f"  {len(names):4} x {sizes:32} input {shape!s:22} {sum_:9.2f} GFLOP  {text}")
    click.echo("\nGains are those published for an H100 (bfloat16, tuned, per product). Nothing above was measured.")


@click.command()
@click.option("--models", default=",".join(SUBJECTS), show_default=True)
@click.option("--batches", default="1,16,64,256", show_default=True)
def main(models: str, batches: str) -> None:
    """Print which layers qualify, and what is published for products of their size. Needs no GPU."""
    dry_run(named(models), [int(part) for part in batches.split(",")])


def named(models: str) -> list[str]:
    """The names in `models`, which are separated by commas."""
    names = models.split(",")
    if unknown := set(names) - set(SUBJECTS):
        raise click.UsageError(f"unknown {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    return names


if __name__ == "__main__":
    main()
