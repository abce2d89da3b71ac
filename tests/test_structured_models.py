"""Structured pruning on a collection of small models: pruned rightly, by numbers, or left alone for a plain reason."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compressor
from compressor import Adapter, CompressorError
from compressor.plugins.structured import Structured
from compressor.plugins.structured.graph import Channels, Refused
from compressor.plugins.structured.groups import find_groups, survey_groups
from compressor.plugins.structured.removal import removal
from compressor.sparsity.surgery import Surgery


class Example(Adapter):
    """Inputs of a given shape, and labels where `classes` is not 0."""

    name = "example"

    def __init__(self, *shape: int, classes: int = 0, double: bool = False) -> None:
        self.shape, self.classes, self.dtype = shape, classes, torch.float64 if double else torch.float32

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def example_inputs(self, batch_size: int) -> Any:
        x = torch.zeros(batch_size, *self.shape, dtype=self.dtype)
        return (x, torch.arange(batch_size) % self.classes) if self.classes else (x,)

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        out = module(*inputs)
        return out if isinstance(out, Tensor) else torch.cat([part.flatten(1) for part in out], 1)


def conv(a: int, b: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


class Residual(nn.Module):
    """Two layers see the sum, so that both and the one before share their channels."""

    def __init__(self, norm: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        self.first, self.norm = conv(2, 16), norm(16)
        self.inner, self.inner_norm, self.outer = conv(16, 24), norm(24), conv(24, 16)
        self.last = conv(16, 2)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.last(torch.relu(x + self.outer(torch.relu(self.inner_norm(self.inner(x))))))


class Gated(nn.Module):
    """A feed-forward whose one layer makes values and gates."""

    def __init__(self, activation: Any, split: Any) -> None:
        super().__init__()
        self.make, self.last, self.activation, self.split = nn.Linear(8, 48), nn.Linear(24, 8), activation, split

    def forward(self, x):
        value, gate = self.split(self.make(x))
        return x + self.last(value * self.activation(gate))


class Swapped(Gated):
    """Values and gates go on side by side, in the other order, so that places matter."""

    def __init__(self) -> None:
        super().__init__(torch.sigmoid, None)
        self.last = nn.Linear(48, 8)

    def forward(self, x):
        value, gate = self.make(x).chunk(2, -1)
        return x + self.last(torch.cat((torch.sigmoid(gate), value), -1))


class GatedConvolution(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.make, self.last = conv(2, 32), conv(16, 2)
        self.norm = nn.GroupNorm(4, 32) if norm else nn.Identity()

    def forward(self, x):
        value, gate = self.norm(self.make(x)).chunk(2, 1)
        return self.last(value * torch.sigmoid(gate))


class Skip(nn.Module):
    """A UNet of one level; the long skip is joined before or after what comes from below."""

    def __init__(self, norm: bool = False, swapped: bool = False) -> None:
        super().__init__()
        self.first, self.down, self.up = conv(2, 16), conv(16, 24, stride=2), nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.norm = nn.GroupNorm(4, 28) if norm else nn.Identity()
        self.join, self.last, self.swapped = conv(28, 16), conv(16, 2), swapped

    def forward(self, x):
        long = torch.relu(self.first(x))
        below = self.up(torch.relu(self.down(long)))
        joined = torch.cat((below, long) if self.swapped else (long, below), 1)
        return self.last(torch.relu(self.join(self.norm(joined))))


class SkipFromInput(nn.Module):
    """The image itself is joined in, before the features: its channels have no layer that made them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(2, 16), conv(18, 2)

    def forward(self, x):
        return self.last(torch.cat((x, torch.relu(self.first(x))), 1))


class Parts(nn.Module):
    """Two parts of one layer go to layers of their own, by sizes that are written down (`fixed`), or by shares.

    torch-pruning numbers parts in the order in which it comes upon them, from the answer on: where `mistaken`, another one.
    """

    def __init__(self, fixed: bool = False, mistaken: bool = False) -> None:
        super().__init__()
        self.make, self.fixed, self.mistaken = nn.Linear(8, 32), fixed, mistaken
        self.first, self.second = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        made = torch.tanh(self.make(x))
        first, second = made.split([16, 16] if self.fixed else made.shape[-1] // 2, dim=-1)
        first, second = self.first(first), self.second(second).sin()
        return first + second if self.mistaken else second + first


class Slices(Parts):
    def forward(self, x):
        made = torch.tanh(self.make(x))
        half = made.shape[1] // 2
        return self.first(made[:, :half]) * self.second(made[:, half:])


class Attention(nn.Module):
    """Self-attention with three projections or one, whose number of heads is called `name`."""

    def __init__(self, fused: bool, name: str = "num_heads") -> None:
        super().__init__()
        self.names = ("qkv",) if fused else ("to_q", "to_k", "to_v")
        for own in self.names:
            setattr(self, own, nn.Linear(8, 96 if fused else 32))
        self.proj, self.name = nn.Linear(32, 8), name
        setattr(self, name, 4)

    def forward(self, x):
        made = torch.cat([getattr(self, own)(x) for own in self.names], -1) if len(self.names) > 1 else self.qkv(x)
        batch, tokens, _ = made.shape
        q, k, v = made.view(batch, tokens, 3, getattr(self, self.name), -1).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))


class Separate(Attention):
    def __init__(self, name: str = "heads") -> None:
        super().__init__(False, name)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (
            getattr(self, own)(x).view(batch, tokens, getattr(self, self.name), -1).transpose(1, 2)
            for own in self.names
        )
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))


class HeadNorm(nn.Module):
    """Channels are seen as heads, and each head is normalised by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.last = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        made = self.make(x)
        by_head = made.view(*made.shape[:-1], 4, -1)
        by_head = by_head / by_head.square().mean(-1, keepdim=True).add(1e-3).sqrt()
        return self.last(by_head.flatten(-2))


class Flat(nn.Module):
    """Images are flattened into one vector for a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(2, 16), nn.Linear(16 * 16, 8)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).flatten(1))


class Switched(nn.Module):
    """A branch that the example inputs, all of label 0, leave out: nothing tells whether its channels went rightly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x, y):
        return self.other(x) + (y > 5)[:, None] * self.last(torch.tanh(self.first(x)).sort(1).values)


class Unflat(nn.Module):
    """A vector becomes an image, whose places are channels and positions of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12 * 4), conv(12, 2)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).view(len(x), -1, 2, 2))


class SharedHeads(nn.Module):
    """Two heads of keys and values serve four of queries; of such repetitions torch-pruning loses where channels came from."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.last = nn.Linear(8, 32), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(32, 8)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (y[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(x), 4, -1, 8) for y in (k, v))
        return self.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Embedding, a parameter for positions, LayerNorm; the stream stays, and the hidden width goes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, 16), nn.Parameter(torch.randn(1, 6, 16))
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, x):
        x = self.embed(x) + self.position
        return self.last(x + self.down(F.gelu(self.up(self.norm(x)))))


class Labelled(nn.Module):
    """Labels are added to the features of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.label, self.last = conv(2, 16), nn.Embedding(5, 16), conv(16, 2)

    def forward(self, x, y):
        return self.last(torch.relu(self.first(x) + self.label(y)[:, :, None, None]))


class Scaled(nn.Module):
    """A parameter of its own scales each channel; a hand-written norm sees them as a whole where `norm`."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first, self.scale, self.last, self.norm = (
            nn.Linear(8, 24),
            nn.Parameter(torch.rand(24)),
            nn.Linear(24, 8),
            norm,
        )

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = x / x.square().mean(-1, keepdim=True).add(1e-3).sqrt() if self.norm else x
        return self.last(x * self.scale)


class Scales(nn.Module):
    """What `predict` flattens and joins: an answer at every scale."""

    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.stem, self.hidden, self.inner = conv(2, 8), conv(8, 12) if inner else nn.Identity(), inner
        self.first, self.second = conv(12 if inner else 8, 8), conv(8, 16, stride=2)
        self.third, self.fourth = conv(16, 32, stride=2), conv(32, 32)

    def forward(self, x):
        stem = self.hidden(self.stem(x))
        first = torch.relu(self.first(torch.relu(stem)))
        second = torch.relu(self.second(first))
        third = self.third(second)
        answers = first, second, third, third + self.fourth(third)
        return answers if self.inner else (stem, *answers)


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


IMAGE, TOKENS, VECTOR, SEQUENCE = (2, 4, 4), (6, 8), (8,), (2, 16)
HALVES = {
    "chunk": lambda x: x.chunk(2, dim=-1),
    "split": lambda x: x.split(x.shape[-1] // 2, dim=-1),
    "sizes": lambda x: x.split([24, 24], dim=-1),
}
PRUNED: dict[str, tuple[Any, tuple[int, ...], dict[str, int]]] = {
    "conv-bn-relu": (
        lambda: chain(
            conv(2, 16), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 24), nn.BatchNorm2d(24), nn.ReLU(), conv(24, 2)
        ),
        IMAGE,
        {"0": 8, "1": 8, "3": 12, "4": 12},
    ),
    "batch norm without factors": (
        lambda: chain(conv(2, 16), nn.BatchNorm2d(16, affine=False), conv(16, 2)),
        IMAGE,
        {"0": 8, "1": 8},
    ),
    "instance norm": (
        lambda: chain(conv(2, 16), nn.InstanceNorm2d(16, affine=True), conv(16, 2)),
        IMAGE,
        {"0": 8, "1": 8},
    ),
    "prelu": (lambda: chain(conv(2, 16), nn.PReLU(16), conv(16, 2)), IMAGE, {"0": 8, "1": 8}),
    "one prelu for all": (lambda: chain(conv(2, 16), nn.PReLU(), conv(16, 2)), IMAGE, {"0": 8}),
    "group norm": (
        lambda: chain(conv(2, 16), nn.GroupNorm(4, 16), nn.SiLU(), conv(16, 2)),
        IMAGE,
        {"0": 8, "1": 8},
    ),
    "group norm without factors": (
        lambda: chain(conv(2, 16), nn.GroupNorm(4, 16, affine=False), conv(16, 2)),
        IMAGE,
        {"0": 8, "1": 8},
    ),
    "residual, batch norm": (Residual, IMAGE, {"first": 8, "outer": 8, "inner": 12, "inner_norm": 12}),
    "residual, group norm": (
        lambda: Residual(lambda n: nn.GroupNorm(4, n)),
        IMAGE,
        {"first": 8, "outer": 8, "inner": 12, "inner_norm": 12},
    ),
    "transposed convolutions": (
        lambda: chain(
            nn.ConvTranspose2d(2, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 2, 4, 2, 1)
        ),
        IMAGE,
        {"0": 8, "1": 8},
    ),
    "transposed 1-D": (
        lambda: chain(nn.ConvTranspose1d(2, 16, 4, 2, 1), nn.ReLU(), nn.Conv1d(16, 2, 3)),
        SEQUENCE,
        {"0": 8},
    ),
    "1-D": (
        lambda: chain(nn.Conv1d(2, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 2, 3)),
        SEQUENCE,
        {"0": 8, "1": 8},
    ),
    "3-D": (lambda: chain(nn.Conv3d(2, 16, 1), nn.ReLU(), nn.Conv3d(16, 2, 1)), (2, 2, 2, 2), {"0": 8}),
    "depthwise": (
        lambda: chain(conv(2, 16, 1), nn.BatchNorm2d(16), conv(16, 16, groups=16), nn.ReLU(), conv(16, 2, 1)),
        IMAGE,
        {"0": 8, "1": 8, "2": 8},
    ),
    "linear": (lambda: chain(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)), VECTOR, {"0": 16}),
    "GLU, images": (GatedConvolution, IMAGE, {"make": 16}),
    "GLU, images, norm": (lambda: GatedConvolution(norm=True), IMAGE, {"make": 16, "norm": 16}),
    "GEGLU, vectors": (lambda: Gated(F.gelu, HALVES["chunk"]), VECTOR, {"make": 24}),
    "GEGLU, tokens": (lambda: Gated(F.gelu, HALVES["chunk"]), TOKENS, {"make": 24}),
    "SwiGLU, split": (lambda: Gated(F.silu, HALVES["split"]), TOKENS, {"make": 24}),
    "skip": (Skip, IMAGE, {"first": 8, "down": 12, "up": 6, "join": 8}),
    "skip, the other way round": (lambda: Skip(swapped=True), IMAGE, {"first": 8, "down": 12, "up": 6, "join": 8}),
    "slices, by share": (Slices, VECTOR, {"make": 16}),
    "parts, by share": (Parts, VECTOR, {"make": 16}),
    "parts, by share, tokens": (Parts, TOKENS, {"make": 16}),
    "flattened": (Flat, IMAGE, {"first": 8}),
    "a vector that becomes an image": (Unflat, VECTOR, {"first": 24, "last": 2}),
    "attention, three projections": (Separate, TOKENS, {"to_q": 16, "to_k": 16, "to_v": 16}),
    "attention, one projection": (lambda: Attention(True), TOKENS, {"qkv": 48}),
    "transformer": (Transformer, TOKENS, {"embed": 16, "up": 16}),
    "a scale of its own": (Scaled, TOKENS, {"first": 12}),
    "labels": (Labelled, (*IMAGE, -5), {"first": 8, "label": 8}),
    "answers at every scale, and a hidden width": (lambda: Scales(inner=True), IMAGE, {"stem": 4, "hidden": 6}),
}
LEFT: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "GLU as a layer": (
        lambda: chain(nn.Linear(8, 48), nn.GLU(), nn.Linear(24, 8)),
        VECTOR,
        "0: what is done before 2 changes how many there are",
    ),
    "GLU, sizes written down": (lambda: Gated(F.silu, HALVES["sizes"]), TOKENS, "make: .*does not run"),
    "parts taken for one another": (
        lambda: Parts(mistaken=True),
        VECTOR,
        "make: without them the model does not answer as if",
    ),
    "gate and values side by side": (Swapped, TOKENS, "cannot be traced"),
    "parts, sizes written down": (lambda: Parts(True), VECTOR, "make: .*does not run"),
    "groups": (
        lambda: chain(conv(2, 16), conv(16, 16, groups=4), conv(16, 2)),
        IMAGE,
        "0: they reach 1, a convolution with groups",
    ),
    "depthwise, more outputs": (
        lambda: chain(conv(2, 8), conv(8, 16, groups=8), conv(16, 2)),
        IMAGE,
        "0: they reach 1, a convolution with groups",
    ),
    "layer norm": (
        lambda: chain(nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 8)),
        TOKENS,
        "0: they reach 1, a LayerNorm",
    ),
    "a norm of its own": (lambda: Scaled(norm=True), TOKENS, "first: without them the model does not answer as if"),
    "heads with norms": (HeadNorm, TOKENS, "make: without them the model does not answer as if"),
    "heads that are not known": (lambda: Separate("n_heads"), TOKENS, "to_.: without them"),
    "the image joined in": (SkipFromInput, IMAGE, "first: "),
    "as many norm groups as channels": (
        lambda: chain(conv(2, 16), nn.GroupNorm(16, 16), conv(16, 2)),
        IMAGE,
        "0: of its 16 channels none can go",
    ),
    "answers at every scale": (Scales, IMAGE, "they reach the model's answer"),
    "a branch that is not used": (
        Switched,
        (8, -3),
        "first: on the example inputs the model's answer hardly depends on them",
    ),
    "one layer": (lambda: nn.Linear(8, 8), VECTOR, "shape"),
    "LSTM": (lambda: First(nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 8)), TOKENS, "no inner width"),
}


class First(nn.Module):
    """The first of what a layer answers goes on."""

    def __init__(self, layer: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = layer, last

    def forward(self, x):
        return self.last(self.layer(x)[0])


def built(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make().double().eval()
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return model


def example(shape: tuple[int, ...]) -> Example:
    sizes = [n for n in shape if n > 0]
    return Example(*sizes, classes=-min(0, *shape), double=True)


def without_statistics(model: nn.Module) -> nn.Module:
    """The model with GroupNorms that only scale and shift: what they measure changes with the channels that go."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):

            def scaled(x, own=module):
                shape = (-1, *[1] * (x.dim() - 2))
                return x if own.weight is None else x * own.weight.view(shape) + own.bias.view(shape)

            module.forward = scaled
    return model


def silenced(model: nn.Module, surgery: Surgery) -> nn.Module:
    """The model in which no layer reads what `surgery` takes from its inputs: written without the code under test."""
    quiet = copy.deepcopy(model)
    for name, module in quiet.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and f"{name}.weight" in surgery.kept:
            dim = 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
            depthwise = getattr(module, "groups", 1) > 1
            for index in set(range(module.weight.shape[dim])) - set(surgery.kept[f"{name}.weight"].get(dim, ())):
                if dim in surgery.kept[f"{name}.weight"] and not depthwise:
                    module.weight.data.select(dim, index).zero_()
    return quiet


def width(module: nn.Module) -> int:
    for key in ("out_features", "out_channels", "num_features", "num_channels", "num_parameters", "embedding_dim"):
        if isinstance(found := getattr(module, key, None), int):
            return found
    raise AssertionError(module)


@pytest.mark.parametrize("name", PRUNED)
def test_a_pruned_model_answers_as_the_dense_one_in_which_nothing_reads_what_went(name):
    """In double precision, on random inputs, at three densities, with random channels, before and after saving."""
    make, shape, widths = PRUNED[name]
    model, adapter = built(make), example(shape)
    groups = find_groups(model, adapter, 1)
    rng = torch.Generator().manual_seed(1)
    scores = [torch.rand(group.width, generator=rng) for group in groups]
    inputs = tuple(
        torch.randn(x.shape, generator=rng, dtype=x.dtype) if x.is_floating_point() else x
        for x in adapter.example_inputs(3)
    )
    for density in (0.3, 0.5, 0.8):
        surgery = removal(model, groups, scores, density)
        smaller = copy.deepcopy(model)
        surgery.apply(smaller)
        assert adapter.predict(smaller, inputs).shape == adapter.predict(model, inputs).shape
        if density == 0.5:
            assert {key: width(smaller.get_submodule(key)) for key in widths} == widths
        Surgery.from_json(surgery.to_json(), "here").apply(again := copy.deepcopy(model))
        assert torch.equal(adapter.predict(again, inputs), adapter.predict(smaller, inputs))
        expected = adapter.predict(without_statistics(silenced(model, surgery)), inputs)
        found = adapter.predict(without_statistics(smaller), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(adapter.predict(without_statistics(copy.deepcopy(model)), inputs), expected)


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_pruned_rightly_is_left_alone_for_a_plain_reason(name):
    make, shape, reason = LEFT[name]
    model, adapter = built(make), example(shape)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressorError, match=reason):
        find_groups(model, adapter, 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_heads_that_share_keys_and_values_are_left_alone():
    found = survey_groups(built(SharedHeads), example(TOKENS), 1)
    assert not found.groups and "repeat them for several heads" in found.left["q"]


def counted(channels: Channels) -> list[int]:
    """The numbers of channels that each step along `channels`' dependencies moves, as they come."""
    steps: list[int] = []

    def counting(mapping):
        def moved(indices):
            steps.append(len(indices))
            return indices if mapping is None else mapping(indices)

        return moved

    for node in channels.graph.module2node.values():
        for dependency in node.dependencies:
            dependency.index_mapping = [counting(dependency.index_mapping[0]), dependency.index_mapping[1]]
    return steps


@pytest.mark.timeout(100)
def test_outputs_that_are_flattened_and_joined_end_the_walk():
    """torch-pruning's own walk goes in rounds here, each with a longer list of channels: minutes, and gigabytes."""
    model, adapter = built(Scales), Example(2, 64, 64, double=True)
    with pytest.raises(CompressorError, match="they reach the model's answer"):
        find_groups(model, adapter, 1)


def test_every_channel_of_an_operation_is_followed_once_whatever_operations_do_to_it(monkeypatch):
    """Even if nothing stopped the walk at the answer."""
    monkeypatch.setattr(Channels, "_known", lambda *_: None)
    channels = Channels(built(Scales), Example(2, 16, 16, double=True))
    steps = counted(channels)
    dependencies = sum(len(node.dependencies) for node in channels.graph.module2node.values())
    for root in channels.roots():
        steps.clear()
        with contextlib.suppress(Refused):
            channels.together(root)
        assert 0 < sum(steps) <= dependencies * channels.limit


class Everything(nn.Module):
    """Layers of every kind from which channels go, for vectors of 16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.label = conv(1, 16), nn.BatchNorm2d(16), nn.Embedding(3, 16)
        self.each, self.act, self.scale = conv(16, 16, groups=16), nn.PReLU(16), nn.Parameter(torch.rand(1, 16, 1, 1))
        self.down, self.up, self.last = conv(16, 24, stride=2), nn.ConvTranspose2d(24, 12, 2, stride=2), conv(28, 1)

    def forward(self, x):
        long = self.norm(self.first(x.view(-1, 1, 4, 4)))
        long = self.act(self.each(long)) * self.scale + self.label(torch.arange(len(x)) % 3)[:, :, None, None]
        return self.last(torch.cat((long, self.up(torch.relu(self.down(long)))), 1)).flatten(1)


def test_a_pruned_model_of_every_kind_of_layer_is_trained_saved_and_loaded(adapter, samples, tmp_path):
    torch.manual_seed(0)
    model = Everything()
    pruner = Structured(density=0.5, multiple=1, timesteps=2, score="diff-pruning-released")
    result = compressor.prune(model, pruner, adapter=adapter, data=samples, steps=2, batch_size=8)
    kept = result.model
    assert (kept.first.out_channels, kept.norm.num_features, kept.each.groups, kept.act.num_parameters) == (8, 8, 8, 8)
    assert (kept.scale.shape, kept.label.embedding_dim) == ((1, 8, 1, 1), 8)
    assert (kept.down.out_channels, kept.up.in_channels, kept.up.out_channels, kept.last.in_channels) == (12, 12, 6, 14)
    compressor.save(tmp_path / "saved", kept, {})
    loaded = compressor.load(tmp_path / "saved", model=Everything())
    state = kept.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded.eval()(samples[:4]), kept.eval()(samples[:4]))


class Picky(nn.Module):
    """It takes zeros alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        if bool(x.any()):
            raise ValueError("zeros, please")
        return self.last(self.first(x))


def test_a_model_that_cannot_be_tried_is_refused():
    with pytest.raises(CompressorError, match=r"with random weights the model does not run: .*zeros, please"):
        find_groups(built(Picky), example(VECTOR), 1)
