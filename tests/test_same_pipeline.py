"""Records are used for the pipeline that they were made with: the same components, and a part that answers as it did."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import tiny_pipelines
import torch
from diffusers import FirstBlockCacheConfig
from safetensors.torch import load_file, save_file

import compressor
from compressor import CompressorError, files
from compressor.pipelines.adapter import CallsAdapter
from compressor.pipelines.opened import open_pipeline, opened
from compressor.pipelines.recording import index_of
from compressor.pipelines.same import components_of
from compressor.plugins.magnitude import Magnitude
from compressor.runs.inputs import prepared, resolve
from compressor.runs.run import Interrupted, execute

NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name in ("sdxl", "pixart") else ()) for name in tiny_pipelines.MAKERS
]
PROMPTS = tiny_pipelines.PROMPTS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder of a tiny Stable Diffusion."""
    return tiny_pipelines.saved("sd", tmp_path_factory.mktemp("pipelines"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "records-cache"))


@pytest.fixture
def pipe(source):
    return open_pipeline(source).pipe


def record(pipe, folder, **more):
    own = {"n": 2, "unseen": 1, "steps": 2, **tiny_pipelines.arguments("sd"), **more}
    return compressor.record(pipe, PROMPTS, folder, **own)


def other_scheduler(pipe):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def other_settings(pipe):
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, beta_end=0.5)


@torch.no_grad()
def other_encoder(pipe):
    for value in pipe.text_encoder.parameters():
        value.mul_(1.5)


def other_tokenizer(pipe):
    pipe.tokenizer.add_tokens(["house</w>"])


def other_encoder_dtype(pipe):
    pipe.text_encoder.to(torch.bfloat16)


CHANGES = [
    (other_scheduler, "another scheduler"),
    (other_settings, "another scheduler"),
    (other_encoder, "another text_encoder"),
    (other_tokenizer, "another tokenizer"),
    (other_encoder_dtype, "another text_encoder"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_records_of_another_pipeline_are_refused(pipe, tmp_path, change, said):
    records = record(pipe, tmp_path / "records")
    assert record(pipe, tmp_path / "records").sha256 == records.sha256  # sampling changes nothing of what it is
    change(pipe)
    with pytest.raises(CompressorError, match=f"has records of {said}"):
        record(pipe, tmp_path / "records")
    with pytest.raises(CompressorError, match=f"another pipeline than this one: {said}"):
        compressor.prune(pipe, Magnitude(), data=records, steps=0)
    (tmp_path / "records" / "picture-00001.safetensors").unlink()  # nor is what is missing recorded with it
    with pytest.raises(CompressorError, match=f"has records of {said}"):
        record(pipe, tmp_path / "records")
    assert not (tmp_path / "records" / "picture-00001.safetensors").exists()


def test_a_pipeline_of_another_class_is_another(pipe, tmp_path):
    record(pipe, tmp_path / "records")
    other = diffusers.StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(
        CompressorError, match="has records of pipeline StableDiffusionPipeline, not StableDiffusionPAGPipeline"
    ):
        record(other, tmp_path / "records")


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_that_was_saved_and_opened_is_the_same(name, tmp_path):
    made = tiny_pipelines.made(name, tmp_path / "files")
    before = components_of(opened(made))
    made(PROMPTS[0], num_inference_steps=2, **tiny_pipelines.arguments(name))
    assert components_of(opened(made)) == before  # tokenizers and schedulers remember their last call
    made.save_pretrained(tmp_path / "saved")
    moved = shutil.move(tmp_path / "saved", tmp_path / "moved")
    assert components_of(open_pipeline(moved)) == before
    assert {"pipeline", "scheduler", "vae", "text_encoder", "tokenizer"} <= before.keys()


def test_a_part_inside_a_component_leaves_the_rest_of_it_to_be_compared(pipe):
    def hashes():
        return components_of(opened(pipe, "vae.decoder"))

    before = hashes()
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight += 1
    assert hashes() == before
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight += 1
    assert {name for name, one in hashes().items() if one != before[name]} == {"vae"}


def test_settings_of_the_part_count_and_a_safety_checker_does_not(pipe):
    before = components_of(opened(pipe))
    pipe.safety_checker = torch.nn.Linear(2, 2)
    assert components_of(opened(pipe)) == before
    pipe.unet.register_to_config(sample_size=16)
    assert {name for name, one in components_of(opened(pipe)).items() if one != before[name]} == {"unet"}


def test_compiled_modules_are_the_same(pipe, tmp_path):
    records = record(pipe, tmp_path / "records")
    dense = pipe.unet
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    index = index_of(opened(pipe), records.index.pictures, 2)
    assert index == records.index and index.module == "UNet2DConditionModel"
    assert compressor.prune(pipe, Magnitude(), data=records, steps=0).masks
    pipe.unet = dense


def test_records_of_earlier_versions_are_refused_with_the_reason(pipe, tmp_path):
    record(pipe, tmp_path / "records")
    path = tmp_path / "records" / "index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    del index["components"]
    path.write_text(json.dumps({**index, "schema_version": 1}), encoding="utf-8")
    with pytest.raises(CompressorError, match=r"schema_version.*found 1") as caught:
        record(pipe, tmp_path / "records")
    assert "did not keep which scheduler" in caught.value.hint


def quick(folder, out, *more):
    return (
        *("run", "--pipeline", folder, "--prompts", out.with_suffix(".jsonl"), "--method", "magnitude", "--out", out),
        *("--set", "record.n=2", "--set", "record.unseen=1", "--set", "record.steps=2"),
        *("--set", "evaluate.latency_rounds=0", "--steps", "0", *more),
    )


def test_runs_of_a_pipeline_that_changed_record_it_anew(source, cli, tmp_path):
    folder = shutil.copytree(source, tmp_path / "pipe")
    errors = []
    for number in range(3):
        out = tmp_path / f"run{number}"
        shutil.copyfile(source.with_suffix(".jsonl"), out.with_suffix(".jsonl"))
        outcome = cli(*quick(folder, out))
        assert outcome.code == 0, outcome.err
        assert len(list((tmp_path / "records-cache" / "compressor" / "records").iterdir())) == number + 1
        drift = files.read_json(out / "report.json")["rows"][-1]["drift"]
        errors.append(next(one["value"] for one in drift if one["metric"] == "prediction_error"))
        if number == 0:
            for path in (folder / "text_encoder").glob("*.safetensors"):
                state = {name: value * 1.5 for name, value in load_file(path).items()}
                save_file(state, path, metadata={"format": "pt"})
        else:
            path = folder / "scheduler" / "scheduler_config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**config, "beta_end": 0.5}), encoding="utf-8")
    assert len(set(errors)) == 3
    for command in ("bench", "evaluate"):
        outcome = cli(command, tmp_path / "run0")
        assert outcome.code == 1 and "scheduler, a text encoder or another part changed" in outcome.err, outcome.err
    assert len(list((tmp_path / "records-cache" / "compressor" / "records").iterdir())) == 3


def test_a_run_of_a_pipeline_that_changed_is_not_resumed_and_nothing_is_recorded(source, cli, tmp_path):
    folder, out = shutil.copytree(source, tmp_path / "pipe"), tmp_path / "run"
    settings = {
        "pipeline": str(folder), "prompts": str(source.with_suffix(".jsonl")), "method": "sparsedm",
        "record": {"n": 2, "unseen": 1, "steps": 2}, "train": {"steps": 4, "batch_size": 2}, "evaluate": {"latency_rounds": 0},
    }  # fmt: skip
    events = prepared(resolve(settings, "test"))
    while True:
        try:
            next(events)
        except StopIteration as ended:
            inputs = ended.value
            break
    events = execute(inputs, out)
    while (event := next(events)).stage != "fine-tune" or event.done < 2:
        pass
    with pytest.raises(Interrupted):
        events.throw(Interrupted(143))
    path = folder / "scheduler" / "scheduler_config.json"
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(before), "beta_end": 0.5}), encoding="utf-8")
    outcome = cli("resume", out)
    assert outcome.code == 1 and "scheduler, a text encoder or another part changed" in outcome.err, outcome.err
    assert len(list((tmp_path / "records-cache" / "compressor" / "records").iterdir())) == 1
    path.write_text(before, encoding="utf-8")
    outcome = cli("resume", out)
    assert outcome.code == 0, outcome.err


def hooked(pipe):
    pipe.unet.register_forward_hook(lambda module, args, output: (output[0] * 2,))


def hooked_a_little(pipe):
    pipe.unet.register_forward_hook(lambda module, args, output: (output[0] * 1.02,))


def freed(pipe):
    pipe.enable_freeu(s1=0.1, s2=0.1, b1=3.2, b2=3.4)


@pytest.mark.parametrize("change", [hooked, hooked_a_little, freed])
def test_a_part_that_answers_otherwise_than_it_was_recorded_is_refused(pipe, tmp_path, change):
    records = record(pipe, tmp_path / "records")
    change(pipe)
    with pytest.raises(CompressorError, match="unet does not answer a recorded call as it did then"):
        compressor.prune(pipe, Magnitude(), data=records, steps=1)
    (tmp_path / "records" / "picture-00001.safetensors").unlink()
    with pytest.raises(CompressorError, match="unet does not answer a recorded call as it did then"):
        record(pipe, tmp_path / "records")  # half of one and half of the other


def test_half_precision_may_round(pipe, tmp_path):
    pipe.to(torch.bfloat16)
    records = record(pipe, tmp_path / "records")
    pipe.unet.register_forward_hook(lambda module, args, output: (output[0] * 1.02,))
    assert compressor.prune(pipe, Magnitude(), data=records, steps=0).masks


def grouped(pipe):
    pipe.transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")


def cast_by_layers(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def with_a_cache(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


@pytest.mark.parametrize(
    ("change", "hook", "recorded"),
    [
        (grouped, "group_offloading", True),
        (cast_by_layers, "layerwise_casting", False),
        (with_a_cache, "fbc_leader_block_hook", False),
    ],
)
def test_a_part_with_hooks_of_diffusers_is_refused_before_anything_is_recorded(tmp_path, change, hook, recorded):
    pipe = tiny_pipelines.made("flux", tmp_path / "files")
    change(pipe)
    given = {"n": 1, "unseen": 1, "steps": 1, **tiny_pipelines.arguments("flux")}
    monitored = []
    pipe.text_encoder.register_forward_hook(lambda *_: monitored.append(1))
    with pytest.raises(CompressorError, match=rf"transformer.* has a hook of diffusers: {hook}"):
        compressor.prune(pipe, Magnitude(), prompts=PROMPTS, record=given, steps=0)
    assert not monitored
    with pytest.raises(CompressorError, match=rf"has a hook of diffusers: {hook}"):
        compressor.lower(pipe.transformer, torch.zeros(1))
    if recorded:  # the answers are its own
        assert len(compressor.record(pipe, PROMPTS, tmp_path / "records", **given)) == 1
    else:
        with pytest.raises(CompressorError, match=f"has a hook of diffusers: {hook}"):
            compressor.record(pipe, PROMPTS, tmp_path / "records", **given)
        assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_fused_projections_are_refused_as_what_they_were_made_of_is_loaded_again(name, tmp_path):
    pipe = tiny_pipelines.made(name, tmp_path / "files")
    given = {"n": 1, "unseen": 1, "steps": 1, **tiny_pipelines.arguments(name)}
    records = compressor.record(pipe, PROMPTS, tmp_path / "records", **given)
    adapter = CallsAdapter(opened(pipe), records)
    opened(pipe).module.fuse_qkv_projections()
    with pytest.raises(CompressorError, match="has fused projections"):
        compressor.prune(pipe, Magnitude(), prompts=PROMPTS, record=given, steps=0)
    with pytest.raises(CompressorError, match="has fused projections"):
        compressor.record(pipe, PROMPTS, tmp_path / "more", **given)
    for prune in (compressor.prune, compressor.prune_):
        with pytest.raises(CompressorError, match="has fused projections"):
            prune(opened(pipe).module, Magnitude(), adapter=adapter, data=records, steps=0)


def test_a_frozen_part_is_told_before_anything_is_recorded(pipe):
    """As fuse_lora and unload_lora_weights leave it."""
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("recorded"))
    with pytest.raises(CompressorError, match="unet is frozen: none of its weights is to be trained"):
        compressor.prune(pipe, Magnitude(), prompts=PROMPTS, record={"n": 1, "unseen": 1, "steps": 1}, steps=1)


def on_meta(pipe):
    pipe.text_encoder.to("meta")


def offloaded(pipe):
    pytest.importorskip("accelerate")
    pipe.enable_sequential_cpu_offload(device="cpu")


@pytest.mark.parametrize("change", [on_meta, offloaded])
def test_a_pipeline_that_is_not_in_memory_is_refused(pipe, tmp_path, change):
    change(pipe)
    with pytest.raises(CompressorError, match="is not in memory") as caught:
        record(pipe, tmp_path / "records")
    assert "without enable_sequential_cpu_offload()" in caught.value.hint
    assert not (tmp_path / "records").exists()
    with pytest.raises(CompressorError, match="is not in memory"):
        compressor.prune(pipe, Magnitude(), prompts=PROMPTS, steps=0)


def test_adapters_of_a_text_encoder_count_with_their_scale(pipe):
    peft = pytest.importorskip("peft")
    hashes = [components_of(opened(pipe))["text_encoder"]]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), pipe.text_encoder)
    hashes.append(components_of(opened(pipe))["text_encoder"])
    for layer in pipe.text_encoder.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("default", 0.3)
    hashes.append(components_of(opened(pipe))["text_encoder"])
    assert len(set(hashes)) == 3


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"n": 0}, {"n": -1}, {"unseen": 0}, {"keep": 0}, {"seed": -1}, {"n": 1.5}]
)
def test_numbers_that_make_no_sense_are_told_before_anything_is_recorded(pipe, tmp_path, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(CompressorError, match=rf"record\(\): {name}: .*found {value}"):
        record(pipe, tmp_path / "records", **wrong)
    assert not (tmp_path / "records").exists()
