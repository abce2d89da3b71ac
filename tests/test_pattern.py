"""Patterns and masks, held against a slow oracle in plain Python and against torch's own sparsifier."""

from __future__ import annotations

import itertools
import math
import warnings
from contextlib import suppress

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor import NM, CompressorError, Mask, Pattern, Unstructured, parse
from compressor.errors import UsageError

PATTERNS = ["2:4", "1:4", "4:8", "15:16", "1:1", "2:2:4", "4:1:4", "2:7:16"]


def oracle(pattern: NM, score: Tensor) -> Tensor:
    """The mask, one group at a time: sum the rows that share, order by falling score, of equals the first first."""
    n, m, v = pattern.n, pattern.m, pattern.v
    keep = torch.zeros(score.shape, dtype=torch.bool)
    kernel = list(itertools.product(*(range(size) for size in score.shape[2:])))
    for row, column in itertools.product(range(0, score.shape[0], v), range(0, score.shape[1], m)):
        for at in kernel:
            totals = [math.fsum(float(score[(row + r, column + i, *at)]) for r in range(v)) for i in range(m)]
            for i in sorted(range(m), key=lambda i: -totals[i])[:n]:
                for r in range(v):
                    keep[(row + r, column + i, *at)] = True
    return keep


@st.composite
def patterns_with_scores(draw: st.DrawFn) -> tuple[NM, Tensor]:
    """A pattern and a score that it fits. Few distinct whole numbers: many ties, and sums that are exact in any dtype."""
    m = draw(st.integers(1, 12))
    pattern = NM(draw(st.integers(1, m)), m, draw(st.sampled_from([1, 1, 2, 4])))
    kernel = draw(st.sampled_from([(), (), (3,), (2, 3), (1, 1)]))
    shape = (pattern.v * draw(st.integers(1, 2)), m * draw(st.integers(1, 2)), *kernel)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    score = torch.randint(0, draw(st.sampled_from([2, 4, 50])), shape, generator=rng).float()
    return pattern, score.to(draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])))


@given(patterns_with_scores())
def test_masks_equal_the_oracle(case: tuple[NM, Tensor]) -> None:
    pattern, score = case
    assert torch.equal(pattern.mask(score).keep, oracle(pattern, score))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shape", [(8, 32), (4, 16, 3, 3), (4, 16, 5)])
def test_masks_of_random_weights_equal_the_oracle(text: str, shape: tuple[int, ...]) -> None:
    pattern, score = parse(text), torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert isinstance(pattern, NM)
    mask = pattern.mask(score)
    assert torch.equal(mask.keep, oracle(pattern, score))
    mask.verify()


def test_convolutions_group_input_channels_at_each_kernel_position() -> None:
    score = torch.zeros(1, 4, 2, 2)
    score[0, :2, 0, 0] = score[0, 2:, 1, 1] = 1.0
    keep = NM(2, 4).mask(score).keep
    assert keep[0, :, 0, 0].tolist() == [True, True, False, False]
    assert keep[0, :, 1, 1].tolist() == [False, False, True, True]


@given(patterns_with_scores(), st.sampled_from([0.0, 1.0, math.inf, -math.inf]))
def test_equal_scores_keep_exactly_the_first_n(case: tuple[NM, Tensor], value: float) -> None:
    pattern, like = case
    keep = pattern.mask(torch.full_like(like, value)).keep
    first = torch.arange(like.shape[1]) % pattern.m < pattern.n
    assert torch.equal(keep, first.view(-1, *[1] * (like.dim() - 2)).expand(like.shape))


@pytest.mark.parametrize("text", [*PATTERNS, "4:2:4", "2:4:8", "2:15:16"])
def test_exactly_n_survive_scores_with_infinities(text: str) -> None:
    pattern = parse(text)
    assert isinstance(pattern, NM)
    values = torch.tensor([-math.inf, 0.0, 1.0, math.inf])
    score = values[torch.randint(4, (64, 64), generator=torch.Generator().manual_seed(0))]
    keep = pattern.mask(score).keep
    assert keep.unflatten(1, (-1, pattern.m)).sum(2).eq(pattern.n).all()
    pattern.verify(keep)


def test_infinite_scores_win_and_lose() -> None:
    score = torch.tensor([[-math.inf, 1.0, math.inf, 0.0]])
    assert NM(2, 4).mask(score).keep.tolist() == [[False, True, True, False]]
    assert Unstructured(0.75).mask(score).keep.tolist() == [[False, True, True, True]]


@pytest.mark.parametrize("text", ["2:4", "15:16", "2:2:4", "unstructured:0.5"])
def test_nan_scores_are_refused(text: str) -> None:
    score = torch.rand(4, 16)
    score[3, 5] = math.nan
    score[0, 0] = math.inf
    with pytest.raises(CompressorError, match=f"{text}: the score holds NaN"):
        parse(text).mask(score)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_give_the_mask_of_their_values(dtype: torch.dtype) -> None:
    score = (100 * torch.rand(16, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    for text in ("2:4", "15:16", "unstructured:0.3"):
        assert torch.equal(parse(text).mask(score).keep, parse(text).mask(score.double()).keep)


def test_a_sum_beyond_half_precision_is_no_nan() -> None:
    keep = NM(2, 4).mask(torch.full((64, 64), 60_000.0, dtype=torch.float16)).keep
    assert keep.sum() == 64 * 32


@pytest.mark.parametrize("text", ["2:4", "2:2:4", "15:16", "unstructured:0.5"])
def test_memory_layout_of_the_score_does_not_matter(text: str) -> None:
    rng = torch.Generator().manual_seed(0)
    pattern = parse(text)
    flat = torch.randint(0, 4, (32, 16), generator=rng).float().T
    image = torch.randint(0, 4, (8, 16, 3, 3), generator=rng).float().to(memory_format=torch.channels_last)
    for score in (flat, image):
        assert not score.is_contiguous()
        assert torch.equal(pattern.mask(score).keep, pattern.mask(score.contiguous()).keep)


def test_rows_that_share_have_one_choice_and_each_obeys_n_m() -> None:
    keep = NM(2, 4, v=4).mask(torch.rand(8, 16, generator=torch.Generator().manual_seed(0))).keep
    assert all(torch.equal(keep[row], keep[row - row % 4]) for row in range(8))
    NM(2, 4).verify(keep)


@pytest.mark.parametrize("density", [0.5, 0.1, 1.0, 1e-9, 0.37])
def test_unstructured_keeps_the_largest_and_at_least_one(density: float) -> None:
    score = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    keep = Unstructured(density).mask(score).keep
    count = max(1, round(100 * density))
    assert keep.sum() == count
    assert score[keep].min() == score.flatten().sort(descending=True).values[count - 1]


def test_unstructured_ties_go_to_the_first_in_memory_order() -> None:
    assert Unstructured(0.5).mask(torch.ones(2, 3)).keep.tolist() == [[True, True, True], [False, False, False]]


@given(
    st.integers(1, 7), st.integers(1, 9), st.floats(0, 1, exclude_min=True), st.integers(2, 50), st.integers(0, 2**32)
)
def test_by_row_keeps_the_same_number_in_each_and_in_all(
    rows: int, columns: int, density: float, values: int, seed: int
) -> None:
    pattern = Unstructured(density)
    score = torch.randint(0, values, (rows, columns, 2), generator=torch.Generator().manual_seed(seed)).float()
    mask = pattern.mask_by_row(score)
    mask.verify()
    kept = mask.keep.flatten(1).sum(1).tolist()
    assert sum(kept) == pattern.mask(score).keep.sum() and max(kept) - min(kept) <= 1
    for row, count in enumerate(kept):
        flat = score[row].flatten().tolist()
        best = sorted(range(len(flat)), key=lambda i: -flat[i])[:count]  # stable: of equals the first
        assert mask.keep[row].flatten().nonzero().flatten().tolist() == sorted(best)


def test_by_row_refuses_what_a_mask_refuses() -> None:
    with pytest.raises(CompressorError, match="NaN"):
        Unstructured(0.5).mask_by_row(torch.full((2, 2), math.nan))


def test_2_4_equals_torch_weight_norm_sparsifier() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.pruning import WeightNormSparsifier
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    weight = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
        sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
        sparsifier.step()
        theirs = model[0].weight.detach() != 0
    assert torch.equal(NM(2, 4).mask(weight.abs()).keep, theirs)


@pytest.mark.parametrize("text", [*PATTERNS, "unstructured:0.5"])
def test_one_weight_more_than_allowed_is_found(text: str) -> None:
    pattern, weight = parse(text), torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    sparse = pattern.mask(weight.abs()).apply(weight)
    pattern.verify(sparse)
    if pattern.density == 1:
        return
    at = (sparse == 0).nonzero()[-1]
    sparse[tuple(at)] = 1e-30
    with pytest.raises(CompressorError, match=f"not {text}: 1 group"):
        pattern.verify(sparse)


def test_a_mask_verifies_its_own_keep() -> None:
    with pytest.raises(CompressorError, match="not 2:4: 8 group"):
        Mask(torch.ones(4, 8, dtype=torch.bool), NM(2, 4)).verify()


def test_fewer_survivors_than_allowed_are_legal() -> None:
    for text in (*PATTERNS, "unstructured:0.5"):
        parse(text).verify(torch.zeros(8, 32))


def test_masked_weights_are_plus_zero() -> None:
    weight = torch.tensor([[-1.0, -0.0, -math.inf, math.nan]])
    out = Mask(torch.zeros(1, 4, dtype=torch.bool), NM(2, 4)).apply(weight)
    assert torch.equal(out, torch.zeros(1, 4))
    assert not out.signbit().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_applying_a_mask_keeps_values_and_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = NM(2, 4).mask(weight.abs())
    out = mask.apply(weight)
    assert out.dtype == dtype and torch.equal(out[mask.keep], weight[mask.keep])


@pytest.mark.parametrize("keep", [torch.ones(2, 4), torch.ones(2, 4, dtype=torch.uint8), [[True]], None])
def test_a_mask_that_is_not_bool_is_refused(keep: object) -> None:
    with pytest.raises(CompressorError, match="must be a bool tensor, got"):
        Mask(keep, NM(2, 4))  # type: ignore[arg-type]


MISFITS = [
    ("2:4", (96, 30), "needs dim 1 divisible by 4, got (96, 30)"),
    ("2:4", (8, 3, 3, 3), "needs dim 1 divisible by 4, got (8, 3, 3, 3)"),
    ("2:4", (8, 6), "needs dim 1 divisible by 4, got (8, 6)"),
    ("2:4", (8, 7), "needs dim 1 divisible by 4, got (8, 7)"),
    ("2:4", (32, 1, 3, 3), "needs dim 1 divisible by 4, got (32, 1, 3, 3)"),  # depthwise
    ("4:2:4", (6, 8), "needs dim 0 divisible by 4, got (6, 8)"),
    ("2:4", (8,), "needs a weight of at least 2 dims (out, in, *kernel), got (8,)"),
    ("2:4", (), "needs a weight of at least 2 dims (out, in, *kernel), got ()"),
    ("2:4", (0, 8), "the weight is empty, got (0, 8)"),
    ("2:4", (8, 4, 0), "the weight is empty, got (8, 4, 0)"),
    ("unstructured:0.5", (8,), "needs a weight of at least 2 dims (out, in, *kernel), got (8,)"),
    ("unstructured:0.5", (0, 4), "the weight is empty, got (0, 4)"),
]


@pytest.mark.parametrize(("text", "shape", "reason"), MISFITS)
def test_a_misfit_says_what_was_needed_and_found(text: str, shape: tuple[int, ...], reason: str) -> None:
    pattern = parse(text)
    assert pattern.misfit(shape) == reason
    for refused in (pattern.mask, pattern.verify):
        with pytest.raises(CompressorError) as caught:
            refused(torch.zeros(shape))
        assert caught.value.message == f"{text}: {reason}"


def test_what_fits_is_no_misfit() -> None:
    assert NM(2, 4).misfit((1, 4)) is None
    assert NM(2, 4, v=2).misfit((2, 8, 1, 1)) is None
    assert Unstructured(0.5).misfit((1, 1)) is None


def any_nm() -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(st.integers(1, 10**7), st.integers(1, 10**7), st.integers(1, 10**7))


@given(any_nm())
def test_every_n_m_that_can_be_built_parses_back(numbers: tuple[int, int, int]) -> None:
    n, m, v = numbers
    try:
        pattern = NM(min(n, m), m, v)
    except UsageError:
        assume(False)
    assert parse(str(pattern)) == pattern


@given(st.floats(0, 1, exclude_min=True))
def test_every_density_parses_back(density: float) -> None:
    assert parse(str(Unstructured(density))) == Unstructured(density)


@given(st.sampled_from(["2:4", " 4:8 ", "4:2:4", "1:2:4", "02:04", "unstructured:.5", "unstructured:1e-3", "15:16\n"]))
def test_text_that_parses_names_one_pattern(text: str) -> None:
    pattern = parse(text)
    assert parse(str(pattern)) == pattern and pattern.density == parse(str(pattern)).density


@given(st.text(max_size=12) | st.from_regex(r"[0-9:.]{0,8}", fullmatch=True))
def test_any_text_is_a_pattern_or_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        assert isinstance(parse(text), Pattern)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two:four", "pattern 'two:four' is not one that exists\nWrite N:M (2:4)"),
        ("2:4:", "pattern '2:4:' is not one that exists"),
        ("1:2:3:4", "pattern '1:2:3:4' is not one that exists"),
        ("-2:4", "pattern '-2:4' is not one that exists"),
        ("", "pattern '' is not one that exists"),
        ("5:4", "pattern 5:4: cannot keep 5 of 4\nN is at most M, as in 2:4."),
        ("0:4", "pattern: n must be a whole number of at least 1, got 0"),
        ("0:2:4", "pattern: v must be a whole number of at least 1, got 0"),
        ("unstructured:0", "pattern: density must be a number above 0 and up to 1, got 0.0"),
        ("unstructured:1.5", "pattern: density must be a number above 0 and up to 1, got 1.5"),
        ("unstructured:nan", "pattern 'unstructured:nan' is not one that exists"),
    ],
)
def test_refused_texts_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("value", [None, 24, 0.5, b"2:4"])
def test_what_is_not_text_is_no_pattern(value: object) -> None:
    with pytest.raises(UsageError, match="is not one that exists"):
        parse(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [True, 2.0, "2", 0, -1])
def test_n_is_a_whole_number(n: object) -> None:
    with pytest.raises(UsageError, match="n must be a whole number of at least 1"):
        NM(n, 4)  # type: ignore[arg-type]


def test_patterns_are_values() -> None:
    assert parse("2:4") == NM(2, 4) == NM(2, 4, 1) and hash(NM(2, 4)) == hash(parse("2:4"))
    assert NM(2, 4) != NM(4, 8)
    assert NM(2, 4).density == 0.5 and NM(7, 8, 4).density == 7 / 8


@pytest.mark.parametrize("text", ["2:4", "15:16", "2:2:4", "unstructured:0.5"])
def test_masks_of_many_weights_are_the_masks_of_each(text: str) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = {"a": (8, 32), "b": (4, 16), "conv": (8, 16, 3, 3), "half": (8, 16)}
    scores = {name: torch.randn(shape, generator=rng).abs() for name, shape in shapes.items()}
    scores["transposed"] = scores["a"].T.contiguous().T
    for dtype in (torch.float32, torch.float16):
        scores["half"] = scores["half"].to(dtype)
        found = parse(text).masks(scores)
        assert list(found) == list(scores)
        for name, score in scores.items():
            assert torch.equal(found[name].keep, parse(text).mask(score).keep), name
            assert found[name].keep.shape == score.shape


def test_a_weight_among_many_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CompressorError, match="dim 1 divisible by 4"):
        parse("2:4").masks({"a": torch.ones(4, 8), "b": torch.ones(4, 8), "odd": torch.ones(4, 7)})
