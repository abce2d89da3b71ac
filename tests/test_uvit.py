"""U-ViT: the layout of the released checkpoints, the forward pass against a slow reference, and the noise process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import CompressorError, registry
from compressor.model_zoo.uvit import UViT, UViTAdapter, sizes
from compressor.model_zoo.uvit.noise import ContinuousTimes

SMALL: dict[str, Any] = {"img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 16, "depth": 2, "num_heads": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "time": {"mlp_time_embed": True},
    "classes": {"num_classes": 5},
    "no-conv": {"conv": False},
    "bias": {"qkv_bias": True},
    "no-skip": {"skip": False},
    "deep": {"depth": 6, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 3, "mlp_time_embed": True},
    "odd-dim": {"embed_dim": 15, "num_heads": 3},
}


def build(**changes: Any) -> UViT:
    """A small U-ViT with every weight random, biases and norms too, so that each one matters."""
    torch.manual_seed(0)
    model = UViT(**{**SMALL, **changes}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def block_keys(name: str, skip: bool) -> set[str]:
    layers = ["norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", *(["skip_linear"] if skip else [])]
    return {f"{name}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")} | {f"{name}.attn.qkv.weight"}


PLAIN_KEYS = {
    "pos_embed",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    *block_keys("in_blocks.0", skip=False),
    *block_keys("mid_block", skip=False),
    *block_keys("out_blocks.0", skip=True),
    "norm.weight",
    "norm.bias",
    "decoder_pred.weight",
    "decoder_pred.bias",
    "final_layer.weight",
    "final_layer.bias",
}
TIME_KEYS = {f"time_embed.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, PLAIN_KEYS),
        ({"mlp_time_embed": True}, PLAIN_KEYS | TIME_KEYS),
        ({"num_classes": 10}, PLAIN_KEYS | {"label_emb.weight"}),
        ({"conv": False}, PLAIN_KEYS - {"final_layer.weight", "final_layer.bias"}),
        ({"qkv_bias": True}, PLAIN_KEYS | {f"{b}.attn.qkv.bias" for b in ("in_blocks.0", "mid_block", "out_blocks.0")}),
        ({"skip": False}, PLAIN_KEYS - {"out_blocks.0.skip_linear.weight", "out_blocks.0.skip_linear.bias"}),
        ({"mlp_time_embed": True, "num_classes": 10}, PLAIN_KEYS | TIME_KEYS | {"label_emb.weight"}),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else "",
)
def test_keys_are_those_of_the_released_checkpoints(changes: dict[str, Any], keys: set[str]) -> None:
    assert set(UViT(**{**SMALL, **changes}).state_dict()) == keys


def test_shapes_are_those_of_the_released_checkpoints() -> None:
    state = UViT(**SMALL, num_classes=5, mlp_time_embed=True).state_dict()
    expected = {
        "pos_embed": (1, 2 + 16, 16),
        "patch_embed.proj.weight": (16, 3, 2, 2),
        "time_embed.0.weight": (64, 16),
        "time_embed.2.weight": (16, 64),
        "label_emb.weight": (5, 16),
        "in_blocks.0.attn.qkv.weight": (48, 16),
        "mid_block.mlp.fc1.weight": (64, 16),
        "out_blocks.0.skip_linear.weight": (16, 32),
        "decoder_pred.weight": (12, 16),
        "final_layer.weight": (3, 3, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred**2).mean(-1, keepdim=True) + 1e-5
    return centred / scale.sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))


def reference_block(x: Tensor, w: dict[str, Tensor], name: str, heads: int, skip: Tensor | None = None) -> Tensor:
    if skip is not None and f"{name}.skip_linear.weight" in w:
        x = linear(torch.cat([x, skip], -1), w, f"{name}.skip_linear")
    qkv = linear(layer_norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv")
    dim, size = x.shape[-1], x.shape[-1] // heads
    mixed = torch.zeros_like(x)
    for head in range(heads):  # qkv is laid out (K H D)
        own = slice(head * size, (head + 1) * size)
        query, key, value = (qkv[..., k * dim : (k + 1) * dim][..., own] for k in range(3))
        mixed[..., own] = (query @ key.transpose(1, 2) / math.sqrt(size)).softmax(-1) @ value
    x = x + linear(mixed, w, f"{name}.attn.proj")
    hidden = linear(layer_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(hidden, w, f"{name}.mlp.fc2")


def reference(w: dict[str, Tensor], config: dict[str, Any], x: Tensor, timesteps: Tensor, y: Tensor | None) -> Tensor:
    """The forward pass as method.md describes it: plain tensor operations and loops."""
    p, heads, dim, rows = (
        config["patch_size"],
        config["num_heads"],
        config["embed_dim"],
        config["img_size"] // config["patch_size"],
    )
    patches = [x[:, :, r * p : (r + 1) * p, c * p : (c + 1) * p].flatten(1) for r in range(rows) for c in range(rows)]
    tokens = torch.stack(
        [patch @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"] for patch in patches], 1
    )
    half = dim // 2
    angles = [timesteps * 10_000 ** (-i / half) for i in range(half)]
    time = torch.stack(
        [a.cos() for a in angles] + [a.sin() for a in angles] + [torch.zeros_like(timesteps)] * (dim % 2), 1
    ).to(x.dtype)
    if "time_embed.0.weight" in w:
        hidden = linear(time, w, "time_embed.0")
        time = linear(hidden * hidden.sigmoid(), w, "time_embed.2")
    extras = [time] if y is None else [w["label_emb.weight"][y], time]
    tokens = torch.cat([torch.stack(extras, 1), tokens], 1) + w["pos_embed"]
    skips = []
    for i in range(config["depth"] // 2):
        tokens = reference_block(tokens, w, f"in_blocks.{i}", heads)
        skips.append(tokens)
    tokens = reference_block(tokens, w, "mid_block", heads)
    for i in range(config["depth"] // 2):
        tokens = reference_block(tokens, w, f"out_blocks.{i}", heads, skips[-1 - i])
    vectors = linear(layer_norm(tokens, w, "norm"), w, "decoder_pred")[:, len(extras) :]
    image = torch.zeros_like(x)
    for index in range(rows * rows):
        top, left = index // rows * p, index % rows * p
        image[:, :, top : top + p, left : left + p] = vectors[:, index].view(-1, p, p, x.shape[1]).permute(0, 3, 1, 2)
    if "final_layer.weight" not in w:
        return image
    return nn.functional.conv2d(image, w["final_layer.weight"], w["final_layer.bias"], padding=1)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_network_equals_the_slow_reference(changes: dict[str, Any]) -> None:
    config = {**SMALL, **changes}
    model = build(**changes).double()
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, generator=rng, dtype=torch.float64)
    timesteps = torch.tensor([0.0, 731.25])
    y = torch.tensor([2, 0]) if config.get("num_classes", -1) > 0 else None
    with torch.no_grad():
        expected = reference(model.state_dict(), config, x, timesteps, y)
        torch.testing.assert_close(model(x, timesteps, y), expected, rtol=1e-5, atol=1e-5)


def test_the_output_has_the_shape_of_the_image() -> None:
    model = UViT(img_size=16, patch_size=2, in_chans=3, embed_dim=64, depth=4, num_heads=4)
    assert model(torch.zeros(2, 3, 16, 16), torch.tensor([0, 999]), y=None).shape == (2, 3, 16, 16)
    assert model(torch.zeros(2, 3, 16, 16), torch.tensor([0.0, 999.0])).shape == (2, 3, 16, 16)


def test_a_class_conditional_network_asks_for_the_class() -> None:
    with pytest.raises(ValueError, match="class-conditional"):
        build(num_classes=5)(torch.zeros(1, 3, 8, 8), torch.zeros(1))


@pytest.mark.parametrize("changes", [{"img_size": 9}, {"num_heads": 3}, {"depth": 3}])
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be divisible"):
        UViT(**{**SMALL, **changes})


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("outer", [None, "ema", "model", "state_dict"])
def test_weights_round_trip_through_a_pth_file(prefix: str, outer: str | None, tmp_path: Path) -> None:
    adapter, model = UViTAdapter(SMALL), build()
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    torch.save(state if outer is None else {outer: state, "step": 3}, tmp_path / "weights.pth")
    loaded = adapter.load(str(tmp_path / "weights.pth"))
    assert not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_averaged_weights_are_taken_where_a_file_has_both(tmp_path: Path) -> None:
    raw, averaged = build(), build()
    nn.init.ones_(averaged.norm.weight)
    torch.save({"model": raw.state_dict(), "ema": averaged.state_dict()}, tmp_path / "both.pth")
    loaded = UViTAdapter(SMALL).load(str(tmp_path / "both.pth"))
    assert torch.equal(loaded.norm.weight, averaged.norm.weight)


def test_weights_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    torch.save(build(depth=4).state_dict(), tmp_path / "deep.pth")
    with pytest.raises(CompressorError, match=r"does not fit UViT: unexpected in_blocks\.1\."):
        UViTAdapter(SMALL).load(str(tmp_path / "deep.pth"))
    torch.save(build(embed_dim=32).state_dict(), tmp_path / "wide.pth")
    with pytest.raises(CompressorError, match=r"pos_embed: file has \(1, 17, 32\), model has \(1, 17, 16\)"):
        UViTAdapter(SMALL).load(str(tmp_path / "wide.pth"))


def test_a_model_without_bundled_weights_asks_for_them() -> None:
    with pytest.raises(CompressorError, match=r"uvit-cifar10 comes without weights\nGive --weights FILE"):
        sizes.cifar10().load(None)


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        (sizes.cifar10, 44),
        (sizes.celeba64, 44),
        (sizes.imagenet64_m, 131),
        (sizes.imagenet64_l, 287),
        (sizes.imagenet256_l, 287),
        (sizes.imagenet256_h, 501),
        (sizes.imagenet512_l, 287),
        (sizes.imagenet512_h, 501),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(
    size: Callable[[], UViTAdapter], millions: int
) -> None:
    with torch.device("meta"):
        model = size().build()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


# What files of others have


PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PUBLISHED["uvit"])
def test_a_file_of_the_authors_answers_as_their_network(name: str, tmp_path: Path) -> None:
    """Scaled down: the flags of the network, the noise and the time are the registered model's."""
    published = PUBLISHED["uvit"][name]
    network = {**published["network"], "embed_dim": 16, "depth": 4, "num_heads": 2, "img_size": 8}
    with torch.random.fork_rng():
        model = build(**network)
    torch.save(model.state_dict(), tmp_path / "authors.pth")
    small = {key: network[key] for key in ("embed_dim", "depth", "num_heads", "img_size")}
    adapter = registry.adapter(name).opened(str(tmp_path / "authors.pth"), small)
    loaded = adapter.load(str(tmp_path / "authors.pth"))
    rng = torch.Generator().manual_seed(1)
    images, labels = torch.randn(2, network["in_chans"], 8, 8, generator=rng), torch.tensor([3, 998])
    weights = {key: value.double() for key, value in model.state_dict().items()}
    for share, told, left in PUBLISHED["processes"][published["process"]]:
        inputs, noise = adapter.noised_at((images, labels), share, rng)
        noised = left**0.5 * images + (1 - left) ** 0.5 * noise
        time = torch.full((2,), told, dtype=torch.float64)
        with torch.no_grad():
            expected = reference(weights, network, noised.double(), time, inputs[2])
            torch.testing.assert_close(adapter.predict(loaded, inputs).double(), expected, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_of_sparsedm_loads_with_its_biases_and_is_saved_with_them(tmp_path: Path) -> None:
    """Its sparse layers ignore `bias=False`; its files hold the dense weights. Source: `libs/sparse_ops_mask.py`."""
    small = {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 8}
    model = build(qkv_bias=True)
    torch.save(model.state_dict(), tmp_path / "nnet_ema.pth")
    source = str(tmp_path / "nnet_ema.pth")
    adapter = registry.adapter("uvit-cifar10").opened(source, small)
    loaded = adapter.load(source)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert adapter.architecture == {"qkv_bias": True, **small}
    compressor.save(tmp_path / "model", loaded, {}, "uvit-cifar10", architecture=adapter.architecture)
    again = compressor.load(tmp_path / "model")
    inputs = adapter.example_inputs(2)
    with torch.no_grad():
        assert torch.equal(adapter.predict(again, inputs), adapter.predict(loaded, inputs))
    without = registry.adapter("uvit-cifar10").opened(source, {**small, "qkv_bias": False})
    with pytest.raises(CompressorError, match=r"unexpected in_blocks\.0\.attn\.qkv\.bias"):
        without.load(source)


@pytest.mark.parametrize("changes", [{"conv": True}, {"mlp_time_embed": True}, {"qkv_bias": True, "conv": True}])
def test_what_a_file_has_beyond_the_name_is_built(changes: dict[str, bool], tmp_path: Path) -> None:
    config = {**SMALL, "conv": False}
    model = build(**{**config, **changes})
    torch.save({"ema": model.state_dict()}, tmp_path / "more.pth")
    adapter = UViTAdapter(config).opened(str(tmp_path / "more.pth"))
    assert adapter.architecture == changes
    loaded = adapter.load(str(tmp_path / "more.pth"))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_a_file_lacks_is_missing(tmp_path: Path) -> None:
    torch.save(build(conv=False).state_dict(), tmp_path / "less.pth")
    with pytest.raises(CompressorError, match=r"missing final_layer\.weight"):
        UViTAdapter(SMALL).opened(str(tmp_path / "less.pth")).load(str(tmp_path / "less.pth"))
    adapter = UViTAdapter(SMALL).opened(str(tmp_path / "less.pth"), {"conv": False})
    assert adapter.load(str(tmp_path / "less.pth")).training is False


def test_a_model_as_its_name_says_is_saved_by_its_name_alone() -> None:
    assert registry.adapter("uvit-digits").opened(None).architecture == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qkv": True}, "has no 'qkv'\nDid you mean 'qkv_bias'"),
        ({"qkv_bias": 1}, "qkv_bias is 1\nAllowed: true or false"),
        ({"depth": True}, "depth is True\nAllowed: whole numbers"),
        ({"depth": 10**9}, "depth is 1000000000"),
        ({"embed_dim": -8}, "embed_dim is -8"),
        ({"mlp_ratio": "4"}, "mlp_ratio is 4"),
        ({"mlp_ratio": math.nan}, "mlp_ratio is nan"),
        ({"depth": 3}, "must be divisible"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    for make in (lambda: UViTAdapter(SMALL).opened(None, settings), lambda: UViTAdapter(SMALL).rebuilt(settings)):
        with pytest.raises(CompressorError, match=message):
            make()


# The noise process

VP = ContinuousTimes()


def test_alpha_bar_is_the_integral_of_beta() -> None:
    for t in (0.001, 0.25, 0.5, 1.0):
        grid = torch.linspace(0, t, 20_001, dtype=torch.float64)
        integral = float(torch.trapezoid(0.1 + 19.9 * grid, grid))
        assert float(VP.log_alpha_bar(torch.tensor(t, dtype=torch.float64))) == pytest.approx(-integral, rel=1e-9)


def test_the_sampler_sees_the_continuous_process_on_its_grid() -> None:
    grid = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.equal(VP.grid(), grid)
    expected = torch.exp(-(0.1 * grid + 9.95 * grid**2))
    kept = 1 - torch.tensor(VP.process(clip=True).betas, dtype=torch.float64)
    torch.testing.assert_close(kept.cumprod(0), expected, rtol=1e-9, atol=0)


def test_noised_images_keep_unit_variance_and_the_right_mean() -> None:
    images, noise = torch.full((4, 1, 2, 2), 0.5), torch.full((4, 1, 2, 2), 2.0)
    t = torch.tensor([0.0, 0.1, 0.5, 1.0])
    mean = torch.exp(-0.5 * (0.1 * t + 9.95 * t**2))
    expected = (0.5 * mean + 2.0 * torch.sqrt(1 - mean**2)).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    torch.testing.assert_close(VP.diffuse(images, noise, t), expected)


@pytest.mark.parametrize("classes", [-1, 5])
def test_the_adapter_gives_noised_images_and_the_time_up_to_999(classes: int) -> None:
    adapter = UViTAdapter({**SMALL, "num_classes": classes})
    images, labels = torch.rand(300, 3, 8, 8), torch.arange(300) % 5
    (noised, timesteps, y), noise = adapter.noised((images, labels), torch.Generator().manual_seed(0))
    torch.testing.assert_close(noised, VP.diffuse(images, noise, timesteps / 999), rtol=1e-4, atol=1e-4)
    assert 0 <= timesteps.min() < 30 and 969 < timesteps.max() <= 999
    assert (y is None) if classes < 0 else torch.equal(y, labels)
    assert abs(float(noise.mean())) < 0.02 and float(noise.std()) == pytest.approx(1, abs=0.02)


class Knowing(nn.Module):
    """The exact noise prediction where all data is the one image `truth`: the oracle of a sampler."""

    def __init__(self, truth: Tensor) -> None:
        super().__init__()
        self.truth = nn.Parameter(truth)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        t = (timesteps.double() / 999).view(-1, 1, 1, 1)
        mean = torch.exp(-0.5 * (0.1 * t + 9.95 * t**2))
        return ((x - mean * self.truth) / torch.sqrt(1 - mean**2)).float()


@pytest.mark.parametrize("steps", [2, 10, 25])
def test_a_perfect_predictor_samples_the_truth(steps: int) -> None:
    truth = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    images = UViTAdapter(SMALL).sample(Knowing(truth), 4, torch.Generator().manual_seed(1), steps)
    torch.testing.assert_close(images, truth.expand(4, 3, 8, 8), rtol=0, atol=2e-3)


@pytest.mark.parametrize("classes", [-1, 5])
def test_sampling_depends_on_its_generator_alone(classes: int) -> None:
    adapter, model = UViTAdapter({**SMALL, "num_classes": classes}), build(num_classes=classes)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        found.append(adapter.sample(model, 3, torch.Generator().manual_seed(seed), 4))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert found[0].shape == (3, 3, 8, 8) and found[0].abs().max() <= 1 and not found[0].requires_grad


def test_example_inputs_fit_the_network() -> None:
    for changes in ({}, {"num_classes": 5}):
        adapter, model = UViTAdapter({**SMALL, **changes}), build(**changes)
        assert adapter.predict(model, adapter.example_inputs(2)).shape == (2, *adapter.image_shape)


@pytest.mark.parametrize("tokens", [17, 600])
def test_attention_in_bfloat16_is_attention(tokens: int) -> None:
    from compressor.model_zoo.uvit.network import attend

    query, key, value = torch.randn(3, 2, 4, tokens, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    with torch.no_grad():
        short = attend(query, key, value)
    long = attend(query, key, value)
    for out in (short, long):
        assert out.dtype == torch.bfloat16
        assert float((out.double() - wanted).norm() / wanted.norm()) < 1e-2
