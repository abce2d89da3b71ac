"""Wanda and OBS: scores by their formulas, masks that obey, updates that lower the error, inputs seen as they are."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import compressor
from compressor import CompressorError, registry
from compressor.data.batches import as_batches
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.obs import OBS, packages, prune_layer
from compressor.plugins.sparsedm import SparseDM
from compressor.plugins.wanda import Wanda
from compressor.sparsity.layers import Layer
from compressor.sparsity.notation import parse
from compressor.sparsity.pattern import NM, Pattern, Unstructured
from compressor.training.calibration import columns, from_matrix, matrix, visits

PATTERNS = ("2:4", "1:4", "4:2:4", "4c:2:4", "unstructured:0.4")


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(8, 12), (3, 5, 8)),
        (nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 5)),
        (nn.Conv2d(8, 12, (3, 1), stride=2, padding=(2, 0), dilation=(2, 1)), (2, 8, 9, 7)),
        (nn.Conv2d(8, 12, 3, padding="same", padding_mode="reflect"), (2, 8, 6, 5)),
        (nn.Conv2d(8, 12, 1), (2, 8, 6, 5)),
        (nn.Conv1d(8, 12, 3, padding=1), (2, 8, 10)),
    ],
)
def test_columns_are_what_the_weight_multiplies(layer, shape):
    x = torch.randn(shape)
    expected = layer(x)
    channels = expected.shape[-1] if isinstance(layer, nn.Linear) else expected.shape[1]
    expected = (expected if isinstance(layer, nn.Linear) else expected.movedim(1, -1)).reshape(-1, channels)
    found = columns(layer, x) @ matrix(layer.weight).T + layer.bias
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(from_matrix(matrix(layer.weight), layer.weight.shape), layer.weight)


def test_groups_of_a_pattern_are_side_by_side_in_the_matrix():
    score = torch.rand(4, 8, 3, 3)
    by_weight = matrix(parse("2:4").mask(score).keep)
    assert torch.equal(by_weight, parse("2:4").mask(matrix(score)).keep)


def test_wanda_is_its_formula(model, adapter, samples):
    pruner = Wanda(timesteps=3)
    batches = as_batches(samples, 16, 0)
    prepared = pruner.prepare(model, adapter, batches)
    seen = torch.cat([visit.inputs for visit in visits(adapter, batches, 3)])
    hidden = torch.tanh(model[0](seen))
    for name, x in (("0.weight", seen), ("2.weight", hidden)):
        weight = model.get_parameter(name).detach()
        expected = weight.abs() * x.double().norm(dim=0).float()
        torch.testing.assert_close(prepared.score(name, weight), expected)
        mask = prepared.masks({name: weight}, 0.0, {})[name]
        assert torch.equal(mask.keep, parse("2:4").mask(expected).keep)


def weights_of_times(adapter, samples, timesteps, *curve):
    return [visit.weight for visit in visits(adapter, as_batches(samples, 8, 0), timesteps, *curve)]


@pytest.mark.parametrize("falls", ["early", "late"])
def test_visits_go_from_noise_to_image_and_fall_with_the_logarithm(samples, adapter, falls):
    found = weights_of_times(adapter, samples, 5, 0.2, falls)
    assert found[0] == 1 and found[-1] == pytest.approx(0.2)
    drops = [a - b for a, b in pairwise(found)]
    assert drops == sorted(drops, reverse=falls == "early") and min(drops) > 0
    assert weights_of_times(adapter, samples, 1, 0.2, falls) == [1]


def test_late_to_two_thirds_is_the_curve_of_obs_diff(samples, adapter):
    """Their main.py, `log_decrease`: from 1.2 to 0.8, by ln(1 + k) for the k-th position counted from the end."""
    theirs = [0.8 + (1.2 - 0.8) / math.log(25) * math.log(1 + k) for k in reversed(range(25))]
    ours = weights_of_times(adapter, samples, 25, 2 / 3, "late")
    assert ours == pytest.approx([weight / theirs[0] for weight in theirs])


@pytest.mark.parametrize("density", [0.5, 0.37])
def test_wanda_compares_unstructured_scores_within_rows(density, adapter, samples):
    """Rows of unlike scale: none may lose more than its share to another. For a convolution a row is an output channel."""
    rng = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(6, 10, generator=rng), "conv": torch.randn(6, 4, 3, 3, generator=rng)}
    weights = {n: w * 10.0 ** torch.arange(6).view(-1, *[1] * (w.dim() - 1)) for n, w in weights.items()}
    pattern = Unstructured(density)
    for name, mask in Wanda(pattern).masks(weights, 0.0, {}).items():
        mask.verify()
        kept = mask.keep.flatten(1).sum(1)
        assert mask.keep.sum() == round(density * mask.keep.numel()) and kept.max() - kept.min() <= 1
        for row, count in enumerate(kept.tolist()):
            size = weights[name][row].abs().flatten()
            assert set(mask.keep[row].flatten().nonzero().flatten().tolist()) == set(size.topk(count).indices.tolist())
    by_layer = Wanda(pattern, within="layer").masks(weights, 0.0, {})
    assert all(torch.equal(m.keep, pattern.mask(weights[n].abs()).keep) for n, m in by_layer.items())
    assert by_layer["a"].keep.sum(1).min() == 0


def test_wanda_goes_by_magnitude_where_a_layer_saw_only_zeros(model):
    weight = model.get_parameter("0.weight").detach()
    blind = Wanda(norms={"0.weight": torch.zeros(weight.shape[1])})
    assert torch.equal(blind.masks({"0.weight": weight}, 0.0, {})["0.weight"].keep, NM(2, 4).mask(weight.abs()).keep)


def error(weight, inputs, pruned):
    return float(((inputs @ (matrix(weight) - matrix(pruned)).T) ** 2).sum())


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shape", [(16, 24), (8, 16, 3, 3)])
def test_obs_obeys_its_pattern_and_beats_magnitude_and_the_mask_alone(text, shape):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=rng)
    width = matrix(weight).shape[1]
    mix = torch.randn(width, width, generator=rng) / width**0.5 + torch.eye(width)
    inputs = torch.randn(2000, width, generator=rng) @ mix
    pattern = parse(text)
    updated, mask = prune_layer(weight, 2 * (inputs.T @ inputs).double(), pattern, 0.01)
    mask.verify()
    assert not updated[~mask.keep].any() and updated.dtype == weight.dtype
    by_magnitude = pattern.mask(weight.abs()).apply(weight)
    assert error(weight, inputs, updated) < error(weight, inputs, by_magnitude)
    assert error(weight, inputs, updated) < error(weight, inputs, mask.apply(weight))


def test_obs_update_is_the_least_squares_one():
    """With one column pruned, what stays is the regression of the output on the inputs that stay."""
    rng = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 4, generator=rng, dtype=torch.float64)
    inputs = torch.randn(500, 4, generator=rng, dtype=torch.float64) @ torch.randn(
        4, 4, generator=rng, dtype=torch.float64
    )
    updated, mask = prune_layer(weight, 2 * inputs.T @ inputs, NM(3, 4), 1e-12)
    for row in range(6):
        kept = mask.keep[row]
        # columns left of a pruned one are not updated: the algorithm goes from left to right
        at = int((~kept).nonzero()[0])
        later = torch.arange(4) > at
        target = inputs @ weight[row] - inputs[:, :at] @ weight[row, :at]
        expected = (
            torch.linalg.lstsq(inputs[:, later], target[:, None]).solution[:, 0] if later.any() else torch.zeros(0)
        )
        torch.testing.assert_close(updated[row, later], expected.to(updated.dtype), rtol=1e-6, atol=1e-8)
        assert torch.equal(updated[row, :at], weight[row, :at])


def correlated(rows, width, seed):
    """`rows` inputs (rows, width) with correlations, in float64."""
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=rng, dtype=torch.float64) / width**0.5 + torch.eye(width)
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ mix


def eliminated(weight, hessian, choose, damping=0.01):
    """(weight, keep) after optimal brain surgery column by column, with the inverse of what is left computed anew for each.

    `choose(column, scores)` is asked at every column, `scores` (out, columns from there on) being w² / [H⁻¹]_jj, each with H
    from its own column on; it gives the keep of as many columns as it wants, or nothing.
    """
    weight, keep, width = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.bool), weight.shape[1]
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    mean = hessian.diagonal()[~dead].mean()
    hessian = hessian + torch.diag(torch.where(dead, mean, damping * mean))
    inverses = [torch.linalg.inv(hessian[at:, at:]) for at in range(width)]
    for at in range(width):
        scores = torch.stack([weight[:, j] ** 2 / inverses[j][0, 0] for j in range(at, width)], 1)
        if (some := choose(at, scores)) is not None:
            keep[:, at : at + some.shape[1]] = some
        for row in range(len(weight)):
            if not keep[row, at]:
                weight[row, at + 1 :] -= weight[row, at] / inverses[at][0, 0] * inverses[at][0, 1:]
                weight[row, at] = 0
    return weight, keep


def best(scores, count):
    """Keeps the `count` largest of `scores`, in plain Python; of equals the first."""
    flat = scores.flatten().tolist()
    kept = set(sorted(range(len(flat)), key=lambda i: -flat[i])[:count])
    return torch.tensor([i in kept for i in range(len(flat))]).view(scores.shape)


def by_rule(text, weight):
    """What `obs` chooses, by its documentation, one group or column after the other."""
    pattern, known = parse(text), {}
    columns = matrix(weight).shape[1]

    def nm(at, scores, rows=None):
        if at % 4:
            return None
        shared = {"2:4": 1, "1:4": 1, "4:2:4": 4, "4c:2:4": 4}[text]
        order = range(len(scores)) if rows is None else rows
        keep = torch.zeros(len(scores), 4, dtype=torch.bool)
        for first in range(0, len(scores), shared):
            together = [order[first + i] for i in range(shared)]
            keep[together] = best(scores[together, :4].sum(0), pattern.n)
        return keep

    def clustered(at, scores):
        if at == 0:
            known["rows"] = pattern.order(pattern.mask(from_matrix(scores, weight.shape)).keep).tolist()
        return nm(at, scores, known["rows"])

    def unstructured(at, scores):
        if at == 0:  # of equals the first in the weight's own memory order
            share = best(from_matrix(scores, weight.shape), round(pattern.density * weight.numel()))
            known["counts"] = matrix(share).sum(0).tolist()
            assert len(known["counts"]) == columns
        return best(scores[:, :1], known["counts"][at])

    return unstructured if text.startswith("u") else clustered if "c" in text else nm


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shape", [(8, 140), (8, 12, 3, 3)])
def test_obs_is_column_by_column_elimination(text, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = correlated(600, matrix(weight).shape[1], 3)
    inputs[:, 17] = 0
    hessian = 2 * inputs.T @ inputs
    expected, keep = eliminated(matrix(weight), hessian, by_rule(text, weight))
    updated, mask = prune_layer(weight, hessian, parse(text), 0.01)
    assert torch.equal(matrix(mask.keep), keep)
    torch.testing.assert_close(matrix(updated), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("density", [0.5, 0.3])
def test_obs_leaves_less_error_than_sparsegpt_where_nothing_is_grouped(density):
    """SparseGPT: the same share of each 128 columns, chosen when they come up. Both on inputs that neither has seen.

    The inputs are like those of real layers: few directions carry most of what they do.
    """
    weight = torch.randn(12, 256, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    few = correlated(24, 256, 9)
    inputs, unseen = (
        correlated(3000, 256, seed)[:, :24] @ few + 0.3 * correlated(3000, 256, seed + 9) for seed in (5, 6)
    )
    hessian = 2 * inputs.T @ inputs

    def sparsegpt(at, scores):
        return None if at % 128 else best(scores[:, :128], round(density * 128 * 12))

    theirs, keep = eliminated(weight, hessian, sparsegpt)
    updated, mask = prune_layer(weight, hessian, Unstructured(density), 0.01)
    assert mask.keep.sum() == keep.sum() == round(density * weight.numel())
    assert error(weight, unseen, updated) < 0.9 * error(weight, unseen, theirs)


def test_inputs_that_are_always_zero_take_their_weights_along_and_change_no_other():
    """As SparseGPT: columns that were never seen become zero. What stays is as if they had not been there."""
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    inputs = correlated(400, 24, 8)
    inputs[:, 8:12] = 0
    living = torch.tensor([i for i in range(24) if not 8 <= i < 12])
    updated, _ = prune_layer(weight, 2 * inputs.T @ inputs, NM(2, 4), 0.01)
    alone, _ = prune_layer(weight[:, living], 2 * inputs[:, living].T @ inputs[:, living], NM(2, 4), 0.01)
    assert not updated[:, 8:12].any()
    torch.testing.assert_close(updated[:, living], alone)


@dataclass(frozen=True)
class Left(Pattern):
    """Keeps the left half: a pattern that `obs` knows nothing of."""

    density = 0.5

    def misfit(self, shape):
        return None

    def survivors(self, score):
        return (torch.arange(score.shape[1]) < score.shape[1] // 2).expand(score.shape).clone()

    def violations(self, keep):
        return int(keep[:, keep.shape[1] // 2 :].any())


def test_obs_takes_patterns_of_other_kinds():
    weight, inputs = torch.randn(8, 24, dtype=torch.float64), correlated(400, 24, 8)
    updated, mask = prune_layer(weight, 2 * inputs.T @ inputs, Left(), 0.01)
    mask.verify()
    assert mask.keep.sum() == weight.numel() // 2 and not updated[:, 12:].any()


def test_sparsedm_starts_from_what_obs_has_updated(model, adapter, samples):
    batches, other = as_batches(samples, 16, 0), copy.deepcopy(model)
    SparseDM(parse("4:2:4"), start="obs").prepare(model, adapter, batches)
    OBS(parse("4:2:4")).prepare(other, adapter, batches)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_where_all_inputs_are_always_zero_magnitude_chooses():
    weight = torch.randn(8, 8)
    hessian = torch.zeros(8, 8, dtype=torch.float64)
    updated, mask = prune_layer(weight, hessian, NM(2, 4), 0.01)
    assert torch.equal(mask.keep, NM(2, 4).mask(weight.abs()).keep)
    torch.testing.assert_close(updated, mask.apply(weight))


def test_packages_keep_within_the_limit():
    layers = [
        Layer(str(i), str(i), nn.Linear(w, 4), nn.Linear(w, 4).weight, None) for i, w in enumerate((8, 8, 16, 64, 8))
    ]
    found = [[layer.name for layer in piece] for piece in packages(layers, 8 * 16**2 + 8 * 8**2)]
    assert found == [["0", "1"], ["2"], ["3"], ["4"]]


def test_packages_do_not_change_what_one_layer_sees_first(model, adapter, samples):
    together = compressor.prune(model, OBS(timesteps=2), adapter=adapter, data=samples, steps=0, batch_size=16)
    apart = OBS(timesteps=2, memory_mb=1)
    alone = compressor.prune(model, apart, adapter=adapter, data=samples, steps=0, batch_size=16)
    assert torch.equal(together.model[0].weight, alone.model[0].weight)


@pytest.mark.parametrize("name", ["uvit-digits", "ddpm-digits"])
@pytest.mark.slow
def test_obs_beats_magnitude_on_the_predicted_noise(name):
    adapter, data = registry.adapter(name), registry.images("digits")
    model, batches = adapter.load(None), as_batches(registry.images("digits"), 64, 7)
    errors = {}
    for pruner in (Magnitude(), OBS(timesteps=8)):
        found = compressor.prune(model, pruner, adapter=adapter, data=data, steps=0, batch_size=32).model
        with torch.no_grad():
            given = [adapter.noised(batches.batch(i), torch.Generator().manual_seed(i))[0] for i in range(4)]
            pairs = [(adapter.predict(found, x), adapter.predict(model, x)) for x in given]
        errors[type(pruner)] = sum(float(F.mse_loss(a, b)) for a, b in pairs)
    assert errors[OBS] < 0.5 * errors[Magnitude]


@pytest.mark.parametrize("cls", [Wanda, OBS])
def test_only_layers_of_this_run_are_touched(cls, model, adapter, samples):
    result = compressor.prune(
        model, cls(timesteps=2), adapter=adapter, data=samples, steps=0, batch_size=16, ignore=["2"]
    )
    assert list(result.masks) == ["0.weight"]
    assert torch.equal(result.model[2].weight, model[2].weight)


def test_layers_of_unknown_kind_fall_back_to_magnitude(adapter):
    grouped = nn.Conv2d(8, 8, 3, groups=2)
    masks = Wanda().masks({"x": grouped.weight.detach()}, 0.0, {})
    assert torch.equal(masks["x"].keep, NM(2, 4).mask(grouped.weight.abs()).keep)


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (Wanda, {"timesteps": 0}),
        (Wanda, {"last_weight": 0.0}),
        (OBS, {"last_weight": 2.0}),
        (OBS, {"damping": 0.0}),
        (OBS, {"memory_mb": 0}),
        (OBS, {"falls": "never"}),
        (Wanda, {"falls": "never"}),
        (Wanda, {"within": "column", "pattern": Unstructured(0.5)}),
        (Wanda, {"within": "layer"}),
    ],
)
def test_settings_that_mean_nothing_are_refused(cls, bad):
    with pytest.raises(CompressorError, match=next(iter(bad))):
        cls(**bad)


@pytest.mark.parametrize(("name", "told"), [("uvit-digits", 999 * 0.3), ("ddpm-digits", 300)])
def test_a_batch_is_noised_at_the_time_that_is_asked_for(name, told):
    adapter = registry.adapter(name)
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    inputs, noise = adapter.noised_at(images, 0.3, torch.Generator().manual_seed(0))
    again, _ = adapter.noised_at(images, 0.3, torch.Generator().manual_seed(0))
    noisy, time = (inputs[0], inputs[1]) if isinstance(inputs, tuple) else (inputs["sample"], inputs["timestep"])
    assert torch.equal(noisy, again[0] if isinstance(again, tuple) else again["sample"])
    torch.testing.assert_close(time.double(), torch.full((4,), float(told), dtype=torch.float64), rtol=1e-5, atol=0)
    # noisy = a x + b noise with a² + b² = 1, the same for the whole batch
    both = torch.stack([images.flatten(), noise.flatten()], 1).double()
    a, b = torch.linalg.lstsq(both, noisy.flatten()[:, None].double()).solution[:, 0].tolist()
    assert a**2 + b**2 == pytest.approx(1, abs=1e-4) and 0 < a < 1 and 0 < b < 1
    for extreme in (0.0, 1.0):
        adapter.noised_at(images, extreme, torch.Generator())


def test_an_adapter_that_knows_no_times_draws_its_own(adapter, samples):
    rng = torch.Generator().manual_seed(0)
    assert torch.equal(
        adapter.noised_at(samples, 0.5, rng)[1], adapter.noised(samples, torch.Generator().manual_seed(0))[1]
    )


class Twice(nn.Module):
    """A weight that two layers have, one of them called with its input's name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(input=3 * torch.relu(self.first(x)))


def test_a_shared_weight_sees_the_inputs_of_all_its_layers(adapter, samples):
    torch.manual_seed(0)
    model = Twice()
    batches = as_batches(samples, 16, 0)
    prepared = Wanda(timesteps=1).prepare(model, adapter, batches)
    (visit,) = visits(adapter, batches, 1)
    second = 3 * torch.relu(model.first(visit.inputs))
    expected = torch.cat([visit.inputs, second]).norm(dim=0)
    torch.testing.assert_close(prepared.norms["first.weight"], expected.detach())


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("pruner", [Wanda(timesteps=2), OBS(timesteps=2)], ids=["wanda", "obs"])
def test_a_calibration_that_is_not_finite_is_refused_with_the_layer(adapter, samples, pruner, wrong):
    broken = samples[:16].clone()
    broken[3, 3] = wrong
    with pytest.raises(CompressorError, match=r"(wanda|obs): what first\.weight is multiplied with .* is not finite"):
        compressor.prune(Twice(), pruner, adapter=adapter, data=[samples[16:32], broken], steps=0)


class Padding(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class Folding(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)).view_as(x)


class Scaling(nn.Linear):
    def forward(self, x, scale=2.0):
        return super().forward(x) * scale


class Own(nn.Module):
    """Layers with a forward of their own, of which one multiplies just what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.padding, self.folding, self.scaling = Padding(4, 4, 3), Folding(16, 16), Scaling(4, 4)

    def forward(self, x):
        return self.scaling(x=self.folding(self.padding(x.view(-1, 4, 4)))).flatten(1)


@pytest.mark.parametrize("pruner", [Wanda(timesteps=2), OBS(timesteps=2)], ids=["wanda", "obs"])
def test_a_layer_whose_own_forward_does_otherwise_is_pruned_by_its_weights(adapter, samples, pruner):
    torch.manual_seed(0)
    model = Own()
    prepared = pruner.prepare(model, adapter, as_batches(samples, 16, 0))
    assert set(getattr(prepared, "norms", None) or prepared.chosen) == {"scaling.weight"}
    result = compressor.prune(model, pruner, adapter=adapter, data=samples, steps=0)
    for name in ("padding.weight", "folding.weight"):
        weight = model.get_parameter(name)
        assert torch.equal(result.model.get_parameter(name), NM(2, 4).mask(weight.abs()).apply(weight))
