"""Models in half precision and frozen ones: pruned and trained in float32, and given back as they came."""

from __future__ import annotations

import copy

import diffusers
import numpy as np
import pytest
import tiny_denoisers
import torch
from conftest import TinyAdapter, tiny_model
from torch import nn

import compressor
from compressor import CompressorError, registry
from compressor.adapter import Adapter, as_taken
from compressor.files import read_json
from compressor.lower.backend import Backend
from compressor.lower.job import built, prepared
from compressor.plugins.depth import Depth
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.obs import OBS
from compressor.plugins.sparsedm import SparseDM
from compressor.plugins.structured import Structured
from compressor.plugins.wanda import Wanda
from compressor.runs.speed import precision_of
from compressor.weights import dtypes_of, weights_sha256

HALF = (torch.float16, torch.bfloat16)
CONDITIONED = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 10,
    "cross_attention_dim": 128,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": 32,
}


def pixart(dtype):
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(**CONDITIONED).to(dtype)


@pytest.mark.parametrize("first", [torch.float32, *HALF])
@pytest.mark.parametrize("second", [torch.float32, *HALF])
def test_inputs_are_in_the_dtype_of_the_first_weight_in_torchs_order(first, second):
    inner = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4).to(first))
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"a": inner, "b": nn.Linear(4, 4).to(second)}))
    model.none = None
    assert next(value.dtype for value in model.parameters() if value.dim() > 1) == first
    images, times = as_taken((torch.randn(2, 4), torch.rand(2)), model)
    assert images.dtype == first and times.dtype == torch.float32
    assert as_taken(torch.randn(2, 4), nn.LayerNorm(4).bfloat16()).dtype == torch.float32


def test_weights_that_a_model_keeps_in_float32_do_not_say_what_it_takes():
    model = tiny_denoisers.wan().pipeline.transformer.bfloat16()
    model.scale_shift_table.data = model.scale_shift_table.float()
    assert as_taken(torch.randn(2, 4), model).dtype == torch.bfloat16


class Packed(Backend):
    """The dense layer, its weights no parameters any more."""

    name = "packed"
    skips_zeros = False

    def unavailable(self, device):
        return None

    def refusal(self, unit):
        return None

    def build(self, unit):
        module = copy.deepcopy(unit.module)
        for part in module.modules():
            for name, value in list(part.named_parameters(recurse=False)):
                delattr(part, name)
                part.register_buffer(name, value.detach())
        return module


@pytest.mark.parametrize("name", ["uvit-digits", "ddpm-digits"])
@torch.no_grad()
def test_a_lowered_model_without_a_weight_left_takes_what_the_model_took(name):
    """Every weight of it is packed, and none says in which dtype inputs are to be."""
    torch.manual_seed(0)
    adapter = registry.adapter(name)
    model = adapter.build().eval().to(torch.bfloat16)
    inputs = adapter.example_inputs(2)
    job = prepared(model, inputs, [Packed()], None, adapter)
    form = built(job, {one.at: "packed" for one in job.found})
    wanted = adapter.predict(model, inputs)
    found = adapter.predict(form, inputs)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wanted)
    assert as_taken(torch.randn(2, 4), torch.compile(form)).dtype == torch.bfloat16


def stored_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("pruner", [Magnitude(), Wanda(), OBS(), SparseDM()], ids=lambda pruner: type(pruner).__name__)
def test_one_shot_gives_the_masked_weights_of_the_given_dtype(dtype, pruner, adapter, samples):
    model = tiny_model().to(dtype)
    before = copy.deepcopy(model.state_dict())
    result = compressor.prune(model, pruner, adapter=adapter, data=samples, steps=0, device="cpu")
    assert set(dtypes_of(result.model).values()) == {dtype}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, mask in result.masks.items():
        weight = result.model.get_parameter(name)
        assert not bool(weight[~mask.keep].any())
        if not isinstance(pruner, OBS):  # which updates what it keeps
            assert torch.equal(weight[mask.keep], before[name][mask.keep])


@pytest.mark.parametrize("dtype", HALF)
def test_training_goes_through_float32_masters(dtype, adapter, samples):
    """As if the model had been float32: rounded once, at the end, not at every step."""
    model = tiny_model().to(dtype)
    settings = {"adapter": adapter, "data": samples, "steps": 6, "batch_size": 16, "lr": 1e-4, "device": "cpu"}
    result = compressor.prune(model, SparseDM(), **settings)
    expected = compressor.prune(copy.deepcopy(model).float(), SparseDM(), **settings)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value.to(dtype))
        assert not torch.equal(value.to(dtype).float(), value)
    for name, mask in result.masks.items():
        assert not bool(result.model.get_parameter(name)[~mask.keep].any())
        mask.pattern.verify(result.model.get_parameter(name).detach())


def test_each_tensor_comes_back_in_its_own_dtype(adapter, samples, tmp_path):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model().half()
            self.scale = nn.Parameter(torch.ones(16))
            self.register_buffer("shift", torch.zeros(16, dtype=torch.bfloat16), persistent=False)
            self.register_buffer("count", torch.zeros(1, dtype=torch.int64))

        def forward(self, x):
            return self.inner(x) * self.scale + self.shift

    model = Mixed()
    result = compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=2, batch_size=8, device="cpu")
    assert dtypes_of(result.model) == dtypes_of(model)
    assert len(set(dtypes_of(model).values())) == 3 and result.model.count.dtype == torch.int64
    compressor.save(tmp_path / "saved", result.model, result.masks)
    loaded = compressor.load(tmp_path / "saved", Mixed())
    assert weights_sha256(loaded) == weights_sha256(result.model)


@pytest.mark.parametrize("pruner", [Structured(macs=0.6, multiple=1), Depth(macs=0.7)], ids=["structured", "depth"])
def test_removed_structure_keeps_the_dtype(pruner):
    adapter = registry.adapter("uvit-digits").small()
    model = adapter.build().half()
    images = torch.rand(16, *adapter.image_shape) * 2 - 1
    data = [(images, torch.arange(16) % adapter.num_classes) if adapter.num_classes else images]
    result = compressor.prune(model, pruner, adapter=adapter, data=data, steps=1, device="cpu")
    assert result.surgery is not None and set(dtypes_of(result.model).values()) == {torch.float16}


def test_one_shot_prunes_frozen_models_and_training_refuses_them(adapter, samples):
    model = tiny_model().requires_grad_(False)
    expected = compressor.prune(tiny_model(), Magnitude(), adapter=adapter, data=samples, steps=0, device="cpu")
    result = compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=0, device="cpu")
    assert weights_sha256(result.model) == weights_sha256(expected.model)
    assert not any(value.requires_grad for value in (*model.parameters(), *result.model.parameters()))
    with pytest.raises(CompressorError, match="frozen"):
        compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=1, device="cpu")
    model[2].requires_grad_(True)  # what is frozen beside what is not stays dense
    result = compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=0, device="cpu")
    assert list(result.masks) == ["2.weight"]


@pytest.mark.parametrize("steps", [0, 1])
def test_what_float16_cannot_hold_is_an_error(steps, adapter, samples):
    class Large(Magnitude):
        def prepare(self, model, adapter, batches):
            model[0].weight.data[0, 0] = 1e5
            return self

    with pytest.raises(CompressorError, match=r"0\.weight: \S+ is too large for torch\.float16"):
        compressor.prune(tiny_model().half(), Large(), adapter=adapter, data=samples, steps=steps, device="cpu")


@pytest.mark.parametrize("dtype", HALF)
def test_folders_of_diffusers_are_read_in_their_own_dtypes(dtype, tmp_path):
    model = pixart(dtype)
    model.pos_embed.proj.float()  # diffusers keeps some parts of such models in float32
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for name in ("model", "shards"):
        adapter = registry.adapter("diffusers").opened(str(tmp_path / name))
        loaded = adapter.load(str(tmp_path / name))
        assert weights_sha256(loaded) == weights_sha256(model)
        adapter.write_pipeline(loaded, tmp_path / f"{name}-back")
        assert stored_bytes(tmp_path / f"{name}-back") <= stored_bytes(tmp_path / name)


def test_weight_files_are_read_in_their_own_dtypes(tmp_path):
    adapter = registry.adapter("uvit-digits")
    model = adapter.load(None).half()
    torch.save(model.state_dict(), tmp_path / "half.pth")
    loaded = adapter.load(str(tmp_path / "half.pth"))
    assert weights_sha256(loaded) == weights_sha256(model)
    inputs = adapter.example_inputs(2)
    assert adapter.predict(loaded, inputs).dtype == torch.float16  # asked in float32, as samplers do


@pytest.fixture(scope="module")
def half_run(tmp_path_factory, cli):
    """A run of a model in float16, from a folder, with its speed; and that folder."""
    folder = tmp_path_factory.mktemp("half")
    pixart(torch.float16).save_pretrained(folder / "source")
    draw = np.random.default_rng(0).standard_normal
    captions = draw((12, 5, 32), dtype=np.float32)
    images = draw((12, 4, 8, 8), dtype=np.float32)
    np.savez(folder / "data.npz", hidden_states=images, encoder_hidden_states=captions)
    noise = ("--set", "architecture.scheduler._class_name=DDPMScheduler")
    command = ("--model", "diffusers", "--weights", folder / "source", "--data", folder / "data.npz", *noise)
    outcome = cli.run(
        folder / "run",
        *command,
        "--set",
        "evaluate.samples=0",
        "--set",
        "evaluate.latency_batch=1",
        "--method",
        "magnitude",
    )
    assert outcome.code == 0, outcome.err
    return folder


def test_a_run_of_float16_writes_float16_and_is_smaller_than_what_it_was_given(half_run):
    given = stored_bytes(half_run / "source")
    assert stored_bytes(half_run / "run" / "model") <= 0.60 * given
    assert stored_bytes(half_run / "run" / "pipeline") <= given
    assert {value.dtype for value in compressor.load(half_run / "run").parameters()} == {torch.float16}
    plain = diffusers.PixArtTransformer2DModel.from_pretrained(half_run / "run" / "pipeline", torch_dtype=torch.float16)
    assert weights_sha256(plain) == weights_sha256(compressor.load(half_run / "run"))


def test_the_report_compares_with_the_file_that_was_given(half_run):
    report = read_json(half_run / "run" / "report.json")
    sizes = {row["name"]: row["size_bytes"] for row in report["rows"]}
    assert sizes["dense"] == pytest.approx(stored_bytes(half_run / "source"), rel=0.01)
    assert sizes["magnitude"] == pytest.approx(stored_bytes(half_run / "run" / "model"), rel=0.01)
    assert [row["latency"][0]["dtype"] for row in report["rows"]] == ["float32"] * 3


@pytest.mark.parametrize(
    ("own", "device", "asked", "expected"),
    [
        (torch.float32, "cpu", "auto", None),
        (torch.float32, "cpu", "bfloat16", torch.bfloat16),
        (torch.bfloat16, "cpu", "auto", torch.bfloat16),
        (torch.float16, "cuda", "auto", torch.float16),
        (torch.float16, "cpu", "auto", torch.float32),  # CPUs have no kernels for it
        (torch.float16, "cpu", "float32", torch.float32),
        (torch.float16, "cpu", "bfloat16", torch.bfloat16),
    ],
)
def test_a_run_is_timed_in_its_models_own_dtype(own, device, asked, expected):
    assert precision_of(tiny_model().to(own), torch.device(device), asked) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_half_model_is_lowered_with_the_adapters_own_examples(dtype):
    adapter = registry.adapter("uvit-digits").small()
    torch.manual_seed(0)
    model, inputs = adapter.build().eval().half(), adapter.example_inputs(2)
    lowered = compressor.lower(model, inputs, ["eager"], dtype=dtype, adapter=adapter, cache=False)
    with torch.no_grad():
        expected = adapter.predict(copy.deepcopy(model).float(), inputs)
        found = adapter.predict(lowered.model, inputs).float()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


class Plain(Adapter):
    """Noise prediction for a plain network, which is asked in the dtype of its inputs."""

    def noised(self, batch, rng):
        noise = torch.randn(batch.shape, generator=rng)
        return batch + noise, noise

    def predict(self, module, inputs):
        return module(inputs)

    def example_inputs(self, batch_size):
        return torch.zeros(batch_size, 16)


def test_half_models_are_counted_as_float32_ones(samples):
    from compressor.cost import costs

    full, half = (costs(tiny_model().to(dtype), Plain(), {}) for dtype in (torch.float32, torch.float16))
    assert full.macs_dense == half.macs_dense and full.params == half.params
    assert half.size_bytes < 0.7 * full.size_bytes


def test_gradient_checkpointing_gives_the_same_weights_and_is_refused_where_there_is_none():
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=8, norm_type="ada_norm_zero",
        num_embeds_ada_norm=10,
    )  # fmt: skip
    config = {**model.config, "_class_name": "DiTTransformer2DModel"}
    adapter = registry.adapter("dit").rebuilt({"config": config, "scheduler": {"_class_name": "DDPMScheduler"}})
    data = [(torch.randn(4, 4, 8, 8), torch.zeros(4, dtype=torch.int64))]
    given = {"adapter": adapter, "data": data, "steps": 2, "batch_size": 4}
    plain = compressor.prune(model, Magnitude(), **given).model
    again = compressor.prune(model, Magnitude(), **given, gradient_checkpointing=True).model
    assert not again.is_gradient_checkpointing and not model.is_gradient_checkpointing
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, again.state_dict()[name], atol=1e-6), name
    with pytest.raises(CompressorError, match="Sequential has no gradient checkpointing"):
        compressor.prune(
            tiny_model(),
            Magnitude(),
            adapter=TinyAdapter(),
            data=torch.randn(8, 16),
            steps=1,
            gradient_checkpointing=True,
        )


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_what_is_built_does_not_hang_on_torchs_default_dtype(tmp_path, default):
    adapter = registry.adapter("uvit-digits")
    dense = adapter.load(None)
    half = copy.deepcopy(dense).bfloat16()
    compressor.save(tmp_path / "full", dense, {}, name="uvit-digits")
    compressor.save(tmp_path / "half", half, {}, name="uvit-digits")
    folder = tmp_path / "diffusers"
    pixart(torch.float32).save_pretrained(folder)
    torch.set_default_dtype(default)
    try:
        found = [adapter.build(), adapter.load(None), compressor.load(tmp_path / "full")]
        rounded = compressor.load(tmp_path / "half")
        opened = registry.adapter("diffusers").opened(str(folder))
        found += [opened.build(), opened.load(str(folder))]
        metric = registry.metric("fd-digits")
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    for model in (*found, metric._network):
        assert set(dtypes_of(model).values()) == {torch.float32}, type(model)
    assert weights_sha256(found[2]) == weights_sha256(dense) == weights_sha256(found[1])
    assert weights_sha256(rounded) == weights_sha256(half)


def test_a_model_that_is_loaded_in_inference_mode_can_be_trained(tmp_path):
    adapter = registry.adapter("uvit-digits")
    compressor.save(tmp_path / "half", adapter.load(None).bfloat16(), {}, name="uvit-digits")
    with torch.inference_mode():
        models = [adapter.build(), adapter.load(None), compressor.load(tmp_path / "half")]
    for model in models:
        assert not any(value.is_inference() for value in (*model.parameters(), *model.buffers()))
        next(model.parameters()).square().sum().backward()


@pytest.mark.parametrize("within", [False, True])
def test_a_model_that_was_built_in_inference_mode_is_loaded_into(tmp_path, within):
    """It ended in an error of torch."""
    compressor.save(tmp_path / "saved", tiny_model(), {})
    with torch.inference_mode():
        model = tiny_model(seed=1)
    model[2] = torch.nn.Linear(32, 16)  # beside one that was not
    with torch.inference_mode(within):
        compressor.load(tmp_path / "saved", model)
    assert weights_sha256(model) == weights_sha256(tiny_model())


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("steps", [0, 1])
def test_what_is_pruned_where_no_gradients_are_kept_can_be_trained(samples, without, steps):
    with without():
        found = compressor.prune(
            tiny_model(), Magnitude(), adapter=TinyAdapter(), data=samples, batch_size=8, steps=steps
        )
    assert not any(value.is_inference() for value in found.model.parameters())
