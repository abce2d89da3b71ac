"""Recorded calls: kept as they were, each tensor once, resumable, and refused where they are of something else."""

from __future__ import annotations

import copy
import errno
import json
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny_denoisers
import tiny_pipelines
import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors import safe_open
from torch import nn

import compressor
from compressor import CompressorError, Recording
from compressor.data import calls as storage
from compressor.data.calls import INDEX, Call, Picture
from compressor.lower.gathered import GatheredLinear
from compressor.lower.units import put
from compressor.pipelines import recording as recorder
from compressor.pipelines.adapter import CallsAdapter
from compressor.pipelines.opened import open_pipeline, opened
from compressor.pipelines.prompts import pictures, read_prompts
from compressor.pipelines.recording import sample
from compressor.plugins.obs import OBS
from compressor.plugins.sparsedm import SparseDM
from compressor.runs import placed
from compressor.training.calibration import visits

STEPS = 4


class Net(nn.Module):
    """A denoiser whose arguments have names and nestings of no convention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ff_in, self.ff_out = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, *, when, extra, flag=None, return_dict=True):
        hidden = torch.tanh(
            self.ff_in(x) + extra["text"]["embedding"].mean() + when[0] * extra["ids"][0].float().mean()
        )
        found = self.ff_out(hidden)
        return (found,) if not return_dict else {"sample": found}


class Scheduler:
    def step(self, answer, latents):
        return (latents - 0.3 * answer,)


class Pipe:
    """What a pipeline of diffusers looks like from outside."""

    def __init__(self) -> None:
        self.net, self.scheduler = Net(), Scheduler()
        self._progress_bar_config = {}

    @property
    def components(self):
        return {"transformer": self.net, "scheduler": self.scheduler}

    @property
    def transformer(self):
        return self.net

    @transformer.setter
    def transformer(self, module):
        self.net = module

    def set_progress_bar_config(self, **config):
        self._progress_bar_config = config

    def __call__(self, prompt, num_inference_steps=STEPS, generator=None, scale=1.0, weird=None):
        latents = torch.randn(1, 8, generator=generator)
        embedding = torch.full((3,), len(prompt) / 20)
        for index in range(num_inference_steps):
            time = torch.tensor([1 - index / num_inference_steps]) * scale
            extra = {"text": {"embedding": embedding}, "ids": [torch.arange(5), (None, 2)], "weird": weird}
            extra = {key: value for key, value in extra.items() if key != "weird" or value is not None}
            answer = self.net(torch.cat([latents, latents]), when=(time,), extra=extra, return_dict=False)[0]
            (latents,) = self.scheduler.step(answer[:1], latents)
        return SimpleNamespace(images=np.tile(latents.numpy().reshape(1, 2, 4, 1) * 0.1 + 0.5, (1, 1, 1, 3)))


PROMPTS = ["one", "two two", "three three three", "four", "five five"]


@pytest.fixture
def pipe():
    return Pipe()


def made(pipe, folder, **more):
    return compressor.record(pipe, PROMPTS, folder, **{"n": 3, "unseen": 2, **more})


def test_calls_are_kept_as_they_were(pipe, tmp_path):
    records = made(pipe, tmp_path / "records")
    assert len(records) == 3 * STEPS and len(records.unseen) == 2 * STEPS
    for call in records.take(torch.arange(len(records))):
        assert call.args[0].shape == (2, 8) and isinstance(call.kwargs["when"], tuple)
        assert call.kwargs["extra"]["ids"][1] == (None, 2) and call.kwargs["extra"]["ids"][0].dtype == torch.int64
        assert call.kwargs["return_dict"] is False and "flag" not in call.kwargs
        with torch.no_grad():
            again = pipe.net(*call.args, **call.kwargs)[0]
        assert torch.allclose(again, call.output, atol=1e-6)


def test_calls_know_their_step(pipe, tmp_path):
    records = made(pipe, tmp_path / "records")
    calls = records.take(torch.arange(len(records)))
    assert [call.step for call in calls] == [0, 1, 2, 3] * 3 and {call.steps for call in calls} == {STEPS}
    assert [round(call.time, 3) for call in calls[:STEPS]] == [0.875, 0.625, 0.375, 0.125]
    near = records.near(0.6)
    assert near.tolist() == [1, 5, 9]


def test_some_calls_of_each_picture_are_kept_by_chance_that_the_seed_gives(pipe, tmp_path):
    records = made(pipe, tmp_path / "records", keep=2, n=6)
    steps = [call.step for call in records.take(torch.arange(len(records)))]
    pairs = [tuple(steps[at : at + 2]) for at in range(0, 12, 2)]
    assert len(records) == 12 and len(records.unseen) == 4 and all(a < b for a, b in pairs) and len(set(pairs)) > 1
    assert {call.steps for call in records.take(torch.arange(12))} == {STEPS}
    assert made(pipe, tmp_path / "again", keep=2, n=6).sha256 == records.sha256
    with pytest.raises(CompressorError, match="keep 2, not None"):
        made(pipe, tmp_path / "records", n=6)


def test_what_repeats_is_stored_once(pipe, tmp_path):
    made(pipe, tmp_path / "records")
    names = []
    for path in sorted((tmp_path / "records").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    assert len(names) == len(set(names))
    # per call: inputs, answer; in all: times of four steps, the ids, the embeddings of the prompts
    pictures = storage.read_index(tmp_path / "records").pictures
    lengths = {len(picture.arguments["prompt"]) for picture in pictures}
    assert len(names) == 5 * STEPS * 2 + STEPS + 1 + len(lengths)


def test_prompts_that_are_judged_on_are_not_learned_from():
    lines = [{"prompt": str(number)} for number in range(20)]
    found = pictures(lines, 40, 4, 0)
    seen = {p.arguments["prompt"] for p in found if not p.unseen}
    held = {p.arguments["prompt"] for p in found if p.unseen}
    assert len(held) == 4 and not seen & held and len(seen) == 16
    assert len({p.seed for p in found}) == 44 and found == pictures(lines, 40, 4, 0) != pictures(lines, 40, 4, 1)
    alone = pictures(lines[:1], 2, 2, 0)
    assert [p.unseen for p in alone] == [False, False, True, True] and len({p.seed for p in alone}) == 4


def test_an_interrupted_recording_goes_on_to_the_same(pipe, tmp_path, monkeypatch):
    whole = made(pipe, tmp_path / "whole")
    ran, own = [], recorder.sample

    def stops(*arguments, **named):
        ran.append(1)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return own(*arguments, **named)

    monkeypatch.setattr(recorder, "sample", stops)
    with suppress(KeyboardInterrupt):
        made(pipe, tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) == 2
    with pytest.raises(CompressorError, match=r"picture-00002.*not finished"):
        Recording.opened(tmp_path / "parts")
    again = made(pipe, tmp_path / "parts")
    assert len(ran) == 3 + 3 and again.sha256 == whole.sha256
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_a_damaged_picture_is_named_and_made_again(pipe, tmp_path, cut):
    records = made(pipe, tmp_path / "records")
    path = tmp_path / "records" / "picture-00001.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CompressorError, match="picture-00001"):
        Recording.opened(tmp_path / "records")
    assert made(pipe, tmp_path / "records").sha256 == records.sha256


def test_a_recording_of_held_out_pictures_alone_is_refused(pipe, tmp_path):
    made(pipe, tmp_path / "records")
    path = tmp_path / "records" / INDEX
    index = json.loads(path.read_text(encoding="utf-8"))
    for picture in index["pictures"]:
        picture["unseen"] = True
    path.write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CompressorError, match="no calls to learn from"):
        Recording.opened(tmp_path / "records")


def test_a_flipped_bit_is_found_when_it_is_read(pipe, tmp_path):
    made(pipe, tmp_path / "records")
    path = tmp_path / "records" / "picture-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(bytes(content))
    records = Recording.opened(tmp_path / "records")
    with pytest.raises(CompressorError, match=r"picture-00000\.safetensors: its bytes are not those"):
        records.take(torch.arange(len(records)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "other prompts, their number or their seed"),
        ({"n": 4}, "other prompts, their number or their seed"),
        ({"scale": 2.0}, "other prompts, their number or their seed"),
        ({"steps": 3}, "steps None, not 3"),
    ],
)
def test_other_records_are_refused(pipe, tmp_path, change, said):
    made(pipe, tmp_path / "records")
    with pytest.raises(CompressorError, match=said):
        made(pipe, tmp_path / "records", **change)


def test_records_of_other_weights_are_refused(pipe, tmp_path):
    records = made(pipe, tmp_path / "records")
    with torch.no_grad():
        pipe.net.ff_out.bias += 1
    with pytest.raises(CompressorError, match="weights_sha256"):
        made(pipe, tmp_path / "records")
    with pytest.raises(
        CompressorError, match="records of another pipeline than this one: other weights of transformer"
    ):
        compressor.prune(pipe, SparseDM(), data=records, steps=0)


def test_a_folder_of_something_else_is_left_alone(pipe, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CompressorError, match="has no records"):
        made(pipe, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_full_disk_keeps_what_is_there(pipe, tmp_path, monkeypatch):
    own, left = storage.save_file, [2]

    def full(tensors, path, **named):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        own(tensors, path, **named)

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(CompressorError, match=r"picture-00002.*No space left") as caught:
        made(pipe, tmp_path / "records")
    assert "the same command goes on" in caught.value.hint
    kept = sorted(path.name for path in (tmp_path / "records").iterdir())
    assert kept == ["index.json", "picture-00000.safetensors", "picture-00001.safetensors"]
    monkeypatch.setattr(storage, "save_file", own)
    assert len(made(pipe, tmp_path / "records")) == 3 * STEPS


def test_too_small_a_disk_is_told_after_the_first_picture(pipe, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(recorder.shutil, "disk_usage", lambda path: usage(0, 0, 70 * 2**20))
    monkeypatch.setattr(recorder, "_SPARE", 70 * 2**20)
    with pytest.raises(CompressorError, match=r"would take [\d.]+ kB, and 73\.4 MB are free"):
        made(pipe, tmp_path / "records")


def test_what_cannot_be_kept_is_named(pipe, tmp_path):
    with pytest.raises(CompressorError, match="argument weird: a object cannot be kept"):
        made(pipe, tmp_path / "records", weird=object())


def test_a_call_with_what_cannot_be_kept_is_named(tmp_path):
    with pytest.raises(CompressorError, match=r"argument\.extra\.0: a object cannot be kept"):
        storage.write(tmp_path / "x.safetensors", [Call((), {"extra": [object()]}, torch.zeros(1))], set())


def test_tensors_among_the_arguments_of_pictures_are_told_apart(pipe, tmp_path):
    made(pipe, tmp_path / "records", weird=torch.ones(3))
    assert len(made(pipe, tmp_path / "records", weird=torch.ones(3))) == 3 * STEPS
    with pytest.raises(CompressorError, match="other prompts"):
        made(pipe, tmp_path / "records", weird=torch.zeros(3))


def test_nothing_of_the_pipeline_is_changed_by_recording(pipe, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made(pipe, tmp_path / "records")
    assert torch.equal(torch.rand(3), expected)
    assert not pipe.net._forward_hooks and not pipe.net._forward_pre_hooks and "step" not in vars(pipe.scheduler)
    assert pipe._progress_bar_config == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"colour": 3}, "takes no 'colour'"),
        ({"part": "transfomer"}, "Did you mean 'transformer'"),
        ({"part": "transformer.ff_im"}, "Did you mean 'ff_in'"),
    ],
)
def test_what_the_pipeline_does_not_have_is_named(pipe, tmp_path, arguments, said):
    with pytest.raises(CompressorError) as caught:
        made(pipe, tmp_path / "records", **arguments)
    assert said in str(caught.value)


def test_a_part_that_is_never_called_is_named(pipe, tmp_path):
    pipe.net.idle = nn.Linear(2, 2)
    with pytest.raises(CompressorError, match=r"never called transformer\.idle"):
        made(pipe, tmp_path / "records", part="transformer.idle")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", b"", "no prompt in it"),
        ("p.txt", b"\n  \n", "no prompt in it"),
        ("p.txt", b"\xff\xfe\x00\x01", "not a text file"),
        ("p.txt", b"a\0b", "not a text file"),
        ("p.txt", b"short\n" + b"x" * 10_000, "p.txt:2: a line of 10,000 characters"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "p.jsonl:2: not JSON"),
        ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "p.jsonl:1: not JSON: the key 'prompt' is there twice"),
        ("p.json", b'[{"prompt": "\\ud800"}]', "p.json: not JSON"),
        ("p.jsonl", b"[1]", "p.jsonl:1: not a JSON object"),
        ("p.json", b"", "no prompt in it"),
        ("p.json", b"[]", "no prompt in it"),
        ("p.json", b'{"prompt": "a"}', "not a JSON list"),
        ("p.json", b'[\n"a",\n', "p.json: not JSON"),
        ("p.json", b'["a", 3]', "entry 1 is no text and no JSON object: 3"),
        ("p.json", b'["a", " "]', "entry 1 is no text"),
        ("p.json", b'["' + b"x" * 10_000 + b'"]', "entry 0 is a text of 10,000 characters"),
        ("p.csv", b"prompt\na cat\n", "prompts are not read from .csv files"),
        ("P.YAML", b"- a cat\n", "prompts are not read from .yaml files"),
        ("p.txt", None, "No such file"),
    ],
)
def test_bad_prompts_are_named(tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CompressorError) as caught:
        read_prompts(tmp_path / name)
    assert said in caught.value.message


def test_prompts_are_lines_or_arguments(tmp_path):
    (tmp_path / "p.txt").write_text("\ufeffa cat\r\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == [{"prompt": "a cat"}, {"prompt": "a dog"}]
    (tmp_path / "p.txt").write_text("a\u2028cat\ra\x0cdog\n", encoding="utf-8")  # neither is the end of a line
    assert read_prompts(tmp_path / "p.txt") == [{"prompt": "a\u2028cat"}, {"prompt": "a\x0cdog"}]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028cat"}', encoding="utf-8")
    assert read_prompts(tmp_path / "p.jsonl") == [{"prompt": "a\u2028cat"}]
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "class_labels": [3]}))
    assert read_prompts(tmp_path / "p.jsonl") == [{"prompt": "a", "class_labels": [3]}]
    (tmp_path / "p.json").write_text(json.dumps(["a cat", {"prompt": "a", "height": 8}, {}], indent=1))
    assert read_prompts(tmp_path / "p.json") == [{"prompt": "a cat"}, {"prompt": "a", "height": 8}, {}]


def adapter_of(pipe, records):
    return CallsAdapter(opened(pipe), records)


def test_fine_tuning_holds_no_teacher_and_follows_the_records(pipe, tmp_path):
    records = made(pipe, tmp_path / "records")
    adapter = adapter_of(pipe, records)
    run = compressor.FineTuning(
        pipe.net,
        SparseDM(),
        adapter=adapter,
        data=records,
        training=compressor.Training(steps=40, batch_size=4, lr=1e-2),
    )
    assert run.teacher is None
    batch = run.batches.batch(0)
    with torch.no_grad():
        expected = torch.stack([(run.student(*c.args, **c.kwargs)[0] - c.output).square().mean() for c in batch]).mean()
    first, *_, last = list(compressor.steps(run))
    assert first.noise_loss == pytest.approx(float(expected), rel=1e-5)
    assert first.loss == pytest.approx(1.1 * first.noise_loss, rel=1e-5)  # 1 for the noise and 0.1 for the teacher
    assert last.noise_loss < 0.7 * first.noise_loss


def test_calibration_sees_every_step_in_turn(pipe, tmp_path):
    records = made(pipe, tmp_path / "records")
    batches = compressor.Samples(records, 2, 0)
    seen = list(visits(adapter_of(pipe, records), batches, STEPS))
    times = [[float(kwargs["when"][0]) for _, kwargs, _ in visit.inputs] for visit in seen]
    assert times == [[1.0] * 2, [0.75] * 2, [0.5] * 2, [0.25] * 2]


def test_obs_beats_magnitude_on_calls_that_it_did_not_see(pipe, tmp_path):
    from compressor.plugins.magnitude import Magnitude

    records = made(pipe, tmp_path / "records", n=8)
    errors = {}
    for pruner in (OBS(), Magnitude()):
        result = compressor.prune(pipe, pruner, data=records, steps=0)
        calls = records.unseen.take(torch.arange(len(records.unseen)))
        with torch.no_grad():
            errors[type(pruner)] = sum(
                float((result.model(*c.args, **c.kwargs)[0] - c.output).square().mean()) for c in calls
            )
    assert errors[OBS] < 0.8 * errors[Magnitude]


def test_the_result_is_put_into_the_pipeline_and_taken_out(pipe, tmp_path):
    dense = pipe.net
    result = compressor.prune(pipe, SparseDM(), prompts=PROMPTS, steps=2, record={"n": 2, "unseen": 1})
    assert pipe.net is dense
    with compressor.apply(pipe, result) as same:
        assert same is pipe and pipe.net is result.model
    assert pipe.net is dense
    placed = compressor.apply(pipe, result.model)
    assert pipe.net is result.model
    placed.remove()
    placed.remove()
    assert pipe.net is dense


def test_a_result_of_another_class_than_the_part_is_refused(pipe, tmp_path):
    records = made(pipe, tmp_path / "records")
    result = compressor.prune(pipe, SparseDM(), data=records, steps=0)
    pipe.net = nn.Linear(2, 2)
    with pytest.raises(CompressorError, match="the result is a Net, and transformer is a Linear"):
        compressor.apply(pipe, result)
    with compressor.apply(pipe, result.model):  # a module is the user's to answer for
        pass


def test_a_model_takes_the_dtype_of_the_part_and_stays_what_it_was(pipe, tmp_path):
    result = compressor.prune(pipe, SparseDM(), prompts=PROMPTS, steps=0, record={"n": 2, "unseen": 1})
    dense = pipe.net.bfloat16()
    for given in (result, result.model):
        with compressor.apply(pipe, given):
            assert {value.dtype for value in pipe.net.parameters()} == {torch.bfloat16} and pipe.net is not result.model
            assert torch.equal(pipe.net.ff_out.weight, result.model.ff_out.weight.bfloat16())
        assert pipe.net is dense
        assert {value.dtype for value in result.model.parameters()} == {torch.float32}
    elsewhere = placed._like(result.model, dense, torch.device("meta"))
    assert {value.device.type for value in elsewhere.parameters()} == {"meta"}
    assert {value.device.type for value in result.model.parameters()} == {"cpu"}
    dense.to("meta")
    with pytest.raises(CompressorError, match=r"transformer: ff_in\.weight has no values"):
        compressor.apply(pipe, result)
    pipe.net = dense = Net().half()
    result.model.ff_out.weight.data[0, 0] = 1e6
    with pytest.raises(CompressorError, match=r"ff_out\.weight: 1e\+06 is too large for torch\.float16"):
        compressor.apply(pipe, result)
    assert pipe.net is dense


def processors(unet):
    unet.set_attn_processor(AttnProcessor())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (processors, r"attn1\.processor \(AttnProcessor\(\)\), and the module .* has not \(AttnProcessor2_0\(\)\)"),
        (lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6), "FreeU"),
        (lambda unet: setattr(unet, "encoder_hid_proj", nn.Linear(2, 2)), "encoder_hid_proj"),
    ],
)
def test_what_was_put_into_a_part_since_is_not_lost_without_a_word(change, said, tmp_path):
    pipe = tiny_pipelines.made("sd", tmp_path / "files")
    other = copy.deepcopy(pipe.unet)
    with compressor.apply(pipe, other):
        change(pipe.unet)  # after apply, it is the module's own
    other = copy.deepcopy(pipe.unet)
    change(pipe.unet)
    with pytest.raises(CompressorError, match=said):
        compressor.apply(pipe, other)
    compressor.save(tmp_path / "model", other, {})
    before = pipe.unet
    if "hid_proj" not in said:
        with compressor.apply(pipe, tmp_path / "model"):
            assert pipe.unet is not before
    with compressor.apply(pipe, copy.deepcopy(before)):
        pass


def test_what_was_applied_last_is_removed_first(pipe):
    dense, one, two = pipe.net, Net(), Net()
    first, second = compressor.apply(pipe, one), compressor.apply(pipe, two)
    with pytest.raises(CompressorError, match="transformer is not the module any more that was put there"):
        first.remove()
    assert pipe.net is two
    second.remove()
    first.remove()
    assert pipe.net is dense
    with compressor.apply(pipe, one):
        pipe.net = torch.compile(pipe.net, backend="eager")  # is it still, faster
    assert pipe.net is dense
    lowered = put(copy.deepcopy(one), "ff_out", GatheredLinear(torch.zeros(16, 8), None, compressor.NM(2, 4, 16)))
    with compressor.apply(pipe, lowered), compressor.apply(pipe, two):  # over one that cannot be pruned any more
        assert pipe.net is two
    assert pipe.net is dense


def test_an_answer_of_a_list_is_stacked_and_others_are_refused():
    assert storage.answer([torch.zeros(2), torch.ones(2)]).shape == (2, 2)
    with pytest.raises(CompressorError, match="not a tensor"):
        storage.answer({"sample": None})
    with pytest.raises(CompressorError, match="unlike shapes"):
        storage.answer([torch.zeros(2), torch.ones(3)])


def test_an_answer_of_a_list_and_more_is_all_its_numbers():
    """As of a ControlNet: what goes to each block on the way down, and what goes to the middle; of FLUX two lists, or one and None."""
    down, mid = [torch.zeros(2, 3), torch.ones(4)], torch.full((5,), 2.0)
    expected = torch.cat([torch.zeros(6), torch.ones(4), torch.full((5,), 2.0)])
    for given in ((down, mid), (tuple(down), mid), {"down": down, "mid": mid}, (down, [mid])):
        assert torch.equal(storage.answer(given), expected)
    assert storage.answer(([mid, mid], None)).shape == (2, 5)


@pytest.mark.parametrize("part", ["controlnet", "controlnet.nets.1"])
def test_a_controlnet_is_recorded_pruned_and_put_back(part, tmp_path):
    def net():
        made = diffusers.ControlNetModel(
            block_out_channels=(32, 64), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1,
            norm_num_groups=8, cross_attention_dim=32, attention_head_dim=8, conditioning_embedding_out_channels=(8, 16),
        )  # fmt: skip
        for value in made.parameters():
            value.data.normal_(0, 0.05)
        return made.eval()

    several = "." in part
    nets, red = diffusers.MultiControlNetModel([net(), net()]) if several else net(), Image.new("RGB", (16, 16), "red")
    parts = {**tiny_pipelines.made("sd", tmp_path / "files").components, "controlnet": nets}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    lines = [{"prompt": prompt, "image": [red, red] if several else red} for prompt in PROMPTS]
    records = compressor.record(pipe, lines, tmp_path / "records", n=2, unseen=1, steps=2, part=part)
    result = compressor.prune(pipe, SparseDM(), data=records, steps=2, lr=1e-3, part=part)
    told = {**lines[0], "num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    before = pipe(**told).images
    with compressor.apply(pipe, result, part=part):
        assert not np.array_equal(pipe(**{**told, "generator": torch.Generator().manual_seed(0)}).images, before)
    assert any("attn" in name for name in result.masks)
    pipe.save_pretrained(tmp_path / "source")
    adapter = CallsAdapter(open_pipeline(tmp_path / "source", part), records)
    (tmp_path / "written").mkdir()
    adapter.write_pipeline(result.model, tmp_path / "written")
    written = opened(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "written", local_files_only=True), part)
    for name, value in result.model.state_dict().items():
        assert torch.equal(written.module.state_dict()[name], value), name


def test_an_answer_of_two_tensors_is_learned_whole(tmp_path):
    """As of a model of video and sound."""

    class Both(Net):
        def __init__(self):
            super().__init__()
            self.ff_sound = nn.Linear(8, 4)

        def forward(self, x, **given):
            (picture,) = super().forward(x, **given)
            return picture, self.ff_sound(picture)

    pipe = Pipe()
    pipe.net = Both()
    records = made(pipe, tmp_path / "records")
    assert records.take(torch.arange(1))[0].output.shape == (2 * 8 + 2 * 4,)
    result = compressor.prune(pipe, SparseDM(), data=records, steps=2, batch_size=2, lr=0.1)
    assert not torch.equal(result.model.ff_sound.bias, pipe.net.ff_sound.bias)


def test_half_precision_and_scalars_are_kept(tmp_path):
    given = (torch.ones(2, dtype=torch.bfloat16), torch.tensor(3.5), torch.tensor([True]), float("inf"), torch.float16)
    call = Call(given, {"none": None}, torch.zeros(1))
    storage.write(tmp_path / "x.safetensors", [call], set())
    listed, _ = storage.outline(tmp_path / "x.safetensors")
    assert [next(iter(value)) for value in listed[0]["args"]["list"]] == [
        "tensor",
        "tensor",
        "tensor",
        "number",
        "dtype",
    ]


def test_a_time_that_was_expanded_to_one_sample_is_kept(tmp_path):
    """Pipelines make the time of a batch of one so; it has a stride of 0."""
    storage.write(tmp_path / "x.safetensors", [Call((torch.tensor(3.5).expand(1),), {}, torch.zeros(1))], set())
    _, (name, other) = storage.outline(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert {float(file.get_tensor(one)) for one in (name, other)} == {0.0, 3.5}


def test_a_model_that_keeps_some_weights_in_float32_is_pruned_in_half_precision(tmp_path):
    torch.manual_seed(0)
    case = tiny_denoisers.wan()
    model = case.pipeline.transformer.bfloat16()
    for name, value in model.named_parameters():  # as diffusers loads it
        value.data = value.float() if any(one in name for one in type(model)._keep_in_fp32_modules) else value
    call = {key: value.bfloat16() if key == "prompt_embeds" else value for key, value in case.call.items()}
    records = compressor.record(case.pipeline, [call] * 2, tmp_path / "records", n=1, unseen=1, steps=2)
    assert records.index.dtype == "bfloat16"
    result = compressor.prune(case.pipeline, OBS(timesteps=2), data=records, steps=1)
    assert {n: v.dtype for n, v in result.model.named_parameters()} == {n: v.dtype for n, v in model.named_parameters()}
    with compressor.apply(case.pipeline, result) as pipe:
        assert np.isfinite(pipe(**call, num_inference_steps=2, output_type="np").frames).all()


UNLIKE = {
    "sizes": [{"height": 16}, {"height": 32}],
    "numbers": [{}, {"num_images_per_prompt": 2}],
    "guidance": [{}, {"guidance_scale": 1.0}],
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_calls_of_unlike_shapes_are_learned_from(kind, tmp_path):
    pipe = tiny_pipelines.made("sd", tmp_path / "files")
    prompts = [{"prompt": f"a cat {n}", "height": 16, "width": 16, **one} for n, one in enumerate(2 * UNLIKE[kind])]
    records = compressor.record(pipe, prompts, tmp_path / "records", n=3, unseen=1, steps=1)
    adapter = CallsAdapter(opened(pipe), records)
    calls = records.take(torch.arange(3))
    inputs, target = adapter.noised(calls, torch.Generator())
    with torch.no_grad():
        torch.testing.assert_close(adapter.predict(pipe.unet, inputs), target, rtol=1e-4, atol=1e-5)
    for call, (one, wanted, share) in zip(calls, adapter.pieces(inputs, target, 1), strict=True):
        assert torch.equal(wanted, call.output) and share == 1 / 3
        assert len(one) == 1 and adapter.predict(pipe.unet, one).shape == wanted.shape
    assert compressor.prune(pipe, OBS(timesteps=2), data=records, steps=1, batch_size=3).masks


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"])
def test_what_is_recorded_is_what_the_pipeline_does_with_that_noise(scheduler, tmp_path):
    """Pipelines look at the names of what the scheduler's step takes before they pass `eta` and `generator` on."""
    pipe = tiny_pipelines.made("sd", tmp_path / "files")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    records = compressor.record(
        pipe, ["a", "b"], tmp_path / "records", n=1, unseen=1, steps=3, eta=1.0, height=16, width=16
    )
    picture = next(one for one in records.index.pictures if not one.unseen)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    pipe(**picture.arguments, num_inference_steps=3, generator=torch.Generator().manual_seed(picture.seed))
    assert all(torch.equal(call.args[0], own) for call, own in zip(records.take(torch.arange(3)), seen, strict=True))


class _InTurns(Pipe):
    """Waits for the other to begin, or to end, a while: as long as it is let."""

    begun, ended = Event(), Event()

    def __call__(self, prompt, num_inference_steps=STEPS, generator=None):
        is_first = not self.begun.is_set()
        if is_first:
            self.begun.set()
        (self.begun if is_first else self.ended).wait(0.3)
        time.sleep(0.1 * is_first)
        try:
            return super().__call__(prompt, num_inference_steps, generator)
        finally:
            if is_first:
                self.ended.set()


def test_threads_record_what_one_after_another_would():
    step = Scheduler.step
    wanted = Picture(arguments={"prompt": "one"}, seed=3)
    alone = sample(opened(Pipe()), wanted, STEPS, keep=True)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: sample(opened(_InTurns()), wanted, STEPS, keep=True), range(2)))
    assert Scheduler.step is step
    for one in found:
        assert [call.step for call in one.calls] == list(range(STEPS))
        assert all(torch.equal(a, b) for a, b in zip(one.latents, alone.latents, strict=True))


def test_a_scheduler_with_a_step_of_its_own_is_followed(pipe):
    wanted = Picture(arguments={"prompt": "one"}, seed=3)
    plain = sample(opened(Pipe()), wanted, STEPS)
    own = Scheduler.step
    pipe.scheduler.step = given = lambda answer, latents: own(pipe.scheduler, answer, latents)
    found = sample(opened(pipe), wanted, STEPS, keep=True)
    assert vars(pipe.scheduler)["step"] is given and Scheduler.step is own
    assert [call.step for call in found.calls] == list(range(STEPS))
    assert all(torch.equal(a, b) for a, b in zip(found.latents, plain.latents, strict=True))


def test_a_copy_of_the_scheduler_steps_by_itself(tmp_path):
    """As pipelines of pictures and sound make one."""
    copies = []

    class Counting(Scheduler):
        count = 0

        def step(self, answer, latents):
            self.count += 1
            return super().step(answer, latents)

    class Copying(Pipe):
        def __call__(self, prompt, num_inference_steps=STEPS, generator=None):
            copies.append(copy.deepcopy(self.scheduler))
            copies[-1].step(torch.zeros(1), torch.zeros(1))
            return super().__call__(prompt, num_inference_steps, generator)

    pipe = Copying()
    pipe.scheduler = Counting()
    made(pipe, tmp_path / "records")
    assert [one.count for one in copies] == [1 + STEPS * n for n in range(5)] and pipe.scheduler.count == 5 * STEPS


class Dynamic(diffusers.StableDiffusionImg2ImgPipeline):
    """A user's own: guidance ends after the first step, as diffusers' documentation has it."""

    def __call__(self, prompt, generator=None, **kwargs):
        def after(pipe, step, time, given):
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": given["prompt_embeds"].chunk(2)[-1]} if step == 0 else {}

        told = {"callback_on_step_end": after, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        return super().__call__(prompt, generator=generator, **told, **kwargs)


def test_a_pipeline_of_ones_own_takes_what_it_passes_on_and_pictures(tmp_path):
    parts = tiny_pipelines.made("sd", tmp_path / "files").components
    pipe = Dynamic(**parts, requires_safety_checker=False)
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    more = {"n": 1, "unseen": 1, "steps": 4, "strength": 1.0}
    lines = [{"prompt": "a", "image": red}, {"prompt": "a", "image": np.asarray(blue)[None] / np.float32(255)}]
    records = compressor.record(pipe, lines, tmp_path / "records", **more)
    assert [len(call.output) for call in records.take(torch.arange(4))] == [2, 1, 1, 1]
    assert all(one.arguments["image"].startswith("array ") for one in records.index.pictures)
    assert compressor.prune(pipe, SparseDM(), data=records, steps=1, batch_size=4).masks
    with pytest.raises(CompressorError, match="other prompts"):
        compressor.record(pipe, [lines[0], {"prompt": "a", "image": red}], tmp_path / "records", **more)
    with pytest.raises(CompressorError, match="takes no 'force'"):
        compressor.record(pipe, lines, tmp_path / "wrong", force=1)
    with pytest.raises(CompressorError, match="a set cannot be kept in records"):
        compressor.record(pipe, [{"prompt": "a", "image": {1}}], tmp_path / "wrong")


def test_latents_are_no_pictures(tmp_path):
    pipe = opened(tiny_pipelines.made("sd", tmp_path / "files"))
    given = {"prompt": "a", "height": 16, "width": 16, "output_type": "latent"}
    assert recorder.sample(pipe, storage.Picture(arguments=given, seed=0), 1).images is None


def test_the_second_of_two_models_is_told_and_pruned_as_a_part_of_its_own(tmp_path):
    torch.manual_seed(0)
    case, other = tiny_denoisers.wan(), tiny_denoisers.wan().pipeline.transformer
    pipe = diffusers.WanPipeline(**{**case.pipeline.components, "transformer_2": other}, boundary_ratio=0.9)
    for part, left in (("transformer", "transformer_2"), ("transformer_2", "transformer")):
        given = {"n": 1, "unseen": 1, "steps": 4}
        with pytest.warns(UserWarning, match=f"^{left}, of the class of {part}, left dense"):
            result = compressor.prune(pipe, OBS(timesteps=2), prompts=[case.call] * 2, part=part, record=given, steps=1)
        compressor.apply(pipe, result, part=part)
    pipe.save_pretrained(tmp_path)
    none = dict.fromkeys(("text_encoder", "tokenizer", "image_encoder", "image_processor"))
    found = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **none)
    for part in ("transformer", "transformer_2"):
        assert float((getattr(found, part).blocks[0].attn1.to_q.weight == 0).float().mean()) == 0.5
