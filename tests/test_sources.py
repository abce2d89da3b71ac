"""Every registered model against what its authors' code and configurations say: noise, time, tensors, guidance.

The numbers are stored in `published.json`, with a note of where they come from. `test_uvit.py` and `test_dit.py` hold the
networks themselves against slow ones of their authors' definition.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor import registry
from compressor.adapter import Sampling
from compressor.model_zoo.dit.layout import translated
from compressor.weights import untied_state

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
UVIT, DIT = PUBLISHED["uvit"], PUBLISHED["dit"]
PROCESSES = (
    {name: one["process"] for name, one in {**UVIT, **DIT}.items()}
    | PUBLISHED["ddpm"]
    | {"uvit-digits": "vp", "uvit-pictures": "vp", "uvit": "vp"}
)
SMALL = {
    "uvit": {"embed_dim": 8, "depth": 2, "num_heads": 2, "img_size": 8},
    "dit": {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 8},
    "ddpm": {"block_out_channels": [8, 8], "down_block_types": ["DownBlock2D"] * 2, "sample_size": 8}
    | {"up_block_types": ["UpBlock2D"] * 2, "norm_num_groups": 4, "_class_name": "UNet2DModel", "in_channels": 3},
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def small(name):
    """The registered adapter, of a model scaled down: what it was trained with stays."""
    family = name.partition("-")[0].replace("diffusers", "ddpm")
    settings = dict(SMALL[family])
    if name == "dit":
        settings |= {"_class_name": "DiTTransformer2DModel", "in_channels": 4, "num_embeds_ada_norm": 10}
    if name == "ddpm-digits":
        settings["in_channels"] = 1
    if name == "diffusers":  # which takes no noise for granted
        settings["scheduler"] = {"_class_name": "DDPMScheduler"}
    return registry.adapter(name).opened(None, settings)


def batch(adapter, n):
    images = torch.rand(n, *adapter.image_shape, generator=rng()) * 2 - 1
    labels = torch.zeros(n, dtype=torch.int64)
    return (images, labels) if adapter.num_classes else images


def parts(inputs):
    """(noised images, time) of an adapter's inputs."""
    if isinstance(inputs, dict):
        return inputs["sample" if "sample" in inputs else "hidden_states"], inputs["timestep"]
    return inputs[0], inputs[1]


def signal(process, told):
    """The share of the variance that is left where the network is told `told`, by the formula in the note."""
    match process:
        case "vp":
            t = told / 999
            return math.exp(-(0.1 * t + 9.95 * t**2))
        case "stable-diffusion":
            first, last, count = 0.00085**0.5, 0.012**0.5, round(told)
            return math.prod(1 - (first + (last - first) * i / 999) ** 2 for i in range(count))
        case _:
            return math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(round(told) + 1))


def test_every_registered_model_is_held_against_its_source():
    assert set(PROCESSES) == set(registry.names("models"))


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_and_time_are_those_of_the_authors(name):
    adapter = small(name)
    given = batch(adapter, 2)
    images = given[0] if isinstance(given, tuple) else given
    for share, told, left in PUBLISHED["processes"][PROCESSES[name]]:
        inputs, noise = adapter.noised_at(given, share, rng(1))
        noised, time = parts(inputs)
        torch.testing.assert_close(time.double(), torch.full((2,), told, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(noised, left**0.5 * images + (1 - left) ** 0.5 * noise, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_training_draws_all_of_the_authors_times_evenly(name):
    adapter = small(name)
    inputs, noise = adapter.noised(batch(adapter, 4000), rng(2))
    time = parts(inputs)[1].double()
    first, last = (0, 999) if PROCESSES[name] != "stable-diffusion" else (1, 1000)
    assert first <= time.min() < first + 5 and last - 5 < time.max() <= last
    assert float(time.mean()) == pytest.approx((first + last) / 2, abs=15)  # 3.3 standard errors
    assert PROCESSES[name] == "vp" or torch.equal(time, time.round())
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


class Knowing(nn.Module):
    """The exact noise where all data is the one image `truth`, at the time that it is told and by the authors' process."""

    def __init__(self, truth, process):
        super().__init__()
        self.truth, self.process = nn.Parameter(truth), process

    def forward(self, hidden_states=None, timestep=None, labels=None, **others):
        images = others.get("sample", hidden_states)
        left = torch.tensor([signal(self.process, float(one)) for one in timestep]).view(-1, 1, 1, 1)
        noise = (images - left.sqrt() * self.truth) / (1 - left).sqrt()
        return (noise,) if others else noise


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++"])
def test_samplers_walk_the_authors_process(name, sampler):
    adapter = small(name).sampling(Sampling(sampler, guidance=1.0))
    truth = torch.rand(1, *adapter.image_shape, generator=rng(3)) * 1.6 - 0.8
    images = adapter.sample(Knowing(truth, PROCESSES[name]), 2, rng(4), 8)
    torch.testing.assert_close(images, truth.expand_as(images), rtol=0, atol=5e-3)


@pytest.mark.parametrize("name", [*UVIT, *DIT])
def test_guidance_and_dropped_labels_are_those_of_the_authors(name):
    wanted, adapter = {**UVIT, **DIT}[name], small(name)
    assert adapter.how.guidance == wanted["guidance"]
    if wanted["unlabelled"] is None:
        assert adapter.null_label is None
        return
    inputs, _ = adapter.noised(batch(adapter, 4000), rng(5))
    labels = inputs["class_labels"] if isinstance(inputs, dict) else inputs[2]
    assert float((labels == adapter.null_label).float().mean()) == pytest.approx(wanted["unlabelled"], abs=0.02)


# --- Tensors, without memory for them. ---


def linear(name, inside, outside):
    return {f"{name}.weight": (outside, inside), f"{name}.bias": (outside,)}


def uvit_shapes(img_size, patch_size, in_chans, embed_dim, depth, num_heads, num_classes, conv):
    """Names and shapes in a file of the authors. Source: `libs/uvit.py`; no qkv_bias, no mlp_time_embed in any config."""
    d, labelled = embed_dim, num_classes > 0
    found = {"pos_embed": (1, 1 + labelled + (img_size // patch_size) ** 2, d)}
    found |= {"patch_embed.proj.weight": (d, in_chans, patch_size, patch_size), "patch_embed.proj.bias": (d,)}
    found |= {"label_emb.weight": (num_classes, d)} if labelled else {}
    half = depth // 2
    for block in (*(f"in_blocks.{i}" for i in range(half)), "mid_block", *(f"out_blocks.{i}" for i in range(half))):
        for norm in ("norm1", "norm2"):
            found |= {f"{block}.{norm}.weight": (d,), f"{block}.{norm}.bias": (d,)}
        found |= {f"{block}.attn.qkv.weight": (3 * d, d), **linear(f"{block}.attn.proj", d, d)}
        found |= {**linear(f"{block}.mlp.fc1", d, 4 * d), **linear(f"{block}.mlp.fc2", 4 * d, d)}
        found |= linear(f"{block}.skip_linear", 2 * d, d) if block.startswith("out") else {}
    found |= {"norm.weight": (d,), "norm.bias": (d,), **linear("decoder_pred", d, patch_size**2 * in_chans)}
    last = {"final_layer.weight": (in_chans, in_chans, 3, 3), "final_layer.bias": (in_chans,)}
    return found | (last if conv else {})


def dit_shapes(input_size, hidden_size, depth, num_heads, patch_size, in_channels, num_classes):
    """Names and shapes in a file of the authors, but the positions. Source: `models.py`, with learn_sigma."""
    d, out = hidden_size, patch_size**2 * 2 * in_channels
    found = {"x_embedder.proj.weight": (d, in_channels, patch_size, patch_size), "x_embedder.proj.bias": (d,)}
    found |= {**linear("t_embedder.mlp.0", 256, d), **linear("t_embedder.mlp.2", d, d)}
    found |= {"y_embedder.embedding_table.weight": (num_classes + 1, d)}
    for i in range(depth):
        found |= {**linear(f"blocks.{i}.attn.qkv", d, 3 * d), **linear(f"blocks.{i}.attn.proj", d, d)}
        found |= {**linear(f"blocks.{i}.mlp.fc1", d, 4 * d), **linear(f"blocks.{i}.mlp.fc2", 4 * d, d)}
        found |= linear(f"blocks.{i}.adaLN_modulation.1", d, 6 * d)
    return found | linear("final_layer.linear", d, out) | linear("final_layer.adaLN_modulation.1", d, 2 * d)


def shapes_of(state):
    return {name: tuple(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("name", UVIT)
def test_a_u_vit_has_the_tensors_of_the_authors_file(name):
    network = UVIT[name]["network"]
    adapter = registry.adapter(name)
    with torch.device("meta"):
        model = adapter.build()
    assert shapes_of(model.state_dict()) == uvit_shapes(**network)
    assert model.mid_block.attn.num_heads == network["num_heads"]


@pytest.mark.parametrize("name", DIT)
def test_a_dit_has_the_tensors_of_the_authors_file(name):
    network = DIT[name]["network"]
    state = {key: torch.empty(shape, device="meta") for key, shape in dit_shapes(**network).items()}
    adapter = registry.adapter(name)
    positions = torch.empty(1, (network["input_size"] // network["patch_size"]) ** 2, network["hidden_size"])
    config = adapter.layout.configuration({**state, "pos_embed": positions}, adapter.config, {})
    with torch.device("meta"):
        model = adapter.rebuilt({"config": config}).build()
    assert shapes_of(untied_state(model)) == shapes_of(translated(state))
    block = model.transformer_blocks[0]
    assert block.norm1.norm.eps == block.norm3.eps == model.norm_out.eps == 1e-6  # as `models.py` has all of its norms
    attention = block.attn1
    assert (attention.heads, attention.scale) == (
        network["num_heads"],
        (network["hidden_size"] // network["num_heads"]) ** -0.5,
    )


def test_a_ddpm_is_told_the_time_as_its_authors_network_is():
    """Source: `nn.py` of github.com/hojonathanho/diffusion: sines, then cosines, at frequencies spaced by 1/63."""
    with torch.device("meta"):
        model = registry.adapter("ddpm-cifar10").build()
    angles = [999 * 10_000 ** (-i / 63) for i in range(64)]
    wanted = torch.tensor([*(math.sin(a) for a in angles), *(math.cos(a) for a in angles)])
    torch.testing.assert_close(model.time_proj(torch.tensor([999]))[0], wanted, rtol=0, atol=2e-4)
