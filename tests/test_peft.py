"""Adapters of peft in a model: refused, by name, before anything is done; gone once they are merged or taken out."""

from __future__ import annotations

import diffusers
import pytest
import torch
from conftest import tiny_model

import compressor
from compressor.errors import UsageError
from compressor.plugins.magnitude import Magnitude
from compressor.weights import weights_sha256

peft = pytest.importorskip("peft")


def wrapped():
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["0", "2"], r=2))


def injected():
    """The base model, into which peft has put its layers."""
    model = tiny_model()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"], r=2))
    return model


def of_another_kind():
    return peft.get_peft_model(tiny_model(), peft.LoHaConfig(target_modules=["0"], r=2))


def kept_beside():
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["0"], modules_to_save=["2"], r=2))


def with_adapter():
    model = diffusers.UNet2DModel(
        **{"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16,), "norm_num_groups": 8},
        **{"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)},
    )
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["to_q", "to_k"], r=2), model)
    return model


KINDS = [wrapped, injected, of_another_kind, kept_beside, with_adapter]


def entrances(model, adapter, samples, folder):
    """Every way in for a model, as a call of no arguments."""
    return {
        "prune": lambda: compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=0),
        "save": lambda: compressor.save(folder / "saved", model, {}),
        "load": lambda: compressor.load(folder / "plain", model),
        "lower": lambda: compressor.lower(model, samples),
        "layers": lambda: compressor.choose_layers(model, Magnitude(), adapter, None, None),
    }


@pytest.mark.parametrize("make", KINDS)
def test_adapters_are_refused_everywhere_by_name(make, adapter, samples, tmp_path):
    model = make()
    compressor.save(tmp_path / "plain", tiny_model(), {})
    names = list(model.state_dict())
    for call in entrances(model, adapter, samples, tmp_path).values():
        with pytest.raises(UsageError, match=r"holds adapters of peft: \S+") as refused:
            call()
        assert "merge_and_unload" in str(refused.value) and "fuse_lora" in str(refused.value)
    assert list(model.state_dict()) == names and not (tmp_path / "saved").exists()


def test_the_layers_are_named(adapter, samples):
    with pytest.raises(UsageError, match=r"Sequential holds adapters of peft: 0, 2"):
        compressor.prune(injected(), Magnitude(), adapter=adapter, data=samples, steps=0)
    with pytest.raises(UsageError, match=r"UNet2DModel holds .*attentions\.0\.to_q.* and \d+ more"):
        compressor.lower(with_adapter(), samples)


def test_a_merged_model_is_a_model(adapter, samples):
    model = wrapped()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    merged = model.merge_and_unload()
    result = compressor.prune(merged, Magnitude(), adapter=adapter, data=samples, steps=0, device="cpu")
    assert sorted(result.masks) == ["0.weight", "2.weight"]
    assert weights_sha256(merged) != weights_sha256(tiny_model())


def test_a_fused_model_of_diffusers_is_a_model_once_its_adapters_are_unloaded(samples):
    torch.manual_seed(0)
    unet = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 16), "norm_num_groups": 8}
    model = diffusers.UNet2DConditionModel(
        **unet,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    names = list(model.state_dict())
    model.add_adapter(peft.LoraConfig(target_modules=["to_q"], r=2))
    model.fuse_lora()
    with pytest.raises(UsageError, match="adapters of peft"):
        compressor.choose_layers(model, Magnitude(), compressor_adapter(), None, None)
    model.unload_lora()
    model.requires_grad_(True)  # peft froze it
    assert list(model.state_dict()) == names
    assert compressor.choose_layers(model, Magnitude(), compressor_adapter(), None, None)


def compressor_adapter():
    from compressor import registry

    return registry.adapter("diffusers")
