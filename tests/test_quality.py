"""Quality and cost: the Fréchet distance against torchmetrics and algebra, multiply-accumulates against arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor import NM, Adapter, CompressorError
from compressor.cost.latency import latencies
from compressor.cost.macs import costs, layer_macs
from compressor.data.sets import Images
from compressor.model_zoo.uvit.sizes import cifar10
from compressor.quality.drift import prediction_error, predictions, sample_rmse
from compressor.quality.evaluate import floor, quality, sample
from compressor.quality.frechet import Gaussian, bootstrap, frechet_distance, gaussian
from compressor.quality.metric import Metric
from compressor.quality.settings import Evaluation
from compressor.report.content import Drift, Quality
from compressor.report.in_short import against
from compressor.runs.fits import asked


def draw(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated features (n, d)."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=rng, dtype=torch.float64)
    return shift + scale * torch.randn(n, d, generator=rng, dtype=torch.float64) @ mix


class Extractor(nn.Module):
    """Features that torchmetrics may use: its input, bent."""

    num_features = 6

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.tanh(), x.square().sum(1, keepdim=True)], dim=1)


@pytest.mark.parametrize("n", [7, 500])
def test_distance_equals_torchmetrics(n: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    theirs = FrechetInceptionDistance(feature=Extractor()).set_dtype(torch.float64)
    real, fake = draw(n, 5, seed=0), draw(n + 3, 5, seed=1, scale=0.7, shift=0.4)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    ours = frechet_distance(gaussian(Extractor()(real)), gaussian(Extractor()(fake)))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_distance_of_diagonal_gaussians_is_the_formula() -> None:
    mean, other = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([0.0, 4.0, 0.0]).double()
    sigma, tau = torch.tensor([1.0, 3.0, 0.0]).double(), torch.tensor([2.0, 0.5, 1.0]).double()
    a, b = Gaussian(mean, torch.diag(sigma**2)), Gaussian(other, torch.diag(tau**2))
    expected = float((mean - other).square().sum() + (sigma - tau).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_distance_of_a_set_from_itself_is_zero_and_grows_with_a_shift() -> None:
    features = draw(100, 5, seed=0)
    one = gaussian(features)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(gaussian(features + 3), one) == pytest.approx(5 * 9, rel=1e-6)


def test_distance_with_fewer_samples_than_dimensions_is_finite_and_symmetric() -> None:
    a, b = gaussian(draw(5, 20, seed=0)), gaussian(draw(6, 20, seed=1))
    assert math.isfinite(frechet_distance(a, b))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)


@pytest.mark.parametrize(
    "features", [torch.zeros(1, 4), torch.tensor([[0.0], [math.nan]]), torch.tensor([[0.0], [math.inf]])]
)
def test_statistics_need_two_rows_of_finite_numbers(features: Tensor) -> None:
    with pytest.raises(CompressorError, match="at least 2 rows of finite numbers"):
        gaussian(features)


def test_interval_contains_the_estimate_and_shrinks_with_more_samples() -> None:
    reference = gaussian(draw(5000, 4, seed=0))
    widths = []
    for n in (50, 500, 5000):
        features = draw(5000, 4, seed=0, shift=0.2)[:n]
        low, high = bootstrap(features, reference, draws=60, seed=0) or (0, 0)
        assert low <= frechet_distance(gaussian(features), reference) <= high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2] > 0


def test_interval_is_seeded_and_absent_without_draws() -> None:
    features, reference = draw(50, 4, seed=1), gaussian(draw(50, 4, seed=0))
    assert bootstrap(features, reference, 0, seed=0) is None
    first, again, other = (bootstrap(features, reference, 10, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_two_samples_have_no_interval_and_no_verdict() -> None:
    reference = gaussian(draw(300, 4, seed=0))
    two, few, enough = (
        quality(Flat(), draw(n, 4, seed=1).view(n, 1, 2, 2), reference, Evaluation()) for n in (2, 7, 8)
    )
    assert two.ci95 is None and few.ci95 is None and enough.ci95 is not None and two.value > 0
    assert "nobody knows" in against(two, enough)


class Flat(Metric):
    """Pixels as features."""

    name = "flat"

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    @property
    def sha256(self) -> str:
        return "0" * 64


def test_quality_says_what_was_measured() -> None:
    images, reference = draw(40, 4, seed=0).view(40, 1, 2, 2), gaussian(draw(40, 4, seed=1))
    entry = quality(Flat(), images, reference, Evaluation(bootstrap=5, sampler_steps=7, seed=3))
    assert entry.ci95 is not None
    value = frechet_distance(gaussian(images.flatten(1)), reference)
    assert entry == Quality(metric="flat", value=value, ci95=entry.ci95, samples=40, sampler_steps=7, seed=3)
    assert entry.ci95[0] <= value <= entry.ci95[1]
    assert quality(Flat(), images, reference, Evaluation(bootstrap=0)).ci95 is None


class Made(Flat):
    """What `give` makes of the pictures."""

    def __init__(self, give: Callable[[Tensor], Any], sha256: Any = "0" * 64) -> None:
        self.give, self.own = give, sha256

    def features(self, images: Tensor) -> Tensor:
        return self.give(images)

    @property
    def sha256(self) -> str:
        return self.own


BROKEN = [
    (lambda images: images.flatten(1).mean(1), r"gave features \(6,\) for 6 pictures"),
    (lambda images: images.flatten(1)[:, :0], r"gave features \(6, 0\) for 6 pictures"),
    (lambda images: images.flatten(1)[:3], r"gave features \(3, 4\) for 6 pictures"),
    (lambda images: images.flatten(1).double() * 1e200, "gave features as large as"),
    (lambda images: images.flatten(1) / 0, "gave features that are not finite"),
    (lambda images: images.flatten(1).tolist(), "gave list as features"),
]


@pytest.mark.parametrize(("give", "said"), BROKEN)
def test_a_metric_that_gives_no_features_is_named(give: Any, said: str) -> None:
    images, reference = draw(6, 4, seed=0).view(6, 1, 2, 2), gaussian(draw(6, 4, seed=1))
    with pytest.raises(CompressorError, match=rf"metric 'flat' \(Made\) {said}"):
        quality(Made(give), images, reference, Evaluation(bootstrap=0))


def test_a_metric_cannot_change_the_pictures_and_has_a_hash() -> None:
    images, reference = draw(6, 4, seed=0).view(6, 1, 2, 2), gaussian(draw(6, 4, seed=1))
    before = images.clone()
    quality(Made(lambda own: own.mul_(0.5).flatten(1)), images, reference, Evaluation(bootstrap=0))
    assert torch.equal(images, before)
    with pytest.raises(CompressorError, match="sha256 None"):
        quality(Made(lambda own: own.flatten(1), None), images, reference, Evaluation(bootstrap=0))
    with pytest.raises(CompressorError, match="the pictures are not finite"):
        quality(Made(lambda own: own.flatten(1)), images / 0, reference, Evaluation(bootstrap=0))


def test_floor_compares_disjoint_halves() -> None:
    features = draw(101, 4, seed=0)
    entry = floor(features, Evaluation(bootstrap=0))
    assert entry.samples == 50
    assert 0 < entry.value < frechet_distance(gaussian(features), gaussian(features + 5))
    # Two rows repeated: halves that shared rows, or were the same rows, would give zero.
    assert floor(torch.eye(4, dtype=torch.float64), Evaluation(bootstrap=0)).value > 0.5


class Drawing(Adapter):
    """Samples that are the noise itself; a prediction that is the input times a weight."""

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        noise = torch.randn(batch.shape, generator=rng)
        return batch + noise, noise

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        out: Tensor = module(inputs)
        return out

    def sample(self, module: nn.Module, n: int, rng: torch.Generator, steps: int) -> Tensor:
        return torch.randn(n, 1, 2, 2, generator=rng)


def test_samples_come_in_batches_from_noise_that_the_seed_gives() -> None:
    settings = Evaluation(samples=10, batch_size=4, seed=5)
    batches = list(sample(Drawing(), nn.Identity(), settings))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    first, again = torch.cat(batches), torch.cat(list(sample(Drawing(), nn.Identity(), settings)))
    assert torch.equal(first, again) and len(first.unique(dim=0)) == 10
    assert not torch.equal(
        first, torch.cat(list(sample(Drawing(), nn.Identity(), Evaluation(samples=10, batch_size=4))))
    )


def test_drift_is_zero_for_the_same_weights_and_the_formula_for_others() -> None:
    data = Images("some", draw(20, 4, seed=0).view(20, 1, 2, 2))
    scaled = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(scaled.weight, 0.9)
    settings, cpu = Evaluation(batch_size=7), torch.device("cpu")
    dense = predictions(Drawing(), nn.Identity(), data, settings, cpu)
    assert prediction_error(predictions(Drawing(), nn.Identity(), data, settings, cpu), dense).value == 0
    entry = prediction_error(predictions(Drawing(), scaled, data, settings, cpu), dense)
    assert entry == Drift(metric="prediction_error", value=entry.value, samples=20)
    assert entry.value == pytest.approx(0.01, rel=1e-4)
    assert sample_rmse(torch.ones(4, 1, 2, 2), torch.zeros(4, 1, 2, 2)).value == 1
    assert sample_rmse(torch.full((4, 1, 2, 2), 0.5), torch.zeros(4, 1, 2, 2)).value == 0.5


def test_a_distance_in_one_feature_is_that_of_two_normal_distributions() -> None:
    a, b = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [2.0]])
    expected = (2 - 1.5) ** 2 + (2 - math.sqrt(0.5)) ** 2
    assert frechet_distance(gaussian(a), gaussian(b)) == pytest.approx(expected)


def test_drift_from_or_of_what_is_no_answer_is_an_error() -> None:
    silent, images = torch.zeros(4, 3), torch.zeros(2, 1, 2, 2)
    with pytest.raises(CompressorError, match="predicts zeros alone"):
        prediction_error(torch.ones(4, 3), silent)
    with pytest.raises(CompressorError, match="predictions are not finite"):
        prediction_error(torch.full((4, 3), math.inf), torch.ones(4, 3))
    with pytest.raises(CompressorError, match="pictures are not finite"):
        sample_rmse(images / 0, images)


def test_a_model_that_predicts_zeros_alone_is_refused_unless_it_is_to_be_trained() -> None:
    data, silent = Images("grey", torch.zeros(4, 1, 2, 2)), nn.Conv2d(1, 1, 1)
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    with pytest.raises(CompressorError, match="was never trained"):
        asked(Drawing(), silent, data)
    assert asked(Drawing(), silent, data, trained=False).example_inputs(1).shape == (1, 1, 2, 2)


# Cost


class Shaped(Adapter):
    """An adapter for any module and input shape."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        out: Tensor = module(inputs)
        return out

    def example_inputs(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, *self.shape)


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(5, 7), (5,), 5 * 7),
        (nn.Linear(5, 7, bias=False), (3, 5), 3 * 5 * 7),  # three tokens
        (nn.Conv2d(4, 6, 3), (4, 8, 8), 6 * 6 * 6 * 4 * 9),  # 6x6 outputs
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), (4, 8, 8), 4 * 4 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 8, 8), 8 * 8 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 8, 8), 8 * 8 * 4 * 1 * 9),  # depthwise
        (nn.Conv1d(4, 6, 3), (4, 8), 6 * 6 * 4 * 3),
    ],
)
def test_macs_of_a_layer_are_those_counted_by_hand(module: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert layer_macs(module, Shaped(*shape)) == (macs, {"weight": macs})


class Answers(nn.Module):
    """What an inner module answers, without its state; asked twice of the same where it takes two."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x, x) if isinstance(self.inner, nn.Bilinear) else self.inner(x)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize(
    ("module", "macs"),
    [
        (nn.LSTM(16, 32, batch_first=True), 5 * 4 * 32 * (16 + 32)),
        (nn.LSTM(16, 32, num_layers=2, bidirectional=True), 5 * 2 * 4 * 32 * (16 + 32 + 64 + 32)),
        (nn.GRU(16, 32, batch_first=True), 5 * 3 * 32 * (16 + 32)),
        (nn.Bilinear(16, 16, 8), 5 * 8 * 16 * 16),
    ],
    ids=lambda value: type(value).__name__,
)
def test_macs_of_layers_that_torchs_counter_takes_for_free(module: nn.Module, macs: int) -> None:
    assert layer_macs(Answers(module), Shaped(5, 16))[0] == macs


@pytest.mark.parametrize(
    ("call", "macs"),
    [
        (lambda x: torch.mv(x, x[0]), 6 * 8),
        (lambda x: torch.addmv(x[:, 0], x, x[0]), 6 * 8),
        (lambda x: x.view(2, 3, 8) @ x[0], 6 * 8),
        (lambda x: torch.dot(x[0], x[1])[None], 8),
        (lambda x: torch.vdot(x[0], x[1])[None], 8),
        (lambda x: torch.addbmm(x[:2, :2], x.view(3, 2, 8), x.view(3, 2, 8).mT), 3 * 2 * 8 * 2),
        (lambda x: torch._int_mm(x.new_ones(32, 32).char(), x.new_ones(32, 64).char()).float(), 32 * 32 * 64),
    ],
)
def test_macs_of_functions_that_torchs_counter_takes_for_free(call: Callable[[Tensor], Tensor], macs: int) -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return call(x.view(6, 8))

    assert layer_macs(Calls(), Shaped(6, 8))[0] == macs


def test_macs_of_torchs_own_transformer_are_counted_whole() -> None:
    """In eval mode it takes a way of its own, in one operation, and it multiplies with its output layer without calling it."""
    tokens, dim, hidden = 5, 8, 24
    layer = nn.TransformerEncoderLayer(dim, 2, hidden, batch_first=True).eval()
    attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    feed_forward = {"linear1.weight": tokens * dim * hidden, "linear2.weight": tokens * dim * hidden}
    assert layer_macs(layer, Shaped(tokens, dim)) == (
        attention + sum(feed_forward.values()),
        {"self_attn.out_proj.weight": tokens * dim * dim, **feed_forward},
    )


class SelfAttention(nn.Module):
    """Two heads over tokens of dim 8."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        out: Tensor = F.scaled_dot_product_attention(query, key, value)
        return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_both_of_its_products_in_the_total(device: str) -> None:
    total, by_weight = layer_macs(SelfAttention().to(device), Shaped(5, 8))
    assert by_weight == {"qkv.weight": 5 * 8 * 24}
    assert total == 5 * 8 * 24 + 2 * (2 * 5 * 5 * 4)


def test_a_weight_used_twice_counts_twice() -> None:
    shared = nn.Linear(8, 8)
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    total, by_weight = layer_macs(nn.Sequential(shared, shared, tied), Shaped(8))
    assert (total, by_weight) == (3 * 64, {"0.weight": 3 * 64})


def test_counting_leaves_no_hooks(model: nn.Sequential, adapter: Adapter) -> None:
    layer_macs(model, adapter)
    assert not any(module._forward_hooks for module in model.modules())


def test_uvit_small_has_the_published_size_and_cost() -> None:
    adapter = cifar10()
    with torch.device("meta"):
        model = adapter.build()
    total, by_weight = layer_macs(model, adapter)
    tokens, dim, blocks = 32 // 2 * 32 // 2 + 1, 512, 13
    linears = blocks * tokens * (4 + 8) * dim**2
    skips = 6 * tokens * 2 * dim**2
    attention = blocks * 2 * tokens**2 * dim
    ends = (tokens - 1) * dim * 12 + tokens * dim * 12 + 32 * 32 * 3 * 3 * 9
    assert total == linears + skips + attention + ends
    assert round(total / 1e9, 1) == 12.2
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 44.26
    assert sum(by_weight.values()) == total - attention


def test_costs_count_zeros_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.Conv2d(8, 2, 1))
    masks = {"0.weight": NM(1, 4).mask(torch.rand(8, 4, 1, 1))}
    with torch.no_grad():
        model[0].weight.copy_(masks["0.weight"].apply(torch.ones(8, 4, 1, 1)))
        nn.init.ones_(model[1].weight)
        nn.init.zeros_(model[1].bias)
    found = costs(model, Shaped(4, 3, 3), {"0.weight": "1:4"}).as_json()
    size = found.pop("size_bytes")
    assert found == {
        "density": 0.25,
        "params": 32 + 16 + 2,
        "nonzero_params": 8 + 16,
        "macs_dense": 9 * (32 + 16),
        "macs_effective": 9 * (8 + 16),
        "macs_lowered": 9 * (32 + 16),
    }
    assert 4 * 50 <= size < 4 * 50 + 500


def test_costs_without_masks_are_dense(model: nn.Sequential, adapter: Adapter) -> None:
    found = costs(model, adapter, {})
    assert found.density == 1 and found.macs_effective == found.macs_dense == 2 * 16 * 32


def test_a_model_that_has_no_dense_one_is_timed_against_itself(
    model: nn.Sequential, adapter: Adapter, clock: Any
) -> None:
    found = latencies({"dense-continued": model}, adapter, 2, rounds=9)
    assert found["dense-continued"].speedup_vs_dense == 1


def test_latencies_are_relative_to_the_dense_one(model: nn.Sequential, adapter: Adapter, clock: Any) -> None:
    slower = nn.Sequential(nn.Linear(16, 16))
    model.register_forward_hook(lambda *_: clock.passes(2e-3))
    slower.register_forward_hook(lambda *_: clock.passes(8e-3))
    found = latencies({"slower": slower, "dense": model}, adapter, 2, rounds=9)
    dense, other = found["dense"], found["slower"]
    assert dense.speedup_vs_dense == 1 and dense.setting == ("eager", "cpu", "float32", 2)
    assert other.speedup_vs_dense == pytest.approx(dense.median_ms / other.median_ms)
    assert other.speedup_vs_dense == pytest.approx(0.25, rel=0.05) and other.iqr_ms == pytest.approx(0, abs=1e-6)
    assert dense.median_ms == pytest.approx(2, rel=0.1)
