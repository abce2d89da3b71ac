"""Further measures of quality, against loops that follow the papers, and the cache of real images' features."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from compressor import registry
from compressor.data.sets import Images
from compressor.errors import UsageError
from compressor.quality import features as kept_features
from compressor.quality import fidelity
from compressor.quality.evaluate import qualities, quality
from compressor.quality.features import real_features, real_spatial
from compressor.quality.fidelity import Reference
from compressor.quality.frechet import gaussian
from compressor.quality.metric import Metric
from compressor.quality.settings import Evaluation
from compressor.seeds import generator
from compressor.validation import validated


def draw(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return shift + torch.randn(n, d, generator=generator(seed), dtype=torch.float64)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a row or two, so that several are needed."""
    monkeypatch.setattr(fidelity, "_BLOCK_ENTRIES", 37)


# --- Kernel distance. ---


def mmd_by_loops(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate, pair by pair."""

    def k(a: Tensor, b: Tensor) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    among_x = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    among_y = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return among_x + among_y - 2 * sum(k(a, b) for a in x for b in y) / (m * n)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("real", "fake", "size"), [(19, 12, 6), (9, 30, 4), (4, 2, 2)])
def test_kid_of_each_pair_of_subsets_is_the_double_loop(real: int, fake: int, size: int) -> None:
    x, y = draw(real, 5, seed=0), draw(fake, 5, seed=1, shift=0.5)
    values, found = fidelity.kid(x, y, seed=7)
    assert found == size and len(values) == fidelity.SUBSETS
    left, right = fidelity.subsets(real, size, 7, "real"), fidelity.subsets(fake, size, 7, "generated")
    assert left.sum(1).eq(size).all() and right.sum(1).eq(size).all() and len(left.unique(dim=0)) > 1
    for row in range(0, len(values), 19):
        expected = mmd_by_loops(x[left[row] == 1], y[right[row] == 1])
        assert float(values[row]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_kid_of_one_distribution_is_zero_on_average_and_grows_with_a_shift() -> None:
    same = torch.stack([fidelity.kid(draw(60, 4, 2 * s), draw(60, 4, 2 * s + 1), s)[0].mean() for s in range(60)])
    assert abs(float(same.mean())) < 3 * float(same.std()) / math.sqrt(60)
    near, far = (float(fidelity.kid(draw(60, 4, 0), draw(60, 4, 1, shift), 0)[0].mean()) for shift in (0.5, 1.5))
    assert float(same.std()) < near < far


def test_kid_is_seeded() -> None:
    x, y = draw(20, 3, seed=0), draw(20, 3, seed=1)
    first, again, other = (fidelity.kid(x, y, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("size", [20, 100])
def test_interval_of_kid_spreads_as_new_samples_do(size: int) -> None:
    """Means of n numbers stand for the estimate: how far they spread is known."""
    n = 200
    widths = []
    for seed in range(30):
        members = fidelity.subsets(n, size, seed, "real")
        low, high = fidelity.jackknife(members @ draw(n, 1, seed)[:, 0] / size, size, n) or (0.0, 0.0)
        widths.append(high - low)
    assert sum(widths) / 30 == pytest.approx(2 * 1.96 / math.sqrt(n), rel=0.1)


def test_interval_of_kid_is_absent_where_all_samples_are_one_subset() -> None:
    assert fidelity.jackknife(torch.zeros(3, dtype=torch.float64), 5, 5) is None


# --- Nearest neighbours. ---


def by_loops(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    """Precision, recall, density and coverage as their papers write them."""

    def radius(x: Tensor, i: int) -> float:
        others = sorted(float((x[i] - x[j]).norm()) for j in range(len(x)) if j != i)
        return others[min(k, len(others)) - 1]

    def inside(x: Tensor, i: int, y: Tensor) -> bool:
        return float((x[i] - y).norm()) <= radius(x, i) * (1 + 1e-12)

    held = [[inside(real, i, y) for i in range(len(real))] for y in fake]
    return {
        "precision": sum(any(row) for row in held) / len(fake),
        "recall": sum(any(inside(fake, j, x) for j in range(len(fake))) for x in real) / len(real),
        "density": sum(map(sum, held)) / (k * len(fake)),
        "coverage": sum(any(row[i] for row in held) for i in range(len(real))) / len(real),
    }


def ours(real: Tensor, fake: Tensor, k: int) -> dict[str, float]:
    around_real, around_fake = fidelity.squared_radii(real, k), fidelity.squared_radii(fake, k)
    return {
        "precision": fidelity.precision(around_real, real, fake),
        "recall": fidelity.precision(around_fake, fake, real),
        "density": fidelity.density(around_real, real, fake, k),
        "coverage": fidelity.coverage(around_real, real, fake),
    }


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("real", "fake"), [(20, 13), (9, 17), (4, 2)])
def test_neighbour_measures_are_the_papers_loops(real: int, fake: int, k: int) -> None:
    x, y = draw(real, 3, seed=k), draw(fake, 3, seed=k + 1, shift=0.4)
    assert ours(x, y, k) == pytest.approx(by_loops(x, y, k))


@settings(max_examples=40, deadline=None)
@given(
    real=st.integers(4, 40), fake=st.integers(2, 40), d=st.integers(1, 6), k=st.integers(1, 7), shift=st.floats(0, 3)
)
def test_shares_are_shares_and_do_not_depend_on_scale_or_order(
    real: int, fake: int, d: int, k: int, shift: float
) -> None:
    x, y = draw(real, d, seed=0), draw(fake, d, seed=1, shift=shift)
    found = ours(x, y, k)
    assert all(0 <= found[name] <= 1 for name in ("precision", "recall", "coverage"))
    assert 0 <= found["density"] <= real / k
    assert ours(4 * x.flip(0), 4 * y.flip(0), k) == pytest.approx(found)


def test_neighbours_do_not_depend_on_where_the_origin_is_and_copies_are_no_distance_apart() -> None:
    rng = generator(5, "far")
    real, fake = (torch.randn(n, 8, generator=rng, dtype=torch.float64) for n in (60, 40))
    near, far = (
        [
            fidelity.precision(fidelity.squared_radii(x, 3), x, y),
            fidelity.precision(fidelity.squared_radii(y, 3), y, x),
            fidelity.density(fidelity.squared_radii(x, 5), x, y, 5),
            fidelity.coverage(fidelity.squared_radii(x, 5), x, y),
        ]
        for x, y in ((real, fake), (real + 1e9, fake + 1e9))
    )
    assert near == far and 0 < near[0] < 1
    again = torch.cat([fake[:20], real[:20]]) + 3.7  # half of those held out are copies, too: they tie with the samples
    assert fidelity.copying(real + 3.7, again, real[:30] + 3.7) == 0.75


@pytest.mark.parametrize("seed", range(4))
def test_what_lies_on_the_edge_of_a_ball_is_in_it(seed: int) -> None:
    real = draw(100, 20, seed=seed)
    for k in (3, 5):  # each ball holds its centre, and its edge is where the k-th nearest other lies
        assert ours(real, real.clone(), k)["density"] == pytest.approx((k + 1) / k, abs=1e-12)
    x, y = (torch.randint(0, 3, (n, 4), generator=generator(seed, n)).double() for n in (60, 50))
    assert ours(x / 10, y / 10, 3) == ours(x, y, 3)  # whole numbers are exact


@pytest.mark.parametrize("side", [0, 1])
def test_a_sample_that_diverged_changes_nothing_for_the_others(side: int) -> None:
    sets = [draw(60, 20, seed=0), draw(50, 20, seed=1)]
    near, far = ([x.clone() for x in sets] for _ in range(2))
    near[side][0], far[side][0] = 1e3, 1e8
    assert ours(*far, 3) == pytest.approx(ours(*near, 3))
    unseen = draw(40, 20, seed=2)
    assert fidelity.copying(far[0], unseen, far[1]) == fidelity.copying(near[0], unseen, near[1])


def test_a_set_has_full_precision_recall_and_coverage_against_itself() -> None:
    x = draw(30, 4, seed=0)
    found = ours(x, x.clone(), 3)
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)


def test_samples_far_away_have_none_and_a_single_picture_has_no_recall() -> None:
    real = draw(40, 4, seed=0)
    assert set(ours(real, draw(40, 4, seed=1, shift=100), 3).values()) == {0}
    one = real[:1].expand(40, 4) + 1e-6 * draw(40, 4, seed=2)
    found = ours(real, one, 3)
    assert found["precision"] == 1 and found["recall"] <= 1 / 40 and found["coverage"] < 0.5


# --- The entries of a row. ---


class Flat(Metric):
    """Pixels as features."""

    name = "flat"

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)

    @property
    def sha256(self) -> str:
        return "0" * 64


def digits_and_samples() -> tuple[Metric, Tensor, Reference]:
    metric, data = registry.metric("fd-digits"), registry.images("digits")
    images = data.images(torch.arange(300))  # type: ignore[attr-defined]
    found = Reference.of(real_features(metric, data), real_spatial(metric, data), 0)  # type: ignore[arg-type]
    return metric, (images + 0.3 * torch.randn(images.shape, generator=generator(0))).clamp(-1, 1), found


def test_fd_digits_is_what_torchmetrics_finds_with_the_same_classifier() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric, images, reference = digits_and_samples()

    class Extractor(torch.nn.Module):
        num_features = 64

        def forward(self, x: Tensor) -> Tensor:
            return metric.features(x).double()

    theirs = FrechetInceptionDistance(feature=Extractor()).set_dtype(torch.float64)
    data = registry.images("digits")
    theirs.update(data.images(torch.arange(len(data))), real=True)  # type: ignore[attr-defined]
    theirs.update(images, real=False)
    value = quality(metric, images, reference.gaussian, Evaluation(bootstrap=0)).value
    assert value == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_a_row_has_the_distance_first_and_then_every_measure() -> None:
    metric, images, reference = digits_and_samples()
    found = qualities(metric, images, reference, Evaluation(bootstrap=5, sampler_steps=7, seed=3))
    measures = ("kid", "precision", "recall", "density", "coverage", "sfd")
    assert [entry.metric for entry in found] == ["fd-digits", *(f"{name}-digits" for name in measures)]
    assert {(entry.samples, entry.sampler_steps, entry.seed) for entry in found} == {(300, 7, 3)}
    assert found[0] == quality(metric, images, reference.gaussian, Evaluation(bootstrap=5, sampler_steps=7, seed=3))
    values = {entry.metric: entry for entry in found}
    interval = values["kid-digits"].ci95
    assert interval is not None and interval[0] < values["kid-digits"].value < interval[1]
    real, fake = reference.features, metric.features(images).double()
    assert values["recall-digits"].value == ours(real, fake, 3)["recall"]
    assert values["coverage-digits"].value == ours(real, fake, 5)["coverage"]
    assert values["sfd-digits"].value > 0


# --- Against what is held out from training. ---


@pytest.mark.usefixtures("small_blocks")
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 5, 9]), st.sampled_from([1, 3, 8]), st.sampled_from([1, 4, 7]))
@settings(max_examples=60, deadline=None)
def test_copying_is_the_share_of_pairs_in_which_the_sample_is_nearer(seed: int, m: int, n: int, k: int) -> None:
    def whole(count: int, side: int) -> Tensor:  # whole numbers, so that distances tie
        return torch.randint(-2, 3, (count, 2), generator=generator(seed, side)).double()

    seen, unseen, points = whole(m, 0), whole(n, 1), whole(k, 2)
    own, new = (
        [min(sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)) for y in seen) for x in side]
        for side in (points, unseen)
    )
    expected = sum((a < b) + (a == b) / 2 for a in own for b in new) / (len(own) * len(new))
    assert fidelity.copying(seen, unseen, points) == pytest.approx(expected, abs=1e-12)


def test_copies_and_new_images_are_told_apart() -> None:
    seen, unseen = draw(400, 3, seed=0), draw(200, 3, seed=1)
    assert fidelity.copying(seen, unseen, seen[:50]) > 0.99
    assert abs(fidelity.copying(seen, unseen, draw(300, 3, seed=2)) - 0.5) < 0.06
    assert fidelity.copying(seen, unseen, draw(300, 3, seed=2, shift=9.0)) < 0.01


def test_what_is_held_out_is_measured_against_where_there_is_some() -> None:
    seen, unseen, images = draw(60, 4, seed=0), draw(30, 4, seed=1), draw(20, 4, seed=2).view(20, 1, 2, 2)
    choice = validated(Evaluation, {"bootstrap": 5, "measures": ["recall"]}, "here")
    *others, distance, copies = qualities(Flat(), images, Reference.of(seen, None, 0, unseen), choice)
    assert (copies.metric, distance.metric) == ("copying-flat", "kid_unseen-flat")
    assert copies.value == fidelity.copying(seen, unseen, images.flatten(1)) and copies.ci95 is None
    assert distance.value == pytest.approx(float(fidelity.kid(unseen, images.flatten(1), choice.seed)[0].mean()))
    assert distance.ci95 is not None
    assert qualities(Flat(), images, Reference.of(seen, None, 0), choice) == others
    single = qualities(Flat(), images, Reference.of(seen, None, 0, unseen[:1]), choice)
    assert [entry.metric for entry in single[len(others) :]] == ["copying-flat"]  # one picture has no pairs
    alone = validated(Evaluation, {"bootstrap": 5, "measures": []}, "here")
    assert qualities(Flat(), images, Reference.of(seen, None, 0, unseen), alone) == others[:1]


def test_the_features_of_held_out_pictures_are_taken_where_they_are_wanted() -> None:
    pixels = torch.randint(0, 256, (24, 1, 2, 2), generator=generator(0), dtype=torch.uint8)
    whole = Images("mine", pixels[:16], held_out=Images("mine, held out", pixels[16:]))
    _, found = kept_features.compared_with(Flat(), whole, Evaluation())
    assert found.unseen is not None and torch.equal(found.unseen, real_features(Flat(), whole.unseen).double())
    assert len(found.features) == 16
    without = validated(Evaluation, {"measures": []}, "here")
    assert kept_features.compared_with(Flat(), whole, without)[1].unseen is None
    assert kept_features.compared_with(Flat(), Images("mine", pixels), Evaluation())[1].unseen is None


@pytest.mark.parametrize("wanted", [[], ["recall"], ["sfd", "kid"]])
def test_only_the_measures_that_are_asked_for_are_taken(wanted: list[str]) -> None:
    images, features = draw(20, 4, seed=0).view(20, 1, 2, 2), draw(30, 4, seed=1)
    choice = validated(Evaluation, {"bootstrap": 0, "measures": wanted}, "here")
    found = qualities(Flat(), images, Reference.of(features, None, 0), choice)
    assert [entry.metric for entry in found] == ["flat", *(f"{name}-flat" for name in wanted if name != "sfd")]
    assert all(entry.ci95 is None for entry in found)


def test_an_unknown_measure_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"measures\.0.*'kid', 'precision', 'recall'.*found 'beauty'"):
        validated(Evaluation, {"measures": ["beauty"]}, "here")


@pytest.mark.parametrize(
    ("measure", "metric", "name"),
    [
        ("kid", "fid", "kid"),
        ("precision", "fid", "precision"),
        ("sfd", "fid", "sfid"),
        ("kid", "fd-digits", "kid-digits"),
        ("sfd", "fd-digits", "sfd-digits"),
        ("recall", "dino", "recall-dino"),
        ("recall", "fid-like", "recall-fid-like"),
    ],
)
def test_only_inception_gives_the_plain_names(measure: str, metric: str, name: str) -> None:
    named = registry.metric("fid") if metric == "fid" else Flat()
    named.name = metric
    assert named.measure_name(measure) == name


def test_of_many_samples_as_many_as_the_limit_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "LIMIT", 10)
    features, spatial = draw(30, 4, seed=1), draw(30, 2, seed=2)
    reference = Reference.of(features, spatial, seed=0)
    assert len(reference.features) == 10 and len(reference.features.unique(dim=0)) == 10
    assert torch.equal(reference.gaussian.mean, gaussian(features).mean)
    assert torch.equal(fidelity.drawn(features, 0, "real"), reference.features)
    assert not torch.equal(fidelity.drawn(features, 1, "real"), reference.features)
    found = fidelity.measures(Flat(), draw(25, 4, seed=3), draw(25, 2, seed=4), reference, Evaluation())
    assert {entry.metric: entry.samples for entry in found} == {
        **{f"{name}-flat": 10 for name in ("kid", "precision", "recall", "density", "coverage")},
        "sfd-flat": 25,
    }


# --- Features of real images, kept between runs. ---


class Counting(Flat):
    """Counts how often it is asked, and answers in float32."""

    def __init__(self) -> None:
        self.asked = 0

    def features(self, images: Tensor) -> Tensor:
        self.asked += 1
        return images.flatten(1).float()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, in which everything is kept, however fast it was."""
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_features, "WORTH_SECONDS", -1.0)
    return tmp_path / "cache" / "compressor" / "features"


def pictures(seed: int = 0) -> Images:
    return Images("some", torch.randint(0, 256, (6, 1, 2, 2), generator=generator(seed)).to(torch.uint8))


def asked(metric: Counting, data: Images, kind: str = "features") -> tuple[int, Tensor]:
    """How often the extractor ran, and what was found."""
    before = metric.asked
    found = kept_features.remembered(kind, metric, data, real_features)
    return metric.asked - before, found


def test_features_are_computed_once(kept: Path) -> None:
    metric = Counting()
    (times, first), (again, second) = asked(metric, pictures()), asked(metric, pictures())
    assert (times, again) == (1, 0) and torch.equal(first, second) and first.dtype == second.dtype
    assert [path.suffix for path in kept.iterdir()] == [".safetensors"]


def test_other_data_extractors_kinds_and_versions_are_not_mistaken(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Counting):
        @property
        def sha256(self) -> str:
            return "1" * 64

    class Renamed(Counting):
        name = "round"

    asked(Counting(), pictures())
    assert asked(Counting(), pictures(1))[0] == asked(Other(), pictures())[0] == asked(Renamed(), pictures())[0] == 1
    assert asked(Counting(), pictures(), "spatial")[0] == 1
    monkeypatch.setattr(kept_features, "VERSION", kept_features.VERSION + 1)
    assert asked(Counting(), pictures())[0] == 1
    assert len(list(kept.iterdir())) == 6


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        save({"other": torch.zeros(6, 4)}),
        save({"features": torch.zeros(5, 4)}),
        save({"features": torch.zeros(6)}),
        save({"features": torch.zeros(6, 4, dtype=torch.int64)}),
        save({"features": torch.full((6, 4), math.nan)}),
        save({"features": torch.zeros(6, 4)})[:-3],
    ],
)
def test_a_damaged_file_is_made_again(kept: Path, content: bytes) -> None:
    metric = Counting()
    expected = asked(metric, pictures())[1]
    (path,) = kept.iterdir()
    path.write_bytes(content)
    assert asked(metric, pictures())[0] == 1
    times, found = asked(metric, pictures())
    assert times == 0 and torch.equal(found, expected)


@pytest.mark.parametrize("spoil", ["file for a folder", "folder for a file", "no right to write"])
def test_a_cache_that_cannot_be_used_is_no_error(kept: Path, spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = Counting()
    if spoil == "file for a folder":
        kept.parent.mkdir(parents=True)
        kept.write_text("a file")
    elif spoil == "folder for a file":
        kept_features.cache_path("features", metric, pictures()).mkdir(parents=True)
    else:

        def refuse(*arguments: object) -> None:
            raise PermissionError("read-only")

        monkeypatch.setattr(kept_features, "save_file", refuse)
    assert [asked(metric, pictures())[0] for _ in range(2)] == [1, 1]
    assert not list(kept.glob(".partial-*") if kept.is_dir() else [])


def test_what_is_computed_quickly_is_not_kept(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_features, "WORTH_SECONDS", 60.0)
    assert [asked(Counting(), pictures())[0] for _ in range(2)] == [1, 1] and not kept.exists()


def test_extractors_without_spatial_features_are_compared_without(kept: Path) -> None:
    features, found = kept_features.compared_with(Counting(), pictures(), Evaluation())
    assert found.spatial is None and torch.equal(features.double(), found.features)
    assert torch.equal(features, kept_features.compared_with(Counting(), pictures(), Evaluation(measures=[]))[0])
