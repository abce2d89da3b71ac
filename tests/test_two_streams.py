"""Transformers of two streams lose blocks and channels rightly, and what is left is a pipeline again where there is such a one."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from torch import nn

import compressor
from compressor.adapter import with_rules
from compressor.errors import CompressorError, ReshapedError
from compressor.model_zoo.generic import DiffusersAdapter
from compressor.model_zoo.generic.reshaped import as_configured
from compressor.plugins.depth import Depth, survey_blocks, without
from compressor.plugins.structured import Structured
from compressor.runs.directory import NO_PIPELINE, clear
from compressor.runs.run import commit_pipeline
from compressor.sparsity.surgery import Surgery, surgery_of
from compressor.weights import twin, weights_sha256

SMALL = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
FLUX = {
    **SMALL,
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "axes_dims_rope": (4, 4, 8),
}
SD3 = {**SMALL, "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 32}


class FewTokens(DiffusersAdapter):
    """FLUX at 64 x 64 pixels with nine tokens of text, so that it is quick."""

    def example_inputs(self, batch_size):
        found = super().example_inputs(batch_size)
        found["hidden_states"], found["img_ids"] = found["hidden_states"][:, :16], torch.rand(16, 3).round()
        found["encoder_hidden_states"], found["txt_ids"] = found["encoder_hidden_states"][:, :9], torch.zeros(9, 3)
        return found


def flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**FLUX)
    return model.eval(), FewTokens(config={**dict(model.config), "_class_name": "FluxTransformer2DModel"})


def sd3(layers=3):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**SD3, num_layers=layers)
    return model.eval(), DiffusersAdapter(config={**dict(model.config), "_class_name": "SD3Transformer2DModel"})


def lively(adapter, n=2, seed=1):
    """The example with random numbers."""
    rng = torch.Generator().manual_seed(seed)
    example = adapter.example_inputs(n)
    return {
        k: torch.randn(v.shape, generator=rng) if v.is_floating_point() and v.dim() == 3 else v
        for k, v in example.items()
    }


def batches(adapter):
    given = lively(adapter, 4)
    rng = torch.Generator().manual_seed(2)
    return [{**given, "target": torch.randn(given["hidden_states"].shape, generator=rng)}]


def stilled(model, name):
    """`model` in which the block `name` adds nothing to either stream."""
    quiet = copy.deepcopy(model)
    for part_name, part in quiet.get_submodule(name).named_modules():
        if part_name.endswith(("to_out.0", "to_add_out", "net.2", "proj_out")):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)
    return quiet


@pytest.mark.parametrize("make", [flux, sd3])
@torch.no_grad()
def test_a_model_without_a_block_answers_as_one_in_which_it_adds_nothing(make):
    model, adapter = make()
    inputs = lively(adapter)
    blocks = survey_blocks(model, adapter)
    lists = [model.transformer_blocks, getattr(model, "single_transformer_blocks", ())]
    assert len(blocks) == sum(map(len, lists)) and all(block.saves > 0 for block in blocks.values())
    dense = adapter.predict(model, inputs)
    for name in blocks:
        without((name,), blocks).apply(smaller := twin(model))
        found = adapter.predict(smaller, inputs)
        torch.testing.assert_close(found, adapter.predict(stilled(model, name), inputs), rtol=1e-5, atol=1e-5)
        assert (found - dense).abs().max() > 1e-3
        # the same where the block is called by place
        bypass = smaller.get_submodule(name)
        one, two = torch.zeros(1), torch.ones(1)
        assert [None if found is None else float(found) for found in bypass(one, two)][1] == 0.0


@pytest.mark.parametrize(("make", "macs"), [(flux, 0.6), (sd3, 0.8)])
def test_depth_is_pruned_trained_saved_and_loaded(make, macs, tmp_path):
    model, adapter = make()
    pruner = Depth(macs=macs, timesteps=1)
    result = compressor.prune(model, pruner, adapter=adapter, data=batches(adapter), steps=1, device="cpu")
    assert result.surgery.removed and set(result.surgery.passed) == set(result.surgery.removed)
    compressor.save(tmp_path / "saved", result.model, {})
    loaded = compressor.load(tmp_path / "saved", make()[0])
    assert surgery_of(loaded) == result.surgery
    inputs = lively(adapter)
    with torch.no_grad():
        assert torch.equal(adapter.predict(loaded, inputs), adapter.predict(result.model, inputs))


@pytest.mark.parametrize(
    ("make", "gone", "expected"),
    [
        (flux, ("transformer_blocks.0", "single_transformer_blocks.1"), {"num_layers": 1, "num_single_layers": 1}),
        (flux, ("single_transformer_blocks.0",), {"num_layers": 2, "num_single_layers": 1}),
        (sd3, ("transformer_blocks.1",), {"num_layers": 2}),
        (sd3, ("transformer_blocks.2",), None),  # the last block has no text stream, and another would have none then
    ],
)
@torch.no_grad()
def test_what_is_left_is_a_pipeline_where_a_configuration_gives_it(make, gone, expected, tmp_path):
    model, adapter = make()
    model = model.half()
    without(gone, survey_blocks(model.float(), adapter)).apply(model)
    model.half()
    if expected is None:
        with pytest.raises(ReshapedError, match="without these blocks it is no SD3Transformer2DModel"):
            adapter.write_pipeline(model, tmp_path)
        return
    adapter.write_pipeline(model, tmp_path)
    plain = type(model).from_pretrained(tmp_path, torch_dtype=torch.float16).eval()
    assert {key: plain.config[key] for key in expected} == expected
    inputs = lively(adapter)
    torch.testing.assert_close(adapter.predict(plain.float(), inputs), adapter.predict(model.float(), inputs))


def test_settings_that_name_layers_by_their_place_follow_them():
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(**SD3, num_layers=4, dual_attention_layers=(0, 2)).eval()
    adapter = DiffusersAdapter(config={**dict(model.config), "_class_name": "SD3Transformer2DModel"})
    without(("transformer_blocks.1",), survey_blocks(model, adapter)).apply(model)
    made = as_configured(model, adapter.config, adapter)
    assert (made.config["num_layers"], tuple(made.config["dual_attention_layers"])) == (3, (0, 1))


@pytest.mark.parametrize("make", [flux, sd3])
def test_channels_go_from_both_streams(make, tmp_path):
    model, adapter = make()
    adapter = with_rules(adapter, ("re:ff|attn",), None)
    pruner = Structured(density=0.5, score="magnitude", multiple=1)
    result = compressor.prune(model, pruner, adapter=adapter, data=batches(adapter), steps=1, device="cpu")
    names = {f"transformer_blocks.0.{part}.net.0.proj.weight" for part in ("ff", "ff_context")}
    assert names <= set(result.surgery.kept)
    for name in names:
        assert result.model.get_parameter(name).shape == (64, 32)
    with pytest.raises(ReshapedError, match="no setting for the inner widths"):
        adapter.write_pipeline(result.model, tmp_path)
    compressor.save(tmp_path / "saved", result.model, {})
    assert weights_sha256(compressor.load(tmp_path / "saved", make()[0])) == weights_sha256(result.model)


def test_a_surgery_passes_on_arguments_that_the_module_has():
    model, _ = sd3()
    for names in (("hidden_states", "nothing"), ()):
        with pytest.raises(CompressorError, match="cannot pass on"):
            Surgery(removed=("transformer_blocks.0",), passed={"transformer_blocks.0": names}).apply(model)
    with pytest.raises(CompressorError, match="cannot pass on"):
        Surgery(passed={"transformer_blocks.0": ("hidden_states",)}).apply(model)
    kept = Surgery(removed=("a.0",), passed={"a.0": (None, "x")})
    assert Surgery.from_json(kept.to_json(), "test") == kept


def test_a_run_says_why_there_is_no_pipeline(tmp_path):
    model, adapter = sd3()
    blocks = survey_blocks(model, adapter)
    without(("transformer_blocks.1",), blocks).apply(fewer := twin(model))
    commit_pipeline(adapter, fewer, tmp_path)
    assert (tmp_path / "pipeline" / "config.json").is_file() and not (tmp_path / NO_PIPELINE).exists()
    clear(tmp_path)
    without(("transformer_blocks.2",), blocks).apply(last := twin(model))
    commit_pipeline(adapter, last, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [NO_PIPELINE]
    said = (tmp_path / NO_PIPELINE).read_text()
    assert said.startswith("There is no pipeline/ here: without these blocks it is no SD3Transformer2DModel")
    plain = copy.copy(adapter)
    object.__setattr__(plain, "writes_reshaped", False)  # as an adapter that knows nothing of removed structure
    commit_pipeline(plain, fewer, tmp_path)
    assert "original shape" in (tmp_path / NO_PIPELINE).read_text() and not (tmp_path / "pipeline").exists()
    clear(tmp_path)
    assert not list(tmp_path.iterdir())
