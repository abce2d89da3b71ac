"""DiT: the authors' network, written out slowly from its definition, against what is made of a file in their layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import diffusers
import pytest
import torch

import compressor
from compressor import registry
from compressor.errors import CompressorError, UsageError
from compressor.export.onnx import export_onnx

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
SIDE, WIDTH, HEADS, DEPTH = 8, 32, 2, 2
SCALED_DOWN = {
    "num_layers": DEPTH,
    "num_attention_heads": HEADS,
    "attention_head_dim": WIDTH // HEADS,
    "sample_size": SIDE,
}
NAMES = ["dit-xl-2-256", "dit-xl-2-512", "dit"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def waves(positions, half):
    """(positions,) -> (positions, 2 half): sines, then cosines, at `half` frequencies from 1 down to 1/10,000 of it."""
    angles = [[float(p) * 10_000 ** (-i / half) for i in range(half)] for p in positions]
    return torch.tensor([[*map(math.sin, row), *map(math.cos, row)] for row in angles], dtype=torch.float64)


def grid_positions(side, width):
    """The fixed embedding of the patches: of the column in the first half, of the row in the second."""
    rows, columns = [i // side for i in range(side * side)], [i % side for i in range(side * side)]
    return torch.cat([waves(columns, width // 4), waves(rows, width // 4)], 1)


def authors_file(name):
    """A state in the authors' layout, of random values, of the registered model scaled down: names and shapes of `models.py`."""
    patch = PUBLISHED["dit"][name]["network"]["patch_size"]
    shapes = {"x_embedder.proj": (WIDTH, 4, patch, patch), "t_embedder.mlp.0": (WIDTH, 256)}
    shapes |= {"t_embedder.mlp.2": (WIDTH, WIDTH), "final_layer.linear": (patch**2 * 8, WIDTH)}
    shapes |= {"final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH)}
    for i in range(DEPTH):
        shapes |= {f"blocks.{i}.attn.qkv": (3 * WIDTH, WIDTH), f"blocks.{i}.attn.proj": (WIDTH, WIDTH)}
        shapes |= {f"blocks.{i}.mlp.fc1": (4 * WIDTH, WIDTH), f"blocks.{i}.mlp.fc2": (WIDTH, 4 * WIDTH)}
        shapes |= {f"blocks.{i}.adaLN_modulation.1": (6 * WIDTH, WIDTH)}
    draw = rng(1)
    state = {f"{key}.weight": torch.randn(shape, generator=draw) * 0.2 for key, shape in shapes.items()}
    state |= {f"{key}.bias": torch.randn(shape[0], generator=draw) * 0.2 for key, shape in shapes.items()}
    state["y_embedder.embedding_table.weight"] = torch.randn(1001, WIDTH, generator=draw)
    state["pos_embed"] = grid_positions(SIDE // patch, WIDTH)[None].float()
    return state


def reference(state, x, time, labels):
    """The forward pass of the authors' `models.py`, in float64: (n, 4, side, side), times (n,), labels -> (n, 8, side, side)."""
    w = {name: value.double() for name, value in state.items()}

    def layer(name, inputs):
        return inputs @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(inputs):
        return inputs * torch.sigmoid(inputs)

    def modulated(inputs, shift, scale):
        centred = inputs - inputs.mean(-1, keepdim=True)
        normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    def attended(name, inputs):
        mixed, size = [], WIDTH // HEADS
        query, key, value = layer(f"{name}.qkv", inputs).split(WIDTH, -1)
        for head in range(HEADS):
            own = slice(head * size, (head + 1) * size)
            shares = (query[..., own] @ key[..., own].transpose(1, 2) / math.sqrt(size)).softmax(-1)
            mixed.append(shares @ value[..., own])
        return layer(f"{name}.proj", torch.cat(mixed, -1))

    def gelu(inputs):  # by its approximation with tanh
        return 0.5 * inputs * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inputs + 0.044715 * inputs**3)))

    patch, kernel = w["x_embedder.proj.weight"].shape[-1], w["x_embedder.proj.weight"].flatten(1)
    side = x.shape[-1] // patch
    corners = [(r * patch, c * patch) for r in range(side) for c in range(side)]
    pieces = [x[:, :, top : top + patch, left : left + patch].double().flatten(1) for top, left in corners]
    tokens = torch.stack(pieces, 1) @ kernel.T + w["x_embedder.proj.bias"] + w["pos_embed"]
    sines, cosines = waves(time, 128).chunk(2, 1)
    hidden = silu(layer("t_embedder.mlp.0", torch.cat([cosines, sines], 1)))
    told = silu(layer("t_embedder.mlp.2", hidden) + w["y_embedder.embedding_table.weight"][labels])
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = layer(f"{block}.adaLN_modulation.1", told).chunk(6, 1)
        tokens = tokens + gate[:, None] * attended(f"{block}.attn", modulated(tokens, shift, scale))
        hidden = gelu(layer(f"{block}.mlp.fc1", modulated(tokens, shift2, scale2)))
        tokens = tokens + gate2[:, None] * layer(f"{block}.mlp.fc2", hidden)
    shift, scale = layer("final_layer.adaLN_modulation.1", told).chunk(2, 1)
    vectors = layer("final_layer.linear", modulated(tokens, shift, scale))
    image = torch.zeros(len(x), 8, *x.shape[2:], dtype=torch.float64)
    for index, (top, left) in enumerate(corners):
        vector = vectors[:, index].view(-1, patch, patch, 8)
        image[:, :, top : top + patch, left : left + patch] = vector.permute(0, 3, 1, 2)
    return image


@pytest.fixture(params=NAMES)
def opened(request, tmp_path):
    """(adapter, model, state): a file of the authors' layout, opened and loaded."""
    state = authors_file(request.param)
    torch.save(state, tmp_path / "authors.pt")
    settings = {"num_attention_heads": HEADS} if request.param == "dit" else SCALED_DOWN
    adapter = registry.adapter(request.param).opened(str(tmp_path / "authors.pt"), settings)
    return adapter, adapter.load(str(tmp_path / "authors.pt")), state


@torch.no_grad()
def test_a_file_of_the_authors_answers_as_their_network(opened):
    adapter, model, state = opened
    latents, labels = torch.randn(2, 4, SIDE, SIDE, generator=rng(2)), torch.tensor([3, 998])
    for share, time, left in PUBLISHED["processes"]["ddpm"]:
        inputs, noise = adapter.noised_at((latents, labels), share, rng(3))
        noised = left**0.5 * latents + (1 - left) ** 0.5 * noise
        told = inputs["class_labels"]
        expected = reference(state, noised, [time] * 2, told)
        torch.testing.assert_close(model(**inputs).sample.double(), expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(adapter.predict(model, inputs).double(), expected[:, :4], rtol=2e-3, atol=2e-3)


def test_the_spacing_of_the_frequencies_survives_saving_and_is_written_for_the_authors_code(opened, tmp_path):
    adapter, model, state = opened
    compressor.save(tmp_path / "model", model, {}, adapter.name, architecture=adapter.architecture)
    again = compressor.load(tmp_path / "model")
    inputs = {"hidden_states": torch.randn(2, 4, SIDE, SIDE, generator=rng(4)), "timestep": torch.tensor([999, 1])}
    inputs["class_labels"] = torch.tensor([5, 1000])
    with torch.no_grad():
        assert torch.equal(again(**inputs).sample, model(**inputs).sample)
    (tmp_path / "pipeline").mkdir()
    adapter.write_pipeline(model, tmp_path / "pipeline")
    assert {path.name for path in (tmp_path / "pipeline").iterdir()} == {f"{adapter.name}.pt", "README.txt"}
    assert "1/128" in (tmp_path / "pipeline" / "README.txt").read_text()
    written = torch.load(tmp_path / "pipeline" / f"{adapter.name}.pt", weights_only=True)
    assert written.keys() == state.keys()
    assert all(torch.allclose(written[name], value, atol=1e-6) for name, value in state.items())


@pytest.mark.slow
def test_onnx_has_the_authors_spacing(tmp_path):
    """At the last timesteps the two spacings are far apart, so that a graph with the other one would be refused."""
    state = authors_file("dit")
    torch.save(state, tmp_path / "authors.pt")
    adapter = registry.adapter("dit").opened(str(tmp_path / "authors.pt"), {"num_attention_heads": HEADS})
    model = adapter.load(str(tmp_path / "authors.pt"))
    path = tmp_path / "model.onnx"
    export_onnx(model, adapter, path)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    latents = torch.randn(2, 4, SIDE, SIDE, generator=rng(5))
    given = [latents.numpy(), torch.tensor([999, 1]).numpy(), torch.tensor([5, 7]).numpy()]
    found = session.run(None, dict(zip([one.name for one in session.get_inputs()], given, strict=True)))[0]
    expected = reference(state, latents, [999, 1], torch.tensor([5, 7]))[:, :4]
    torch.testing.assert_close(torch.from_numpy(found).double(), expected, rtol=2e-3, atol=2e-3)


def test_a_file_by_diffusers_names_is_diffusers_network(opened, tmp_path):
    adapter, model, _ = opened
    if adapter.name == "dit":
        return
    plain = diffusers.DiTTransformer2DModel(**SCALED_DOWN, out_channels=8)
    plain.load_state_dict(model.state_dict())
    torch.save(plain.state_dict(), tmp_path / "diffusers.bin")
    other = registry.adapter(adapter.name).opened(str(tmp_path / "diffusers.bin"), SCALED_DOWN)
    inputs = {"hidden_states": torch.randn(2, 4, SIDE, SIDE, generator=rng(4)), "timestep": torch.tensor([999, 1])}
    inputs["class_labels"] = torch.tensor([5, 1000])
    with torch.no_grad():
        expected = plain.eval()(**inputs).sample
        torch.testing.assert_close(
            other.load(str(tmp_path / "diffusers.bin"))(**inputs).sample, expected, rtol=0, atol=1e-5
        )
        assert float((model(**inputs).sample - expected).abs().max()) > 0.1
    with pytest.raises(CompressorError, match=r"another configuration.*\n.*opened"):
        adapter.load(str(tmp_path / "diffusers.bin"))


def test_a_folder_of_diffusers_takes_the_authors_spacing_where_it_is_asked_for(opened, tmp_path):
    """facebook/DiT-XL-2-256 and -512 have the authors' weights, and the name that the class had in their day."""
    adapter, model, state = opened
    plain = diffusers.DiTTransformer2DModel(**SCALED_DOWN, out_channels=8, patch_size=adapter.config["patch_size"])
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["_class_name"] = "Transformer2DModel"
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    latents, time, labels = (
        torch.randn(2, 4, SIDE, SIDE, generator=rng(4)),
        torch.tensor([999, 1]),
        torch.tensor([5, 9]),
    )
    inputs = {"hidden_states": latents, "timestep": time, "class_labels": labels}
    folder = str(tmp_path / "folder")
    with torch.no_grad():
        unopened = registry.adapter(adapter.name)
        if unopened.config:
            with pytest.raises(CompressorError, match=r"another configuration.*\n.*opened"):
                unopened.load(folder)
        usual = unopened.opened(folder)
        expected = plain.eval()(**inputs).sample
        torch.testing.assert_close(usual.load(folder)(**inputs).sample, expected, rtol=0, atol=1e-5)
        asked = registry.adapter(adapter.name).opened(folder, {"downscale_freq_shift": 0, "norm_eps": 1e-6})
        found = asked.load(folder)(**inputs).sample
        torch.testing.assert_close(found.double(), reference(state, latents, time, labels), rtol=2e-3, atol=2e-3)
    assert usual.num_classes == 1000


def test_settings_that_diffusers_would_leave_out_in_silence_are_refused():
    adapter = registry.adapter("dit-xl-2-256")
    with pytest.raises(UsageError, match="has no setting 'num_layer'\nDid you mean 'num_layers'"):
        adapter.opened(None, {"num_layer": 2})
    with pytest.raises(UsageError, match="downscale_freq_shift is 2"):
        adapter.opened(None, {**SCALED_DOWN, "downscale_freq_shift": 2}).build()
