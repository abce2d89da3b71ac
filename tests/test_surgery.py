"""Removed structure as data: carried out whole or not at all, stored as JSON, and never able to make anything larger."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import compressor
from compressor import CompressorError
from compressor.sparsity.surgery import Surgery, surgery_of
from compressor.weights import sketch

NARROWER = Surgery(
    {"0.weight": {0: (1, 4, 9)}, "0.bias": {0: (1, 4, 9)}, "2.weight": {1: (1, 4, 9)}},
    {"0": {"out_features": 3}, "2": {"in_features": 3}},
)


def test_what_stays_is_what_was_there(model):
    narrow = copy.deepcopy(model)
    NARROWER.apply(narrow)
    assert torch.equal(narrow[0].weight, model[0].weight[[1, 4, 9]])
    assert (narrow[0].out_features, narrow[2].in_features) == (3, 3)
    silenced = copy.deepcopy(model)
    gone = [i for i in range(32) if i not in (1, 4, 9)]
    with torch.no_grad():
        silenced[2].weight[:, gone] = 0
    x = torch.randn(5, 16)
    torch.testing.assert_close(narrow(x), silenced(x))


def test_frozen_parameters_stay_frozen(model):
    model[0].weight.requires_grad_(False)
    NARROWER.apply(model)
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad


def test_json_and_back(model):
    again = Surgery.from_json(json.loads(json.dumps(NARROWER.to_json())), "here")
    assert again == NARROWER


def test_a_model_remembers_two_operations_as_one(model, tmp_path):
    twice, once = copy.deepcopy(model), copy.deepcopy(model)
    NARROWER.apply(twice)
    second = Surgery(
        {"0.weight": {0: (0, 2)}, "0.bias": {0: (0, 2)}, "2.weight": {1: (0, 2)}},
        {"0": {"out_features": 2}, "2": {"in_features": 2}},
    )
    second.apply(twice)
    surgery_of(twice).apply(once)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    compressor.save(tmp_path / "saved", twice, {})
    loaded = compressor.load(tmp_path / "saved", model=copy.deepcopy(model))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), twice.parameters(), strict=True))
    again = compressor.load(tmp_path / "saved", model=copy.deepcopy(twice))  # narrow already
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), twice.parameters(), strict=True))


def content(**changes):
    return {**NARROWER.to_json(), **changes}


@pytest.mark.parametrize(
    "bad",
    [
        {"schema_version": 2},
        {"kept": {"0.weight": {"0": [4, 1]}}},
        {"kept": {"0.weight": {"0": [1, 1]}}},
        {"kept": {"0.weight": {"0": [-1]}}},
        {"kept": {"0.weight": {"0": [32]}}},
        {"kept": {"0.weight": {"0": []}}},
        {"kept": {"0.weight": {"7": [0]}}},
        {"kept": {"0.weight": {"2": [0]}}},
        {"kept": {"9.weight": {"0": [0]}}},
        {"kept": {"0.weight": [0]}},
        {"numbers": {"0": {"out_features": 64}}},
        {"numbers": {"0": {"out_features": 0}}},
        {"numbers": {"0": {"out_features": "forward"}}},
        {"numbers": {"0": {"training": 1}}},
        {"numbers": {"0": {"forward": 1}}},
        {"numbers": {"0": {"new": 1}}},
        {"numbers": {"": {"_modules": 1}}},
        {"numbers": {"nowhere": {"out_features": 1}}},
        {"extra": 1},
        {"removed": ["nowhere"]},
        {"removed": [""]},
        {"removed": ["0"]},
        {"removed": ["1", "1"]},
        {"removed": "1"},
        {"removed": [1]},
    ],
)
def test_hostile_content_is_refused_and_changes_nothing(bad, model):
    before = copy.deepcopy(model)
    with pytest.raises(CompressorError):
        Surgery.from_json(content(**bad), "here").apply(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert model[0].out_features == 32
    assert surgery_of(model) is None


def test_shared_tensors_are_refused(model):
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    with pytest.raises(CompressorError, match="shared"):
        Surgery({"0.weight": {0: (0,)}}).apply(tied)


def test_dims_are_counted_from_the_front(model):
    with pytest.raises(CompressorError, match="dim -1"):
        Surgery({"0.weight": {-1: (0,)}}).apply(model)


def test_a_removed_module_hands_on_its_first_argument(model, tmp_path):
    model.append(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    shorter = copy.deepcopy(model)
    Surgery(removed=("3",)).apply(shorter)
    x = torch.randn(5, 16)
    torch.testing.assert_close(shorter(x), model[:3](x))
    assert not any(name.startswith("3.") for name, _ in shorter.named_parameters())
    compressor.save(tmp_path / "saved", shorter, {})
    again = compressor.load(tmp_path / "saved", model=copy.deepcopy(model))
    torch.testing.assert_close(again(x), shorter(x))
    assert surgery_of(again) == Surgery(removed=("3",))


def test_what_is_removed_takes_along_what_was_said_of_it(model):
    NARROWER.apply(model)
    Surgery(removed=("1",)).apply(model)
    Surgery(removed=("0",)).apply(model)
    found = surgery_of(model)
    assert found == Surgery({"2.weight": {1: (1, 4, 9)}}, {"2": {"in_features": 3}}, ("1", "0"))
    assert Surgery.from_json(json.loads(json.dumps(found.to_json())), "here") == found


def test_a_changed_surgery_file_is_found(model, tmp_path):
    narrow = copy.deepcopy(model)
    NARROWER.apply(narrow)
    compressor.save(tmp_path / "saved", narrow, {})
    assert not [path for path in (tmp_path / "saved").iterdir() if path.suffix in (".pkl", ".pt", ".pth", ".bin")]
    (tmp_path / "saved" / "surgery.json").write_text("{}")
    before = copy.deepcopy(model)
    with pytest.raises(CompressorError, match=r"surgery\.json"):
        compressor.load(tmp_path / "saved", model=model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_sketch_has_shapes_and_no_memory(model):
    empty = sketch(model)
    assert all(p.is_meta for p in empty.parameters())
    assert not any(p.is_meta for p in model.parameters())
    assert empty(torch.zeros(3, 16, device="meta")).shape == (3, 16)


def test_a_model_of_diffusers_does_not_write_a_folder_that_would_not_load(tmp_path):
    from diffusers import UNet2DModel

    whole = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    Surgery().apply(same := copy.deepcopy(whole))
    narrow = copy.deepcopy(whole)
    some = tuple(range(16))
    Surgery(
        {
            "time_embedding.linear_1.weight": {0: some},
            "time_embedding.linear_1.bias": {0: some},
            "time_embedding.linear_2.weight": {1: some},
        },
        {"time_embedding.linear_1": {"out_features": 16}, "time_embedding.linear_2": {"in_features": 16}},
    ).apply(narrow)
    assert narrow(torch.zeros(1, 3, 8, 8), 0).sample.shape == (1, 3, 8, 8)
    for one in (narrow, copy.deepcopy(narrow)):
        with pytest.raises(CompressorError, match="a folder that does not load"):
            one.save_pretrained(tmp_path / "narrow")
    assert not (tmp_path / "narrow").exists()
    for name, one in (("whole", whole), ("same", same)):
        one.save_pretrained(tmp_path / name)
        UNet2DModel.from_pretrained(tmp_path / name)
