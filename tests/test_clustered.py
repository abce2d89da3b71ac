"""Rows that share a choice without being neighbours: masks, order, kernels, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compressor
from compressor import NM, CompressorError, parse
from compressor.errors import UsageError
from compressor.lower import Unit
from compressor.lower.units import pattern_of
from compressor.lower.vnm import VNM, kernels
from compressor.plugins.sparsedm import SparseDM
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.codes import fake_quantised


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("text", ["2c:2:4", "4c:2:4", "8c:1:4", "16c:4:8"])
def test_its_string_parses_back(text: str) -> None:
    assert str(parse(text)) == text and isinstance(parse(text), Clustered)
    assert parse(text).density == parse(text.partition(":")[2]).density


@pytest.mark.parametrize("text", ["1c:2:4", "3c:2:4", "0c:2:4", "4c:5:4", "c:2:4", "4cc:2:4"])
def test_what_it_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_mask_is_legal_and_keeps_exactly_n(data: st.DataObject) -> None:
    v, m = data.draw(st.sampled_from([2, 4, 8])), data.draw(st.sampled_from([2, 4, 8]))
    pattern = Clustered(data.draw(st.integers(1, m)), m, v)
    shape = (
        v * data.draw(st.integers(1, 6)),
        m * data.draw(st.integers(1, 4)),
        *data.draw(st.sampled_from([(), (3, 3)])),
    )
    score = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, torch.inf]), min_size=5, max_size=5)))
    score = score[torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))]
    mask = pattern.mask(score)
    mask.verify()
    NM(pattern.n, m).verify(mask.keep)
    assert int(mask.keep.sum()) == score.numel() * pattern.n // m
    assert torch.equal(mask.keep, pattern.mask(score.clone()).keep)
    order = pattern.order(mask.keep)
    assert sorted(order.tolist()) == list(range(shape[0]))
    together = mask.keep[order].reshape(-1, v, *shape[1:])
    assert bool((together == together[:, :1]).all())


def test_similar_rows_meet_wherever_they_are() -> None:
    """Four kinds of rows, shuffled: each kind shares a choice, and nothing of it is lost."""
    kinds = NM(2, 4).mask(normal(4, 32).abs()).keep
    rows = torch.arange(4).repeat(4)[torch.randperm(16, generator=torch.Generator().manual_seed(3))]
    score = kinds[rows] + 0.1 * normal(16, 32).abs()
    assert torch.equal(Clustered(2, 4, 4).mask(score).keep, kinds[rows])
    assert not torch.equal(NM(2, 4, 4).mask(score).keep, kinds[rows])


@pytest.mark.parametrize("v", [2, 4, 8])
def test_it_keeps_more_than_neighbours_do(v: int) -> None:
    score = normal(128, 128).square()
    kept = {pattern: float(pattern.mask(score).apply(score).sum()) for pattern in (Clustered(2, 4, v), NM(2, 4, v))}
    assert kept[Clustered(2, 4, v)] > 1.01 * kept[NM(2, 4, v)]


def test_a_choice_that_is_not_shared_breaks_it() -> None:
    keep = Clustered(2, 4, 4).mask(normal(16, 16).abs()).keep
    keep[3] = ~keep[3]
    with pytest.raises(CompressorError, match="not 4c:2:4"):
        Clustered(2, 4, 4).verify(keep)


def test_zeros_among_the_kept_break_nothing() -> None:
    weight = normal(16, 16)
    weight = Clustered(2, 4, 4).mask(weight.abs()).apply(weight)
    for row, column in ((0, 0), (5, 3), (11, 9)):
        weight[row, column] = 0
    Clustered(2, 4, 4).verify(weight)
    Clustered(2, 4, 4).verify(torch.zeros(16, 16))


@pytest.mark.parametrize("v", [2, 4, 8])
def test_what_has_the_pattern_already_loses_nothing_to_it(v: int) -> None:
    """As where a model that `obs` has pruned is trained: rows of other sizes than those by which they met."""
    pattern, weight = Clustered(2, 4, v), normal(64, 64) * normal(64, 1, seed=1).exp()
    weight = pattern.mask(normal(64, 64, seed=2).abs()).apply(weight)
    assert torch.equal(pattern.mask(weight.abs()).apply(weight), weight)
    assert int(pattern.mask(weight.abs()).keep.sum()) == weight.numel() // 2


@pytest.mark.parametrize("v", [2, 4, 8])
@pytest.mark.parametrize("shape", [(64, 64), (32, 16, 3, 3)])
@pytest.mark.parametrize("zeros", ["rounded", "anywhere", "columns", "rows"])
def test_rows_that_share_a_choice_are_found_though_some_of_what_they_keep_is_zero(
    v: int, shape: tuple[int, ...], zeros: str
) -> None:
    """As 8 bits make of small weights, and calibration of inputs that are never used: such models are saved, loaded and lowered."""
    pattern, weight = Clustered(2, 4, v), normal(*shape)
    weight = pattern.mask(weight.abs()).apply(weight)
    if zeros == "rounded":
        weight = fake_quantised(weight)
    elif zeros == "anywhere":
        weight *= torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.05
    else:
        (weight if zeros == "rows" else weight.transpose(0, 1))[::3] = 0
    assert int(weight.count_nonzero()) < weight.numel() // 2
    pattern.verify(weight)
    order = pattern.order(weight)
    assert sorted(order.tolist()) == list(range(len(weight)))
    pattern.neighbours.verify(weight[order])


@pytest.mark.parametrize("text", ["2c:2:4", "4c:2:4", "8c:2:4", "4c:1:4", "4c:4:8"])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_of_few_inputs_rows_are_found_though_many_go_with_each_other_by_chance(
    text: str, share: float, tmp_path: Path
) -> None:
    """Such a weight is saved and loaded, and loses nothing where it is pruned again."""
    pattern, layer = parse(text), nn.Linear(16, 64)
    for seed in range(4):
        weight = normal(64, 16, seed=seed)
        mask = pattern.mask(weight.abs())
        rng = torch.Generator().manual_seed(seed)
        weight = mask.apply(weight) * (torch.rand(weight.shape, generator=rng) > share)
        pattern.verify(weight)
        assert torch.equal(pattern.mask(weight.abs()).apply(weight), weight)
    layer.weight.data = weight
    compressor.save(tmp_path / "model", layer, {"weight": mask})
    assert torch.equal(compressor.load(tmp_path / "model", nn.Linear(16, 64)).get_parameter("weight"), weight)


def test_rows_that_share_nothing_are_told_at_once() -> None:
    weight = NM(2, 4).mask(normal(64, 64).abs()).apply(normal(64, 64))
    weight[:, 5] = 0
    assert Clustered(2, 4, 2).violations(weight != 0) > 0 and sorted(Clustered(2, 4, 2).order(weight).tolist()) == [
        *range(64)
    ]


def test_rows_stay_together_from_step_to_step() -> None:
    pattern = Clustered(2, 4, 4)
    first = pattern.masks({"w": normal(32, 16).abs()})
    second = pattern.masks({"w": normal(32, 16, seed=1).abs()}, first)
    assert not torch.equal(first["w"].keep, second["w"].keep)
    order = pattern.order(first["w"].keep)
    pattern.neighbours.verify(second["w"].keep[order])
    other = pattern.masks({"w": normal(32, 16).abs()}, {"w": NM(2, 4).mask(normal(32, 16).abs())})
    assert torch.equal(other["w"].keep, first["w"].keep)


def test_rows_of_a_progressive_schedule_stay_together_once_they_have_met() -> None:
    pattern = Clustered(2, 4, 4)
    pruner = SparseDM(pattern, progressive=True)
    first = pruner.masks({"w": normal(32, 16)}, 0.99, {"w": NM(3, 4).mask(normal(32, 16))})
    second = pruner.masks({"w": normal(32, 16, seed=1)}, 1.0, first)
    assert not torch.equal(first["w"].keep, second["w"].keep)
    pattern.neighbours.verify(second["w"].keep[pattern.order(first["w"].keep)])


@pytest.mark.parametrize("v", [2, 4, 8])
def test_the_pattern_is_read_from_the_zeros(v: int) -> None:
    weight = normal(64, 32)
    assert pattern_of(Clustered(2, 4, v).mask(weight.abs()).apply(weight)) == Clustered(2, 4, v)


@pytest.mark.skipif(kernels()[0] is None, reason="the compiled kernels are not installed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [2, 4, 16])
def test_kernels_put_every_row_in_its_place(v: int, dtype: torch.dtype) -> None:
    pattern = Clustered(2, 4, v)

    def pruned(module: Any) -> Any:
        weight = module.weight.detach()
        module.weight = nn.Parameter(pattern.mask(weight.abs()).apply(weight).to(dtype), requires_grad=False)
        module.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        return module

    torch.manual_seed(0)
    tolerance = 2e-6 if dtype == torch.float32 else 6e-3
    pair = nn.Sequential(pruned(nn.Linear(24, 96)), nn.GELU(), pruned(nn.Linear(96, 32)))
    cases: list[tuple[Any, Tensor]] = [
        (pruned(nn.Linear(24, 96)), normal(3, 50, 24)),
        (pair, normal(3, 50, 24)),
        (pruned(nn.Conv2d(24, 96, 3, padding=1)), normal(2, 24, 8, 8)),
    ]
    for module, x in cases:
        count = 2 if module is pair else 1
        unit = Unit("layer", module, tuple(x.shape), dtype, torch.device("cpu"), (pattern,) * count)
        assert VNM().refusal(unit) is None
        out = VNM().build(unit)(x.to(dtype))
        wanted = module.double()(x.to(dtype).double())
        assert float((out - wanted).norm() / wanted.norm()) < tolerance


def test_a_clustered_model_is_saved_packed_and_lowered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    pattern = parse("4c:2:4")
    masks = {name: pattern.mask(w.detach().abs()) for name, w in model.named_parameters() if w.dim() == 2}
    with torch.no_grad():
        for name, mask in masks.items():
            weight = dict(model.named_parameters())[name]
            weight.copy_(mask.apply(weight))
    compressor.save(tmp_path / "saved", model, masks)
    again = compressor.load(tmp_path / "saved", model=nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    plan = compressor.lower(again, torch.zeros(4, 16), cache=False).plan
    assert {layer.patterns for layer in plan.layers} == {("4c:2:4",)}
    x = normal(5, 16)
    assert torch.allclose(compressor.lower(again, x, cache=False).model(x), again(x), atol=1e-5)
    assert torch.equal(F.linear(x, again[0].weight, again[0].bias), model[0](x))  # type: ignore[index]
