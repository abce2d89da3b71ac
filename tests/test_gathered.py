"""The gathered form against the masked dense layer: the same answers, in every shape, compiled and exported too."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor import NM, CompressorError, parse, registry
from compressor.lower.backend import Unit
from compressor.lower.gathered import Gathered, GatheredConv1x1, GatheredLinear

CPU = torch.device("cpu")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked(pattern: NM, *shape: int, seed: int = 0) -> Tensor:
    weight = torch.randn(shape, generator=rng(seed))
    return pattern.mask(weight.abs()).apply(weight)


def unit(module: nn.Module, shape: tuple[int, ...], *patterns: NM | None, dtype: torch.dtype = torch.float32) -> Unit:
    return Unit("layer", module.requires_grad_(False).to(dtype), shape, dtype, CPU, patterns)


def sparse(layer: nn.Module, pattern: NM) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(masked(pattern, *layer.weight.shape))
    return layer


def pair(pattern: NM, approximate: str = "none") -> nn.Sequential:
    return nn.Sequential(
        sparse(nn.Linear(32, 64), pattern), nn.GELU(approximate), sparse(nn.Linear(64, 32, bias=False), pattern)
    )


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 3),
    v=st.integers(1, 20),
    blocks=st.integers(1, 4),
    nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (4, 8), (2, 5), (3, 3)]),
    leading=st.lists(st.integers(0, 4), max_size=3),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_it_answers_as_the_masked_linear(groups, v, blocks, nm, leading, bias, seed):
    pattern = NM(*nm, v)
    weight = masked(pattern, groups * v, blocks * nm[1], seed=seed)
    offset = torch.randn(groups * v, generator=rng(seed + 1)) if bias else None
    x = torch.randn(*leading, weight.shape[1], generator=rng(seed + 2))
    out = GatheredLinear(weight, offset, pattern)(x)
    torch.testing.assert_close(out, F.linear(x, weight, offset), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 32, 5, 7), (32, 5, 7), (0, 32, 4, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_answers_as_the_masked_1x1_convolution(shape, bias):
    pattern = NM(2, 4, 16)
    weight = masked(pattern, 48, 32, 1, 1)
    offset = torch.randn(48, generator=rng(1)) if bias else None
    x = torch.randn(shape, generator=rng(2))
    out = GatheredConv1x1(weight, offset, pattern)(x)
    torch.testing.assert_close(out, F.conv2d(x, weight, offset), rtol=1e-5, atol=1e-5)


def test_a_kept_weight_that_is_zero_changes_nothing():
    pattern = NM(2, 4, 16)
    weight = masked(pattern, 32, 16)
    weight[:16, :8] = 0
    x = torch.randn(3, 16, generator=rng())
    torch.testing.assert_close(GatheredLinear(weight, None, pattern)(x), F.linear(x, weight))


def test_a_weight_that_breaks_the_pattern_is_refused():
    weight = masked(NM(2, 4, 16), 32, 16)
    with pytest.raises(CompressorError, match="not 32:2:4"):
        GatheredLinear(weight, None, NM(2, 4, 32))


def test_only_what_is_kept_is_multiplied():
    layer = GatheredLinear(masked(NM(1, 4, 16), 64, 32), None, NM(1, 4, 16))
    assert sum(value.numel() for name, value in layer.named_buffers() if name.endswith("values")) == 64 * 32 // 4


# --- As a backend. ---


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_pair_answers_as_its_two_layers(approximate):
    pattern = NM(2, 4, 16)
    dense = pair(pattern, approximate)
    built = Gathered().build(unit(dense, (3, 5, 32), pattern, pattern))
    x = torch.randn(3, 5, 32, generator=rng(3))
    torch.testing.assert_close(built(x), dense(x), rtol=1e-5, atol=1e-5)


def test_what_is_built_shares_nothing_with_the_layer():
    pattern = NM(2, 4, 16)
    layer = sparse(nn.Linear(16, 32), pattern)
    one = unit(layer, (3, 16), pattern)
    built = Gathered().build(one)
    x = torch.randn(3, 16, generator=rng())
    before = built(x)
    layer.weight.zero_()
    layer.bias.zero_()
    assert torch.equal(built(x), before)
    assert before.abs().sum() > 0
    torch.testing.assert_close(copy.deepcopy(built)(x), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_work(dtype):
    pattern = NM(2, 4, 16)
    layer = sparse(nn.Linear(16, 32), pattern)
    built = Gathered().build(unit(layer, (3, 16), pattern, dtype=dtype))
    x = torch.randn(3, 16, generator=rng()).to(dtype)
    # a sum of products is rounded in another order: by a few steps of the precision, of numbers of order one
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(built(x), layer(x), rtol=4 * eps, atol=4 * eps)


def conv(*arguments: int, **options: object) -> nn.Module:
    return nn.Conv2d(*arguments, **options)


@pytest.mark.parametrize(
    ("module", "pattern", "reason"),
    [
        (nn.Linear(16, 32), None, "obeys no N:M pattern"),
        (nn.Linear(16, 32), "2:4", "too few rows"),
        (nn.Linear(16, 32), "8:2:4", "too few rows"),
        (nn.Linear(16, 32), "16c:2:4", "not neighbours"),
        (conv(16, 32, 3), "16:2:4", r"kernel of \(3, 3\)"),
        (conv(64, 32, 1, groups=2), "16:2:4", "2 groups"),
        (conv(16, 32, 1, stride=2), "16:2:4", "stride"),
        (conv(16, 32, 1, padding=1), "16:2:4", "padding"),
    ],
)
def test_what_has_no_gathered_form_is_refused_with_the_reason(module, pattern, reason):
    one = unit(module, (2, 16), pattern and parse(pattern))
    assert Gathered().refusal(one)
    with pytest.raises(CompressorError, match=reason):
        Gathered().build(one)


def test_a_pair_is_refused_where_one_layer_is():
    good, poor = NM(2, 4, 16), NM(2, 4, 4)
    assert Gathered().refusal(unit(pair(good), (2, 32), good, good)) is None
    assert "too few rows" in Gathered().refusal(unit(pair(good), (2, 32), good, poor))


def test_it_is_registered_and_available_everywhere():
    backend = registry.backend("gathered")
    assert (backend.name, backend.skips_zeros) == ("gathered", True)
    assert backend.unavailable(CPU) is None
    assert backend.unavailable(torch.device("cuda")) is None


# --- Under torch's compilers. ---


@pytest.fixture
def layer() -> GatheredLinear:
    pattern = NM(2, 4, 16)
    return GatheredLinear(masked(pattern, 32, 16), torch.randn(32, generator=rng(1)), pattern).eval()


@pytest.mark.skipif(torch.__version__.startswith("2.10."), reason="torch 2.10 guards its size unless strict")
@pytest.mark.parametrize(
    "batch",
    [
        torch.export.Dim.DYNAMIC,
        pytest.param(
            torch.export.Dim("batch"),
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.11."), reason="torch 2.11 asks more of named dims"
            ),
        ),
    ],
)
def test_it_exports_with_a_dynamic_batch(layer, batch):
    program = torch.export.export(layer, (torch.zeros(2, 3, 16),), dynamic_shapes=({0: batch},))
    x = torch.randn(7, 3, 16, generator=rng())
    torch.testing.assert_close(program.module()(x), layer(x))


def test_it_compiles_without_a_break(layer):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(7, 3, 16, generator=rng())
    torch.testing.assert_close(compiled(x), layer(x))
