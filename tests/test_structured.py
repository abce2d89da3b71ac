"""Structured pruning: what goes together goes together, scores are what they say, and the smaller model works."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor import CompressorError, registry
from compressor.adapter import with_rules
from compressor.cost.macs import layer_macs
from compressor.data.batches import as_batches
from compressor.files import read_json
from compressor.plugins.structured import Structured
from compressor.plugins.structured.groups import find_groups
from compressor.plugins.structured.removal import removal
from compressor.plugins.structured.scores import diff_pruning, entry_scores, taylor
from compressor.seeds import generator

DIGITS = ("uvit-digits", "ddpm-digits")


def family(name):
    adapter = registry.adapter(name)
    return adapter, adapter.load(None)


@pytest.fixture(scope="module")
def tiny_dit():
    from compressor.model_zoo.generic import DiffusersAdapter

    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
        "norm_type": "ada_norm_zero",
    }
    torch.manual_seed(0)
    adapter = DiffusersAdapter(config=config, scheduler={"_class_name": "DDPMScheduler"})
    return adapter, adapter.build()


@pytest.mark.parametrize("name", [*DIGITS, "dit"])
def test_every_count_of_channels_works(name, tiny_dit):
    adapter, model = tiny_dit if name == "dit" else family(name)
    groups = find_groups(model, adapter, 8)
    scores = [torch.rand(group.width, generator=generator(i)) for i, group in enumerate(groups)]
    inputs = adapter.example_inputs(2)
    shape = adapter.predict(model, inputs).shape
    sizes = []
    for density in (0.05, 0.3, 0.55, 0.8, 1.0):
        smaller = copy.deepcopy(model)
        removal(model, groups, scores, density).apply(smaller)
        assert adapter.predict(smaller, inputs).shape == shape
        sizes.append(sum(p.numel() for p in smaller.parameters()))
        for module in smaller.modules():
            if isinstance(module, nn.Linear):
                assert tuple(module.weight.shape) == (module.out_features, module.in_features)
            if isinstance(module, nn.Conv2d):
                assert tuple(module.weight.shape[:2]) == (module.out_channels, module.in_channels)
            if isinstance(module, nn.GroupNorm):
                assert module.weight.numel() == module.num_channels and module.num_channels % module.num_groups == 0
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["uvit-digits", "dit"])
def test_of_a_transformer_heads_and_hidden_widths_go_and_nothing_else_is_changed(name, tiny_dit):
    """Such channels add to what follows, so a removed one is a silenced one."""
    adapter, model = tiny_dit if name == "dit" else family(name)
    adapter = with_rules(adapter, None, [])
    groups = find_groups(model, adapter, 1)
    assert {group.attention is not None for group in groups} == {True, False}
    scores = [torch.rand(group.width, generator=generator(i)) for i, group in enumerate(groups)]
    surgery = removal(model, groups, scores, 0.5)
    smaller, silenced = copy.deepcopy(model), copy.deepcopy(model)
    surgery.apply(smaller)
    state = silenced.state_dict()
    for tensor, dims in surgery.kept.items():
        if 1 in dims:  # the layer that reads them
            gone = torch.ones(state[tensor].shape[1], dtype=torch.bool)
            gone[list(dims[1])] = False
            state[tensor][:, gone] = 0
    inputs, _ = adapter.noised_at((torch.randn(4, *adapter.image_shape), torch.arange(4)), 0.5, generator(1))
    inputs = inputs if name == "dit" else (*inputs[:2], None)
    torch.testing.assert_close(
        adapter.predict(smaller, inputs), adapter.predict(silenced, inputs), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", DIGITS)
@pytest.mark.parametrize("share", [0.4, 0.7])
@pytest.mark.slow
def test_the_share_of_multiply_accumulates_is_met(name, share):
    adapter, model = family(name)
    prepared = Structured(macs=share).prepare(model, adapter, as_batches(registry.images("digits"), 8, 0))
    smaller = copy.deepcopy(model)
    prepared.surgery.apply(smaller)
    assert layer_macs(smaller, adapter)[0] / layer_macs(model, adapter)[0] == pytest.approx(share, abs=0.03)


def test_a_share_that_cannot_be_reached_is_refused():
    adapter, model = family("uvit-digits")
    with pytest.raises(CompressorError, match="cannot be reached"):
        Structured(macs=0.01).prepare(model, adapter, as_batches(registry.images("digits"), 8, 0))


@pytest.mark.slow
def test_the_least_of_each_norm_group_goes():
    adapter, model = family("ddpm-digits")
    for group in find_groups(model, adapter, 1):
        norms = [m.module.num_groups for m in group.members if isinstance(m.module, nn.GroupNorm)]
        if not norms:
            continue
        score = torch.rand(group.width, generator=generator("s"))
        surgery = removal(model, [group], [score], 0.5)
        root = next(m for m in group.members if m.out and len(m.own) == group.width)
        kept = surgery.kept[f"{root.name}.weight"][0]
        pieces = torch.arange(group.width).view(max(norms), -1)
        for piece in pieces:
            staying = [int(i) for i in piece if int(i) in kept]
            best = piece[score[piece].argsort(descending=True)[: len(staying)]]
            assert len(staying) == pieces.shape[1] // 2 and set(staying) == set(best.tolist())


def test_layers_that_are_ignored_keep_their_width():
    adapter, model = family("uvit-digits")
    batches = as_batches(registry.images("digits"), 8, 0)
    smaller = copy.deepcopy(model)
    Structured(macs=0.7).prepare(model, with_rules(adapter, None, ["*.mlp.fc1"]), batches).surgery.apply(smaller)
    assert {block.mlp.fc1.out_features for block in smaller.in_blocks} == {384}
    assert {block.attn.num_heads for block in smaller.in_blocks} < {1, 2, 3}


class Tied(nn.Module):
    """Two layers that share one weight, and a third of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 32)
        self.third.weight, self.last = self.first.weight, nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 16))

    def forward(self, x):
        return self.last(self.third(self.second(torch.relu(self.first(x)))))


def test_shared_weights_are_left_alone(adapter, samples):
    torch.manual_seed(0)
    model = Tied()
    result = compressor.prune(
        model, Structured(density=0.5, multiple=1), adapter=adapter, data=samples, steps=2, batch_size=8
    )
    assert result.model.first.weight is result.model.third.weight
    assert result.model.first.out_features == 32 and result.model.last[0].out_features == 12


def test_a_model_without_inner_width_is_refused(adapter, samples):
    with pytest.raises(CompressorError, match="no inner width"):
        compressor.prune(nn.Sequential(nn.Linear(16, 16)), Structured(), adapter=adapter, data=samples, steps=0)


def test_scores_equal_finite_differences(tiny, adapter, samples):
    """Diff-Pruning's score is what the loss at each time changes by, to first order, if the entry goes; in float64."""
    model = tiny().double()

    class At(type(adapter)):
        def noised_at(self, batch, time, rng):
            noise = torch.randn(batch.shape, generator=rng, dtype=torch.float64)
            return (1 - time) * batch + time * noise, (1 - time) * noise  # easier with more noise

    own = At()
    batches = as_batches(samples.double(), 16, 0)
    timesteps, threshold = 6, 0.75

    def loss(index):
        inputs, target = own.noised_at(batches.batch(index), (index + 0.5) / timesteps, generator("structured", index))
        return F.mse_loss(own.predict(model, inputs), target)

    with torch.no_grad():
        largest, counted = 0.0, []
        for index in range(timesteps):
            value = float(loss(index))
            largest = max(largest, value)
            if value < threshold * largest:
                break
            counted.append(index)
        assert 0 < len(counted) < timesteps  # the threshold does something here
        expected = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        released = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        mean = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        step = 1e-5
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            for at in range(0, flat.numel(), 7):
                old = float(flat[at])
                for index in range(timesteps):
                    flat[at] = old + step
                    above = loss(index)
                    flat[at] = old - step
                    slope = (above - loss(index)) / (2 * step)
                    flat[at] = old
                    mean[name].view(-1)[at] += old * slope / timesteps
                    if index in counted:
                        expected[name].view(-1)[at] += (old * slope).abs()
                        released[name].view(-1)[at] += old * slope
    found = diff_pruning(model, own, batches, timesteps, threshold)
    summed = diff_pruning(model, own, batches, timesteps, threshold, summed=True)
    plain = taylor(model, own, batches, timesteps)
    for name in expected:
        torch.testing.assert_close(found[name].view(-1)[::7], expected[name].view(-1)[::7], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(summed[name].view(-1)[::7], released[name].view(-1)[::7].abs(), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(plain[name].view(-1)[::7], mean[name].view(-1)[::7].abs(), rtol=1e-3, atol=1e-7)


def test_scores_equal_autograd_over_all_times_at_once(tiny, adapter, samples):
    """Of the released scripts: one backward pass of the summed loss, times the weight, in float64; of the other, one for each."""
    model = tiny().double()

    class At(type(adapter)):
        def noised_at(self, batch, time, rng):
            noise = torch.randn(batch.shape, generator=rng, dtype=torch.float64)
            return (1 - time) * batch + time * noise, noise

    own, batches = At(), as_batches(samples.double(), 16, 0)
    losses = []
    for index in range(4):
        inputs, target = own.noised_at(batches.batch(index), (index + 0.5) / 4, generator("structured", index))
        losses.append(F.mse_loss(model(inputs), target))
    weights = dict(model.named_parameters())
    at_once = torch.autograd.grad(sum(losses), list(weights.values()), retain_graph=True)
    each = [torch.autograd.grad(loss, list(weights.values()), retain_graph=True) for loss in losses]
    summed = diff_pruning(model, own, batches, 4, 0.0, summed=True)
    separate = diff_pruning(model, own, batches, 4, 0.0)
    for at, (name, weight) in enumerate(weights.items()):
        torch.testing.assert_close(summed[name], (weight * at_once[at]).abs().detach(), rtol=1e-10, atol=1e-14)
        apart = sum((weight * gradients[at]).abs() for gradients in each).detach()
        torch.testing.assert_close(separate[name], apart, rtol=1e-10, atol=1e-14)
        assert not torch.allclose(summed[name], separate[name])


def test_scores_differ_and_leave_no_gradients():
    adapter, model = family("uvit-digits")
    batches = as_batches(registry.images("digits"), 8, 0)
    kinds = ("magnitude", "taylor", "diff-pruning", "diff-pruning-released")
    found = [entry_scores(model, adapter, batches, kind, 3, 0.05)["mid_block.mlp.fc1.weight"] for kind in kinds]
    assert not any(torch.equal(first, second) for first, second in combinations(found, 2))
    assert bool((found[3] <= found[2] * (1 + 1e-5)).all())  # what cancels out can only be less
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", DIGITS)
@pytest.mark.slow
def test_a_run_reloads_without_pickle_and_is_smaller(name, cli, tmp_path):
    outcome = cli.trial(tmp_path / "run", "--model", name, "--method", "structured", "--steps", "2")
    assert outcome.code == 0, outcome.err
    rows = read_json(tmp_path / "run" / "report.json")["rows"]
    dense, final = rows[0], rows[-1]
    for key in ("params", "nonzero_params", "size_bytes"):
        assert final[key] < 0.75 * dense[key]
    assert final["macs_dense"] == pytest.approx(0.5 * dense["macs_dense"], rel=0.06)
    assert final["macs_dense"] == final["macs_effective"] == final["macs_lowered"]
    loaded = compressor.load(tmp_path / "run")
    assert sum(p.numel() for p in loaded.parameters()) == final["params"]
    suffixes = {path.suffix for path in (tmp_path / "run" / "model").iterdir()}
    assert suffixes == {".json", ".safetensors"}
    assert not (tmp_path / "run" / "pipeline").exists()


@pytest.mark.parametrize(
    ("settings", "noise", "teacher"), [({}, 1, 0), ({"teacher": 0.5}, 1, 0.5), ({"teacher_only": True}, 0, 1)]
)
def test_the_dense_model_teaches_the_smaller_one(settings, noise, teacher, adapter, model, samples):
    tuning = compressor.FineTuning(
        model,
        Structured(density=0.5, score="random", **settings),
        adapter=adapter,
        data=samples,
        training=compressor.Training(steps=1, batch_size=16),
    )
    (step,) = compressor.steps(tuning)
    assert (step.teacher_loss is not None) == bool(teacher)
    assert step.loss == pytest.approx(noise * step.noise_loss + teacher * (step.teacher_loss or 0.0))


def test_an_interrupted_run_goes_on_with_the_same_structure(adapter, model, samples):
    training = compressor.Training(steps=6, batch_size=16)

    def started(previous=None):
        pruner = Structured(density=0.5, score="random", seed=3)
        return compressor.FineTuning(model, pruner, adapter=adapter, data=samples, training=training, previous=previous)

    whole, half = started(), started()
    list(compressor.steps(whole))
    for _ in range(3):
        half.advance()
    resumed = started(half.state())
    list(compressor.steps(resumed))
    first, second = whole.finish(), resumed.finish()
    assert first.surgery == second.surgery
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


class Attention(nn.Module):
    """Self-attention over eight tokens of two numbers; the attribute with the number of heads is called `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(a, b) for a, b in ((2, 32), (2, 32), (2, 32), (32, 2)))
        self.mlp = nn.Sequential(nn.Linear(2, 24), nn.GELU(), nn.Linear(24, 2))
        setattr(self, name, 4)
        self.name = name

    def forward(self, x):
        x = x.view(len(x), 8, 2)
        q, k, v = (
            m(x).view(len(x), 8, getattr(self, self.name), -1).transpose(1, 2)
            for m in (self.to_q, self.to_k, self.to_v)
        )
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (x + self.out(found) + self.mlp(x)).flatten(1)


@pytest.mark.parametrize(("name", "known"), [("heads", True), ("n_heads", False)])
def test_an_attention_whose_heads_are_not_known_is_left_alone(name, known, adapter):
    torch.manual_seed(0)
    found = find_groups(Attention(name), adapter, 1)
    assert {group.attention for group in found} == ({"", None} if known else {None})
    assert any(member.name == "mlp.0" for group in found for member in group.members)
    assert known or not any(member.name == "to_q" for group in found for member in group.members)


class Convolutional(nn.Module):
    """With what models of one's own have: a norm as a function, an arange, a tensor of theirs, an attribute that is no width."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.shift = 3, torch.ones(())
        self.a, self.b, self.c = nn.Conv2d(1, 20, 3, padding=1), nn.Conv2d(20, 24, 3, padding=1), nn.Conv2d(24, 1, 1)
        self.dropout, self.mlp = (
            nn.Dropout(0.3),
            nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(16), nn.Linear(24, 16)),
        )

    def forward(self, x):
        image = x.view(-1, 1, 4, 4) + torch.arange(4.0) * self.shift
        image = self.c(torch.relu(self.b(F.group_norm(self.a(image), 2))))
        return image.flatten(1)


def test_models_of_ones_own(adapter, samples):
    torch.manual_seed(0)
    model = Convolutional()
    assert [group.members[0].name for group in find_groups(model, adapter, 1)] == [
        "b"
    ]  # a norm that is no layer sees a
    result = compressor.prune(
        model, Structured(density=0.5, multiple=1, timesteps=4), adapter=adapter, data=samples, steps=1
    )
    assert (result.model.a.out_channels, result.model.b.out_channels, result.model.channels) == (20, 12, 3)


def test_scores_do_not_depend_on_dropout_and_leave_statistics_alone(adapter, samples):
    class Noisy(nn.Sequential):
        pass

    torch.manual_seed(0)
    model = Noisy(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 16), nn.BatchNorm1d(16))
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        result = compressor.prune(
            model,
            Structured(density=0.5, score="taylor", multiple=1, timesteps=2),
            adapter=adapter,
            data=samples,
            steps=0,
        )
        found.append(result.surgery)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(result.model[3].running_mean, torch.zeros(16))
    assert found[0] == found[1]


@pytest.mark.parametrize("score", ["magnitude", "taylor", "diff-pruning", "diff-pruning-released"])
def test_numbers_that_are_not_finite_are_refused(score, model, adapter, samples):
    model[0].weight.data[3] = float("nan")
    with pytest.raises(CompressorError, match=r"0\.weight holds NaN or infinity"):
        compressor.prune(model, Structured(density=0.5, score=score), adapter=adapter, data=samples, steps=0)


def test_scores_that_are_not_finite_are_refused(model, adapter, samples):
    model[0].weight.data[3] = 3e38  # it is finite, but its square is not
    with pytest.raises(CompressorError, match=r"scores of 0\.weight are not finite"):
        compressor.prune(model, Structured(density=0.5, score="magnitude"), adapter=adapter, data=samples, steps=0)


def test_frozen_layers_and_those_that_are_no_targets_keep_their_outputs(adapter, samples):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))
    pruner = Structured(density=0.5, multiple=1, timesteps=2)
    targeted = compressor.prune(model, pruner, adapter=adapter, data=samples, steps=0, targets=["2"]).model
    assert [m.out_features for m in targeted if isinstance(m, nn.Linear)] == [32, 12, 16]
    model[0].requires_grad_(False)
    frozen = compressor.prune(model, pruner, adapter=adapter, data=samples, steps=0).model
    assert [m.out_features for m in frozen if isinstance(m, nn.Linear)] == [32, 12, 16]
    assert not frozen[0].weight.requires_grad and frozen[2].weight.requires_grad
    model.requires_grad_(False)
    # nothing is trained in one shot
    whole = compressor.prune(model, pruner, adapter=adapter, data=samples, steps=0).model
    assert [m.out_features for m in whole if isinstance(m, nn.Linear)] == [16, 12, 16]
    with pytest.raises(CompressorError, match="trainable"):
        compressor.prune(model, pruner, adapter=adapter, data=samples, steps=1)


@pytest.mark.parametrize(
    "bad",
    [
        {"macs": 0.0},
        {"macs": 1.5},
        {"density": 0.0},
        {"threshold": 1.0},
        {"timesteps": 0},
        {"score": "l1"},
        {"teacher": -1.0},
    ],
)
def test_settings_that_mean_nothing_are_refused(bad):
    with pytest.raises(CompressorError, match=f"structured: {next(iter(bad))}"):
        Structured(**bad)


def test_a_score_that_does_not_exist_is_refused():
    with pytest.raises(CompressorError, match="structured: score: there is no 'l1'"):
        Structured(score="l1")
