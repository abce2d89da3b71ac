"""`compressor sample`: images as files, the same however they are shared out, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from compressor.data.latents import Autoencoder
from compressor.errors import CompressorError


def test_samples_are_files_and_say_how_to_draw_them_again(finished, cli, tmp_path):
    outcome = cli("sample", finished, "--n", "5", "--steps", "3", "--batch", "2", "--out", tmp_path / "drawn")
    assert outcome.code == 0, outcome.err
    files = sorted(path.name for path in (tmp_path / "drawn").glob("*.png"))
    assert files == [*(f"{index:06d}.png" for index in range(5)), "sheet.png"]
    facts = json.loads((tmp_path / "drawn" / "samples.json").read_text())
    config = json.loads((finished / "model" / "config.json").read_text())
    assert facts["weights_sha256"] == config["weights_sha256"]
    assert facts["how"] == "DPM-Solver++ 2M" and facts["seed"] == 0 and facts["shape"] == [5, 1, 8, 8]
    with Image.open(tmp_path / "drawn" / "000004.png") as image:
        assert image.size == (8, 8) and image.mode == "L"


def test_processes_do_not_change_the_images(finished, cli, tmp_path):
    for count in ("1", "2"):
        command = ("--n", "3", "--steps", "2", "--batch", "2", "--processes", count, "--sampler", "ddim")
        assert cli("sample", finished, *command, "--spacing", "quadratic", "--out", tmp_path / count).code == 0
    for one in (tmp_path / "1").glob("*.png"):
        assert one.read_bytes() == (tmp_path / "2" / one.name).read_bytes()
    assert json.loads((tmp_path / "2" / "samples.json").read_text())["how"] == "DDIM, quadratic spacing"


def test_former_samples_are_replaced_only_on_request_and_other_files_never(finished, cli, tmp_path):
    def draw(*more):
        return cli("sample", finished, "--n", "1", "--steps", "1", "--out", tmp_path / "drawn", *more)

    assert draw().code == 0
    assert draw().code == 2
    assert draw("--overwrite").code == 0
    (tmp_path / "drawn" / "notes.txt").write_text("mine")
    outcome = draw("--overwrite")
    assert outcome.code == 2 and "notes.txt" in outcome.err
    assert (tmp_path / "drawn" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--sampler", "dimm"), "Did you mean 'ddim'?"),
        (("--sampler", "unipc", "--spacing", "quadratic"), "takes no spacing"),
        (("--guidance", "2"), "takes no guidance"),
    ],
)
def test_samplers_that_do_not_exist_are_refused_before_anything_is_written(finished, cli, tmp_path, options, part):
    outcome = cli("sample", finished, "--out", tmp_path / "drawn", *options)
    assert outcome.code == 2 and part in outcome.err
    assert not (tmp_path / "drawn").exists()


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    ).save_pretrained(folder / "vae")
    return folder


def test_an_autoencoder_scales_its_latents_as_diffusers_does(autoencoder):
    found = Autoencoder(autoencoder)
    images = torch.rand(10, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = found.encode(images)
    assert latents.shape == (10, 4, 8, 8)
    with torch.no_grad():
        expected = found.model.encode(images).latent_dist.mean * 0.5
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
        pixels = found.model.decode(latents / 0.5).sample.clamp(-1, 1)
    torch.testing.assert_close(found.decode(latents), pixels, rtol=1e-4, atol=1e-5)


def test_a_folder_without_an_autoencoder_is_refused(tmp_path):
    with pytest.raises(CompressorError, match=r"no config\.json"):
        Autoencoder(tmp_path)


def test_models_of_latents_write_latents_or_with_an_autoencoder_images(autoencoder, cli, tmp_path):
    from diffusers import UNet2DModel

    from compressor import registry, save

    UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).save_pretrained(tmp_path / "unet")
    adapter = registry.adapter("ddpm").opened(str(tmp_path / "unet"))
    save(tmp_path / "model", adapter.load(str(tmp_path / "unet")), {}, "ddpm", architecture=adapter.architecture)
    draw = ("sample", tmp_path / "model", "--n", "2", "--steps", "1", "--out")
    assert cli(*draw, tmp_path / "latents").code == 0
    with np.load(tmp_path / "latents" / "latents.npz") as file:
        assert file["images"].shape == (2, 4, 8, 8)
    outcome = cli(*draw, tmp_path / "images", "--vae", autoencoder)
    assert outcome.code == 0, outcome.err
    with Image.open(tmp_path / "images" / "000001.png") as image:
        assert image.size == (16, 16) and image.mode == "RGB"


def test_a_run_with_an_autoencoder_trains_on_latents_and_shows_pictures(autoencoder, cli, tmp_path):
    from compressor.model_zoo.uvit import UViT

    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels)
    config = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "conv": False,
    }
    source = f"from compressor.model_zoo.uvit import UViTAdapter\n\n\ndef model():\n    return UViTAdapter({config}, 'latent')\n"
    (tmp_path / "latent.py").write_text(source)
    torch.save(UViT(**config).state_dict(), tmp_path / "weights.pth")
    command = ("--model", f"{tmp_path / 'latent.py'}:model", "--weights", tmp_path / "weights.pth")
    command += ("--data", tmp_path / "data.npz", "--vae", autoencoder, "--set", "evaluate.samples=2")
    outcome = cli.run(tmp_path / "run", *command)
    assert outcome.code == 0, outcome.err
    with Image.open(tmp_path / "run" / "samples" / "sparsedm.png") as sheet:
        assert sheet.mode == "RGB" and min(sheet.size) >= 16
    outcome = cli("sample", tmp_path / "run", "--n", "1", "--steps", "1", "--vae", autoencoder)
    assert outcome.code == 0, outcome.err
