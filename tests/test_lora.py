"""LoRA: sparse models are recovered by masked adapters, and take a user's own LoRA under their masks; every zero stays."""

from __future__ import annotations

import copy
import errno
import json
import math
import operator

import diffusers
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

import compressor
from compressor import registry
from compressor.data.batches import as_batches
from compressor.errors import CompressorError, UsageError
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.sparsedm import SparseDM
from compressor.plugins.structured import Structured
from compressor.runs import lora
from compressor.seeds import generator
from compressor.sparsity.notation import parse
from compressor.training.engine import FineTuning, steps
from compressor.training.pruner import Objective
from compressor.training.settings import Lora, Training
from compressor.weights import dtypes_of, weights_sha256

peft = pytest.importorskip("peft")

TEACHER = SparseDM(preset="best")


# --- Recovery. ---


class Taught(Magnitude):
    """The largest weights as they are, and the dense model's predictions to learn from."""

    objective = Objective(noise=0.0, teacher=1.0)


class Masked(nn.Module):
    """W + s (B A) ∘ mask by autograd: what `Adapters` does with hooks."""

    def __init__(self, first, second, scale, keep):
        super().__init__()
        self.first, self.second, self.scale, self.keep = nn.Parameter(first), nn.Parameter(second), scale, keep

    def forward(self, weight):
        return weight + self.scale * (self.second @ self.first).view_as(weight) * self.keep


def lora_run(model, adapter, data, pruner=TEACHER, **training):
    settings = {
        "steps": 3,
        "batch_size": 16,
        "lr": 1e-2,
        "device": "cpu",
        "mode": "lora",
        "lora": Lora(rank=2, alpha=3.0),
    }
    return FineTuning(model, pruner, adapter=adapter, data=data, training=Training(**settings | training))


class Once(nn.Module):
    """The second layer has a part in the first answer alone."""

    def __init__(self):
        super().__init__()
        self.always, self.once, self.asked = nn.Linear(16, 16), nn.Linear(16, 16), 0

    def forward(self, x):
        self.asked += 1
        return self.always(x) + (self.once(x) if self.asked == 1 else 0)


def test_a_weight_that_a_step_does_not_come_to_stays_as_it_is(adapter, samples):
    # without momentum: whatever moves it now is a gradient of before
    run = lora_run(Once(), adapter, samples, Magnitude(), betas=(0.0, 0.0), weight_decay=0.0, schedule="constant")
    run.advance()
    left = run.student.once.weight.detach().clone(), run.student.always.weight.detach().clone()
    run.advance()
    assert torch.equal(run.student.once.weight, left[0])
    assert not torch.equal(run.student.always.weight, left[1])


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_training_is_that_of_autograd_through_the_masked_product(clip, adapter, samples):
    run = lora_run(tiny_model(), adapter, samples, Taught(), ema=0.0, clip=clip)
    oracle, teacher = tiny_model(), tiny_model().eval()
    for name, mask in run.shadow.masks.items():
        layer = oracle.get_submodule(name.removesuffix(".weight"))
        layer.weight.data.mul_(mask.keep)
        layer.requires_grad_(False)
        first, second = (run.shadow.matrices[f"{name}.{which}"].detach().clone() for which in "AB")
        parametrize.register_parametrization(layer, "weight", Masked(first, second, 1.5, mask.keep))
    trained = [p for name, p in oracle.named_parameters() if name.endswith(("first", "second"))]
    settings = run.training
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    batches = as_batches(samples, settings.batch_size, settings.seed)
    for t in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(t)
        inputs, _ = adapter.noised(batches.batch(t), generator(settings.seed, "noise", t))
        optimizer.zero_grad()
        (oracle(inputs) - teacher(inputs).detach()).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(trained, clip or math.inf)  # of what is trained: the matrices
        optimizer.step()
        assert run.advance().grad_norm == pytest.approx(float(norm), rel=1e-4)
    result = run.finish()
    for name in result.masks:
        expected = oracle.get_submodule(name.removesuffix(".weight")).weight
        torch.testing.assert_close(result.model.get_parameter(name), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(result.model.get_parameter(name), tiny_model().get_parameter(name))


def unseen_error(model, adapter, count=4):
    """The mean square difference from the dense model on other data."""
    dense = tiny_model().eval()
    given = torch.randn(256, 16, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        return float((model.eval()(given) - dense(given)).square().mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("pattern", ["2:4", "4:2:4", "unstructured:0.5"])
def test_recovery_lowers_the_error_on_unseen_inputs_and_keeps_every_zero(pattern, seed, adapter, samples):
    pruner = SparseDM(parse(pattern), preset="best")
    run = lora_run(tiny_model(), adapter, samples, pruner, steps=60, lora=Lora(rank=4), seed=seed)
    before = run.one_shot()
    list(steps(run))
    after = run.finish()
    assert unseen_error(after.model, adapter) < 0.9 * unseen_error(before.model, adapter)
    for name, mask in after.masks.items():
        assert torch.equal(mask.keep, before.masks[name].keep)
        assert not bool(after.model.get_parameter(name)[~mask.keep].any())
        parse(pattern).verify(after.model.get_parameter(name).detach())
        change = after.model.get_parameter(name) - before.model.get_parameter(name)
        assert bool(change[mask.keep].any())
    for name in ("0.bias", "2.bias"):  # only the matrices are trained
        assert torch.equal(after.model.get_parameter(name), tiny_model().get_parameter(name))
    assert all(value.requires_grad for value in after.model.parameters())
    assert set(after.flipped.values()) == {0.0}


def test_an_interrupted_recovery_goes_on_to_the_same_bytes(adapter, samples):
    whole = lora_run(tiny_model(), adapter, samples, steps=6)
    list(steps(whole))
    half = lora_run(tiny_model(), adapter, samples, steps=6)
    half.advance()
    half.advance()
    state = copy.deepcopy(half.state())
    resumed = FineTuning(tiny_model(), TEACHER, adapter=adapter, data=samples, training=half.training, previous=state)
    list(steps(resumed))
    assert weights_sha256(resumed.finish().model) == weights_sha256(whole.finish().model)


def test_a_half_model_is_recovered_in_float32(adapter, samples):
    model = tiny_model().half()
    model[0].bias.requires_grad_(False)
    run = lora_run(model, adapter, samples)
    list(steps(run))
    result = run.finish().model
    assert set(dtypes_of(result).values()) == {torch.float16}
    assert [value.requires_grad for value in result.parameters()] == [True, False, True, True]


def test_a_method_without_masks_has_nothing_to_recover(adapter, samples):
    with pytest.raises(UsageError, match="masks no weight"):
        lora_run(tiny_model(), adapter, samples, Structured(macs=0.6, multiple=1))


def test_the_option_and_its_settings_reach_the_run(cli, tmp_path):
    options = ("--steps", "1", "--train", "lora", "--set", "lora.rank=3", "--set", "lora.alpha=6.0")
    outcome = cli.trial(tmp_path / "run", *options)
    assert outcome.code == 0, outcome.err
    recipe = json.loads((tmp_path / "run" / "report.json").read_text())["recipe"]["train"]
    assert (recipe["mode"], recipe["lora"]) == ("lora", {"rank": 3, "alpha": 6.0})
    model, dense = compressor.load(tmp_path / "run"), registry.adapter("uvit-digits").load(None)
    masked = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["patterns"]
    own = dict(dense.named_parameters())
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, own[name])}
    assert changed == set(masked)
    bad = cli.trial(tmp_path / "other", "--train", "some")
    assert bad.code == 2 and "train.mode" in bad.err and not (tmp_path / "other").exists()


# --- Merging a LoRA of the user's. ---

SMALL = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
SD3 = {**SMALL, "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 32}
UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def sd3():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(**SD3, num_layers=2)


def flux():
    torch.manual_seed(0)
    sizes = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8)}
    return diffusers.FluxTransformer2DModel(**SMALL, **sizes)


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**UNET)


def saved_run(model, folder, dtype=torch.float32):
    """A one-shot run's files: `model/` and `pipeline/`."""
    model.to(dtype).save_pretrained(folder / "source")
    adapter = registry.adapter("diffusers").opened(str(folder / "source"))
    loaded = adapter.load(str(folder / "source"))
    result = compressor.prune(loaded, Magnitude(), adapter=adapter, data=torch.zeros(2, 4, 8, 8), steps=0, device="cpu")
    run = folder / "run"
    compressor.save(run / "model", result.model, result.masks, "diffusers", architecture=adapter.architecture)
    (run / "pipeline").mkdir()
    adapter.write_pipeline(result.model, run / "pipeline")
    return run, result


def own_lora(model, targets=("to_q", "to_k", "to_v"), alpha=4, rank=2):
    """`model` with a random LoRA in it."""
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    rng = torch.Generator().manual_seed(5)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data.copy_(torch.randn(value.shape, generator=rng))
    return model


def by_diffusers(kind, file):
    """The file as diffusers' pipelines save it, with its configuration in the header."""
    model = own_lora(kind())
    mixin, part = {
        "sd3": (diffusers.loaders.SD3LoraLoaderMixin, "transformer"),
        "flux": (diffusers.loaders.FluxLoraLoaderMixin, "transformer"),
        "unet": (diffusers.loaders.StableDiffusionLoraLoaderMixin, "unet"),
    }[kind.__name__]
    layers = peft.get_peft_model_state_dict(model)
    config = {f"{part}_lora_adapter_metadata": model.peft_config["default"].to_dict()}
    mixin.save_lora_weights(file.parent, **{f"{part}_lora_layers": layers}, weight_name=file.name, **config)


def changes(kind):
    """What the LoRA adds to each weight."""
    return {
        f"{name}.weight": layer.get_delta_weight("default").detach()
        for name, layer in own_lora(kind()).named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


@pytest.mark.parametrize(("kind", "dtype"), [(sd3, torch.float32), (flux, torch.bfloat16), (unet, torch.float16)])
def test_a_lora_is_merged_under_the_masks(kind, dtype, tmp_path):
    run, result = saved_run(kind(), tmp_path, dtype)
    by_diffusers(kind, tmp_path / "own.safetensors")
    merged = compressor.merge_lora(run, tmp_path / "own.safetensors", tmp_path / "out", scale=0.5)
    expected, norms, gone = changes(kind), 0.0, 0.0
    assert {layer.name for layer in merged.layers} == set(expected)
    for name, change in expected.items():
        keep = result.masks[name].keep
        weight = (result.model.get_parameter(name).float() + 0.5 * change * keep).to(dtype)
        torch.testing.assert_close(merged.model.get_parameter(name).detach(), weight)
        assert not bool(merged.model.get_parameter(name)[~keep].any())
        (layer,) = (layer for layer in merged.layers if layer.name == name)
        assert layer.removed == pytest.approx(float((change * ~keep).norm() / change.norm()), rel=1e-4)
        norms, gone = norms + float(change.square().sum()), gone + float((change * ~keep).square().sum())
    assert merged.removed == pytest.approx((gone / norms) ** 0.5, rel=1e-4) and 0.3 < merged.removed < 0.9
    others = set(dict(result.model.named_parameters())) - set(expected)
    assert all(torch.equal(merged.model.get_parameter(n), result.model.get_parameter(n)) for n in others)
    plain = type(kind()).from_pretrained(tmp_path / "out" / "pipeline", torch_dtype=dtype)
    assert weights_sha256(plain) == weights_sha256(compressor.load(tmp_path / "out")) == weights_sha256(merged.model)


@pytest.mark.parametrize("name", ["pipeline", "model", "lora.json"])
def test_a_merge_that_was_not_written_can_be_made_again_at_the_same_place(name, tmp_path, monkeypatch):
    run, _ = saved_run(unet(), tmp_path, torch.float32)
    by_diffusers(unet, tmp_path / "own.safetensors")
    (tmp_path / "out").mkdir()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    place = {"pipeline": "commit_pipeline", "model": "saving.save", "lora.json": "files.write_json"}[name]
    with monkeypatch.context() as patch:
        patch.setattr(f"compressor.runs.lora.{place}", full)
        with pytest.raises((OSError, CompressorError), match="No space"):
            compressor.merge_lora(run, tmp_path / "own.safetensors", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    compressor.merge_lora(run, tmp_path / "own.safetensors", tmp_path / "out")
    assert {"pipeline", "model", "lora.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_a_merge_that_was_killed_leaves_nothing_at_its_place_and_the_next_one_clears_the_rest(tmp_path, monkeypatch):
    run, _ = saved_run(unet(), tmp_path, torch.float32)
    by_diffusers(unet, tmp_path / "own.safetensors")
    seen = []

    def watched(function):
        def called(*arguments, **named):
            seen.append((tmp_path / "out").exists())
            return function(*arguments, **named)

        return called

    for place in ("commit_pipeline", "saving.save", "files.write_json"):
        home, _, name = f"compressor.runs.lora.{place}".rpartition(".")
        monkeypatch.setattr(f"{home}.{name}", watched(operator.attrgetter(place)(lora)))
    killed = tmp_path / ".partial-1-out"  # as a process that died leaves it
    (killed / "pipeline").mkdir(parents=True)
    compressor.merge_lora(run, tmp_path / "own.safetensors", tmp_path / "out")
    assert seen[:3] == [False] * 3
    assert not killed.exists()


def kohya(state):
    """A UNet's LoRA by the names of kohya's programs, with alpha 4 for each layer."""
    named = {}
    for name, value in state.items():
        layer, _, half = name.rpartition(".lora_")
        base = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
        named[f"{base}.{'lora_down' if half[0] == 'A' else 'lora_up'}.weight"] = value
        named[f"{base}.alpha"] = torch.tensor(4.0)
    return named


def older(state):
    """By the names that diffusers itself had before peft."""
    names = {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"}
    return {n.replace(old, new): v for n, v in state.items() for old, new in names.items() if n.endswith(old)}


def scaled(state):
    """Without a configuration in the header, alpha goes into the matrices."""
    return {name: value * 2 if "lora_B" in name else value for name, value in state.items()}


@pytest.mark.parametrize("layout", [kohya, lambda state: older(scaled(state)), scaled], ids=["kohya", "older", "bare"])
def test_other_layouts_of_the_same_lora_give_the_same_model(layout, tmp_path):
    run, _ = saved_run(unet(), tmp_path)
    by_diffusers(unet, tmp_path / "own.safetensors")
    expected = compressor.merge_lora(run, tmp_path / "own.safetensors").model
    save_file(layout(load_file(tmp_path / "own.safetensors")), tmp_path / "other.safetensors")
    found = compressor.merge_lora(run, tmp_path / "other.safetensors").model
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), value)


def renamed(state):
    return {name.replace("to_q", "to_nothing"): value for name, value in state.items()}


def halved(state):
    return {name: value for name, value in state.items() if not name.endswith("to_k.lora_B.weight")}


def wider(state):
    return {name: torch.ones(2, 5) if "to_q.lora_A" in name else value for name, value in state.items()}


def dora(state):
    first = next(iter(state)).rpartition(".lora_")[0]
    return {**state, f"{first}.lora_magnitude_vector": torch.ones(16)}


def lokr(state):
    return {"transformer.transformer_blocks.0.attn.to_q.lokr_w1": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (renamed, r"no layer '.*to_nothing'"),
        (halved, r"to_k\.lora_A\.weight is there without its other half"),
        (wider, r"to_q\.lora_A\.weight is \(2, 5\), the weight \(32, 32\)"),
        (dora, r"lora_magnitude_vector is no matrix of a plain LoRA"),
        (lokr, r"lokr_w1 is no matrix of a plain LoRA"),
        (lambda state: {"text_encoder.a.lora_A.weight": torch.ones(2, 2)}, "does not fit SD3Transformer2DModel"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(change, said, tmp_path):
    run, _ = saved_run(sd3(), tmp_path)
    by_diffusers(sd3, tmp_path / "own.safetensors")
    save_file(change(load_file(tmp_path / "own.safetensors")), tmp_path / "bad.safetensors")
    with pytest.raises(UsageError, match=said):
        compressor.merge_lora(run, tmp_path / "bad.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_merges_and_says_how_much_was_removed(tmp_path, cli):
    run, _ = saved_run(sd3(), tmp_path)
    by_diffusers(sd3, tmp_path / "own.safetensors")
    state = load_file(tmp_path / "own.safetensors") | {"text_encoder.a.lora_A.weight": torch.ones(2, 2)}
    save_file(state, tmp_path / "both.safetensors")
    outcome = cli("merge-lora", run, tmp_path / "both.safetensors", "--json")
    assert outcome.code == 0, outcome.err
    facts = json.loads(outcome.out)
    assert facts["left_out"] == {"text_encoder": 1} and 0.3 < facts["removed"] < 0.9
    assert facts["out"] == str(tmp_path / "run-both")
    assert json.loads((tmp_path / "run-both" / "lora.json").read_text())["removed"] == facts["removed"]
    outcome = cli("merge-lora", run, tmp_path / "both.safetensors", "--out", tmp_path / "named", "--scale", "0.5")
    assert outcome.code == 0 and "1 tensors of the LoRA are of text_encoder" in outcome.err
    assert "of the LoRA's norm" in outcome.out and "to_q.weight: the mask removed" in outcome.out
    assert cli("merge-lora", run, tmp_path / "both.safetensors", "--out", tmp_path / "named").code == 2
    assert cli("merge-lora", run, tmp_path / "nothing.safetensors").code == 1
