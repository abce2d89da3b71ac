"""Files that are damaged, hostile or simply wrong: nothing in them runs, and the message says where and what."""

from __future__ import annotations

import os
import pickle
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor import cost, recipe, registry
from compressor.data.sets import Images
from compressor.errors import CompressorError, UsageError
from compressor.plugins.wanda import Wanda
from compressor.runs import inputs
from compressor.runs.fits import refuse_unsigned
from compressor.weights import read_weights


@contextmanager
def refused(*parts, error=CompressorError):
    """The block raises `error` within a second of computing, and what it says holds every one of `parts`."""
    began = time.process_time()
    with pytest.raises(error) as caught:
        yield
    assert time.process_time() - began < 1
    for part in parts:
        assert str(part) in str(caught.value)


def resolved(tmp_path, text):
    """The recipe that `text` makes, as `compressor run --config` reads it."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return inputs.resolve(recipe.read(path), str(path))


def digits_weights():
    return load_file(registry.adapter("uvit-digits").weights)


# --- Weights. ---


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch"])
def test_a_malicious_pickle_executes_nothing(tmp_path, suffix, dump):
    marker, path = tmp_path / "executed", tmp_path / f"weights{suffix}"
    with path.open("wb") as file:
        dump({"weight": Evil(marker)}, file)
    with refused(path):
        read_weights(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))  # the payload is real
    assert marker.exists()


def test_a_malicious_pickle_ends_a_run_before_it_begins(tmp_path, cli):
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "executed")))
    outcome = cli.trial(tmp_path / "out", "--weights", path)
    assert outcome.code == 1
    assert str(path) in outcome.err
    assert "safetensors" in outcome.err  # how to convert
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]


def test_a_malicious_array_executes_nothing(tmp_path, cli):
    path = tmp_path / "images.npy"
    np.save(path, np.array([Evil(tmp_path / "executed")], dtype=object), allow_pickle=True)
    outcome = cli.trial(tmp_path / "out", "--data", path)
    assert outcome.code == 1
    assert str(path) in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["images.npy"]


def test_weights_of_another_width_name_the_first_differences(tmp_path):
    adapter = registry.adapter("uvit-digits")
    narrow = type(adapter)({**adapter.config, "embed_dim": 48}).build()
    save_file(narrow.state_dict(), tmp_path / "narrow.safetensors")
    with refused(tmp_path / "narrow.safetensors", "pos_embed", "48", "96", "more", "--model"):
        adapter.load(str(tmp_path / "narrow.safetensors"))


def test_missing_and_unexpected_weights_are_named(tmp_path):
    state = digits_weights()
    state["final.weight"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "renamed.pth")
    with refused("missing norm.weight", "unexpected final.weight"):
        registry.adapter("uvit-digits").load(str(tmp_path / "renamed.pth"))


@pytest.mark.parametrize(
    "saved", [{"parts": {"w": torch.ones(1)}}, {1: torch.ones(1)}, [torch.ones(1)], {}, torch.ones(1)]
)
def test_what_is_no_state_dict_is_refused(tmp_path, saved):
    torch.save(saved, tmp_path / "odd.pt")
    with refused(tmp_path / "odd.pt"):
        read_weights(tmp_path / "odd.pt")


def test_a_small_file_cannot_fill_the_memory(tmp_path):
    torch.save({"w": torch.zeros(1).expand(2**31)}, tmp_path / "bomb.pt")
    with refused("bomb.pt", "larger than the file"):
        read_weights(tmp_path / "bomb.pt")


@pytest.mark.parametrize("length", [0, 7, 8, 100, 10_000])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_weights_are_refused(tmp_path, suffix, length):
    whole, path = tmp_path / "whole", tmp_path / f"cut{suffix}"
    save_file(digits_weights(), whole) if suffix == ".safetensors" else torch.save(digits_weights(), whole)
    path.write_bytes(whole.read_bytes()[:length])
    with refused(path):
        read_weights(path)


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, cli):
    state = digits_weights()
    state["in_blocks.0.mlp.fc1.weight"][3, 5] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    outcome = cli.trial(tmp_path / "out", "--weights", tmp_path / "nan.safetensors")
    assert outcome.code == 1
    assert "in_blocks.0.mlp.fc1.weight" in outcome.err
    assert not (tmp_path / "out").exists()


# --- Data. ---


@pytest.mark.parametrize("largest", [1.0, 255.0])
def test_pictures_in_floats_that_are_never_below_zero_are_refused(tmp_path, cli, largest):
    images = np.linspace(0, largest, 8 * 64, dtype=np.float32).reshape(8, 1, 8, 8)
    np.savez(tmp_path / "set.npz", images=images)
    outcome = cli("run", "--data", tmp_path / "set.npz", "--out", tmp_path / "run")
    assert outcome.code == 2 and f"set: images are floats from 0 to {largest:g}" in outcome.err
    assert "pictures lie in [-1, 1]" in outcome.err and "uint8" in outcome.err
    refuse_unsigned(Images("latents", torch.from_numpy(images - largest / 2)))
    refuse_unsigned(Images("bytes", torch.zeros(2, 1, 8, 8, dtype=torch.uint8)))


@pytest.mark.parametrize("name", ["uvit-digits", "ddpm-digits"])
@pytest.mark.parametrize("form", ["tensor", "pairs", "loader", "images"])
def test_python_says_that_pictures_are_not_around_zero(name, form):
    adapter = registry.adapter(name)
    model, unit = adapter.load(None), torch.rand(8, *adapter.image_shape)

    def pruned(pixels):
        forms = {
            "tensor": lambda: pixels,
            "pairs": lambda: [(pixels, torch.zeros(8, dtype=torch.int64))],
            "loader": lambda: DataLoader(TensorDataset(pixels), batch_size=8),
            "images": lambda: compressor.Images("mine", pixels),
        }
        data = forms[form]()
        return compressor.prune(model, Wanda(timesteps=1), adapter=adapter, data=data, steps=0, batch_size=8)

    with pytest.warns(
        UserWarning, match=r"takes images in \[-1, 1\], and a batch has no number below 0 and none above 1"
    ):
        pruned(unit)
    with pytest.warns(UserWarning, match="no number below 0 and some above 1"):
        pruned(255 * unit)
    pruned(2 * unit - 1)
    pruned(torch.ones_like(unit))
    if form == "images":
        pruned((255 * unit).byte())  # which are mapped
    else:
        with pytest.raises(CompressorError, match=r"takes images in \[-1, 1\], and these are torch.uint8"):
            pruned((255 * unit).byte())


@pytest.mark.parametrize("shape", [(20, 1, 16, 16), (20, 3, 8, 8)])
def test_images_of_another_size_are_refused(tmp_path, cli, shape):
    np.savez(tmp_path / "other.npz", images=np.zeros(shape, np.uint8))
    outcome = cli.trial(tmp_path / "out", "--data", tmp_path / "other.npz")
    assert outcome.code == 2
    assert str(shape[1:]) in outcome.err
    assert "(1, 8, 8)" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--weights", "--data", "--config", "--out", "--pruner"])
def test_a_path_that_is_too_long_is_refused(tmp_path, cli, option):
    suffix = {"--weights": ".pth", "--data": ".npz", "--pruner": ".py:Mine"}.get(option, "")
    path = tmp_path / ("x" * 300 + suffix)
    outcome = cli.trial(path) if option == "--out" else cli.trial(tmp_path / "out", option, path)
    assert outcome.code in (1, 2)
    assert "x" * 300 in outcome.err
    assert "unexpected" not in outcome.err


# --- Recipes. ---


def test_a_pattern_and_a_learning_rate_need_no_quotes(tmp_path):
    for text in ("pattern: 2:4\nlr: 1e-4\n", "pattern: 2:4\ntrain:\n  lr: 1e-4\n"):
        found = resolved(tmp_path, text)
        assert found.pattern == "2:4"
        assert found.train.lr == 1e-4


def test_the_resolved_recipe_shows_them_and_reads_back(tmp_path):
    found = resolved(tmp_path, "pattern: 4:2:4\nlr: 1e-4\nsteps: 7\nbetas: [0.9, 0.99]\nsettings: {decay: 1e-3}\n")
    (tmp_path / "resolved.yaml").write_text(recipe.dump(found))
    text = (tmp_path / "resolved.yaml").read_text()
    assert "pattern: 4:2:4" in text
    assert inputs.resolve(recipe.read(tmp_path / "resolved.yaml"), "again") == found
    assert recipe.read(tmp_path / "resolved.yaml")["train"]["lr"] == 1e-4


@pytest.mark.parametrize(
    ("text", "line"),
    [("steps: 3\nmethod: a\nsteps: 4\n", 3), ("train:\n  lr: 1e-4\n  lr: 2e-4\n", 3), ("a: [1\nb: 2\n", 2)],
)
def test_what_is_not_yaml_is_refused_with_path_and_line(tmp_path, text, line):
    with refused(f"{tmp_path / 'recipe.yaml'}:{line}", error=UsageError):
        resolved(tmp_path, text)


def test_a_setting_given_inside_and_outside_its_section_is_refused(tmp_path):
    with refused(tmp_path / "recipe.yaml", "'lr'", "twice", error=UsageError):
        resolved(tmp_path, "lr: 1e-4\ntrain:\n  lr: 1e-3\n")


@pytest.mark.parametrize(
    ("text", "unknown", "meant"),
    [
        ("metod: magnitude", "'metod'", "'method'"),
        ("train: {step: 3}", "'train.step'", "'steps'"),
        ("evaluate: {sample: 3}", "'evaluate.sample'", "'samples'"),
        ("warmups: 3", "'warmups'", "'train.warmup'"),
    ],
)
def test_an_unknown_setting_suggests_the_nearest_one(tmp_path, text, unknown, meant):
    with refused(tmp_path / "recipe.yaml", unknown, f"Did you mean {meant}?", error=UsageError):
        resolved(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("steps: many", "train.steps"),
        ("steps: 1.5", "train.steps"),
        ("steps: -1", "train.steps"),
        ("steps: true", "train.steps"),
        ("steps: 1000000000000", "train.steps"),
        ("lr: 0", "train.lr"),
        ("lr: .nan", "train.lr"),
        ("lr: .inf", "train.lr"),
        ("lr: 1e999", "train.lr"),
        ("betas: [0.9]", "train.betas.1"),
        ("betas: [0.9, 1.0]", "train.betas.1"),
        ("ignore: head", "ignore"),
        ("targets: [1]", "targets.0"),
        ("train: 3", "train"),
        ("train: {1: 2}", "train.1"),
        ("schedule: sideways", "train.schedule"),
        ("method: [sparsedm]", "method"),
        ("samples: -5", "evaluate.samples"),
    ],
)
def test_a_wrong_value_is_refused_with_path_and_name(tmp_path, text, path):
    with refused(tmp_path / "recipe.yaml", f"{path}: ", "found", error=UsageError):
        resolved(tmp_path, text)


HOSTILE = {
    "alias bomb": "a: &a [x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nsettings: {d: [*c, *c, *c]}\n",
    "python tag": "method: !!python/object/apply:os.system ['true']\n",
    "binary": b"\x93NUMPY\x00\xff\xfe",
    "NUL": b"method: a\x00b\n",
    "1 MB": "method: " + "x" * 1_000_000,
    "many values": "targets: [" + "a, " * 80_000 + "a]\n",
    "many keys": "".join(f"k{i}: 1\n" for i in range(25_000)),
    "deep lists": "settings: {a: " + "[" * 20_000,
    "deep blocks": "\n".join(" " * depth + "a:" for depth in range(500)),
    "deep dashes": "- " * 20_000,
    "many digits": "steps: " + "9" * 100_000,
    "two documents": "steps: 3\n---\nsteps: 4\n",
    "a list": "- steps\n",
    "unhashable key": "? {a: 1}\n: 2\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_recipe_is_refused_at_once(tmp_path, text):
    with refused(tmp_path / "recipe.yaml", error=UsageError):
        resolved(tmp_path, text)


@pytest.mark.parametrize("text", ["method: a\nweights: &w x\n", "method: a\nweights: !x y\n"])
def test_what_recipes_do_not_use_is_refused_with_its_line(tmp_path, text):
    with refused(f"{tmp_path / 'recipe.yaml'}:2", error=UsageError):
        resolved(tmp_path, text)


@pytest.mark.parametrize("name", ["missing.yaml", ""])
def test_a_recipe_that_is_no_file_is_refused(tmp_path, name):
    with refused(tmp_path / name, error=UsageError):
        recipe.read(tmp_path / name)


def test_betas_are_a_list(tmp_path):
    assert resolved(tmp_path, "train: {betas: [0.9, 0.99]}").train.betas == (0.9, 0.99)
    assert resolved(tmp_path, "betas: [0.9, 0]").train.betas == (0.9, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=1e-4", {"train": {"lr": 1e-4}}),
        ("lr=1e-4", {"lr": 1e-4}),
        ("pattern=2:4", {"pattern": "2:4"}),
        ("settings.progressive=true", {"settings": {"progressive": True}}),
        ("train.betas=[0.9, 0.99]", {"train": {"betas": [0.9, 0.99]}}),
        ("ignore=[re:attn, head]", {"ignore": ["re:attn", "head"]}),
        ("weights=a=b.pth", {"weights": "a=b.pth"}),
        ("evaluate.metric=null", {"evaluate": {"metric": None}}),
        (" data = x ", {"data": "x"}),
    ],
)
def test_an_assignment_is_read_as_yaml(text, expected):
    assert recipe.assignment(text) == expected


@pytest.mark.parametrize(
    "text", ["lr", "=1", "lr={", "lr=*x", "lr=!!python/name:os.system", "steps=3\nmethod: magnitude"]
)
def test_an_assignment_that_is_none_is_refused(text):
    with refused("--set", text.partition("=")[0], error=UsageError):
        recipe.assignment(text)


def test_a_later_layer_wins_key_by_key():
    layers = recipe.merged({"train": {"lr": 1e-3, "steps": 5}}, {"lr": 1e-4}, {"train": {"ema": 0.5}})
    assert layers == {"train": {"lr": 1e-4, "steps": 5, "ema": 0.5}}


def test_a_metric_that_cannot_take_the_images_is_refused_before_training(tmp_path, cli):
    outcome = cli.trial(tmp_path / "out", "--set", "evaluate.samples=1")
    assert outcome.code == 2 and "at least 2 samples" in outcome.err and not (tmp_path / "out").exists()


def test_two_methods_at_once_are_refused(tmp_path, cli):
    assert cli("run", "--method", "magnitude", "--pruner", "x.py:Y", "--out", tmp_path / "out").code == 2


def test_resume_takes_no_other_settings(tmp_path, cli):
    out = tmp_path / "out"
    given = ("--method", "magnitude", "--set", "evaluate.samples=0", "--set", "evaluate.latency_rounds=0", "--out", out)
    assert cli("run", "--steps", 0, *given).code == 0
    done = cli("run", "--resume", "--steps", 5, *given)
    assert done.code == 2 and "train.steps is 0 there, not 5" in done.err
    assert cli("run", "--resume", "--overwrite", "--out", out).code == 2


ADAPTER = """
import torch
from torch import nn
from compressor import Adapter


class Right(Adapter):
    name = "right"

    def build(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Unflatten(1, (1, 8, 8)))

    def load(self, source):
        return self.build().eval()

    def noised(self, batch, rng):
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        noise = torch.randn(images.shape, generator=rng)
        return images + noise, noise

    def predict(self, module, inputs):
        return module(inputs)

    def example_inputs(self, batch_size):
        return torch.zeros(batch_size, 1, 8, 8)

    def sample(self, module, n, rng, steps):
        return module(torch.randn(n, 1, 8, 8, generator=rng)).clamp(-1, 1)


class OneExample(Right):
    def example_inputs(self, batch_size):
        return torch.zeros(1, 1, 8, 8)


class Shrinking(Right):
    def noised(self, batch, rng):
        images, noise = super().noised(batch, rng)
        return images[::2], noise[::2]


class InBytes(Right):
    def sample(self, module, n, rng, steps):
        return (super().sample(module, n, rng, steps) + 1) * 127.5


class Fewer(Right):
    def sample(self, module, n, rng, steps):
        return super().sample(module, 1, rng, steps)


class Listed(Right):
    def sample(self, module, n, rng, steps):
        return super().sample(module, n, rng, steps).tolist()
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("OneExample", ("OneExample.example_inputs(2) holds 1 samples", "`fixed_batch`")),
        ("Shrinking", ("Shrinking.noised gave a target (1, 1, 8, 8) for 2 samples",)),
        ("InBytes", ("InBytes.sample gave images from ", "Images are in [-1, 1]: images / 127.5 - 1")),
        ("Fewer", ("Fewer.sample gave (1, 1, 8, 8) for ",)),
        ("Listed", ("Listed.sample gave list for ",)),
        ("Right", ()),
    ],
)
def test_an_adapter_that_breaks_its_promises_is_named_before_it_trains(cli, tmp_path, name, said):
    (tmp_path / "a.py").write_text(ADAPTER, encoding="utf-8")
    outcome = cli.run(tmp_path / "out", "--model", f"{tmp_path / 'a.py'}:{name}", "--data", "digits", "--quiet")
    for part in said:
        assert part in outcome.err
    assert outcome.code == (0 if not said else 2 if name == "Shrinking" else 1), outcome.err
    assert (tmp_path / "out" / "model").exists() == (not said)


def test_latencies_are_of_the_batch_that_they_say(tmp_path):
    (tmp_path / "a.py").write_text(ADAPTER, encoding="utf-8")
    adapter = registry.adapter(f"{tmp_path / 'a.py'}:OneExample")
    with refused("OneExample.example_inputs(16) holds 1 samples"):
        cost.latencies({"dense": adapter.build()}, adapter, 16, 1)
