"""Models that torch.compile or DataParallel put something around: no name of theirs is in a mask, a layer or a file."""

from __future__ import annotations

import copy
import gc
from functools import partial

import pytest
import torch
from conftest import tiny_model
from torch import nn

import compressor
from compressor import CompressorError, discovery, saving
from compressor.lower import Backend, dense_operators
from compressor.lower.dense import PrepackedLinear
from compressor.lower.graphs import Graphed
from compressor.lower.units import find_units, put
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.structured import Structured
from compressor.sparsity.notation import parse
from compressor.weights import bare, read_outline, weights_sha256


def compiled(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def inside(model):
    model[0] = compiled(model[0])
    return model


def twice(model):
    return compiled(inside(model))


WAYS = [compiled, in_place, inside, twice, nn.DataParallel]


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def wrapped(request):
    return request.param(tiny_model())


@pytest.mark.parametrize("steps", [0, 2])
def test_a_wrapped_model_is_pruned_saved_and_loaded_by_its_plain_names(wrapped, steps, adapter, samples, tmp_path):
    settings = {"adapter": adapter, "data": samples, "steps": steps, "batch_size": 8, "device": "cpu"}
    settings |= {"targets": ["0"]}
    names = list(wrapped.state_dict())
    result = compressor.prune(wrapped, Magnitude(), **settings)
    expected = compressor.prune(tiny_model(), Magnitude(), **settings)
    assert list(wrapped.state_dict()) == names  # the given model is as it was
    assert type(result.model) is nn.Sequential and list(result.model.state_dict()) == list(tiny_model().state_dict())
    assert weights_sha256(result.model) == weights_sha256(expected.model)
    assert list(result.masks) == ["0.weight"]
    assert [layer.module_name for layer in result.layers] == ["0", "2"]
    compressor.save(tmp_path / "saved", result.model, result.masks)
    assert weights_sha256(compressor.load(tmp_path / "saved", tiny_model(1))) == weights_sha256(result.model)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_wrapped_after_pruning_is_saved_and_filled_by_its_plain_names(way, adapter, samples, tmp_path):
    settings = {"adapter": adapter, "data": samples, "steps": 0, "device": "cpu"}
    result = compressor.prune(tiny_model(), Magnitude(), **settings)
    expected = weights_sha256(result.model)
    model = way(copy.deepcopy(result.model))
    named = {name: result.masks[name.replace("_orig_mod.", "")] for name in result.masks}
    compressor.save(tmp_path / "saved", model, {f"_orig_mod.{name}": mask for name, mask in named.items()})
    text = (tmp_path / "saved" / "config.json").read_text() + str(
        list(read_outline(tmp_path / "saved/model.safetensors"))
    )
    assert "_orig_mod" not in text and "module." not in text
    assert sorted(saving.read_config(tmp_path / "saved").patterns) == ["0.weight", "2.weight"]
    given = way(tiny_model(1))
    loaded = compressor.load(tmp_path / "saved", given)
    assert loaded is given and not loaded.training
    assert weights_sha256(bare(loaded)) == expected


def test_a_part_that_is_used_twice_stays_one_part():
    model = tiny_model()
    shared = compiled(nn.Linear(4, 4))
    tree = nn.ModuleDict({"one": shared, "two": shared, "three": shared._orig_mod, "rest": model})
    found = bare(tree)
    assert found["one"] is found["two"] and found["one"] is found["three"] and type(found["one"]) is nn.Linear
    assert found["one"].weight is shared._orig_mod.weight
    assert bare(model) is model


def test_removed_structure_is_not_loaded_into_a_model_with_compiled_parts(adapter, samples, tmp_path):
    settings = {"adapter": adapter, "data": samples, "steps": 0, "device": "cpu"}
    result = compressor.prune(compiled(tiny_model()), Structured(macs=0.5, multiple=1), **settings)
    compressor.save(tmp_path / "saved", compiled(result.model), {})
    loaded = compressor.load(tmp_path / "saved", compiled(tiny_model(1)))
    assert weights_sha256(bare(loaded)) == weights_sha256(result.model)
    before = weights_sha256(given := inside(tiny_model(1)))
    with pytest.raises(CompressorError, match="parts of the given model are compiled"):
        compressor.load(tmp_path / "saved", given)
    assert weights_sha256(given) == before


def test_a_compiled_model_is_lowered_as_the_plain_one(wrapped):
    x = torch.randn(4, 16)
    lowered = compressor.lower(wrapped, x, backends=["onednn"], cache=False)
    assert [layer.name for layer in lowered.plan.layers] == ["0", "2"]
    torch.testing.assert_close(lowered.model(x), tiny_model()(x), rtol=1e-4, atol=1e-5)


class Mixture(nn.Module):
    """A convolution of each kind, a feed-forward pair and a Linear, all of them `pattern`."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.stride = nn.Conv2d(32, 32, 3, stride=2, padding=2, dilation=2, bias=False)
        self.ff = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.out = nn.Linear(32, 32)
        for layer in self.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.weight.data.copy_(parse(pattern).mask(layer.weight.detach().abs()).apply(layer.weight.detach()))

    def forward(self, x):
        x = self.stride(self.conv(x)).flatten(2).transpose(1, 2)
        return self.out(x + self.ff(x))


@torch.no_grad()
def with_backend(model, backend, x):
    """`model` with every unit that `backend` takes in its form, and how many those are."""
    form, taken = copy.deepcopy(model), 0
    for one in find_units(form, partial(form, x))[0]:
        if backend.refusal(one.unit) is None:
            form, taken = put(form, one.at, backend.build(one.unit)), taken + 1
    return form, taken


@pytest.mark.parametrize(
    ("name", "pattern", "least"),
    [("vnm", "4:2:4", 3), ("vnm", "4c:2:4", 3), ("gathered", "16:2:4", 2), ("onednn", "2:4", 4)],
)
def test_lowered_layers_are_one_graph_that_answers_as_they_do(name, pattern, least):
    torch.manual_seed(0)
    backend = discovery.made("backends", name, Backend)
    if reason := backend.unavailable(torch.device("cpu")):
        pytest.skip(reason)
    model, x = Mixture(pattern).eval(), torch.randn(2, 16, 8, 8)
    form, taken = with_backend(model, backend, x)
    assert taken >= least
    torch._dynamo.reset()
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        others = (torch.randn(3, 16, 6, 10),) if name == "onednn" else ()
        for inputs in (x, *others):
            torch.testing.assert_close(compiled(inputs), form(inputs), rtol=0, atol=0)
            torch.testing.assert_close(compiled(inputs), model(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_lowered_model_is_one_graph(dtype):
    torch.manual_seed(0)
    model, x = Mixture("4:2:4").eval(), torch.randn(2, 16, 8, 8)
    lowered = compressor.lower(model, x, dtype=dtype, cache=False).model
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(lowered, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(found, lowered(x))
    assert found.dtype == torch.float32


def test_a_model_that_records_its_calls_leaves_that_to_the_compiler():
    model = tiny_model()
    torch._dynamo.reset()
    x = torch.randn(2, 16)
    with torch.no_grad():
        assert torch.equal(torch.compile(Graphed(model), fullgraph=True, backend="eager")(x), model(x))


def test_a_packed_weight_goes_when_its_last_module_does():
    backend = discovery.made("backends", "onednn", Backend)
    if reason := backend.unavailable(torch.device("cpu")):
        pytest.skip(reason)
    form, _ = with_backend(Mixture("2:4"), backend, torch.randn(2, 16, 8, 8))
    number = form.out.number
    second = copy.deepcopy(form)
    del form
    gc.collect()
    assert second.out.number == number and number in dense_operators._held
    del second
    gc.collect()
    assert number not in dense_operators._held


@pytest.fixture
def packed_model():
    """Convolutions, a pair and Linears with their weights packed by oneDNN, the dense model, and what both are called with."""
    backend = discovery.made("backends", "onednn", Backend)
    if reason := backend.unavailable(torch.device("cpu")):
        pytest.skip(reason)
    torch.manual_seed(0)
    model, x = Mixture("2:4").eval(), torch.randn(2, 16, 8, 8)
    return with_backend(model, backend, x)[0], model, x


@torch.no_grad()
def test_packed_weights_go_with_what_is_exported(packed_model):
    form, model, x = packed_model
    batch = torch.export.Dim("batch")
    exported = torch.export.export(form, (x,), dynamic_shapes=({0: batch},))
    # by their numbers another process would find other weights, or none
    assert "packed" not in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x[:1]), model(x[:1]), rtol=1e-4, atol=1e-5)
    strict = torch.export.export(form, (x,), strict=True)
    torch.testing.assert_close(strict.module()(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_packed_weights_are_pickled(packed_model, tmp_path, monkeypatch):
    form, _, x = packed_model
    torch.save(form, tmp_path / "lowered.pt")
    monkeypatch.setattr(dense_operators, "_held", {})  # as in another process
    again = torch.load(tmp_path / "lowered.pt", weights_only=False)
    assert again.out.packed is not form.out.packed and again.out.number == form.out.number
    assert torch.equal(again(x), form(x))
    del dense_operators._held[again.out.number]
    with pytest.raises(CompressorError, match="needs a packed weight that this process does not have"):
        torch.ops.compressor.packed_linear(x, None, again.out.number, "none", "")


@torch.no_grad()
def test_a_state_belongs_to_the_weights_that_it_was_packed_of(packed_model):
    form, _, x = packed_model
    expected = form(x)
    changed = copy.deepcopy(form)
    for bias in changed.buffers():
        bias.zero_()
    changed.load_state_dict(form.state_dict())
    assert torch.equal(changed(x), expected)
    torch.manual_seed(1)
    other, _ = with_backend(Mixture("2:4").eval(), discovery.made("backends", "onednn", Backend), x)
    with pytest.raises(CompressorError, match="or of other weights"):  # it has their biases alone
        other.load_state_dict(form.state_dict())


def test_what_is_compiled_for_a_packed_weight_is_known_by_its_numbers(packed_model):
    first, like, other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 16, bias=False)
    like.load_state_dict(first.state_dict())
    made = [PrepackedLinear(layer, 4) for layer in (first, like, other)]
    made.append(PrepackedLinear(first, 1024))
    assert made[0].packed is made[1].packed
    assert len({one.number for one in made}) == 3  # torch keeps on disk what it compiled, by these


@torch.no_grad()
def test_packed_layers_take_what_autocast_makes(packed_model):
    form, model, x = packed_model
    half = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = form(half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), model(x), rtol=0.1, atol=0.1)
    with pytest.raises(CompressorError, match=r"got torch\.float64; it takes float32 or bfloat16"):
        form(x.double())


@torch.no_grad()
@pytest.mark.parametrize("name", ["onednn", "vnm", "vnm-dense", "vnm-int8", "vnm-dense-int8"])
def test_lowered_convolutions_take_an_image_without_a_batch(name):
    backend = discovery.made("backends", name, Backend)
    if reason := backend.unavailable(torch.device("cpu")):
        pytest.skip(reason)
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    conv.weight.copy_(parse("4:2:4").mask(conv.weight.detach().abs()).apply(conv.weight.detach()))
    form, _ = with_backend(conv, backend, torch.randn(2, 8, 8, 6))
    x = torch.randn(8, 8, 6)  # as many rows as channels
    assert form(x).shape == (8, 8, 6) and float((form(x) - conv(x)).norm() / conv(x).norm()) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("name", ["onednn", "vnm", "vnm-int8", "vnm-dense-int8"])
def test_lowered_layers_are_exported_for_any_batch(name):
    backend = discovery.made("backends", name, Backend)
    if reason := backend.unavailable(torch.device("cpu")):
        pytest.skip(reason)
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8)
    form, _ = with_backend(Mixture("4:2:4").eval(), backend, x)
    exported = torch.export.export(form, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for one in (x, torch.randn(5, 16, 8, 8)):
        torch.testing.assert_close(exported.module()(one), form(one))
