"""A pipeline's denoiser, fine-tuned with noise on a user's own captioned pictures: told what its pipeline tells it, and no more."""

from __future__ import annotations

import inspect
import json
import math
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_denoisers
import tiny_pipelines
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

import compressor
from compressor import CompressorError, files, parse, registry, seeds
from compressor.adapter import to_device
from compressor.data.latents import Autoencoder
from compressor.data.reading.captions import read_captioned
from compressor.data.sets import Records
from compressor.data.settings import Loading, Record
from compressor.errors import UsageError
from compressor.pipelines import captions
from compressor.pipelines.opened import open_pipeline

CAPTIONS = tiny_pipelines.PROMPTS[:7]
UNGUIDED = {"flux": {}}
"""What turns guidance off where it is not guidance_scale=1: FLUX tells its model how much to imitate."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that gives the folder of a tiny pipeline by its name, made once."""
    return partial(tiny_pipelines.saved, base=tmp_path_factory.mktemp("pipelines"))


def picture(path: Path, seed: int, height: int = 40, width: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven pictures with captions in text files, two of which are the same."""
    folder = tmp_path_factory.mktemp("photos")
    for number, caption in enumerate([*CAPTIONS[:6], CAPTIONS[0]]):
        picture(folder / f"{number}.png", number)
        (folder / f"{number}.txt").write_text(caption + "\n", encoding="utf-8")
    return folder


def own(name: str) -> dict[str, object]:
    """The pipeline's arguments beside a prompt, without those that the size of the pictures decides."""
    return {k: v for k, v in tiny_pipelines.arguments(name).items() if k not in ("height", "width")}


def size(name: str) -> int:
    return tiny_pipelines.SIZES.get(name, 16)


def through(events):
    while True:
        try:
            next(events)
        except StopIteration as finished:
            return finished.value


def data_of(name: str, folder: Path, photos: Path, **record: object):
    opened = open_pipeline(folder)
    adapter = registry.adapter("diffusers").opened(str(folder))
    settings = Record(arguments=own(name), unseen=2, **record)
    loading = Loading(size=size(name))
    return opened, adapter, through(captions.encoded(opened, adapter, read_captioned(photos), settings, loading))


def calls_of(module: torch.nn.Module, act) -> list[dict[str, object]]:
    """The arguments of each call of `module` while `act` runs, by name; those that the class takes anyway are left out."""
    parameters, found = inspect.signature(module.forward).parameters, []

    def hook(_, args, kwargs):
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        given.pop("return_dict", None)
        found.append({n: v for n, v in given.items() if v is not parameters[n].default})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            act()
    finally:
        handle.remove()
    return found


def asked(opened, arguments) -> list[dict[str, object]]:
    """The calls of the denoiser while the pipeline runs."""
    pipe, rng = opened.pipe, torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return calls_of(
        opened.module, partial(pipe, **arguments, output_type="latent", num_inference_steps=2, generator=rng)
    )


def same(ours: object, theirs: object, where: str) -> None:
    one, form = tree_flatten(ours)
    other, expected = tree_flatten(theirs)
    assert form == expected, where
    for a, b in zip(one, other, strict=True):
        if isinstance(b, Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), where
            assert torch.equal(a, b), where
        else:
            assert a == b, where


def first_row(count: int, tensor: Tensor) -> Tensor:
    return tensor[:1] if len(tensor) == count else tensor


def compare(opened, adapter, data: Records, row: int, other: int, caption: str, arguments) -> None:
    """What `data` makes the model be called with, for one sample and for two, against the pipeline's own call."""
    expected, *_ = asked(opened, {**arguments, "prompt": caption})
    model = opened.module
    first = next(iter(inspect.signature(model.forward).parameters))
    for rows in (torch.tensor([row]), torch.tensor([row, other])):
        inputs, target = adapter.noised(data.take(rows), torch.Generator().manual_seed(0))
        (found,) = calls_of(model, partial(adapter.predict, model, to_device(inputs, torch.device("cpu"))))
        assert found.keys() == expected.keys()
        assert found[first].shape == (len(rows), *expected[first].shape[1:]) == target.shape
        assert found[first].dtype == expected[first].dtype
        for argument in expected.keys() - {first, "timestep"}:
            ours = tree_map_only(Tensor, partial(first_row, len(rows)), found[argument])
            same(ours, expected[argument], f"{argument} of {caption}")


@pytest.mark.parametrize("name", tiny_pipelines.MAKERS)
def test_the_model_is_told_what_its_pipeline_tells_it(name, folders, photos):
    opened, adapter, data = data_of(name, folders(name), photos)
    told = read_captioned(photos).captions
    order = torch.randperm(7, generator=seeds.generator(0, "captions"))
    seen = order[1:].sort().values.tolist()  # a fifth of seven is held out
    assert len(data) == len(seen) + (name != "flux")
    arguments = {**tiny_pipelines.arguments(name), **UNGUIDED.get(name, {"guidance_scale": 1.0})}
    for row, number in enumerate(seen):
        compare(opened, adapter, data, row, (row + 1) % len(seen), told[number], arguments)


def _chroma(case) -> tuple[object, int, int]:
    tokenizer, encoder = tiny_pipelines._t5()
    made = diffusers.ChromaPipeline(
        scheduler=case.pipeline.scheduler, vae=tiny_pipelines._vae(shift_factor=0.1), text_encoder=encoder,
        tokenizer=tokenizer, transformer=case.pipeline.transformer,
    )  # fmt: skip
    return made, 16, 16


def _lumina2(case) -> tuple[object, int, int]:
    tokenizer, encoder = tiny_pipelines._gemma()
    made = diffusers.Lumina2Pipeline(
        scheduler=case.pipeline.scheduler, vae=tiny_denoisers.vae(4), text_encoder=encoder, tokenizer=tokenizer,
        transformer=case.pipeline.transformer,
    )  # fmt: skip
    return made, 64, 64


def _aura_flow(case) -> tuple[object, int, int]:
    tokenizer, _ = tiny_pipelines._t5()
    config = transformers.UMT5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    made = diffusers.AuraFlowPipeline(
        scheduler=case.pipeline.scheduler, vae=tiny_pipelines._vae(), text_encoder=transformers.UMT5EncoderModel(config),
        tokenizer=tokenizer, transformer=case.pipeline.transformer,
    )  # fmt: skip
    return made, 16, 16


OTHERS = {
    "chroma": (tiny_denoisers.chroma, _chroma),
    "lumina2": (tiny_denoisers.lumina2, _lumina2),
    "aura_flow": (tiny_denoisers.aura_flow, _aura_flow),
}
"""Pipelines that ask twice for guidance, or count their time otherwise."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_classes_of_the_table_take_the_same_way(name, photos, tmp_path):
    torch.manual_seed(0)
    case, make = OTHERS[name]
    pipe, side, tokens = make(case())
    pipe.save_pretrained(tmp_path)
    opened = open_pipeline(tmp_path)
    adapter = registry.adapter("diffusers").opened(str(tmp_path))
    record = Record(arguments={"max_sequence_length": tokens}, unseen=1)
    data = through(captions.encoded(opened, adapter, read_captioned(photos), record, Loading(size=side)))
    assert len(data) == 6 + 1
    order = torch.randperm(7, generator=seeds.generator(0, "captions"))
    number = int(order[1:].min())
    arguments = {"height": side, "width": side, "max_sequence_length": tokens, "guidance_scale": 1.0}
    compare(opened, adapter, data, 0, 1, read_captioned(photos).captions[number], arguments)
    with pytest.raises(AssertionError):  # the last one is told something else
        compare(opened, adapter, data, 6, 6, read_captioned(photos).captions[number], arguments)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart", "sana"])
def test_one_sample_in_ten_is_told_what_guidance_tells_beside_the_caption(name, folders, photos):
    opened, adapter, data = data_of(name, folders(name), photos)
    call, *_ = asked(opened, {**tiny_pipelines.arguments(name), "guidance_scale": 5.0, "prompt": CAPTIONS[0]})
    both = adapter.conditions((), call)
    assert len(both.noisy) == 2  # of which diffusers has the negative one first
    last = data.take(torch.tensor([len(data) - 1]))
    for argument, array in Records("", both.arrays).take(torch.tensor([0])).items():
        same(last[argument], array, argument)


@pytest.mark.parametrize("name", tiny_pipelines.MAKERS)
def test_latents_are_those_that_the_pipeline_decodes_to_the_picture(name, folders, photos):
    opened, _, data = data_of(name, folders(name), photos)
    side, vae, pipe = size(name), opened.pipe.vae, opened.pipe
    pixels = compressor.read_data(photos, (3, side, side)).images(torch.arange(7))
    order = torch.randperm(7, generator=seeds.generator(0, "captions"))
    pixels = pixels[order[1:].sort().values]
    with torch.no_grad():
        given = vae.encode(pixels)
    plain = given.latent_dist.mean if hasattr(given, "latent_dist") else given.latent
    latents = data.take(torch.arange(6))[next(iter(data.arrays))]
    if name == "flux":
        latents = pipe._unpack_latents(latents, side, side, pipe.vae_scale_factor)
    found = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_latents_may_have_a_mean_and_a_deviation_of_each_channel():
    vae = tiny_pipelines._vae(latents_mean=[0.5, 0.0, -0.5, 1.0], latents_std=[1.0, 2.0, 4.0, 0.5])
    made = Autoencoder(vae)
    plain = torch.ones(2, 4, 3, 3)
    expected = torch.tensor([0.5, 0.5, 0.375, 0.0]) * vae.config.scaling_factor
    torch.testing.assert_close(made.scaled(plain), expected.view(1, 4, 1, 1).expand(2, 4, 3, 3))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    mean, deviation = (torch.tensor(vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():  # as StableDiffusionXLPipeline does before it decodes
        picture_of = vae.decode(latents * deviation / vae.config.scaling_factor + mean).sample.clamp(-1, 1)
    torch.testing.assert_close(made.decode(latents), picture_of, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_pipeline_that_makes_its_latents_in_another_way_is_refused(name, folders, photos, monkeypatch):
    monkeypatch.setattr(Autoencoder, "scaled", lambda self, plain: plain * self.scale)  # without the shift
    with pytest.raises(UsageError, match="how it makes latents") as caught:
        data_of(name, folders(name), photos)
    assert "--prompts" in caught.value.hint


def test_a_model_that_is_told_something_beside_its_arguments_is_refused(folders, photos):
    opened = open_pipeline(folders("sd3"))
    adapter = registry.adapter("diffusers").opened(str(folders("sd3")))
    calls = []

    def other(module, args, kwargs, output):
        calls.append(1)
        return (output[0] * (1 + len(calls)),)

    opened.module.register_forward_hook(other, with_kwargs=True)
    events = captions.encoded(opened, adapter, read_captioned(photos), Record(arguments=own("sd3")), Loading(size=32))
    with pytest.raises(UsageError, match="does not answer again"):
        through(events)


def test_what_is_held_out_is_neither_learned_from_nor_told_apart_by_luck(folders, photos):
    _, _, data = data_of("sd3", folders("sd3"), photos)
    learned, held = (one.arrays["hidden_states"].flatten(1) for one in (data, data.unseen))
    assert len(held) >= 32 and len(held.unique(dim=0)) == 1 and len(learned.unique(dim=0)) == 6
    assert not (learned[:, None] == held[:1]).all(-1).any()
    assert data.sha256 != Records(data.name, data.arrays, data.shared, data.constants).sha256


def test_damaged_pictures_are_left_out_with_their_captions(folders, photos, tmp_path):
    for path in sorted(photos.iterdir()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "2.png").write_bytes(b"no picture")
    found, captions_left = read_captioned(tmp_path).images((3, 16, 16), 0, True, 64)
    assert len(found) == 6 and found.skipped == 1
    assert captions_left == [*CAPTIONS[:2], *CAPTIONS[3:6], CAPTIONS[0]]
    with pytest.raises(CompressorError, match=r"2\.png"):
        read_captioned(tmp_path).images((3, 16, 16), 0, False, 64)


def test_latents_are_known_by_what_they_were_computed_from(photos, monkeypatch):
    pictures = compressor.read_data(photos, (3, 32, 32))
    torch.manual_seed(0)
    vae = tiny_pipelines._vae()
    made = Autoencoder(vae).encoded(pictures)
    own = Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, images: own(self, images) * (1 + 1e-6))  # another machine
    again = Autoencoder(vae).encoded(pictures)
    assert not torch.equal(again.pixels, made.pixels) and again.sha256 == made.sha256
    vae.config["scaling_factor"] = 0.5
    others = [Autoencoder(vae).encoded(pictures), Autoencoder(tiny_pipelines._vae()).encoded(pictures)]
    others.append(Autoencoder(vae).encoded(compressor.read_data(photos, (3, 16, 16))))
    assert len({made.sha256, *(one.sha256 for one in others)}) == 4


def test_captioned_data_are_known_by_what_they_were_computed_from(folders, photos, monkeypatch, tmp_path):
    _, _, data = data_of("sd3", folders("sd3"), photos)
    own = Autoencoder.encode
    with monkeypatch.context() as patch:  # another machine
        patch.setattr(Autoencoder, "encode", lambda self, images: own(self, images) * (1 + 1e-6))
        again = data_of("sd3", folders("sd3"), photos)[2]
    first = next(iter(data.arrays))
    assert not torch.equal(again.arrays[first], data.arrays[first]) and again.sha256 == data.sha256
    assert data_of("sd3", folders("sd3"), photos, seed=1)[2].sha256 != data.sha256
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert data_of("sd3", folders("sd3"), tmp_path)[2].made_of == data.made_of
    (tmp_path / "0.txt").write_text("something else", encoding="utf-8")
    assert data_of("sd3", folders("sd3"), tmp_path)[2].sha256 != data.sha256


# --- The command. ---


def command(name: str, folder: Path, data: Path, out: Path, *more: object) -> tuple[object, ...]:
    settings = [f"record.arguments.{key}={json.dumps(value)}" for key, value in own(name).items()]
    given = [part for text in settings for part in ("--set", text)]
    return (
        *("run", "--pipeline", folder, "--data", data, "--out", out, "--set", f"loading.size={size(name)}", *given),
        *("--set", "record.unseen=1", "--set", "train.batch_size=2", "--set", "evaluate.latency_rounds=1", *more),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_pipelines.MAKERS)
def test_a_run_ends_with_a_pipeline_that_plain_diffusers_runs(name, folders, photos, cli, tmp_path):
    outcome = cli(*command(name, folders(name), photos, tmp_path / "run", "--method", "sparsedm", "--steps", "3"))
    assert outcome.code == 0, outcome.err
    report = files.read_json(tmp_path / "run" / "report.json")
    dense, bare, final = report["rows"]
    assert dense["drift"] == [] and all(
        {d["metric"] for d in row["drift"]} == {"prediction_error"} for row in (bare, final)
    )
    assert final["drift"][0]["value"] > 0 and final["drift"][0]["samples"] >= 32
    assert final["macs_effective"] < 0.9 * dense["macs_dense"] and final["size_bytes"] < dense["size_bytes"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(math.isfinite(json.loads(line)["loss"]) for line in lines)

    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline", local_files_only=True)
    part = "unet" if hasattr(plain, "unet") else "transformer"
    weights = dict(getattr(plain, part).named_parameters())
    masked = {layer["name"]: layer["pattern"] for layer in report["layers"] if layer["pattern"]}
    assert masked
    for weight, pattern in masked.items():
        parse(pattern).verify(weights[weight])
    plain.set_progress_bar_config(disable=True)
    drawn = plain(CAPTIONS[0], **tiny_pipelines.arguments(name), num_inference_steps=2).images[0]
    assert isinstance(drawn, Image.Image)


@pytest.mark.slow
def test_a_finished_run_is_used_again_without_the_captions(folders, photos, cli, tmp_path):
    """Here the size is the pipeline's own default, and methods that calibrate see the captions too."""
    from compressor.runs.saved import finished, saved_model

    data = tmp_path / "photos"
    data.mkdir()
    for path in photos.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    out, folder = tmp_path / "run", folders("sd3")
    given = ("--pipeline", folder, "--data", data, "--set", "record.arguments.max_sequence_length=16")
    quick = ("--set", "evaluate.latency_rounds=1", "--set", "settings.timesteps=2", "--method", "obs")
    outcome = cli("run", *given, *quick, "--steps", "1", "--out", out)
    assert outcome.code == 0, outcome.err
    for path in data.iterdir():
        path.unlink()
    run = finished(out)
    adapter, sparse = saved_model(out)
    inputs = adapter.example_inputs(3)
    assert inputs["hidden_states"].shape == run.adapter.example_inputs(3)["hidden_states"].shape == (3, 4, 16, 16)
    assert torch.equal(adapter.predict(sparse, inputs), run.adapter.predict(run.sparse, inputs))
    assert type(compressor.load(out)).__name__ == "SD3Transformer2DModel"
    opened = open_pipeline(folder)
    before = opened.module
    with compressor.apply(opened.pipe, out, lowered=True) as pipe:
        assert pipe.transformer is not before


@pytest.mark.slow
def test_a_run_that_was_stopped_is_resumed(folders, photos, cli, tmp_path):
    from compressor.runs.inputs import prepared, resolve
    from compressor.runs.run import Interrupted, execute

    settings = {
        "pipeline": str(folders("sd3")), "data": str(photos), "loading": {"size": 32}, "record": {"arguments": own("sd3")},
        "train": {"steps": 4, "batch_size": 2}, "evaluate": {"latency_rounds": 0},
    }  # fmt: skip
    recipe = resolve(settings, "test")
    list(execute(through(prepared(recipe)), tmp_path / "whole"))
    events = execute(through(prepared(recipe)), tmp_path / "parts")
    while (event := next(events)).stage != "fine-tune" or event.done < 2:
        pass
    with pytest.raises(Interrupted):
        events.throw(Interrupted(143))
    outcome = cli("resume", tmp_path / "parts")
    assert outcome.code == 0, outcome.err
    one, two = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()


# --- Bad input. ---


def metadata(*lines: object) -> str:
    return "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)


A = {"file_name": "a.png", "text": "a cat"}
B = {"file_name": "sub/b.png", "caption": "a boat"}


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_captions_are_read_from_metadata(key, tmp_path):
    picture(tmp_path / "a.png", 0)
    picture(tmp_path / "sub" / "b.png", 1)
    lines = [{"file_name": "sub/b.png", key: " a boat ", "width": 3}, "", {"file_name": "./a.png", key: "ä cat"}]
    (tmp_path / "metadata.jsonl").write_text(metadata(*lines), encoding="utf-8")
    found = read_captioned(tmp_path)
    assert [found.files.called(i) for i in range(2)] == ["a.png", "sub/b.png"]
    assert found.captions == ["ä cat", "a boat"]


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ({}, "pictures without captions"),
        ({"a.txt": "a cat"}, "sub/b.png has no caption"),
        ({"a.txt": "a cat", "sub/b.txt": "a boat", "c.txt": "?"}, "c.txt is the caption of no picture"),
        ({"a.txt": "a cat", "sub/b.txt": " \n"}, "sub/b.txt: an empty caption"),
        ({"a.txt": "a cat", "sub/b.txt": b"\xff\xfe\x00"}, "sub/b.txt: not a text file in UTF-8"),
        ({"a.txt": "a cat", "sub/b.txt": "a" * 4001}, "sub/b.txt: a caption of 4,001 characters"),
        ({"a.txt": "a cat", "sub/b.txt": "a\0b"}, "sub/b.txt: not a text"),
        ({"metadata.jsonl": metadata(A, B), "a.txt": "a cat"}, "a.png has captions in metadata.jsonl and in a.txt"),
        (
            {"metadata.jsonl": metadata(A, B), "metadata.csv": "file_name,text"},
            "metadata.jsonl and metadata.csv, two sources",
        ),
        ({"metadata.jsonl": metadata(A, B), "sub/metadata.jsonl": ""}, "and sub/metadata.jsonl, two sources"),
        ({"a.txt": "a cat", "a.TXT": "a dog", "sub/b.txt": "a boat"}, "a.txt: a.png has a caption already"),
        (
            {"metadata.jsonl": metadata(A, '{"text": "1", "text": "2"}')},
            "metadata.jsonl:2: not JSON: the key 'text' is",
        ),
        ({"metadata.jsonl": metadata(A, {**B, "caption": "\ud800"})}, "metadata.jsonl:2: not a text"),
        ({"metadata.jsonl": ""}, "metadata.jsonl: no caption in it"),
        ({"metadata.jsonl": metadata(A)}, "sub/b.png has no caption"),
        ({"metadata.jsonl": metadata(A, "", '{"file_name": ')}, "metadata.jsonl:3: not JSON"),
        ({"metadata.jsonl": metadata(A, "[]")}, "metadata.jsonl:2: not a JSON object"),
        ({"metadata.jsonl": metadata(A, {"text": "a"})}, "metadata.jsonl:2: no file_name"),
        ({"metadata.jsonl": metadata(A, {"file_name": 3, "text": "a"})}, "metadata.jsonl:2: no file_name"),
        ({"metadata.jsonl": metadata(A, {**B, "file_name": "../b.png"})}, "metadata.jsonl:2: '../b.png' leads out"),
        ({"metadata.jsonl": metadata(A, {**B, "file_name": "/b.png"})}, "metadata.jsonl:2: '/b.png' leads out"),
        ({"metadata.jsonl": metadata(A, {**B, "file_name": "c.png"})}, "metadata.jsonl:2: c.png is not there"),
        ({"metadata.jsonl": metadata(A, {**B, "file_name": "metadata.jsonl"})}, "metadata.jsonl is no picture"),
        ({"metadata.jsonl": metadata(A, A)}, "metadata.jsonl:2: a.png has a caption already"),
        ({"metadata.jsonl": metadata(A, {"file_name": "sub/b.png"})}, "metadata.jsonl:2: no caption for sub/b.png"),
        ({"metadata.jsonl": metadata(A, {**B, "text": "x"})}, "metadata.jsonl:2: text and caption for sub/b.png"),
        ({"metadata.jsonl": metadata(A, {**B, "caption": " "})}, "metadata.jsonl:2: an empty caption"),
        ({"metadata.jsonl": metadata(A, {**B, "caption": 7})}, "metadata.jsonl:2: a caption of type int"),
        ({"metadata.jsonl": metadata(A, {**B, "file_name": "\ud800"})}, "metadata.jsonl:2: '\\ud800' is no file name"),
    ],
)
def test_a_folder_that_is_not_whole_is_told_in_a_line(texts, said, folders, cli, tmp_path, monkeypatch):
    data = tmp_path / "photos"
    picture(data / "a.png", 0)
    picture(data / "sub" / "b.png", 1)
    for name, text in texts.items():
        (data / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr("compressor.runs.captioned.open_pipeline", None)  # nothing is opened before that
    outcome = cli("run", "--pipeline", folders("sd3"), "--data", data, "--out", tmp_path / "run")
    assert outcome.code in (1, 2) and said in outcome.err, outcome.err
    assert not (tmp_path / "run" / "run.json").exists()


def test_two_pictures_never_have_one_caption(tmp_path):
    picture(tmp_path / "a.png", 0)
    picture(tmp_path / "a.bmp", 1)
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(UsageError, match=r"a\.bmp and a\.png would have one caption"):
        read_captioned(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--data", "digits"), "pipeline and data: digits is no folder"),
        (("--data", "PHOTOS/0.png"), "0.png is no folder"),
        (("--data", "PHOTOS/nothing"), "nothing is no folder"),
        (("--data", "PHOTOS", "--prompts", "PHOTOS/0.txt"), "data and prompts: two sources"),
        (("--data", "PHOTOS", "--records", "PHOTOS"), "data and records: two sources"),
        (("--data", "PHOTOS", "--part", "vae.decoder"), "part vae.decoder: captioned pictures are for what denoises"),
        (("--data", "PHOTOS", "--part", "unet"), "unet"),
        (("--data", "PHOTOS", "--set", "evaluate.samples=4"), "evaluate.samples: a pipeline draws its pictures itself"),
        (("--data", "PHOTOS", "--set", "record.n=8"), "record.n: nothing asks for it"),
        (("--data", "PHOTOS", "--set", "record.steps=8"), "record.steps: nothing asks for it"),
        (("--data", "PHOTOS", "--set", "record.keep=8"), "record.keep: nothing asks for it"),
        (("--data", "PHOTOS", "--set", "record.arguments.prompt=x"), "the captions are the prompts"),
        (("--data", "PHOTOS", "--set", "record.arguments.colour=x"), "takes no 'colour'"),
        (("--data", "PHOTOS", "--set", "record.arguments.height=16"), "Give both height and width"),
        (("--data", "PHOTOS", "--set", "loading.size=30"), "StableDiffusion3Pipeline fails"),
        (("--data", "PHOTOS", "--set", "loading.flip=true"), "flip mirrors pictures"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_line(folders, photos, cli, tmp_path, arguments, said):
    given = [text.replace("PHOTOS", str(photos)) for text in arguments]
    outcome = cli("run", "--pipeline", folders("sd3"), "--out", tmp_path / "run", *given)
    assert outcome.code in (1, 2) and said in outcome.err, outcome.err
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_pipeline_without_text_is_refused(photos, cli, tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    outcome = cli("run", "--pipeline", tmp_path / "ddpm", "--data", photos, "--out", tmp_path / "run")
    assert outcome.code != 0 and "DDPMPipeline takes no prompt" in outcome.err, outcome.err


def test_a_class_that_is_not_in_the_table_is_to_be_recorded(folders, photos, cli, tmp_path, monkeypatch):
    from compressor.model_zoo.generic import conventions

    rest = {name: one for name, one in conventions.CONVENTIONS.items() if name != "SD3Transformer2DModel"}
    monkeypatch.setattr(conventions, "CONVENTIONS", rest)
    outcome = cli(*command("sd3", folders("sd3"), photos, tmp_path / "run"))
    assert outcome.code != 0 and "SD3Transformer2DModel" in outcome.err and "compressor record" in outcome.err, (
        outcome.err
    )
