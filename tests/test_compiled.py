"""Models that torch.compile or DataParallel put something around: no name of theirs is in a mask, a layer or a file."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_model
from torch import nn

import compressor
from compressor import CompressorError, saving
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.structured import Structured
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
