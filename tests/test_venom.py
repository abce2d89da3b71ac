"""VENOM's format, `venom:V:N:M`: masks against every choice there is, what tells it from ours, runs, files and plans."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compressor
from compressor import NM, CompressorError, FineTuning, Training, parse
from compressor.errors import UsageError
from compressor.export.onnx import _gathered_form
from compressor.lower import Unit
from compressor.lower.cusparselt import CuSparseLt
from compressor.lower.gathered import Gathered
from compressor.lower.units import pattern_of
from compressor.lower.vnm import VNM
from compressor.plugins.obs import prune_layer
from compressor.plugins.sparsedm import SparseDM
from compressor.runs.speed import _densities
from compressor.sparsity.venom import Venom


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def best(values: list[float], count: int) -> tuple[int, ...]:
    """Of all choices of `count` places, the first in lexicographic order among those with the largest sum."""
    choices = itertools.combinations(range(len(values)), count)
    return max(choices, key=lambda some: (math.fsum(values[i] for i in some), tuple(-i for i in some)))


def oracle(pattern: Venom, score: Tensor) -> Tensor:
    """Every choice of columns of every block is tried, and then every choice of each row among its four."""
    keep = torch.zeros(score.shape, dtype=torch.bool)
    kernel = list(itertools.product(*(range(size) for size in score.shape[2:])))
    for row, column in itertools.product(range(0, score.shape[0], pattern.block), range(0, score.shape[1], pattern.m)):
        rows = range(row, row + pattern.block)
        for at in kernel:
            sums = [math.fsum(float(score[(r, column + i, *at)]) for r in rows) for i in range(pattern.m)]
            four = best(sums, 4)
            for r in rows:
                for i in best([float(score[(r, column + i, *at)]) for i in four], pattern.n):
                    keep[(r, column + four[i], *at)] = True
    return keep


@st.composite
def cases(draw: st.DrawFn) -> tuple[Venom, Tensor]:
    """Few distinct whole numbers: many ties, and sums that are exact in any dtype."""
    m = draw(st.integers(4, 9))
    pattern = Venom(draw(st.integers(1, 4)), m, draw(st.sampled_from([1, 2, 4])))
    kernel = draw(st.sampled_from([(), (), (2,), (1, 2)]))
    shape = (pattern.block * draw(st.integers(1, 2)), m * draw(st.integers(1, 2)), *kernel)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    score = torch.randint(0, draw(st.sampled_from([2, 4, 50])), shape, generator=rng).float()
    return pattern, score.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_masks_equal_the_exhaustive_oracle(case: tuple[Venom, Tensor]) -> None:
    pattern, score = case
    mask = pattern.mask(score)
    assert torch.equal(mask.keep, oracle(pattern, score))
    mask.verify()
    NM(pattern.n, pattern.m).verify(mask.keep)
    assert int(mask.keep.sum()) * pattern.m == score.numel() * pattern.n


@pytest.mark.parametrize("text", ["venom:64:2:8", "venom:1:2:4", "venom:128:1:16", "venom:2:4:5"])
def test_its_string_parses_back(text: str) -> None:
    found = parse(text)
    assert isinstance(found, Venom) and str(found) == text
    assert found.density == found.n / found.m


@pytest.mark.parametrize(
    "text",
    ["venom:0:2:8", "venom:64:5:8", "venom:64:2:3", "venom:64:0:8", "venom:2:8", "venom:64:2:8:1", "venom:c:2:8"],
)
def test_what_it_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="pattern"):
        parse(text)


def test_weights_that_do_not_fit_are_told_why() -> None:
    pattern = Venom(2, 8, 64)
    assert pattern.misfit((64, 32)) is None and pattern.misfit((128, 8, 3, 3)) is None
    assert "dim 0 divisible by 64" in str(pattern.misfit((96, 32)))
    assert "dim 1 divisible by 8" in str(pattern.misfit((64, 36)))


def test_its_4_2_4_is_plain_2_4_and_ours_is_not() -> None:
    """What the literature calls 4:2:4 is another format than the one of that name here."""
    score = normal(16, 32).abs()
    theirs = parse("venom:4:2:4").mask(score).keep
    assert torch.equal(theirs, NM(2, 4).mask(score).keep)
    assert not torch.equal(theirs, parse("4:2:4").mask(score).keep)
    with pytest.raises(CompressorError, match="not 4:2:4"):
        parse("4:2:4").verify(theirs)


@pytest.mark.parametrize("value", [0.0, 1.0, math.inf, -math.inf])
def test_equal_scores_keep_the_first(value: float) -> None:
    keep = Venom(2, 8, 4).mask(torch.full((8, 16), value)).keep
    assert torch.equal(keep, (torch.arange(16) % 8 < 2).expand(8, 16))


def test_infinities_keep_exactly_n_in_four_columns() -> None:
    values = torch.tensor([-math.inf, 0.0, 1.0, math.inf])
    score = values[torch.randint(4, (64, 64), generator=torch.Generator().manual_seed(0))]
    mask = Venom(2, 8, 16).mask(score)
    mask.verify()
    assert mask.keep.unflatten(1, (-1, 8)).sum(2).eq(2).all()


def test_a_fifth_column_and_a_third_entry_are_found() -> None:
    pattern = Venom(2, 8, 4)
    keep = torch.zeros(4, 8, dtype=torch.bool)
    for row, columns in enumerate([(0, 1), (2, 3), (0, 3), (1, 2)]):
        keep[row, list(columns)] = True
    pattern.verify(keep)
    fifth, third = keep.clone(), keep.clone()
    fifth[0, 1], fifth[0, 7] = False, True  # each row has two still, and column 1 that of the last row
    third[0, 2] = True
    for wrong in (fifth, third):
        with pytest.raises(CompressorError, match="not venom:4:2:8: 1 group"):
            pattern.verify(wrong)


def test_the_best_columns_are_taken_for_the_block_and_not_for_a_row() -> None:
    score = torch.ones(2, 8)
    score[:, 4:] = 2.0
    score[0, 0] = 2.5  # the best of its row, and not of the block
    assert Venom(1, 8, 2).mask(score).keep.nonzero().tolist() == [[0, 4], [1, 4]]
    score[0, 0] = 9.0
    assert Venom(1, 8, 2).mask(score).keep.nonzero().tolist() == [[0, 0], [1, 4]]


# --- What it goes through. ---


def test_training_keeps_it_after_every_step_and_it_loads_again(model, adapter, samples, tmp_path) -> None:
    pruner = SparseDM(parse("venom:8:2:8"))
    run = FineTuning(model, pruner, adapter=adapter, data=samples, training=Training(steps=4, batch_size=8, lr=0.05))
    for _ in compressor.steps(run):
        for name in run.shadow.masks:
            pruner.pattern.verify(run.student.get_parameter(name).detach())
    result = run.finish()
    assert len(result.masks) == 2
    compressor.save(tmp_path / "saved", result.model, result.masks)
    again = compressor.load(tmp_path / "saved", model=model)
    for name, weight in result.model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert set(config["patterns"].values()) == {"venom:8:2:8"} and len(config["packed"]) == 2
    moved = run.state()["shadow"]["masks"]
    assert {one["pattern"] for one in moved.values()} == {"venom:8:2:8"}


def test_obs_chooses_it_on_the_updated_weights() -> None:
    """Its error on the inputs that it saw is 0.78 of the same pattern by magnitude; chosen on the first weights it would be 0.90."""
    inputs, weight, pattern = normal(400, 32) @ normal(32, 32, seed=1), normal(16, 32, seed=2), Venom(2, 8, 8)
    updated, mask = prune_layer(weight, (inputs.T @ inputs).double(), pattern, 0.01)
    mask.verify()
    pattern.verify(updated)
    plain = pattern.mask(weight.abs()).apply(weight)
    error = [float((inputs @ (weight - other).T).square().sum()) for other in (updated, plain)]
    assert error[0] < 0.85 * error[1]


def pruned(layer: Any, pattern: Venom) -> Any:
    with torch.no_grad():
        layer.weight.copy_(pattern.mask(layer.weight.abs()).apply(layer.weight))
    return layer.requires_grad_(False)


@pytest.mark.parametrize("text", ["venom:64:2:8", "venom:16:2:16", "venom:8:1:8"])
def test_it_is_read_from_the_zeros(text: str) -> None:
    pattern: Any = parse(text)
    assert pattern_of(pattern.mask(normal(64, 64).abs()).apply(normal(64, 64))) == pattern
    plain = NM(pattern.n, pattern.m)
    assert pattern_of(plain.mask(normal(64, 64).abs()).apply(normal(64, 64))) == plain


def test_no_kernel_of_a_cpu_takes_it_and_the_plan_says_why() -> None:
    torch.manual_seed(0)
    pattern = Venom(2, 8, 16)
    layer = pruned(nn.Linear(32, 32), pattern)
    unit = Unit("layer", layer, (4, 32), torch.float32, torch.device("cpu"), (pattern,))
    for backend in (VNM(), Gathered()):
        assert "no kernel here gains from that, so it stays dense" in str(backend.refusal(unit))
    lowered = compressor.lower(nn.Sequential(layer), normal(4, 32), cache=False)
    (found,) = lowered.plan.layers
    assert found.patterns == ("venom:16:2:8",) and not found.skips_zeros
    assert "venom:16:2:8" in found.candidate("vnm").refused
    x = normal(5, 32, seed=3)
    assert torch.allclose(lowered.model(x), layer(x), atol=1e-5)


def test_sparse_tensor_cores_take_its_rows_as_2_4() -> None:
    """Two of eight are two of four at most: half of its zeros are skipped."""
    for pattern, taken in ((Venom(2, 8, 16), True), (Venom(3, 8, 16), False)):
        layer = pruned(nn.Linear(32, 32), pattern)
        unit = Unit("layer", layer.bfloat16(), (16, 32), torch.bfloat16, torch.device("cuda"), (pattern,))
        reason = CuSparseLt().refusal(unit)
        assert (reason is None) == taken, reason


def test_the_gathered_form_of_an_export_leaves_it(adapter) -> None:
    pattern = Venom(2, 8, 16)
    model = nn.Sequential(pruned(nn.Linear(16, 16), pattern))
    form = _gathered_form(model, adapter, torch.zeros(2, 16), {"0.weight": pattern})
    assert not form.gathered and "venom:16:2:8" in form.left["0.weight"]


@pytest.mark.slow
def test_a_run_reports_it(cli, tmp_path: Path) -> None:
    out = tmp_path / "run"
    outcome = cli.run(out, "--pattern", "venom:16:2:8", "--set", "evaluate.metric=fd-digits")
    assert outcome.code == 0, outcome.err
    report = json.loads((out / "report.json").read_text())
    assert report["pattern"] == "venom:16:2:8"
    assert report["rows"][-1]["density"] == 0.25
    assert "venom:16:2:8" in (out / "report.md").read_text()
    outcome = cli("lower", out)
    assert outcome.code == 0, outcome.err
    assert "venom:16:2:8" in (out / "lowering.json").read_text()


@pytest.mark.parametrize(
    ("backend", "text", "left"),
    [
        ("cusparselt", "venom:16:2:8", 0.5),
        ("cusparselt-fp8", "1:4", 0.5),
        ("cusparselt", "2:4", 0.5),
        ("vnm", "4:1:4", 0.25),
    ],
)
def test_only_what_a_kernel_leaves_out_counts_as_left_out(backend, text, left) -> None:
    """Sparse tensor cores multiply two of four, whatever else is zero."""
    layer = SimpleNamespace(weights=("w",), patterns=(text,), choice=backend, skips_zeros=True)
    plan: Any = SimpleNamespace(layers=(layer,), left_out={}, lowered=True)
    assert _densities(plan) == {"w": left}
    plan.layers = (layer, SimpleNamespace(weights=("w",), patterns=(text,), choice="eager", skips_zeros=False))
    assert _densities(plan) == {"w": 1.0}  # two layers of one weight, of which one stays dense
    plan.layers, plan.left_out = (layer,), {"w": "its weight is no plain parameter of a plain layer"}
    assert _densities(plan) == {"w": 1.0}
    plan.left_out, plan.lowered = {}, False
    assert _densities(plan) == {"w": 1.0}
