"""Files and models of other people: endless, swollen, damaged, hostile or not what they seem. Each is refused by name and at once."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import threading
import time
import types
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import hooks
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

import compressor
from compressor import Adapter, CompressorError, recipe, registry
from compressor.data.calls import outline, read_index
from compressor.data.latents import Autoencoder
from compressor.data.outsized import check_config, check_pipeline
from compressor.data.reading import read_data
from compressor.data.reading.captions import read_captioned
from compressor.data.reading.hugging_face import Rows
from compressor.export.onnx import export_onnx
from compressor.export.tensorrt import export_tensorrt
from compressor.files import read_json, verify
from compressor.foreign.bounded import check_tree, read_bytes
from compressor.lower import Plan
from compressor.pipelines.opened import open_pipeline
from compressor.pipelines.prompts import read_prompts
from compressor.plugins.magnitude import Magnitude
from compressor.report import read_comparison, read_metrics, read_report
from compressor.saving.model import read_config
from compressor.weights import load_strictly, read_outline, read_weights


@contextmanager
def refused(*parts: object, seconds: float = 20.0) -> Iterator[None]:
    """The block raises a CompressorError, without long computing, whose text holds every one of `parts`."""
    began = time.process_time()
    with pytest.raises(CompressorError) as caught:
        yield
    assert time.process_time() - began < seconds
    for part in parts:
        assert str(part) in str(caught.value)


# --- Files without an end. ---


def _picture(path: Path) -> None:
    path.rename(path.parent / "picture.png")
    read_data(path.parent, (3, 8, 8))


def _inner(name: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """`read` of the folder in which the file is, by the `name` that it has there."""

    def reads(path: Path) -> object:
        path.rename(path.parent / name)
        return read(path.parent)

    return reads


def _suffixed(suffix: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: read(path.rename(path.with_suffix(suffix)))


READERS: dict[str, Callable[[Path], object]] = {
    "manifest": _inner("manifest.json", verify),
    "config": _inner("config.json", read_config),
    "recipe": recipe.read,
    "prompts": read_prompts,
    "report": read_report,
    "comparison": read_comparison,
    "plan": Plan.read,
    "index of calls": _inner("index.json", read_index),
    "calls": outline,
    "safetensors": _suffixed(".safetensors", read_weights),
    "header": _suffixed(".safetensors", read_outline),
    "pth": _suffixed(".pth", read_weights),
    "pth, not read": _suffixed(".pth", read_outline),
    "npz": _suffixed(".npz", read_data),
    "npy": _suffixed(".npy", read_data),
    "records": _suffixed(".safetensors", read_data),
    "CIFAR": _suffixed(".bin", read_data),
    "picture": _picture,
    "picture of a data set": lambda path: Rows("x", [{"a": {"bytes": None, "path": str(path)}}], "a", None).content(0),
    "pipeline": _inner("model_index.json", open_pipeline),
    "part of a pipeline": _inner("weights.bin", check_pipeline),
    "FID": _suffixed(".pth", read_weights),
}


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [_pipe, _device], ids=["pipe", "device"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_what_has_no_end_is_refused_at_once(
    tmp_path: Path, read: Callable[[Path], object], make: Callable[[Path], None]
) -> None:
    (tmp_path / "in").mkdir()
    make(path := tmp_path / "in" / "file")
    began = time.process_time()
    with pytest.raises((CompressorError, OSError)) as caught:  # a picture's OSError is told of by who reads them all
        read(path)
    assert time.process_time() - began < 20  # it has no end
    said = str(caught.value)
    assert "not a regular file" in said or "model_index" in said or "leads out of" in said


def test_bytes_are_read_up_to_a_bound(tmp_path: Path) -> None:
    (path := tmp_path / "a").write_bytes(b"x" * 1000)
    assert read_bytes(path, 1000) == b"x" * 1000
    with pytest.raises(OSError, match="larger than 999 bytes"):
        read_bytes(path, 999)
    with path.open("wb") as file:
        file.truncate(2**40)  # no byte of it is on the disk
    with refused(path, "larger than"):
        read_json(path)


def test_captions_without_an_end_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.txt")
    with refused("a.txt", "not a regular file"):
        read_captioned(tmp_path)
    os.mkfifo(tmp_path / "losses")
    assert read_metrics(tmp_path / "losses") == []


# --- Archives that hold more than they are, and not what was put in. ---


def _swollen(path: Path, name: str, size: int) -> Path:
    """An archive with one member of `size` zeros."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
        archive.open(name, "w") as member,
    ):
        header = np.lib.format
        header.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (size // 64, 8, 8)})
        for _ in range(size // 2**20):
            member.write(bytes(2**20))
    return path


def test_an_archive_that_unpacks_to_a_hundred_times_its_size_is_refused(tmp_path: Path) -> None:
    path = _swollen(tmp_path / "images.npz", "images.npy", 320 * 2**20)
    assert path.stat().st_size < 2**20
    with refused(path, "would unpack to", "np.savez"):
        read_data(path)
    with refused("would unpack to"):
        read_weights(path.rename(tmp_path / "weights.pth"))


def test_what_compresses_well_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "black.npz", images=np.zeros((20_000, 8, 8), np.uint8))
    assert len(read_data(tmp_path / "black.npz")) == 20_000


@pytest.mark.parametrize("at", [0.3, 0.5, 0.7])
def test_a_flipped_bit_in_weights_of_torch_is_found(tmp_path: Path, at: float) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"w": torch.arange(10_000.0)}, path)
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)
    with refused(path, "damaged"):
        read_weights(path)


def test_weights_that_torch_wrote_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(1000.0)}, tmp_path / "weights.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read_weights(tmp_path / "weights.pth")["w"], torch.arange(1000.0))


# --- Configurations. ---


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """The folder of a tiny UNet of diffusers, in a pipeline's."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    folder = tmp_path / "pipeline"
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "many layers": ("unet/config.json", {"layers_per_block": 10**9}),
    "rather many layers": ("unet/config.json", {"layers_per_block": 128, "num_layers": 300}),
    "wide": ("unet/config.json", {"block_out_channels": [12_000, 12_000]}),
    "rather wide": ("unet/config.json", {"block_out_channels": [2000, 2000], "layers_per_block": 20}),
    "many blocks": ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 100_000}),
    "large pictures": ("unet/config.json", {"sample_size": 10**9}),
    "many times": ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**8}),
    "many classes": ("unet/config.json", {"num_class_embeds": 10**9}),
    "hidden in a section": ("unet/config.json", {"inner": {"hidden_size": 10**12}}),
}


@pytest.mark.parametrize(("name", "change"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("part", ["", "unet"])
def test_a_hostile_configuration_is_refused_before_anything_is_built(
    unet: Path, name: str, change: dict[str, Any], part: str
) -> None:
    path = unet / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with refused(path.name):
        adapter = registry.adapter("diffusers").opened(str(unet / part))
        adapter.load(str(unet / part))
    if change.get("layers_per_block") != 20:  # what is a little too much is seen once the class of the model is known
        with refused(path.name):
            check_pipeline(unet)


def test_its_own_configuration_is_taken(unet: Path) -> None:
    check_pipeline(unet)
    assert registry.adapter("diffusers").opened(str(unet)).load(str(unet))
    assert open_pipeline(unet).part == "unet"


REAL = {
    "SDXL": {"block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10], "layers_per_block": 2,
             "cross_attention_dim": 2048, "down_block_types": ["a", "b", "c"], "sample_size": 128},
    "FLUX": {"num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "joint_attention_dim": 4096},
    "T5-XXL": {"num_layers": 24, "num_decoder_layers": 24, "d_model": 4096, "d_ff": 10240, "vocab_size": 32128},
    "CLIP": {"vocab_size": 49408, "hidden_size": 768, "num_hidden_layers": 12, "max_position_embeddings": 77},
    "SD3.5": {"num_layers": 38, "dual_attention_layers": list(range(38)), "pos_embed_max_size": 192},
    "Gemma 2": {"hidden_size": 2304, "vocab_size": 256_000, "max_position_embeddings": 8192, "rope_theta": 10_000.0},
}  # fmt: skip


@pytest.mark.parametrize("config", REAL.values(), ids=REAL)
def test_the_configurations_of_large_models_pass(config: dict[str, Any]) -> None:
    check_config(config, "config.json", 200 * 2**20)


@pytest.mark.parametrize("change", [{"block_out_channels": [50_000]}, {"layers_per_block": 10**9}])
def test_a_hostile_autoencoder_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path)
    Autoencoder(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with refused(path, next(iter(change))):
        Autoencoder(tmp_path)


def test_building_it_first_without_memory_draws_no_random_numbers(unet: Path) -> None:
    adapter = registry.adapter("diffusers").opened(str(unet))
    torch.manual_seed(3)
    adapter.build()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    diffusers.UNet2DModel.from_config(dict(adapter.config))
    assert torch.equal(drawn, torch.rand(1))


# --- Links and folders. ---


def test_links_that_lead_out_of_a_pipeline_are_refused(unet: Path, tmp_path: Path) -> None:
    weights = unet / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(unet / "kept")
    weights.symlink_to(unet / "kept")
    check_tree(unet)  # inside of it
    outside = tmp_path / "elsewhere"
    (unet / "kept").rename(outside)
    weights.unlink()
    weights.symlink_to(outside)
    for open_it in (open_pipeline, lambda path: registry.adapter("diffusers").opened(str(path))):
        with refused(weights, "leads out of"):
            open_it(unet)
    weights.unlink()
    weights.symlink_to(weights)
    with refused(weights, "leads nowhere"):
        check_tree(unet)


def test_the_cache_of_the_hub_may_link_to_its_own_files(unet: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots").mkdir()
    snapshot = unet.rename(home / "snapshots" / "0123")
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = path.rename(home / "blobs" / str(number))
        path.symlink_to(os.path.relpath(blob, path.parent))
    assert open_pipeline(snapshot).part == "unet"
    check_tree(snapshot / "unet")
    (tmp_path / "secret").write_text("x")
    (snapshot / "more").symlink_to(tmp_path / "secret")
    with refused("leads out of"):
        check_tree(snapshot)
    (snapshot / "more").unlink()
    (home / "blobs" / "0").unlink()
    (home / "blobs" / "0").symlink_to(tmp_path / "secret")
    with refused("leads out of"):
        check_tree(snapshot)


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A picture in 1,200 folders, which are gone afterwards: Python's own rmtree cannot remove so many."""
    here = os.getcwd()
    os.chdir(tmp_path)
    for _ in range(1200):
        os.mkdir("a")
        os.chdir("a")
    Image.new("RGB", (8, 8)).save("a.png")
    os.chdir(here)
    yield tmp_path
    below = 0
    os.chdir(tmp_path)
    while os.path.isdir("a"):
        os.chdir("a")
        below += 1
    os.remove("a.png")
    for _ in range(below):
        os.chdir("..")
        os.rmdir("a")
    os.chdir(here)


def test_pictures_in_1200_nested_folders_are_refused(deep: Path) -> None:
    with refused("folders in more than 64 others"):
        read_data(deep, (3, 8, 8))
    with refused("64"):
        check_tree(deep)


def test_a_link_to_itself_is_a_picture_that_cannot_be_read(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "b.png")
    with refused("b.png", "1 of 2"):
        read_data(tmp_path, (3, 8, 8))
    assert len(read_data(tmp_path, (3, 8, 8), skip_damaged=True)) == 1


def test_an_extra_key_in_a_list_of_a_plan_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"forms": [{"nam": "x"}]}))
    with refused("plan.json"):
        Plan.read(tmp_path / "plan.json")
    form = {"name": "x", "dense": True, "median_ms": 1, "iqr_ms": 1, "speedup": 1}
    plan = {
        "weights_sha256": "", "dtype": "", "input_shapes": [], "layers": [], "left_out": {}, "choice": "", "reason": "",
        "setting": {"device": "", "hardware": "", "threads": 1, "versions": {}}, "forms": [{**form, "nam": 1}],
    }  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with refused("'forms.0.nam'", "Did you mean 'name'?"):
        Plan.read(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "forms": [form]}))
    assert Plan.read(tmp_path / "plan.json").forms[0].name == "x"


# --- Numbers that are none. ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_images_that_are_not_finite_are_refused_by_number(tmp_path: Path, bad: float) -> None:
    images = np.zeros((6, 1, 8, 8), np.float32)
    images[4, 0, 3, 3] = bad
    np.savez(tmp_path / "latents.npz", images=images)
    with refused("latents.npz", "image 4"):
        read_data(tmp_path / "latents.npz")


def test_records_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    arrays = {"sample": np.zeros((6, 4), np.float32), "mask": np.full((6, 4), -np.inf, np.float32)}
    np.savez(tmp_path / "records.npz", **arrays)
    assert len(read_data(tmp_path / "records.npz")) == 6  # masks hold minus infinity
    np.savez(tmp_path / "records.npz", **{**arrays, "mask": np.full((6, 4), np.nan, np.float32)})
    with refused("mask holds NaN"):
        read_data(tmp_path / "records.npz")
    np.savez(tmp_path / "records.npz", **{**arrays, "sample": np.full((6, 4), np.inf, np.float32)})
    with refused("sample holds NaN or infinity"):
        read_data(tmp_path / "records.npz")


def test_samples_in_memory_that_are_not_finite_are_refused(model: nn.Module, adapter: Adapter, samples: Tensor) -> None:
    samples = samples.clone()
    samples[5, 2] = math.nan
    for data in (samples, compressor.Records("mine", {"x": samples})):
        with refused("sample 5"):
            compressor.prune(model, Magnitude(), adapter=adapter, data=data, steps=2, batch_size=4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_model_that_is_not_finite_is_refused_by_name(
    model: nn.Module, adapter: Adapter, samples: Tensor, steps: int, bad: float
) -> None:
    with torch.no_grad():
        model.get_parameter("2.weight")[1, 1] = bad
    with refused("2.weight"):
        compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=steps, batch_size=4)
    with refused("2.weight"):
        compressor.prune_(model, Magnitude(), adapter=adapter, data=samples, batch_size=4)


def test_a_folder_whose_weights_are_not_finite_is_refused(unet: Path) -> None:
    path = unet / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.weight"][0] = math.nan
    save_file(state, path, metadata={"format": "pt"})
    adapter = registry.adapter("diffusers").opened(str(unet))
    with refused("conv_in.weight"):
        adapter.load(str(unet))


def test_codes_are_not_read_as_weights(model: nn.Module) -> None:
    state = model.state_dict()
    codes = {name: value.mul(100).to(torch.int8) for name, value in state.items()}
    with refused("0.weight is torch.int8", "float32"):
        load_strictly(model, codes, "file")
    load_strictly(model, {name: value.half() for name, value in state.items()}, "file")


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_learning_rate_that_diverges_leaves_no_model(tmp_path: Path, cli: Any, steps: int) -> None:
    outcome = cli.trial(tmp_path / "out", "--set", "lr=1e10", "--set", "warmup=0", "--steps", steps)
    assert outcome.code == 1 and "Lower the learning rate" in outcome.err
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("lr", [30.0, 100.0])
def test_a_run_that_diverged_with_finite_numbers_gives_nothing_and_names_step_and_layer(
    model: nn.Module, adapter: Adapter, samples: Tensor, lr: float
) -> None:
    training = compressor.Training(steps=4, batch_size=4, lr=lr, ema=0.0)
    tuning = compressor.FineTuning(model, Magnitude(), adapter=adapter, data=samples, training=training)
    tuning.state()
    with refused("diverged", "the largest weights are those of"):
        list(compressor.steps(tuning))
        tuning.state()
    with refused("step 4: diverged"):
        tuning.finish()


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e3])
def test_a_model_that_is_far_off_at_first_is_not_taken_for_one_that_diverged(
    model: nn.Module, adapter: Adapter, samples: Tensor, factor: float
) -> None:
    with torch.no_grad():
        for value in model.parameters():
            value.mul_(factor)  # a thousand: the loss is some 10^12 times the mean square of the target
    training = compressor.Training(steps=20, batch_size=4, lr=1e-2)
    tuning = compressor.FineTuning(model, Magnitude(), adapter=adapter, data=samples, training=training)
    for _ in compressor.steps(tuning):
        tuning.state()
    tuning.finish()


@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0])
def test_a_batch_whose_target_is_next_to_nothing_is_no_divergence(
    model: nn.Module, adapter: Adapter, size: float
) -> None:
    class Fading(type(adapter)):  # type: ignore[misc]
        """What is to be answered last is `size` times what it is otherwise."""

        def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
            inputs, target = super().noised(batch, rng)
            return inputs, target * (size if bool(batch.sum() == 0) else 1.0)

    batches = [torch.ones(4, 16), torch.zeros(4, 16)]
    training = compressor.Training(steps=2, batch_size=4)
    tuning = compressor.FineTuning(model, Magnitude(), adapter=Fading(), data=batches, training=training)
    for _ in compressor.steps(tuning):
        tuning.state()
    tuning.finish()


def test_what_a_loss_is_held_against_is_the_same_after_an_interruption(
    model: nn.Module, adapter: Adapter, samples: Tensor
) -> None:
    training = compressor.Training(steps=6, batch_size=4)
    given = {"adapter": adapter, "data": samples, "training": training}
    whole = compressor.FineTuning(model, Magnitude(), **given)
    for _ in range(3):
        whole.advance()
    resumed = compressor.FineTuning(model, Magnitude(), **given, previous=copy.deepcopy(whole.state()))
    for one in (whole, resumed):
        list(compressor.steps(one))
    assert whole.state()["scale"] == resumed.state()["scale"] > 0


def test_a_run_that_ends_in_steps_that_were_skipped_gives_nothing(
    model: nn.Module, adapter: Adapter, samples: Tensor
) -> None:
    good, bad = samples[:4], torch.full_like(samples[:4], math.nan)
    batches = [good, good, bad]
    with refused("step 3", "not finite"):
        compressor.prune(model, Magnitude(), adapter=adapter, data=batches, steps=3)
    compressor.prune(model, Magnitude(), adapter=adapter, data=[good, bad, good], steps=3)  # one is tolerated


def test_a_model_whose_answers_are_no_numbers_is_never_a_checkpoint(
    model: nn.Module, adapter: Adapter, samples: Tensor
) -> None:
    training = compressor.Training(steps=3, batch_size=4)
    tuning = compressor.FineTuning(model, Magnitude(), adapter=adapter, data=samples, training=training)
    tuning.advance()
    tuning.state()
    with torch.no_grad():
        tuning.student.get_parameter("2.bias").fill_(3e38)
        tuning.student.get_parameter("2.weight").fill_(3e38)
    with refused("step 1: the model's answer is not finite"):
        tuning.state()
    assert tuning.student.training


# --- Modules that are not what they seem. ---


def _pruned(model: nn.Sequential) -> None:
    torch_prune.l1_unstructured(model[0], "weight", 0.5)


def _weight_norm(model: nn.Sequential) -> None:
    torch.nn.utils.weight_norm(model[0])


def _spectral_norm(model: nn.Sequential) -> None:
    torch.nn.utils.spectral_norm(model[0])


def _lazy(model: nn.Sequential) -> None:
    model[0] = nn.LazyLinear(32)


def _quantised(model: nn.Sequential) -> None:
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


class GGUFParameter(nn.Parameter):
    """As diffusers makes them: bytes of blocks, of which a Linear of its own makes numbers at every call."""

    def __new__(cls, data: Tensor) -> GGUFParameter:
        made: GGUFParameter = Tensor._make_subclass(cls, data, False)
        return made


class Wrapped(Tensor):
    """As optimum-quanto and torchao make theirs: of codes and scales, and to other code a tensor of floats."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Wrapped:
        made: Wrapped = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        return made

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].codes) if func is torch.ops.aten.detach.default else NotImplemented


def _gguf(model: nn.Sequential) -> None:
    model[0].weight = GGUFParameter(torch.ones(32, 17, dtype=torch.uint8))


def _wrapped(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(Wrapped(torch.ones(32, 16, dtype=torch.int8)), requires_grad=False)


def _quanto(model: nn.Sequential) -> None:
    """Not frozen yet: a plain weight, which is rounded at every call."""
    kind = type("QLinear", (nn.Linear,), {"__module__": "optimum.quanto.nn.qlinear"})
    model[0] = kind(16, 32)


def _scripted(model: nn.Sequential) -> None:
    model[0] = torch.jit.script(model[0])


def _traced(model: nn.Sequential) -> None:
    model[0] = torch.jit.trace(model[0], torch.zeros(1, 16))


def _sparse(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())


def _lazy_buffer(model: nn.Sequential) -> None:
    model[1] = nn.LazyBatchNorm1d(affine=False)


def _sparse_buffer(model: nn.Sequential) -> None:
    model[1].register_buffer("edges", torch.eye(4).to_sparse())


def _sparse_rows(model: nn.Sequential) -> None:
    model[1].register_buffer("edges", torch.eye(4).to_sparse_csr())


def _transposed(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(model[0].weight.detach().t())


def _view(model: nn.Sequential) -> None:
    model[2].bias = nn.Parameter(model[0].weight.detach()[0])


def _expanded(model: nn.Sequential) -> None:
    model[2].bias = nn.Parameter(torch.ones(1).expand(16))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (_pruned, ("0.weight", "torch.nn.utils.prune.remove")),
        (_weight_norm, ("0.weight", "remove_weight_norm")),
        (_spectral_norm, ("0.weight", "remove_spectral_norm")),
        (_lazy, ("0.weight", "lazy")),
        (_quantised, ("0: ", "quantised")),
        (_gguf, ("0.weight: quantised (GGUFParameter, torch.uint8)", "without quantisation")),
        (_wrapped, ("0.weight: quantised (Wrapped, torch.float32)", "without quantisation")),
        (_quanto, ("0: a QLinear is quantised", "without quantisation")),
        (_scripted, ("0: compiled by torch.jit", "the module that it was made of")),
        (_traced, ("0: compiled by torch.jit", "the module that it was made of")),
        (_sparse, ("0.weight", "to_dense")),
        (_lazy_buffer, ("1.running_mean: a lazy buffer", "Call the model once")),
        (_sparse_buffer, ("1.edges: stored as torch.sparse_coo", "persistent=False")),
        (_sparse_rows, ("1.edges: stored as torch.sparse_csr", "persistent=False")),
        (_transposed, ("2.weight shares memory with 0.weight", "clone()")),
        (_view, ("2.bias shares memory with 0.weight", "clone()")),
        (_expanded, ("2.bias: its entries share memory",)),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_not_what_they_seem_are_refused_by_name(
    model: nn.Sequential,
    adapter: Adapter,
    samples: Tensor,
    tmp_path: Path,
    change: Callable[[nn.Sequential], None],
    parts: tuple[str, ...],
) -> None:
    change(model)
    for steps in (0, 2):
        with refused(*parts):
            compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=steps, batch_size=4)
    with refused(*parts):
        compressor.save(tmp_path / "model", model, {})
    with refused(*parts):
        compressor.lower(model, torch.zeros(1, 16))


@pytest.fixture
def cut() -> Iterator[nn.Module]:
    """A model as FSDP2 leaves it, in a job of one process."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        yield fully_shard(nn.Sequential(nn.Linear(16, 16)), mesh=mesh)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_fsdp_has_cut_is_refused_by_name(
    cut: nn.Module, adapter: Adapter, samples: Tensor, tmp_path: Path
) -> None:
    """All but `prune` ended in errors of torch, and that in one that told to take hooks off."""
    compressor.save(tmp_path / "whole", nn.Sequential(nn.Linear(16, 16)), {})
    for ask in (
        lambda: compressor.prune(cut, Magnitude(), adapter=adapter, data=samples, steps=0, batch_size=4),
        lambda: compressor.prune_(cut, Magnitude(), adapter=adapter, data=samples, batch_size=4),
        lambda: compressor.save(tmp_path / "model", cut, {}),
        lambda: compressor.load(tmp_path / "whole", cut),
        lambda: compressor.lower(cut, samples[:1]),
    ):
        with refused("0.weight: cut, so that each process has a part of it (DTensor)", "as it was before FSDP"):
            ask()


@pytest.mark.parametrize("change", [_gguf, _wrapped])
def test_a_shadow_refuses_quantised_weights_by_name(
    model: nn.Sequential, change: Callable[[nn.Sequential], None]
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    change(model)
    with refused("0.weight: quantised", "without quantisation"):
        compressor.Shadow({"0.weight": model[0].weight}, Magnitude(), optimizer)


def _lock() -> Any:
    return threading.Lock()


def _numbers() -> Any:
    return (number for number in range(3))


def _file() -> Any:
    return io.TextIOWrapper(io.BytesIO())


@pytest.mark.parametrize("make", [_lock, _numbers, _file])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_what_python_does_not_copy_is_named_where_a_model_is_copied(
    make: Callable[[], Any], half: bool, model: nn.Sequential, adapter: Adapter, samples: Tensor, tmp_path: Path
) -> None:
    model[1].seen = {"last": [make()]}
    model[0].hook = lambda x: x  # which is copied
    words = ("1.seen (a dict): cannot be copied", "module.NAME = None")
    pruner, given = Magnitude(), {"adapter": adapter, "data": samples}
    if half:
        model.to(torch.bfloat16)
    for steps in (0, 2):
        with refused(*words):
            compressor.prune(model, pruner, **given, steps=steps, batch_size=4)
    with refused(*words):
        compressor.lower(model, torch.zeros(1, 16))
    for export in (export_onnx, export_tensorrt):
        with refused(*words):
            export(model, adapter, tmp_path / "model.onnx")
    compressor.save(tmp_path / "model", model, {})  # which copies nothing, as this does
    assert compressor.prune_(model, pruner, **given, batch_size=4).model is model


class Kept(nn.Module):
    """Keeps what it computed, as some do to look at it."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.linear, self.inside, self.seen = nn.Linear(16, 16), inside, None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        self.seen = {"last": [out]} if self.inside else out  # type: ignore[assignment]
        return out


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_torch_does_not_copy_is_named_where_a_model_is_copied(
    inside: bool, adapter: Adapter, samples: Tensor, tmp_path: Path
) -> None:
    model, words = Kept(inside), ("seen: kept from a forward pass", "module.seen = None")
    model(samples)
    for steps in (0, 2):
        with refused(*words):
            compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=steps, batch_size=4)
    with refused(*words):
        compressor.lower(model, torch.zeros(1, 16))
    for export in (export_onnx, export_tensorrt):
        with refused(*words):
            export(model, adapter, tmp_path / "model.onnx")
    compressor.save(tmp_path / "model", model, {})  # which copies nothing


def of_a_function(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda x: 1.0 * before(x)


def of_a_default(module: nn.Module) -> None:
    module.forward = lambda x, own=module: type(own).forward(own, x)


def of_a_hook_of_diffusers(module: nn.Module) -> None:
    hooks.HookRegistry.check_if_exists_or_initialize(module).register_hook(hooks.ModelHook(), "any")


def of_a_compiler(module: nn.Module) -> None:
    module.forward = torch.compile(module.forward, backend="eager")


@pytest.mark.parametrize("change", [of_a_function, of_a_default, of_a_hook_of_diffusers, of_a_compiler])
@pytest.mark.parametrize("at", ["", "0"])
def test_a_function_that_would_compute_a_copy_with_the_weights_of_the_original_is_refused(
    change: Callable[[nn.Module], None], at: str, adapter: Adapter, samples: Tensor
) -> None:
    """Of a pruned copy, the answers were those of the dense model."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    change(model.get_submodule(at))
    where = f"{at}.forward".lstrip(".")
    for steps in (0, 2):
        with refused(f"{where}: set on the module, and bound to its weights", "put it on what comes out"):
            compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=steps, batch_size=4)
    pruned = compressor.prune_(model, Magnitude(), adapter=adapter, data=samples, batch_size=4).model  # copies nothing
    expected = F.linear(F.linear(samples, pruned[0].weight, pruned[0].bias), pruned[1].weight, pruned[1].bias)
    torch.testing.assert_close(model(samples), expected)


def in_a_hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda module, args, out: out + model[1](out))


def in_a_hook_of_a_weight(model: nn.Sequential) -> None:
    weight = model[1].weight
    model[0].register_forward_pre_hook(lambda module, args: (F.linear(args[0], weight),))


def in_a_list(model: nn.Sequential) -> None:
    model[0].extra = [lambda x: x + model[1](x)]


def in_an_object(model: nn.Sequential) -> None:
    model[0].extra = types.SimpleNamespace(function=lambda x: x + model[1](x))


def by_a_weak_reference(model: nn.Sequential) -> None:
    model[0].extra = weakref.ref(model[1])


def in_a_notebook(model: nn.Sequential) -> None:
    scope = {"model": model}
    exec("hook = lambda module, args, out: out + model[1](out)", scope)
    model[0].register_forward_hook(scope["hook"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (in_a_hook, "0._forward_hooks"),
        (in_a_hook_of_a_weight, "0._forward_pre_hooks"),
        (in_a_list, "0.extra"),
        (in_an_object, "0.extra"),
        (by_a_weak_reference, "0.extra"),
        (in_a_notebook, "0._forward_hooks"),
    ],
)
def test_a_hook_or_an_attribute_that_would_use_the_weights_of_the_original_is_refused(
    change: Callable[[nn.Sequential], None], where: str, adapter: Adapter, samples: Tensor
) -> None:
    """A pruned copy was computed, and trained, with layers of the dense model, whose gradients came to that."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    change(model)
    for steps in (0, 2):
        with refused(f"{where}: set on the module, and bound to its weights", "handle.remove()"):
            compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=steps, batch_size=4)
    assert compressor.prune_(model, Magnitude(), adapter=adapter, data=samples, batch_size=4).model is model


class Itself(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Itself:
        return self


def test_what_gives_itself_for_a_copy_is_refused(adapter: Adapter, samples: Tensor) -> None:
    """The given model was pruned and trained."""
    model = nn.Sequential(nn.Linear(16, 16), Itself(16, 16))
    for steps in (0, 2):
        with refused("1.weight: in a copy of the model it is the given model's own", "compressor.prune_"):
            compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=steps, batch_size=4)
    assert set(compressor.prune_(model, Magnitude(), adapter=adapter, data=samples, batch_size=4).masks) == {
        "0.weight",
        "1.weight",
    }


class Hiding(nn.Sequential):
    """Shows the parameters of its first layer alone."""

    def named_parameters(self, *args: Any, **named: Any) -> Any:
        return self[0].named_parameters(prefix="0")


def test_a_weight_that_the_model_hides_stays_dense_with_its_reason(adapter: Adapter, samples: Tensor) -> None:
    """It ended in a KeyError."""
    model = Hiding(nn.Linear(16, 16), nn.Linear(16, 16))
    result = compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=2, batch_size=4)
    assert [layer.reason for layer in result.layers] == [None, "the model's named_parameters() leave it out"]
    assert torch.equal(result.model[1].weight, model[1].weight)


class Hooked(nn.Module):
    """Hooks that go along with a copy: a method of the model, one that looks at its own arguments alone, one that keeps shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.side = nn.Linear(16, 16), nn.Linear(16, 16)
        self.first.register_forward_pre_hook(self.beside)
        self.first.register_forward_hook(lambda module, args, out: out + F.linear(args[0], module.weight))
        seen: list[torch.Size] = []
        self.side.register_forward_hook(lambda module, args, out: seen.append(out.shape))

    def beside(self, module: nn.Module, args: Any) -> Any:
        return (args[0] + self.side(args[0]),)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.first(x)
        return out


def test_hooks_that_go_along_with_a_copy_are_taken(adapter: Adapter, samples: Tensor) -> None:
    result = compressor.prune(Hooked(), Magnitude(), adapter=adapter, data=samples, steps=2, batch_size=4)
    other = Hooked()
    other.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(other(samples), result.model(samples))


def as_a_method(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, x: F.linear(x, self.weight), module)


def as_offloading_does(module: nn.Module) -> None:
    add_hook_to_module(module, AlignDevicesHook("cpu"))


def of_nothing_of_the_model(module: nn.Module) -> None:
    other = nn.Linear(16, 32)
    module.forward = lambda x: 1.0 * other(x)


@pytest.mark.parametrize("change", [as_a_method, as_offloading_does, of_nothing_of_the_model])
def test_a_function_that_goes_along_with_a_copy_is_taken(
    change: Callable[[nn.Module], None], model: nn.Sequential, adapter: Adapter, samples: Tensor
) -> None:
    change(model[0])
    result = compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=0, batch_size=4)
    before, found = model(samples), result.model(samples)
    model.load_state_dict(result.model.state_dict())
    torch.testing.assert_close(model(samples), found)
    assert not torch.equal(before, found)


@pytest.mark.filterwarnings("ignore")
def test_a_model_without_values_is_refused_by_name(
    model: nn.Sequential, adapter: Adapter, samples: Tensor, tmp_path: Path
) -> None:
    """torch loads nothing into it, and says so in a warning; a model that accelerate offloads computed with its former weights."""
    compressor.save(tmp_path / "model", model, {})
    model[2].to("meta")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for ask in (
        lambda: compressor.load(tmp_path / "model", model),
        lambda: compressor.save(tmp_path / "again", model, {}),
        lambda: compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=0, batch_size=4),
        lambda: compressor.prune_(model, Magnitude(), adapter=adapter, data=samples, batch_size=4),
        lambda: compressor.lower(model, samples[:1]),
        lambda: export_onnx(model, adapter, tmp_path / "model.onnx"),
        lambda: export_tensorrt(model, adapter, tmp_path / "model.onnx"),
        lambda: compressor.Shadow({"2.weight": model[2].weight}, Magnitude(), optimizer),
    ):
        with refused("2.weight has no values (it is on the meta device)", "enable_sequential_cpu_offload"):
            ask()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


class Around(nn.Module):
    """A linear layer, and one without any input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.empty = nn.Linear(16, 16), nn.Linear(0, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) + self.empty(x[:, :0])
        return out


@pytest.mark.filterwarnings("ignore")
def test_empty_layers_stay_as_they_are(adapter: Adapter, samples: Tensor, tmp_path: Path) -> None:
    result = compressor.prune(Around(), Magnitude(), adapter=adapter, data=samples, steps=2, batch_size=4)
    assert {layer.name: layer.reason for layer in result.layers if layer.reason}.keys() == {"empty.weight"}
    compressor.save(tmp_path / "model", result.model, result.masks)
    loaded = compressor.load(tmp_path / "model", Around())
    assert torch.equal(loaded(samples), result.model(samples))
    lowered = compressor.lower(loaded, samples[:1])
    assert "empty" in lowered.plan.left_out["empty.weight"]


def test_a_computed_weight_is_left_dense_with_its_reason(
    model: nn.Sequential, adapter: Adapter, samples: Tensor
) -> None:
    parametrizations.weight_norm(model[0])
    result = compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=2, batch_size=4)
    assert set(result.masks) == {"2.weight"}
    assert "parametrization" in str(result.layers[0].reason)


def test_a_weight_that_is_a_buffer_is_left_dense_with_its_reason(
    model: nn.Sequential, adapter: Adapter, samples: Tensor
) -> None:
    value = model[0].weight.detach().clone()
    del model[0].weight
    model[0].register_buffer("weight", value)
    result = compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=2, batch_size=4)
    assert [layer.reason for layer in result.layers] == ["its weight is a buffer", None]
    assert torch.equal(result.model[0].weight, value)


def test_slices_of_one_memory_that_do_not_overlap_are_taken(adapter: Adapter, samples: Tensor) -> None:
    model, flat = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), torch.randn(32, 16)
    model[0].weight, model[1].weight = nn.Parameter(flat[:16]), nn.Parameter(flat[16:])
    result = compressor.prune(model, Magnitude(), adapter=adapter, data=samples, steps=1, batch_size=4)
    assert set(result.masks) == {"0.weight", "1.weight"}
