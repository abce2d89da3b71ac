"""Pipelines of diffusers as people have them, through the command line: forms of their weights, and data of their own arguments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_denoisers import CASES
from torch import Tensor

import compressor
from compressor import registry
from compressor.adapter import Adapter, Shared, to_device
from compressor.data.sets import Records
from compressor.errors import CompressorError, UsageError
from compressor.plugins.magnitude import Magnitude

N = 6


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def pipeline(name, folder):
    """A folder with the denoiser and the scheduler of a pipeline."""
    torch.manual_seed(0)
    case = CASES[name]()
    part = getattr(case.pipeline, case.part)
    part.save_pretrained(folder / case.part)
    case.pipeline.scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": type(case.pipeline).__name__, case.part: ["diffusers", type(part).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


ARRAYS = {
    "sd": {"sample": normal(N, 4, 8, 8), "encoder_hidden_states": normal(N, 7, 16)},
    "sdxl": {
        "sample": normal(N, 4, 8, 8),
        "encoder_hidden_states": normal(N, 7, 16),
        "added_cond_kwargs.text_embeds": normal(N, 16),
        "added_cond_kwargs.time_ids": np.full((N, 6), 8.0, np.float32),
    },
    "sd3": {
        "hidden_states": normal(N, 4, 8, 8),
        "encoder_hidden_states": normal(N, 7, 32),
        "pooled_projections": normal(N, 16),
    },
    "flux": {
        "hidden_states": normal(N, 4, 16),
        "encoder_hidden_states": normal(N, N, 32),
        "pooled_projections": normal(N, 16),
        "guidance": np.full(N, 3.5, np.float32),
        "img_ids": np.stack([np.zeros(4), *np.indices((2, 2)).reshape(2, 4)], 1).astype(np.float32),
        "txt_ids[shared]": np.zeros((N, 3), np.float32),  # as many tokens as samples
    },
    "sana": {
        "hidden_states": normal(N, 4, 8, 8),
        "encoder_hidden_states": normal(N, 7, 16),
        "encoder_attention_mask": np.ones((N, 7), np.int64),
    },
    "wan": {"hidden_states": normal(N, 4, 2, 2, 2), "encoder_hidden_states": normal(N, 7, 16)},
    "z_image": {"x": normal(N, 4, 8, 8), "cap_feats": normal(N, 7, 16)},
    "hunyuan": {
        "hidden_states": normal(N, 4, 8, 8),
        "encoder_hidden_states": normal(N, 8, 16),
        "encoder_hidden_states_t5": normal(N, 8, 16),
        "text_embedding_mask": np.ones((N, 8), np.int64),
        "text_embedding_mask_t5": np.ones((N, 8), np.int64),
        "image_meta_size": np.full((N, 6), 64.0, np.float32),
        "style": np.zeros(N, np.int64),
        "image_rotary_emb.0": normal(16, 16),
        "image_rotary_emb.1": normal(16, 16),
    },
    "qwen_image": {
        "hidden_states": normal(N, 4, 16),
        "encoder_hidden_states": normal(N, 7, 32),
        "encoder_hidden_states_mask": np.ones((N, 7), np.int64),
        "img_shapes": np.tile(np.array([[1, 2, 2]]), (N, 1)),
    },
}


def command(folder, *more, weights=None):
    return (
        "--model",
        "diffusers",
        "--weights",
        weights or folder,
        "--data",
        folder / "data.npz",
        "--set",
        "train.accumulate=2",
        *more,
    )


# The tests' `cli.run` draws samples by itself, which the model's own default does not.
NO_SAMPLES = ("--set", "evaluate.samples=0")


@pytest.fixture(scope="module", params=ARRAYS)
def source(request, tmp_path_factory):
    folder = pipeline(request.param, tmp_path_factory.mktemp(request.param))
    np.savez(folder / "data.npz", **ARRAYS[request.param])
    return request.param, folder


@pytest.mark.slow
def test_a_pipeline_runs_to_its_end_and_is_lowered(source, cli, tmp_path):
    name, folder = source
    outcome = cli.run(tmp_path / "run", *command(folder, "--steps", "2", "--method", "magnitude", *NO_SAMPLES))
    assert outcome.code == 0, outcome.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rows"][-1]["macs_dense"] > 0
    model = compressor.load(tmp_path / "run")
    written = Path(tmp_path / "run" / "pipeline")
    part = "unet" if name in ("sd", "sdxl") else "transformer"
    plain = type(model).from_pretrained(written / part).state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    if name in ("sana", "z_image"):  # of the classes whose examples come from the data
        outcome = cli("lower", tmp_path / "run")
        assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_pipeline_of_flow_is_planned_and_run_without_a_word_of_samples(name, cli, tmp_path):
    folder = pipeline(name, tmp_path / "pipe")
    np.savez(folder / "data.npz", **ARRAYS[name])
    more = ("--steps", "1", "--set", "train.batch_size=2", "--set", "evaluate.latency_rounds=0")
    outcome = cli("run", "--out", tmp_path / "run", "--method", "magnitude", *command(folder, *more))
    assert outcome.code == 0, outcome.err
    if name == "sd3":  # of Flux as many tokens are planned as it has at 512 pixels, which takes a minute
        outcome = cli("plan", *command(folder, *more))
        assert outcome.code == 0, outcome.err


def test_samples_that_no_sampler_here_can_draw_are_refused_before_training(cli, tmp_path):
    folder = pipeline("sd3", tmp_path / "pipe")
    np.savez(folder / "data.npz", **ARRAYS["sd3"])
    outcome = cli.run(tmp_path / "run", *command(folder, "--set", "evaluate.samples=4"))
    assert outcome.code == 2 and "conditions that only its pipeline makes" in outcome.err
    assert not (tmp_path / "run").exists()


def test_flow_without_conditions_is_trained_and_says_that_it_is_not_sampled(cli, tmp_path):
    torch.manual_seed(0)
    folder = pipeline("ddpm", tmp_path / "pipe")
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler"}')
    np.savez(folder / "data.npz", images=normal(N, 3, 8, 8))
    outcome = cli.run(tmp_path / "run", *command(folder, "--steps", "1", *NO_SAMPLES))
    assert outcome.code == 0, outcome.err
    outcome = cli.run(tmp_path / "other", *command(folder, "--set", "evaluate.samples=4"))
    assert outcome.code == 2 and "flow matching is sampled by the model's pipeline" in outcome.err


# --- The model's folder alone. ---


def test_a_models_folder_inside_of_its_pipeline_is_the_pipelines(tmp_path):
    folder = pipeline("sd", tmp_path / "pipe")
    adapter = registry.adapter("diffusers").opened(str(folder / "unet"))
    assert adapter.scheduler["_class_name"] == "DDIMScheduler" and adapter.scheduler["beta_end"] == 0.012
    model = adapter.load(str(folder / "unet"))
    (tmp_path / "back").mkdir()
    adapter.write_pipeline(model, tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["model_index.json", "scheduler", "unet"]


def test_a_model_without_scheduler_is_refused_or_told_what_noise_it_had(cli, tmp_path):
    folder = pipeline("sd", tmp_path / "pipe")
    alone = tmp_path / "alone"
    shutil.copytree(folder / "unet", alone)
    np.savez(alone / "data.npz", **ARRAYS["sd"])
    outcome = cli.run(tmp_path / "run", *command(alone, *NO_SAMPLES))
    assert outcome.code == 2 and "without a scheduler" in outcome.err
    assert "--set architecture.scheduler._class_name" in outcome.err and not (tmp_path / "run").exists()
    said = (
        "--set",
        "architecture.scheduler._class_name=DDIMScheduler",
        "--set",
        "architecture.scheduler.beta_end=0.012",
    )
    outcome = cli.run(tmp_path / "run", *command(alone, *said, "--steps", "1", *NO_SAMPLES))
    assert outcome.code == 0, outcome.err
    outcome = cli.run(tmp_path / "no", *command(alone, "--set", "architecture.scheduler.beta_schedule=no", *NO_SAMPLES))
    assert outcome.code == 2 and "cannot be built" in outcome.err
    outcome = cli.run(tmp_path / "no", *command(alone, "--set", "architecture.scheduler=3", *NO_SAMPLES))
    assert outcome.code == 2 and "architecture.scheduler 3" in outcome.err


# --- Forms of weights. ---


def as_variant(folder):
    """Rename a folder's weights as `save_pretrained(variant="fp16")` does, and halve them."""
    plain = folder / "diffusion_pytorch_model.safetensors"
    half = {name: value.half() for name, value in load_file(plain).items()}
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    plain.unlink()  # which tensors that were read of it may still need: never written over


def same(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], value, rtol=0, atol=tolerance) for name, value in expected.items())


def test_a_folder_with_the_half_precision_variant_alone_is_read_and_written_back(tmp_path):
    folder = pipeline("sd", tmp_path / "pipe")
    expected = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    as_variant(folder / "unet")
    adapter = registry.adapter("diffusers").opened(str(folder))
    model = adapter.load(str(folder))
    same(model.state_dict(), {name: value.half() for name, value in expected.items()})
    (tmp_path / "back").mkdir()
    adapter.write_pipeline(model, tmp_path / "back")
    again = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / "back" / "unet", variant="fp16", torch_dtype=torch.float16
    )
    same(again.state_dict(), model.state_dict())


def test_beside_plain_weights_those_are_read(tmp_path):
    folder = pipeline("sd", tmp_path / "pipe") / "unet"
    expected = load_file(folder / "diffusion_pytorch_model.safetensors")
    other = {name: value + 1 for name, value in expected.items()}
    save_file(other, folder / "diffusion_pytorch_model.fp16.safetensors", metadata={"format": "pt"})
    same(registry.adapter("diffusers").opened(str(folder)).load(str(folder)).state_dict(), expected)


def test_an_autoencoder_with_the_variant_alone_is_read(tmp_path):
    from compressor.data.latents import Autoencoder

    CASES["sd"]().pipeline.vae.save_pretrained(tmp_path / "vae")
    as_variant(tmp_path / "vae")
    assert Autoencoder(tmp_path).encode(torch.zeros(1, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_read_by_their_folder_or_by_one_of_them(variant, tmp_path):
    torch.manual_seed(0)
    case = CASES["sd"]()
    case.pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="30KB", variant=variant)
    shards = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    for source in (tmp_path / "unet", shards[0]):
        model = registry.adapter("diffusers").opened(str(source)).load(str(source))
        same(model.state_dict(), case.pipeline.unet.state_dict())


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "mine.safetensors"])
def test_a_single_file_beside_its_configuration_runs(name, cli, tmp_path):
    folder = pipeline("sd3", tmp_path / "pipe")
    file = folder / "transformer" / name
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(file)
    np.savez(folder / "data.npz", **ARRAYS["sd3"])
    more = ("--steps", "1", "--method", "magnitude", *NO_SAMPLES)
    outcome = cli.run(tmp_path / "run", *command(folder, *more, weights=file))
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "run" / "pipeline" / "scheduler").is_dir()
    diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "run" / "pipeline" / "transformer")


def test_a_single_file_with_its_architecture_said_is_read(tmp_path):
    folder = pipeline("sd3", tmp_path / "pipe") / "transformer"
    config = {
        key: value for key, value in json.loads((folder / "config.json").read_text()).items() if value is not None
    }
    file = shutil.copy(folder / "diffusion_pytorch_model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(CompressorError, match=r"a file of weights alone, without the config\.json"):
        registry.adapter("diffusers").opened(str(file)).load(str(file))
    said = {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}
    same(registry.adapter("diffusers").opened(str(file), said).load(str(file)).state_dict(), load_file(file))


SINGLE = {
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": "StableDiffusionPipeline.from_single_file(",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": "StableDiffusionXLPipeline.from_single_file(",
    "text_encoders.clip_g.logit_scale": "StableDiffusion3Pipeline.from_single_file(",
    "model.diffusion_model.out.2.bias": "type(pipe.transformer).from_single_file(",
    "double_blocks.0.img_attn.qkv.bias": "type(pipe.transformer).from_single_file(",
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_single_files_of_authors_are_refused_with_what_makes_a_folder_of_them(name, ending, cli, tmp_path):
    file = tmp_path / f"model.{ending}"
    state = {name: torch.ones(2), "model.diffusion_model.input_blocks.0.0.bias": torch.ones(2)}
    save_file(state, file) if ending == "safetensors" else torch.save({"state_dict": state}, file)
    of_pipeline = ("--pipeline", file, "--prompts", _prompts(tmp_path))
    for given in (of_pipeline, ("--model", "diffusers", "--weights", file, "--data", "digits")):
        outcome = cli("run", *given, "--out", tmp_path / "run")
        assert outcome.code == 2 and SINGLE[name] in outcome.err and str(file) in outcome.err, outcome.err
    assert not (tmp_path / "run").exists()


def _prompts(folder):
    (folder / "p.txt").write_text("a cat")
    return folder / "p.txt"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("m.gguf", "GGUF holds quantised weights"),
        ("m.zip", "a file, not the folder"),
        ("m.safetensors", "a single file of weights"),
    ],
)
def test_other_files_are_no_pipelines(name, said, cli, tmp_path):
    file = tmp_path / name
    file.write_bytes(b"GGUF") if name != "m.safetensors" else save_file({"conv_in.bias": torch.ones(2)}, file)
    outcome = cli("record", file, "--prompts", _prompts(tmp_path), "--out", tmp_path / "records")
    assert outcome.code == 2 and said in outcome.err, outcome.err


@pytest.mark.parametrize("told", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"weights": "int8"}])
def test_a_folder_of_quantised_weights_is_refused_before_it_is_opened(told, cli, tmp_path, monkeypatch):
    folder = pipeline("sd3", tmp_path / "pipe")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": told}))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", None)
    of_pipeline = ("--pipeline", folder, "--prompts", _prompts(tmp_path))
    for given in (of_pipeline, ("--model", "diffusers", "--weights", folder, "--data", "digits")):
        outcome = cli("run", *given, "--out", tmp_path / "run")
        assert outcome.code == 2 and "config.json: quantised weights" in outcome.err, outcome.err
        assert "without quantisation" in outcome.err


# --- Records. ---


def read(folder, **arrays):
    np.savez(folder / "set.npz", **arrays)
    return compressor.read_data(str(folder / "set.npz"))


def test_names_with_dots_are_places_in_dicts_and_tuples(tmp_path):
    found = read(
        tmp_path, **{"a.b": normal(5, 2), "a.c.d": normal(5), "e.0": normal(5), "e.1": normal(5, 3), "f": normal(5)}
    )
    batch = found.take(torch.tensor([4, 0]))
    assert list(batch) == ["a", "e", "f"] and list(batch["a"]) == ["b", "c"] and isinstance(batch["e"], tuple)
    assert torch.equal(batch["a"]["c"]["d"], torch.from_numpy(normal(5))[[4, 0]])
    assert batch["e"][1].shape == (2, 3) and len(found) == 5


def test_arrays_of_another_length_and_those_said_to_be_are_shared(tmp_path):
    arrays = {"sample": normal(5, 2), "text": normal(5, 3), "ids": normal(7, 3), "also[shared]": normal(5, 3)}
    found = read(tmp_path, **arrays)
    batch = found.take(torch.tensor([1]))
    assert len(found) == 5 and batch["sample"].shape == (1, 2) and batch["text"].shape == (1, 3)
    assert isinstance(batch["ids"], Shared) and torch.equal(batch["ids"].tensor, torch.from_numpy(arrays["ids"]))
    assert isinstance(batch["also"], Shared) and batch["also"].tensor.shape == (5, 3)
    unshared = Records("set", found.arrays, {"ids"})
    assert unshared.sha256 != found.sha256 and found.describe().count("shared by all samples") == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": normal(3), "b": normal(2)}, "no records"),
        ({"a": normal(3), "b": normal(3), "c": normal(2), "d": normal(2)}, "no records"),
        ({"target": normal(3), "sample": normal(2)}, "no records"),
        ({"a[shared]": normal(3)}, "no records"),
        ({"a": normal(3), "a[shared]": normal(3)}, "with and without"),
        ({"a": normal(3), "a.b": normal(3)}, "a.b: a is an array itself"),
        ({"sample": normal(3), "scalar": np.float32(1)}, "arrays are"),
    ],
)
def test_arrays_whose_samples_are_not_clear_are_refused(arrays, message, tmp_path):
    with pytest.raises(CompressorError, match=message):
        read(tmp_path, **arrays)


def test_an_array_of_two_entries_does_not_pass_for_a_shared_one(cli, tmp_path):
    folder = pipeline("sd", tmp_path / "pipe")
    np.savez(folder / "data.npz", **{**ARRAYS["sd"], "encoder_hidden_states": normal(2, 7, 16)})
    outcome = cli.run(tmp_path / "run", *command(folder, *NO_SAMPLES))
    assert outcome.code == 2 and "encoder_hidden_states (2, 7, 16) shared by all samples" in outcome.err
    assert not (tmp_path / "run").exists()


class Seeing(Adapter):
    """A linear layer that looks at what it is given."""

    def __init__(self):
        self.seen = []

    def noised(self, batch, rng):
        return batch, torch.zeros(len(batch["sample"]), 4)

    def predict(self, module, inputs):
        self.seen.append({name: tuple(value.shape) for name, value in inputs.items()})
        return module(inputs["sample"]) + inputs["ids"].mean()


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_shared_tensor_is_never_split_though_it_is_as_long_as_the_batch(accumulate):
    adapter, model = Seeing(), torch.nn.Linear(4, 4)
    batch = {"sample": torch.randn(4, 4, generator=rng()), "ids": Shared(torch.arange(4.0))}
    result = compressor.prune(
        model, Magnitude(), adapter=adapter, data=[batch], steps=1, batch_size=4, accumulate=accumulate, lr=1e-2
    )
    assert set(map(str, adapter.seen)) == {str({"sample": (4 // accumulate, 4), "ids": (4,)})}
    whole = compressor.prune(
        model, Magnitude(), adapter=Seeing(), data=[batch], steps=1, batch_size=4, accumulate=1, lr=1e-2
    )
    torch.testing.assert_close(result.model.weight, whole.model.weight)


def test_calibration_sees_shared_tensors_as_they_are():
    from compressor.plugins.obs import OBS

    adapter = Seeing()
    batch = {"sample": torch.randn(8, 4, generator=rng()), "ids": Shared(torch.arange(3.0))}
    compressor.prune(torch.nn.Linear(4, 4), OBS(), adapter=adapter, data=[batch], steps=0)
    assert adapter.seen and all(seen["ids"] == (3,) for seen in adapter.seen)


# --- Examples from the data. ---


def test_an_adapter_is_given_examples():
    inputs = {
        "x": torch.arange(6.0).reshape(2, 3),
        "ids": Shared(torch.arange(2)),
        "inner": {"scale": torch.tensor(2.0)},
    }
    plain = Seeing()
    found = plain.exampled(inputs).example_inputs(5)
    assert found["x"].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert found["ids"].tolist() == [0, 1] and found["inner"]["scale"] == 2
    with pytest.raises(CompressorError, match="no example inputs"):
        plain.example_inputs(1)


def test_examples_of_diffusers_models_are_saved_with_the_model_and_sound():
    adapter = registry.adapter("diffusers").rebuilt({"config": {"_class_name": "SanaTransformer2DModel"}})
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "mask": torch.tensor([[True, False], [True, True]]),
        "ids": Shared(torch.zeros(2, 3)),
        "pair": (torch.ones(2, 300), torch.full((2,), 7)),
        "flag": None,
    }
    saved = json.loads(json.dumps(adapter.exampled(inputs).architecture))
    found = registry.adapter("diffusers").rebuilt(saved).example_inputs(3)
    assert found["hidden_states"].shape == (3, 4, 8, 8) and found["mask"].tolist() == [[True, False]] * 3
    assert found["ids"].shape == (2, 3) and found["pair"][0].shape == (3, 300) and found["pair"][1].tolist() == [7] * 3
    assert found["flag"] is None
    for change in ({"shape": [2**40]}, {"dtype": "object"}, {"values": ["x"]}, {"shape": [-1]}, {"values": [1.0]}):
        damaged = json.loads(json.dumps(saved))
        damaged["example"]["ids"] |= change
        with pytest.raises(CompressorError, match="damaged"):
            registry.adapter("diffusers").rebuilt(damaged)
    with pytest.raises(UsageError, match="other is of type"):
        adapter.exampled({**inputs, "other": object()})


def test_to_device_unwraps_what_is_shared():
    found = to_device({"a": Shared(torch.ones(2)), "b": (torch.zeros(1), None)}, torch.device("cpu"))
    assert isinstance(found["a"], Tensor) and found["b"][1] is None


def test_images_that_the_model_cannot_take_are_refused_before_training(cli, tmp_path):
    folder = pipeline("sd3", tmp_path / "pipe")
    np.savez(folder / "data.npz", images=normal(N, 4, 8, 8))
    outcome = cli.run(tmp_path / "run", *command(folder, *NO_SAMPLES))
    assert outcome.code == 2 and "cannot take its images (4, 8, 8)" in outcome.err
    assert not (tmp_path / "run").exists()
