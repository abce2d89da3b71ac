"""One-shot pruning of a model itself: the same masks as of a copy, and little memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from conftest import TinyAdapter, tiny_model

import compressor
from compressor import NM, CompressorError, Mask, parse
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.obs import OBS
from compressor.plugins.sparsedm import SparseDM
from compressor.plugins.wanda import Wanda
from compressor.sparsity.packed import PackedMasks


def data():
    return [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.mark.parametrize(
    "pruner",
    [Magnitude(), Wanda(timesteps=4), OBS(timesteps=4), SparseDM(), Magnitude(parse("unstructured:0.4"))],
    ids=str,
)
def test_it_is_what_pruning_a_copy_gives(pruner):
    model = tiny_model()
    expected = compressor.prune(copy.deepcopy(model), pruner, adapter=TinyAdapter(), data=data(), steps=0)
    found = compressor.prune_(model, pruner, adapter=TinyAdapter(), data=data())
    assert found.model is model
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert {n: torch.equal(m.keep, found.masks[n].keep) for n, m in expected.masks.items()} == dict.fromkeys(
        expected.masks, True
    )
    assert [(layer.name, layer.reason) for layer in found.layers] == [
        (layer.name, layer.reason) for layer in expected.layers
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_frozen_models_stay_what_they_are(dtype, tmp_path):
    model = tiny_model().to(dtype).requires_grad_(False)

    class Half(TinyAdapter):
        def predict(self, module, inputs):
            return module(inputs.to(dtype))

    found = compressor.prune_(model, OBS(timesteps=2), adapter=Half(), data=data())
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert not any(value.requires_grad for value in model.parameters())
    for name, mask in found.masks.items():
        mask.pattern.verify(model.get_parameter(name))
    compressor.save(tmp_path / "saved", model, found.masks)
    again = compressor.load(tmp_path / "saved", tiny_model().to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_what_is_frozen_beside_what_is_not_stays_dense_as_in_a_copy():
    """It was pruned; and whole numbers among the parameters ended in an error of torch that left all of them unfrozen."""
    model = tiny_model()
    model[0].weight.requires_grad_(False)
    model.numbers = torch.nn.Parameter(torch.arange(3), requires_grad=False)
    before = model[0].weight.clone()
    expected = compressor.prune(copy.deepcopy(model), Magnitude(), adapter=TinyAdapter(), data=data(), steps=0)
    found = compressor.prune_(model, Magnitude(), adapter=TinyAdapter(), data=data())
    assert set(found.masks) == set(expected.masks) == {"2.weight"}
    assert torch.equal(model[0].weight, before)
    assert [layer.reason for layer in found.layers] == [layer.reason for layer in expected.layers]

    model.requires_grad_(False)
    found = compressor.prune_(model, Magnitude(), adapter=TinyAdapter(), data=data())
    assert set(found.masks) == {"0.weight", "2.weight"}
    assert not any(value.requires_grad for value in model.parameters())


def test_a_model_that_nothing_fits_is_left_as_it_was():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressorError):
        compressor.prune_(model, Magnitude(NM(2, 7)), adapter=TinyAdapter(), data=data())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(3, 8), (4, 8, 3, 3), (5, 16)])
def test_packed_masks_are_the_same_masks(shape):
    masks = {
        str(seed): NM(2, 4).mask(torch.randn(shape, generator=torch.Generator().manual_seed(seed))) for seed in range(3)
    }
    packed = PackedMasks.of(masks)
    assert list(packed) == list(masks) and len(packed) == 3
    for name, mask in masks.items():
        assert torch.equal(packed[name].keep, mask.keep) and packed[name].pattern == mask.pattern
        packed[name].verify()
    assert isinstance(packed["0"], Mask) and "9" not in packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_is_pruned_itself_as_its_copy_is(tmp_path: Path, dtype: torch.dtype) -> None:
    pipe = tiny_pipelines.made("sd3", tmp_path / "files").to(dtype)
    pipe.set_progress_bar_config(disable=True)
    records = compressor.record(pipe, tiny_pipelines.PROMPTS, tmp_path / "records", n=2, unseen=1, steps=2)
    pruner = Magnitude(parse("4:2:4"))
    expected = compressor.prune(pipe, pruner, data=records, steps=0)
    found = compressor.prune_(pipe, pruner, data=records)
    assert found.model is pipe.transformer and {value.dtype for value in found.model.parameters()} == {dtype}
    assert found.masks and found.masks.keys() == expected.masks.keys()
    assert all(torch.equal(mask.keep, expected.masks[name].keep) for name, mask in found.masks.items())
    with pytest.raises(CompressorError, match="weights"):
        compressor.prune_(pipe, OBS(timesteps=2), data=records)  # what was recorded was the dense model


def test_what_a_pipeline_or_a_module_lacks_is_said(tmp_path: Path) -> None:
    pipe = tiny_pipelines.made("sd3", tmp_path / "files")
    with pytest.raises(CompressorError, match="needs data=, the records"):
        compressor.prune_(pipe, Magnitude(), data=data())
    with pytest.raises(CompressorError, match="its own adapter"):
        compressor.prune_(pipe, Magnitude(), adapter=TinyAdapter(), data=data())
    with pytest.raises(CompressorError, match="needs adapter= and data="):
        compressor.prune_(tiny_model(), Magnitude(), data=data())
    with pytest.raises(CompressorError, match="part is for pipelines"):
        compressor.prune_(tiny_model(), Magnitude(), adapter=TinyAdapter(), data=data(), part="unet")
