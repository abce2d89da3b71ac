"""Models of diffusers: read, fine-tuned, sampled, saved, written back, exported; and what is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import compressor
from compressor import registry
from compressor.adapter import Sampling
from compressor.cost.macs import layer_macs
from compressor.data.sets import Images
from compressor.errors import CompressorError
from compressor.export.onnx import export_onnx
from compressor.model_zoo.dit.layout import original
from compressor.model_zoo.generic import DiffusersAdapter
from compressor.plugins.sparsedm import SparseDM
from compressor.sparsity.notation import parse

DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


SMALL_UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def small_unet():
    return diffusers.UNet2DModel(**SMALL_UNET)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A DDPMPipeline's folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    diffusers.DDPMPipeline(small_unet(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dit():
    """A DiT of diffusers whose blocks have the same embedder, as a trained one's have."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**DIT)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
    return model.eval()


def dit_inputs():
    x = torch.randn(3, 4, 8, 8, generator=rng())
    return {"hidden_states": x, "timestep": torch.tensor([3, 500, 900]), "class_labels": torch.tensor([1, 2, 10])}


@pytest.fixture(params=["diffusers", "authors"])
def dit_source(request, dit, tmp_path):
    """The DiT in each of its two layouts."""
    if request.param == "diffusers":
        dit.save_pretrained(tmp_path / "dit")
        return str(tmp_path / "dit"), {}
    state = {n: v for n, v in dit.state_dict().items() if "norm1.emb" not in n or ".0.norm1" in n}
    torch.save(original(state, dit.pos_embed.pos_embed), tmp_path / "dit.pt")
    return str(tmp_path / "dit.pt"), {"num_attention_heads": 2}


# --- Through the command line and back. ---


@pytest.fixture(scope="module")
def ddpm_run(pipeline, tmp_path_factory, cli):
    folder = tmp_path_factory.mktemp("run")
    (folder / "pictures").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 12, 16, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "pictures" / f"{index}.png")
    command = ("--model", "ddpm", "--weights", pipeline, "--data", folder / "pictures", "--method", "sparsedm")
    outcome = cli.run(folder / "out", *command, "--set", "evaluate.samples=4")
    assert outcome.code == 0, outcome.err
    return folder / "out"


def test_a_pipeline_comes_back_as_one_that_diffusers_loads_and_samples(ddpm_run):
    found = diffusers.DDPMPipeline.from_pretrained(ddpm_run / "pipeline")
    found.set_progress_bar_config(disable=True)
    assert found.scheduler.config.variance_type == "fixed_large"
    assert found(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)
    saved = compressor.load(ddpm_run).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in found.unet.state_dict().items())


def test_convolutions_and_linear_layers_of_the_pipeline_are_sparse(ddpm_run):
    unet = diffusers.UNet2DModel.from_pretrained(ddpm_run / "pipeline" / "unet")
    config = json.loads((ddpm_run / "model" / "config.json").read_text())
    kinds = set()
    for name, module in unet.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and f"{name}.weight" in config["patterns"]:
            parse("2:4").verify(module.weight.detach())
            assert float((module.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
            kinds.add(type(module))
    assert kinds == {nn.Conv2d, nn.Linear}


def test_a_saved_architecture_rebuilds_the_model_without_its_source(ddpm_run, pipeline, tmp_path):
    shutil.copytree(ddpm_run / "model", tmp_path / "model")
    model = compressor.load(tmp_path / "model")
    assert isinstance(model, diffusers.UNet2DModel)
    assert not model.training


@pytest.mark.parametrize(
    "change",
    [
        {"block_out_channels": [16, 10**9]},
        {"block_out_channels": [16, 10**5]},
        {"layers_per_block": 10**6},
        {"_class_name": "os"},
    ],
)
def test_a_hostile_architecture_is_refused_at_once(ddpm_run, tmp_path, change):
    from compressor import files

    config = json.loads((ddpm_run / "model" / "config.json").read_text())
    config["architecture"]["config"] |= change

    def write(folder):
        shutil.copy(ddpm_run / "model" / "model.safetensors", folder)
        (folder / "config.json").write_text(json.dumps(config))

    files.commit(tmp_path / "model", write)
    with pytest.raises(CompressorError):
        compressor.load(tmp_path / "model")


# --- DiT. ---


def test_both_layouts_give_the_output_of_their_network(dit, dit_source):
    source, architecture = dit_source
    adapter = registry.adapter("dit").opened(source, architecture)
    model = adapter.load(source)
    network = copy.deepcopy(dit)
    if source.endswith(".pt"):  # test_dit.py holds the authors' network against its definition
        for block in network.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = 0, 1e-6
    with torch.no_grad():
        expected = network(**dit_inputs()).sample[:, :4]
        torch.testing.assert_close(adapter.predict(model, dit_inputs()), expected, rtol=0, atol=1e-6)
    copies = sum(p.numel() for n, p in dit.named_parameters() if ".1.norm1.emb." in n)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in dit.parameters()) - copies


def test_a_dit_trains_is_saved_once_and_samples_with_guidance(dit_source, tmp_path):
    source, architecture = dit_source
    adapter = registry.adapter("dit").opened(source, architecture)
    latents = Images("latents", torch.randn(32, 4, 8, 8, generator=rng()), torch.arange(32) % 10)
    result = compressor.prune(adapter.load(source), SparseDM(), adapter=adapter, data=latents, steps=3, batch_size=8)
    assert len(result.masks) == 12
    compressor.save(tmp_path / "model", result.model, result.masks, "dit", architecture=adapter.architecture)
    loaded = compressor.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(**dit_inputs()).sample, result.model(**dit_inputs()).sample)
    plain, strong = (adapter.sampling(Sampling(guidance=g)).sample(loaded, 3, rng(1), 3) for g in (1.0, 4.0))
    assert plain.shape == strong.shape == (3, 4, 8, 8)
    assert not torch.equal(plain, strong)
    assert adapter.sampling(Sampling(guidance=4.0)).sampler == "DDIM, uniform spacing, guidance 4"


def test_guided_sampling_is_that_of_the_pipeline(dit, tmp_path):
    dit.save_pretrained(tmp_path / "dit")
    adapter = registry.adapter("dit").opened(str(tmp_path / "dit"))
    model = adapter.load(str(tmp_path / "dit"))
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(5)
    generator = rng(7)
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    labels = torch.randint(10, (3,), generator=generator)
    images = noise
    with torch.no_grad():
        for t in scheduler.timesteps:  # as DiTPipeline does it
            both = torch.cat([labels, torch.full((3,), 10)])
            out = dit(images.repeat(2, 1, 1, 1), timestep=t.expand(6), class_labels=both).sample[:, :4]
            given, without = out.chunk(2)
            images = scheduler.step(without + 4 * (given - without), t, images).prev_sample
    found = adapter.sampling(Sampling("ddim", "uniform", 4.0)).sample(model, 3, rng(7), 5)
    torch.testing.assert_close(found, images, rtol=1e-4, atol=1e-4)


def test_labels_are_dropped_for_teacher_and_student_alike(dit, tmp_path):
    dit.save_pretrained(tmp_path / "dit")
    adapter = registry.adapter("dit").opened(str(tmp_path / "dit"))
    model = adapter.load(str(tmp_path / "dit")).train()
    inputs, _ = adapter.noised((torch.zeros(400, 4, 8, 8), torch.zeros(400, dtype=torch.int64)), rng())
    assert set(inputs["class_labels"].tolist()) == {0, 10}
    piece = {name: value[:8] for name, value in inputs.items()}
    assert torch.equal(adapter.predict(model, piece), adapter.predict(model, piece))


def test_copies_of_the_embedder_that_differ_are_refused_by_name(dit, tmp_path):
    model = diffusers.DiTTransformer2DModel(**DIT)
    model.save_pretrained(tmp_path / "dit")
    adapter = registry.adapter("dit").opened(str(tmp_path / "dit"))
    with pytest.raises(CompressorError, match=r"transformer_blocks.1.norm1.emb differs"):
        adapter.load(str(tmp_path / "dit"))


def test_a_dit_file_of_unknown_heads_or_other_positions_is_refused(dit, tmp_path):
    state = {n: v for n, v in dit.state_dict().items() if "norm1.emb" not in n or ".0.norm1" in n}
    torch.save(original(state, dit.pos_embed.pos_embed), tmp_path / "dit.pt")
    with pytest.raises(CompressorError, match="num_attention_heads"):
        registry.adapter("dit").opened(str(tmp_path / "dit.pt"))
    torch.save(original(state, dit.pos_embed.pos_embed + 0.1), tmp_path / "moved.pt")
    adapter = registry.adapter("dit").opened(str(tmp_path / "moved.pt"), {"num_attention_heads": 2})
    with pytest.raises(CompressorError, match="pos_embed"):
        adapter.load(str(tmp_path / "moved.pt"))


# --- Anything else. ---


def conditioned_unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        cross_attention_dim=16,
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def pixart():
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        sample_size=8,
        cross_attention_dim=32,
        caption_channels=16,
        in_channels=4,
        out_channels=8,
    )


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )


@pytest.mark.parametrize("make", [conditioned_unet, pixart, sd3, flux])
def test_other_models_get_masks_cost_and_lowering(make, tmp_path):
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "model")
    adapter = registry.adapter("diffusers").opened(str(tmp_path / "model"))
    model = adapter.load(str(tmp_path / "model"))
    result = compressor.prune(model, SparseDM(), adapter=adapter, data=[{}], steps=0)
    assert len(result.masks) >= 10
    total, by_weight = layer_macs(result.model, adapter)
    assert 0 < sum(by_weight.values()) <= total
    lowered = compressor.lower(result.model, adapter.example_inputs(1))
    with torch.no_grad():
        expected = adapter.predict(result.model, adapter.example_inputs(1))
        torch.testing.assert_close(
            adapter.predict(lowered.model, adapter.example_inputs(1)), expected, rtol=1e-3, atol=1e-4
        )


def smaller_unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16,), cross_attention_dim=16, norm_num_groups=8,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make", [smaller_unet, small_unet, sd3])
def test_other_models_are_exported(make, tmp_path):
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path / "model")
    adapter = registry.adapter("diffusers").opened(str(tmp_path / "model"))
    assert export_onnx(model, adapter, tmp_path / "model.onnx").parity.max_error < 1e-4


SCALED = {"scheduler": {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}}


@pytest.mark.parametrize("with_target", [False, True])
def test_a_conditioned_unet_is_fine_tuned_with_the_users_batches_and_written_back(with_target, tmp_path):
    torch.manual_seed(0)
    conditioned_unet().save_pretrained(tmp_path / "unet")
    adapter = registry.adapter("diffusers").opened(str(tmp_path / "unet"), SCALED)
    model = adapter.load(str(tmp_path / "unet"))
    text, latents = torch.randn(4, 7, 16, generator=rng()), torch.randn(4, 4, 8, 8, generator=rng(1))
    batch = {"sample": latents, "encoder_hidden_states": text}
    if with_target:
        batch |= {"timestep": torch.tensor([1, 2, 3, 4]), "target": latents}
    result = compressor.prune(model, SparseDM(), adapter=adapter, data=[batch], steps=2)
    (tmp_path / "back").mkdir()
    adapter.write_pipeline(result.model, tmp_path / "back")
    plain = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "back")
    with torch.no_grad():
        expected = result.model(latents, 5, text).sample
        assert torch.equal(plain.eval()(latents, 5, text).sample, expected)
    for name in result.masks:
        parse("2:4").verify(plain.get_parameter(name).detach())


NOISE = ("--set", "architecture.scheduler.beta_schedule=scaled_linear")


@pytest.fixture
def records(tmp_path):
    """A saved UNet2DConditionModel, and a file of arrays for it."""
    torch.manual_seed(0)
    conditioned_unet().save_pretrained(tmp_path / "unet")
    draw = np.random.default_rng(0).standard_normal
    arrays = {
        "sample": draw((20, 4, 8, 8), dtype=np.float32),
        "encoder_hidden_states": draw((20, 7, 16), dtype=np.float32),
    }
    return tmp_path, arrays


def test_a_conditioned_unet_goes_through_the_command_line_with_the_users_arrays(records, cli):
    folder, arrays = records
    np.savez(folder / "batches.npz", **arrays)
    command = ("--model", "diffusers", "--weights", folder / "unet", "--data", folder / "batches.npz", *NOISE)
    outcome = cli.run(folder / "run", *command, "--set", "evaluate.samples=0")
    assert outcome.code == 0, outcome.err
    assert json.loads((folder / "run" / "report.json").read_text())["model"] == "UNet2DConditionModel"
    plain = diffusers.UNet2DConditionModel.from_pretrained(folder / "run" / "pipeline").state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in compressor.load(folder / "run").state_dict().items())


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"encoder_hidden_states": np.zeros((20, 7, 5), np.float32)}, r"encoder_hidden_states \(7, 5\)"),
        ({"text": np.zeros((20, 7), np.float32)}, "text"),
        ({"target": np.zeros((20, 4, 4, 4), np.float32), "timestep": np.zeros(20, np.int64)}, "the target is"),
    ],
)
def test_arrays_that_the_model_cannot_take_are_refused_before_training(records, cli, change, part):
    folder, arrays = records
    np.savez(folder / "batches.npz", **arrays | change)
    command = ("--model", "diffusers", "--weights", folder / "unet", "--data", folder / "batches.npz", *NOISE)
    outcome = cli.run(folder / "run", *command)
    assert outcome.code == 2
    assert re.search(part, outcome.err), outcome.err
    assert not (folder / "run").exists()


def test_a_batch_without_images_is_refused_with_what_it_has(tmp_path):
    adapter = DiffusersAdapter(config={"_class_name": "UNet2DConditionModel"})
    with pytest.raises(CompressorError, match=r"\['encoder_hidden_states'\].*'sample' nor 'target'"):
        adapter.noised({"encoder_hidden_states": torch.zeros(1, 7, 16)}, rng())


def old_names(state):
    """Names as diffusers wrote them until 2022 for attention, and google/ddpm-cifar10-32 still has them."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for today, then in new.items():
        state = {name.replace(f".{today}.", f".{then}."): value for name, value in state.items()}
    return state


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_attention_names_of_2022_load_from_a_file_as_from_a_folder(ending, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = small_unet().eval()
    model.save_pretrained(tmp_path / "unet")
    state = old_names(model.state_dict())
    assert any(".proj_attn." in name for name in state) and not any(".to_q." in name for name in state)
    file = tmp_path / f"diffusion_pytorch_model.{ending}"
    save_file(state, file) if ending == "safetensors" else torch.save(state, file)
    found = registry.adapter("ddpm-cifar10").opened(str(file), SMALL_UNET).load(str(file))
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())
    shutil.copy(file, tmp_path / "unet")  # and the folder of the same file
    if ending == "bin":
        (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    folder = str(tmp_path / "unet")
    again = registry.adapter("diffusers").opened(folder).load(folder)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


# --- What is refused. ---


def test_a_weight_that_is_missing_is_named(pipeline, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(pipeline, tmp_path / "broken")
    file = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.extra"] = state.pop("conv_in.bias")
    save_file(state, file, metadata={"format": "pt"})
    adapter = registry.adapter("ddpm").opened(str(tmp_path / "broken"))
    with pytest.raises(CompressorError, match=r"missing conv_in.bias; unexpected conv_in.extra"):
        adapter.load(str(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "config.json"),
        ({"config.json": "{"}, "not JSON"),
        ({"config.json": "[]"}, "not a JSON object"),
        ({"config.json": '{"_class_name": "os.system"}'}, "not a model of diffusers"),
        ({"config.json": '{"_class_name": "DDPMScheduler"}'}, "not a model of diffusers"),
        ({"model_index.json": '{"vae": ["diffusers", "AutoencoderKL"]}'}, "no unet or transformer"),
    ],
)
def test_folders_that_are_no_models_are_refused(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CompressorError, match=message):
        registry.adapter("ddpm").opened(str(tmp_path))


def test_a_missing_folder_and_an_unreachable_name_are_refused_soon(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CompressorError, match="no such folder"):
        registry.adapter("ddpm").opened(str(tmp_path / "nowhere"))
    with pytest.raises(CompressorError, match="not to be had from the hub"):
        registry.adapter("ddpm").opened("nobody/no-such-model")
