"""Whole pipelines: recorded, pruned, judged on what was not learned from, and written back for plain diffusers."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import diffusers
import pytest
import tiny_pipelines
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import compressor
from compressor import CompressorError, files, parse, registry
from compressor.data.latents import Autoencoder
from compressor.pipelines.opened import open_pipeline
from compressor.pipelines.prompts import pictures
from compressor.pipelines.recording import sample
from compressor.plugins.magnitude import Magnitude
from compressor.report import read_report
from compressor.runs import inputs
from compressor.runs.directory import refuse_own_sources
from compressor.weights import weights_sha256

QUICK = (
    *("--set", "record.n=3", "--set", "record.unseen=2", "--set", "record.steps=3", "--set", "train.batch_size=2"),
    *("--set", "evaluate.latency_rounds=1"),
)
OBS_QUICK = ("--method", "obs", "--steps", "2", "--set", "settings.timesteps=4")
NO_TIMES = ("--set", "evaluate.latency_rounds=0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function that gives the folder of a tiny pipeline by its name, made once."""
    return partial(tiny_pipelines.saved, base=tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path_factory.getbasetemp() / "records-cache"))


def command(folder: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("run", "--pipeline", folder, "--prompts", folder.with_suffix(".jsonl"), "--out", out, *QUICK, *more)


OTHERS = {"sdxl", "sana", "pixart"}
"""Pipelines that are run as the rest are, where there is time."""
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in OTHERS else ()) for name in tiny_pipelines.MAKERS]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_ends_with_a_pipeline_that_plain_diffusers_runs(name, folders, cli, tmp_path):
    folder = folders(name)
    outcome = cli(*command(folder, tmp_path / "run", *OBS_QUICK))
    assert outcome.code == 0, outcome.err
    report = files.read_json(tmp_path / "run" / "report.json")
    dense, bare, final = report["rows"]
    assert [row["name"] for row in report["rows"]] == ["dense", "one-shot", "obs"]
    metrics = {"prediction_error", "sample_rmse", "ssim", "latent_error"}
    assert dense["drift"] == [] and all({d["metric"] for d in row["drift"]} == metrics for row in (bare, final))
    assert len(next(d for d in final["drift"] if d["metric"] == "latent_error")["by_time"]) == 3
    assert [entry["backend"] for entry in final["latency"]] == ["eager", "pipeline"]
    assert final["macs_effective"] < 0.9 * dense["macs_dense"] and final["size_bytes"] < dense["size_bytes"]
    assert report["data"]["kind"] == "calls"
    assert report["model"].startswith(type(tiny_pipelines.made(name, tmp_path / "files")).__name__)

    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline", local_files_only=True)
    part = "unet" if hasattr(plain, "unet") else "transformer"
    weights = dict(getattr(plain, part).named_parameters())
    masked = {layer["name"]: layer["pattern"] for layer in report["layers"] if layer["pattern"]}
    assert masked
    for weight, pattern in masked.items():
        parse(pattern).verify(weights[weight])
    plain.set_progress_bar_config(disable=True)
    lines = [json.loads(line) for line in folder.with_suffix(".jsonl").read_text().splitlines()]
    picture = plain(**lines[0], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert isinstance(picture, Image.Image)

    with Image.open(tmp_path / "run" / "samples" / "side-by-side.png") as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 2 * 128
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Side by side" in page and "Latent error by step" in page and "whole pipeline" in page


def test_the_same_run_gives_the_same_bytes(folders, cli, tmp_path):
    hashes = []
    for name in ("one", "two"):
        outcome = cli(*command(folders("sd3"), tmp_path / name, "--method", "sparsedm", "--steps", "3", *NO_TIMES))
        assert outcome.code == 0, outcome.err
        root = tmp_path / name
        hashes.append(
            {p.relative_to(root): files.file_sha256(p) for p in sorted((root / "pipeline").rglob("*")) if p.is_file()}
        )
    assert hashes[0] == hashes[1] and len(hashes[0]) > 5


def test_one_shot_obs_beats_magnitude_on_prompts_that_it_did_not_see(tmp_path):
    from compressor.plugins.magnitude import Magnitude
    from compressor.plugins.obs import OBS

    for name in ("sd3", "pixart"):
        pipe = tiny_pipelines.made(name, tmp_path / name)
        own = tiny_pipelines.arguments(name)
        records = compressor.record(
            pipe, tiny_pipelines.PROMPTS, tmp_path / f"{name}-records", n=8, unseen=4, steps=4, **own
        )
        calls = records.unseen.take(torch.arange(len(records.unseen)))
        errors = {}
        for pruner in (OBS(timesteps=16), Magnitude()):
            model = compressor.prune(pipe, pruner, data=records, steps=0).model
            with torch.no_grad():
                found = [(model(*c.args, **c.kwargs)[0] - c.output).square().mean() for c in calls]
            errors[type(pruner)] = float(sum(found))
        assert errors[OBS] < 0.6 * errors[Magnitude], name


def test_a_decoder_is_pruned_like_a_denoiser(folders, cli, tmp_path):
    folder = folders("sd")
    outcome = cli(*command(folder, tmp_path / "run", "--part", "vae.decoder", *OBS_QUICK))
    assert outcome.code == 0, outcome.err
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline", local_files_only=True)
    report = files.read_json(tmp_path / "run" / "report.json")
    weights = dict(plain.vae.decoder.named_parameters())
    for layer in report["layers"]:
        if layer["pattern"]:
            parse(layer["pattern"]).verify(weights[layer["name"]])
    source = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.vae.encoder.parameters(), source.vae.encoder.parameters(), strict=True)
    )
    with compressor.apply(source, tmp_path / "run") as pipe:
        assert all(torch.equal(a, b) for a, b in zip(pipe.vae.decoder.parameters(), weights.values(), strict=True))
    # without a registered name, a decoder is loaded into the module it is of
    with pytest.raises(CompressorError, match="saved without a model name"):
        compressor.load(tmp_path / "run")


@pytest.mark.parametrize(
    "told",
    [
        *("evaluate.sampler=ddim", "evaluate.guidance=2", "evaluate.metric=fd-digits", "evaluate.measures=[kid]"),
        "evaluate.inception_weights=weights.pth",
        *(
            "loading.size=64",
            "loading.flip=true",
            "loading.workers=1",
            "loading.skip_damaged=true",
            "loading.cache_mb=9",
        ),
        *("train.times=even", "train.lora.rank=4"),
    ],
)
def test_what_no_run_of_a_pipeline_asks_is_refused(folders, cli, tmp_path, told):
    outcome = cli(*command(folders("sd3"), tmp_path / "run", "--set", told))
    assert outcome.code == 2 and f"error: {told.partition('=')[0]}" in outcome.err, outcome.err
    assert not (tmp_path / "run").exists()


def test_numbers_that_no_run_of_a_pipeline_asks_are_named(folders, cli, tmp_path):
    given = ("samples=8", "sampler_steps=3", "bootstrap=7", "seed=7")
    settings = [part for one in given for part in ("--set", f"evaluate.{one}")]
    outcome = cli(
        *command(folders("sd3"), tmp_path / "run", "--method", "magnitude", "--steps", "0", *NO_TIMES, *settings)
    )
    assert outcome.code == 0, outcome.err
    names = "evaluate.samples, evaluate.sampler_steps, evaluate.bootstrap, evaluate.seed"
    assert f"not asked for: {names}, as a pipeline draws its pictures itself" in outcome.err


def test_the_recipe_that_a_run_wrote_is_run_again(folders, cli, tmp_path):
    given = ("--method", "magnitude", "--steps", "0", *NO_TIMES, "--quick")
    outcome = cli(*command(folders("sd3"), tmp_path / "run", *given))
    assert outcome.code == 0, outcome.err
    again = cli("run", "--config", tmp_path / "run" / "recipe.yaml", "--out", tmp_path / "again")
    assert again.code == 0 and "not asked for" not in outcome.err + again.err, again.err
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_a_run_is_put_into_a_pipeline_in_memory(folders, cli, tmp_path):
    folder = folders("sd3")
    outcome = cli(*command(folder, tmp_path / "run", "--method", "magnitude", "--steps", "0", *NO_TIMES))
    assert outcome.code == 0 and "sample one-shot" in outcome.err and "sample magnitude" not in outcome.err
    bare, final = files.read_json(tmp_path / "run" / "report.json")["rows"][1:]
    assert bare["drift"] == final["drift"] and len(final["drift"]) == 4  # the same weights, drawn once
    opened = open_pipeline(folder)
    written = open_pipeline(tmp_path / "run" / "pipeline")
    picture = files.read_json(next((Path(tmp_path) / "run").glob("recipe.yaml")).with_name("report.json"))["recipe"][
        "record"
    ]
    assert picture["n"] == 3
    line = json.loads(folder.with_suffix(".jsonl").read_text().splitlines()[0])
    from compressor.data.calls import Picture

    wanted = Picture(arguments=line, seed=7)
    before = sample(opened, wanted, 2).images
    expected = sample(written, wanted, 2).images
    with compressor.apply(opened.pipe, tmp_path / "run"):
        inside = sample(opened, wanted, 2).images
    after = sample(opened, wanted, 2).images
    assert torch.allclose(inside, expected, atol=1e-4) and not torch.allclose(inside, before, atol=1e-3)
    assert torch.allclose(after, before, atol=1e-6)
    with compressor.apply(opened.pipe, tmp_path / "run", lowered=True):
        fast = sample(opened, wanted, 2).images
    assert torch.allclose(fast, expected, atol=1e-3)
    plan = tmp_path / "run" / "lowering.json"
    assert cli("lower", tmp_path / "run", "--max-error", "0.05").code == 0
    for how in ({"max_error": 0.05}, {"plan": compressor.Plan.read(plan)}):
        with compressor.apply(opened.pipe, tmp_path / "run", lowered=how):
            fewer = sample(opened, wanted, 2).images
        assert torch.allclose(fewer, expected, atol=0.2)
    for wrong in ("vnm", {"max_eror": 0.05}):
        with pytest.raises(CompressorError, match=r"arguments of compressor\.lower"):
            compressor.apply(opened.pipe, tmp_path / "run", lowered=wrong)
    opened.pipe.to(torch.bfloat16)
    with pytest.raises(CompressorError, match="has no records of transformer with these weights"):
        compressor.apply(opened.pipe, tmp_path / "run", lowered=True)
    loaded = compressor.load(tmp_path / "run")
    assert type(loaded).__name__ == "SD3Transformer2DModel"
    report = (tmp_path / "run" / "report.json").read_bytes()
    for told in ("--samples=10", "--sampler-steps=7", "--sampler=ddim", "--guidance=2", "--metric=fd-digits"):
        judged = cli("evaluate", tmp_path / "run", told)
        name = told[2:].partition("=")[0].replace("-", "_")
        assert judged.code == 2 and f"evaluate.{name}: a pipeline" in judged.err, judged.err
    assert (tmp_path / "run" / "report.json").read_bytes() == report
    drawn = cli("sample", tmp_path / "run")
    assert drawn.code == 2 and "draws its pictures itself" in drawn.err and "run/pipeline" in drawn.err
    assert not (tmp_path / "run" / "drawn").exists()


def test_what_was_recorded_before_is_used_again(folders, cli, tmp_path, monkeypatch):
    folder, records = folders("sd3"), tmp_path / "records"
    lines = folder.with_suffix(".jsonl")
    given = ("--n", "3", "--unseen", "2", "--steps", "3")
    outcome = cli("record", folder, "--prompts", lines, "--out", records, *given, "--json")
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    assert facts["calls"] == 9 and facts["unseen_calls"] == 6 and facts["part"] == "transformer"
    before = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    outcome = cli(*command(folder, tmp_path / "run", "--records", records, "--method", "magnitude", "--steps", "0"))
    assert outcome.code == 0, outcome.err
    assert {path.name: path.stat().st_mtime_ns for path in records.iterdir()} == before


def test_pictures_that_are_judged_are_of_one_size_and_others_may_differ(folders, cli, tmp_path):
    folder, lines = folders("sd"), tmp_path / "lines.jsonl"
    given = [{"prompt": f"a cat {number}", "height": 16, "width": 16} for number in range(10)]
    tall = next(
        n for n, one in enumerate(given) if one in [p.arguments for p in pictures(given, 10, 1, 0) if not p.unseen]
    )
    given[tall]["height"] = 32
    lines.write_text("\n".join(map(json.dumps, given)))
    common = ("run", "--pipeline", folder, "--prompts", lines, *NO_TIMES, "--method", "magnitude", "--steps", "2")
    common += ("--set", "record.steps=2", "--set", "record.n=9", "--set", "record.keep=1")
    outcome = cli(*common, "--out", tmp_path / "run", "--set", "record.unseen=1")
    assert outcome.code == 0, outcome.err
    for number, one in enumerate(given):
        one["height"] = 16 * (1 + number % 2)
    lines.write_text("\n".join(map(json.dumps, given)))
    seed = next(s for s in range(9) if len({p.arguments["height"] for p in pictures(given, 9, 2, s) if p.unseen}) == 2)
    outcome = cli(*common, "--out", tmp_path / "other", "--set", "record.unseen=2", "--set", f"record.seed={seed}")
    assert outcome.code == 2 and "the pictures that are judged have height 16 and 32" in outcome.err


def test_pictures_that_a_pipeline_changes_are_named_in_the_file_of_prompts(folders, cli, tmp_path):
    parts = diffusers.DiffusionPipeline.from_pretrained(folders("sd"), local_files_only=True).components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "source")
    lines = [{"prompt": f"a cat {n}", "image": {"file_name": f"{n}.png"}, "strength": 0.9} for n in range(5)]
    shown = [Image.new("RGB", (16, 16), (50 * number, 0, 99)) for number in range(5)]
    for line, image in zip(lines, shown, strict=True):
        image.save(tmp_path / line["image"]["file_name"])
    (tmp_path / "source.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ("--records", tmp_path / "records", "--method", "magnitude", "--steps", "0")
    outcome = cli(*command(tmp_path / "source", tmp_path / "run", *given))
    assert outcome.code == 0, outcome.err
    found = compressor.Recording.opened(tmp_path / "records")
    given = [{**line, "image": image} for line, image in zip(lines, shown, strict=True)]
    same = compressor.record(pipe, given, tmp_path / "same", n=3, unseen=2, steps=3)
    assert found.sha256 == same.sha256
    with compressor.apply(pipe, tmp_path / "run", lowered=True):
        assert pipe(**given[0], num_inference_steps=3, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("name", "said"),
    [("none.png", "none.png: no picture: No such file"), ("text.png", "no picture"), ("", "no picture")],
)
def test_what_is_no_picture_is_told_before_anything_is_opened(cli, tmp_path, name, said):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "images": [{"file_name": name}]}))
    outcome = cli("record", tmp_path / "nowhere", "--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "records")
    assert outcome.code == 2 and said in outcome.err and "images: " in outcome.err, outcome.err


def test_pictures_of_several_sizes_are_refused_where_they_say_the_size(cli, tmp_path):
    for side in (16, 32):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    lines = [{"prompt": "a", "image": {"file_name": f"{16 + 16 * (n % 2)}.png"}} for n in range(10)]
    seed = next(
        s
        for s in range(9)
        if len({p.arguments["image"]["file_name"] for p in pictures(lines, 9, 2, s) if p.unseen}) == 2
    )
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = ("--unseen", "2", "--seed", str(seed), "--out", tmp_path / "records")
    outcome = cli("record", tmp_path / "nowhere", "--prompts", tmp_path / "p.jsonl", *given)
    assert outcome.code == 2 and "the pictures that are judged have image 16x16 and 32x32" in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("named", "file"),
    [({"_class_name": ["pipeline", "Own"]}, "pipeline.py"), ({"unet": ["net", "Own"]}, "unet/net.py")],
    ids=["pipeline", "component"],
)
def test_code_in_a_folder_is_not_run_and_the_error_says_what_to_do(folders, tmp_path, named, file):
    shutil.copytree(folders("sd"), tmp_path / "own")
    index = files.read_json(tmp_path / "own" / "model_index.json")
    files.write_json(tmp_path / "own" / "model_index.json", {**index, **named})
    (tmp_path / "own" / file).write_text("raise SystemExit('it ran')")
    with pytest.raises(CompressorError, match=f"contains custom code in {re.escape(file)}") as caught:
        open_pipeline(tmp_path / "own")
    assert "trust_remote_code=True" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "uvit-digits", "--weights", "x", "--prompts", "p"), "prompts without a pipeline"),
        (("--pipeline", "FOLDER"), "--pipeline needs prompts"),
        (("--pipeline", "FOLDER", "--prompts", "LINES", "--data", "digits"), "pipeline and data: digits is no folder"),
        (("--pipeline", "nowhere/at/all", "--prompts", "LINES"), "no such folder"),
        (("--pipeline", "FOLDER/transformer", "--prompts", "LINES"), "no model_index.json"),
        (("--pipeline", "FOLDER/model_index.json", "--prompts", "LINES"), "Give the folder of a pipeline"),
        (("--pipeline", "FOLDER", "--prompts", "LINES", "--part", "unet"), "no part 'unet'"),
        (("--pipeline", "FOLDER", "--prompts", "LINES", "--part", "transformer.nothing"), "no part 'nothing'"),
        (("--pipeline", "FOLDER", "--prompts", "EMPTY"), "no prompt in it"),
        (("--pipeline", "FOLDER", "--prompts", "LINES", "--method", "obss"), "obs"),
        (("--pipeline", "FOLDER", "--prompts", "LINES", "--set", "record.arguments.colour=3"), "takes no 'colour'"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_line(folders, cli, tmp_path, arguments, said):
    folder = folders("sd3")
    (tmp_path / "empty.txt").write_text("")
    names = {"LINES": folder.with_suffix(".jsonl"), "EMPTY": tmp_path / "empty.txt", "FOLDER": folder}
    given = [names.get(text, str(text).replace("FOLDER", str(folder))) for text in arguments]
    outcome = cli("run", "--out", tmp_path / "run", *given)
    assert outcome.code in (1, 2) and said in outcome.err, outcome.err
    assert outcome.err.startswith("error: ") or "\nerror: " in outcome.err
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_run_that_was_stopped_is_resumed(folders, cli, tmp_path):
    from compressor.runs.inputs import prepared, resolve
    from compressor.runs.run import Interrupted, execute

    folder = folders("sd3")
    settings = {
        "pipeline": str(folder), "prompts": str(folder.with_suffix(".jsonl")), "method": "sparsedm",
        "record": {"n": 3, "unseen": 2, "steps": 3}, "train": {"steps": 6, "batch_size": 2}, "evaluate": {"latency_rounds": 0},
    }  # fmt: skip
    recipe = resolve(settings, "test")

    def inputs():
        events = prepared(recipe)
        while True:
            try:
                next(events)
            except StopIteration as finished:
                return finished.value

    list(execute(inputs(), tmp_path / "whole"))
    events = execute(inputs(), tmp_path / "parts")
    while (event := next(events)).stage != "fine-tune" or event.done < 3:
        pass
    with pytest.raises(Interrupted):
        events.throw(Interrupted(143))
    assert (tmp_path / "parts" / "checkpoint-3").is_dir()
    assert cli("resume", tmp_path / "parts").code == 0
    one, two = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()


def test_of_plain_weights_and_a_variant_the_plain_ones_are_opened_and_written(cli, tmp_path):
    """As many pipelines on the hub have both, and diffusers takes the plain ones."""
    folder = tiny_pipelines.saved("sd", tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.to(torch.float16).save_pretrained(folder, variant="fp16")
    pipe.save_pretrained(folder, variant="non_ema")  # two in half precision, one not
    assert {part.dtype for part in open_pipeline(folder).pipe.components.values() if hasattr(part, "dtype")} == {
        torch.float32
    }
    outcome = cli(*command(folder, tmp_path / "run", "--method", "magnitude", "--steps", "0", *NO_TIMES))
    assert outcome.code == 0, outcome.err
    written = tmp_path / "run" / "pipeline" / "unet"
    assert [path.name for path in written.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    weight = diffusers.DiffusionPipeline.from_pretrained(written.parent).unet.mid_block.resnets[0].conv1.weight
    assert weight.dtype == torch.float32 and float((weight == 0).float().mean()) == 0.5


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_pickled_weights_are_opened_in_their_own_precision(tmp_path, variant):
    """They were opened in float32, and nothing said so."""
    pipe, folder = tiny_pipelines.made("sd", tmp_path / "files").to(torch.float16), tmp_path / "pickled"
    pipe.save_pretrained(folder, safe_serialization=False, variant=variant)
    for name in ("unet", "text_encoder"):
        stem = "diffusion_pytorch_model" if name == "unet" else "pytorch_model"
        file = folder / name / f"{stem}{'' if variant is None else '.fp16'}.bin"
        weights = getattr(pipe, name).state_dict()
        for other in (folder / name).glob("*model*"):
            other.unlink()  # transformers 5 writes safetensors whatever it is asked for
        torch.save(weights, file)
    parts = {name: part.dtype for name, part in open_pipeline(folder).pipe.components.items() if hasattr(part, "dtype")}
    assert set(parts.values()) == {torch.float16}, parts
    torch.save({"weights": torch.nn.Linear(2, 2)}, file)
    with pytest.raises(CompressorError, match="refused: not a plain PyTorch state dict"):
        open_pipeline(folder)


def test_a_run_does_not_lie_in_the_pipeline_that_it_copies(folders, cli, tmp_path):
    """The copy was copied into itself, until the path was too long or the disk full."""
    folder = shutil.copytree(folders("sd"), tmp_path / "sd")
    shutil.copy(folders("sd").with_suffix(".jsonl"), tmp_path / "sd.jsonl")
    before = set(folder.rglob("*"))
    outcome = cli(*command(folder, folder / "runs" / "one", "--method", "magnitude", "--steps", "0", *NO_TIMES))
    assert outcome.code == 2 and "lies in the pipeline" in outcome.err, outcome.err
    assert set(folder.rglob("*")) == before
    of_the_denoiser = inputs.resolve({"model": "diffusers", "weights": str(folder / "unet"), "data": "digits"}, "test")
    with pytest.raises(CompressorError, match="would be copied into itself"):
        refuse_own_sources(of_the_denoiser, folder / "one", None)
    adapter = registry.adapter("diffusers").opened(str(folder))
    with pytest.raises(CompressorError, match=r"lies in the pipeline, .*, which is copied there"):
        adapter.write_pipeline(adapter.load(str(folder)), folder / "one")


def dropped(state, layer):
    del state[f"{layer}.weight"]


def coded(state, layer):
    state[f"{layer}.weight"] = (state[f"{layer}.weight"] * 100).to(torch.int8)


def scaled(state, layer):
    state[f"{layer}.weight"] = (state[f"{layer}.weight"] * 8).to(torch.float8_e4m3fn)
    state[f"{layer}.weight_scale"] = torch.tensor(1 / 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dropped, r"missing [\w.]*{}\.weight"),
        (coded, r"{}\.weight is torch\.int8"),
        (scaled, r"unexpected [\w.]*{}\.weight_scale"),
    ],
)
@pytest.mark.parametrize("part", ["unet.conv_in", "text_encoder.fc1", "vae.conv_in"])
def test_weights_that_other_libraries_only_warn_of_are_refused_by_name(part, change, said, folders, tmp_path):
    """A text encoder had random weights, other ones at each opening; codes were taken for weights; scales were dropped."""
    folder, (component, _, layer) = shutil.copytree(folders("sd"), tmp_path / "damaged"), part.partition(".")
    (file,) = (folder / component).glob("*.safetensors")
    state = load_file(file)
    change(state, next(name for name in state if name.endswith(f"{layer}.weight")).removesuffix(".weight"))
    save_file(state, file, metadata={"format": "pt"})
    by_itself = {"unet": lambda: registry.adapter("diffusers").opened(str(folder)).load(str(folder))}
    by_itself["vae"] = lambda: Autoencoder(folder)
    for read in (lambda: open_pipeline(folder), by_itself.get(component)):
        if read is not None:
            with pytest.raises(CompressorError, match=f"{component}.*{said.format(layer)}"):
                read()


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_pieces_of_a_model_that_lack_a_tensor_or_have_one_twice_are_refused(component, folders, tmp_path):
    """Of two, the last piece's was taken; what the index lists and no piece has ended in an error of torch."""
    folder = shutil.copytree(folders("sd"), tmp_path / "pieces")
    model = getattr(open_pipeline(folder).pipe, component)
    for file in (folder / component).glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder / component, max_shard_size="20KB")
    pieces = getattr(open_pipeline(folder).pipe, component)
    assert weights_sha256(pieces) == weights_sha256(model)
    first, second = sorted((folder / component).glob("*-of-*.safetensors"))[:2]
    one, other = load_file(first), load_file(second)
    name = min(one)
    save_file({**other, name: one[name] + 1}, second, metadata={"format": "pt"})
    with pytest.raises(CompressorError, match=f"{name} is in {first.name} and in {second.name}"):
        open_pipeline(folder)
    save_file(other, second, metadata={"format": "pt"})
    del one[name]
    save_file({**one, "empty": torch.zeros(1)}, first, metadata={"format": "pt"})
    with pytest.raises(CompressorError, match=f"{component} does not fit .*: missing "):
        open_pipeline(folder)


@pytest.mark.slow
def test_half_precision_comes_back_no_larger(folders, cli, tmp_path):
    pipe = tiny_pipelines.made("sd3", tmp_path / "files")
    for variant in (None, "fp16"):
        folder = tmp_path / f"source-{variant}"
        pipe.to(torch.float16).save_pretrained(folder, variant=variant)
        folder.with_suffix(".jsonl").write_text(folders("sd3").with_suffix(".jsonl").read_text())
        out = tmp_path / f"run-{variant}"
        outcome = cli(
            *command(folder, out, "--method", "magnitude", "--steps", "1", "--targets", "re:attn|ff", *NO_TIMES)
        )
        assert outcome.code == 0, outcome.err
        source, written = (
            {path.relative_to(root): path.stat().st_size for path in root.rglob("*") if path.is_file()}
            for root in (folder, out / "pipeline")
        )
        assert written == source
        weights = load_file(next((out / "pipeline" / "transformer").glob("*.safetensors")))
        assert {value.dtype for value in weights.values()} == {torch.float16}
        assert (out / "model" / "model.safetensors").stat().st_size < 0.9 * sum(
            value.nbytes for value in weights.values()
        )


def test_fewer_blocks_are_written_back_or_a_word_says_why_not(folders, cli, tmp_path):
    fewer = ("--method", "depth", "--set", "settings.macs=0.6", "--steps", "1")
    outcome = cli(*command(folders("sd3"), tmp_path / "run", *fewer, *NO_TIMES))
    assert outcome.code == 0, outcome.err
    if (tmp_path / "run" / "pipeline").is_dir():
        plain = diffusers.DiffusionPipeline.from_pretrained(str(tmp_path / "run" / "pipeline"), local_files_only=True)
        assert plain.transformer.config.num_layers == 1
    else:
        assert "There is no pipeline/ here" in (tmp_path / "run" / "pipeline.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_time_of_the_model_and_that_of_the_pipeline_are_told_apart(folders, cli, tmp_path):
    outcome = cli(
        *command(folders("flux"), tmp_path / "run", "--method", "magnitude", "--pattern", "4:2:4", "--steps", "0"),
        "--lower",
    )
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "run" / "report.json")
    assert report.dense.standing.backend == "eager" and report.dense.of_pipeline.backend == "pipeline"
    assert report.final.standing.of_plan and report.final.of_pipeline.backend == "pipeline, lowered"
    assert report.final.of_pipeline.against == "pipeline"
    again = cli("bench", tmp_path / "run", "--batches", "1", "--no-compiled", "--no-onnx")
    assert again.code == 0, again.err


@pytest.mark.slow
def test_methods_are_compared_on_the_records_of_one_pipeline(folders, cli, tmp_path):
    folder = folders("flux")
    outcome = cli(
        *("compare", "--methods", "magnitude,sparsedm", "--seeds", "1", "--pipeline", folder, "--steps", "2"),
        *(
            "--prompts",
            folder.with_suffix(".jsonl"),
            "--out",
            tmp_path / "out",
            *QUICK,
            *NO_TIMES,
        ),
    )
    assert outcome.code == 0, outcome.err
    outcome = cli("compare", "--pipeline", folder, "--prompts", folder.with_suffix(".jsonl"), "--sampler-steps", "2")
    assert outcome.code == 2 and "--sampler-steps: what fewer steps cost is told by a metric" in outcome.err, (
        outcome.err
    )
    report = files.read_json(tmp_path / "out" / "report.json")
    assert report["compared_by"] == "prediction_error"
    assert report["model"] == "FluxPipeline, transformer"  # as a run of it says, not the family that reads pipelines
    assert [(entry["label"], len(entry["cells"])) for entry in report["entries"]] == [("magnitude", 1), ("sparsedm", 1)]


def test_a_pruned_denoiser_goes_on_beside_a_controlnet(tmp_path):
    pipe = tiny_pipelines.made("sdxl", tmp_path / "files")
    pipe.set_progress_bar_config(disable=True)
    records = compressor.record(
        pipe, tiny_pipelines.PROMPTS, tmp_path / "records", n=1, unseen=1, steps=1, height=16, width=16
    )
    result = compressor.prune(pipe, Magnitude(), data=records, steps=0)
    beside = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    torch.nn.init.normal_(beside.controlnet_mid_block.weight)  # zeros, before it has learned
    both = diffusers.StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=beside)
    both.set_progress_bar_config(disable=True)
    shown = Image.new("RGB", (16, 16), (200, 20, 90))

    def drawn(pipe, **more):
        noise = torch.Generator().manual_seed(0)
        call = partial(pipe, "a red cat", num_inference_steps=1, height=16, width=16, output_type="pt", generator=noise)
        return call(**more).images[0]

    dense = drawn(both, image=shown)
    with compressor.apply(both, result):
        sparse = drawn(both, image=shown)
        assert both.unet is result.model
    pipe.unet = result.model
    assert not torch.equal(dense, sparse) and not torch.equal(drawn(pipe), sparse)
