"""The 8-bit CPU kernels against whole-number arithmetic in plain torch, bit for bit, at every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import compressor
from compressor import CompressorError
from compressor.lower import Unit
from compressor.lower.vnm import VNM, VNMConv, VNMInt8, VNMLinear, VNMPair, kernels
from compressor.lower.vnm_weight import LARGEST_INNER, KernelWeight, Lanes
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.pattern import NM

extension: Any = kernels()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the compiled kernels are not installed")
LEVELS = extension.levels() if extension is not None else []
HIDDEN = 1024  # hidden channels of a pair that have a scale of their own, as the kernels' documentation has it


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sparse(out: int, inner: int, pattern: NM | Clustered, seed: int = 0) -> Tensor:
    weight = normal(out, inner, seed=seed) * torch.logspace(-2, 1, out)[:, None]
    return pattern.mask(weight.abs()).apply(weight)


def int8(weight: Tensor, bias: Tensor | None, pattern: NM | Clustered, **options: Any) -> KernelWeight:
    return KernelWeight(weight, bias, pattern, lanes=Lanes.CODES, **{"block": 32, **options})


def unit(module: nn.Module, *patterns: NM | Clustered | None, dtype: torch.dtype = torch.float32) -> Unit:
    first = next(m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    shape = (3, first.weight.shape[1], *[6] * (first.weight.dim() - 2))
    return Unit("layer", module.to(dtype).requires_grad_(False), shape, dtype, torch.device("cpu"), patterns)


def dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)
    return layer


# --- The reference. Divisions are of two tensors: torch multiplies by a reciprocal where one side is a number. ---


def codes_of(rows: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Whole numbers and float32 scales (rows, 1): rows * (largest / most), to nearest even; most / largest."""
    most = rows.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    full = torch.full_like(most, largest)
    return (rows * (full / most)).round().to(torch.int64), most / full


def codes_of_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / torch.full((len(weight), 1), 127.0)
    return (weight / scale).round().to(torch.int64), scale.flatten()


def largest_of(codes: Tensor, asked: int = 32_767) -> int:
    return min(asked, (2**31 - 1) // max(1, int(codes.abs().sum(1).max())))


def product(rows: Tensor, codes: Tensor, scale: Tensor, largest: int) -> Tensor:
    """(sum * scale of the row of the weight) * scale of the token, each rounded to float32; sums are exact."""
    inputs, scales = codes_of(rows, largest)
    sums = inputs @ codes.t()
    assert int(sums.abs().max()) < 2**31
    return sums.to(torch.int32).float() * scale * scales


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, asked: int = 32_767) -> Tensor:
    codes, scale = codes_of_weight(weight.float())
    out = product(x.float(), codes, scale, largest_of(codes, asked))
    return (out if bias is None else out + bias.float()).to(x.dtype)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, asked: int = 32_767, stride: int = 1, padding: int | None = None
) -> Tensor:
    """An image has one scale, a row of the weight one over its channels and kernel positions."""
    codes, scale = codes_of_weight(weight.float().flatten(1))
    inputs, scales = codes_of(x.float().flatten(1), largest_of(codes, asked))
    wide, kernel = inputs.view(x.shape).double(), codes.view(weight.shape).double()
    padding = weight.shape[-1] // 2 if padding is None else padding
    sums = nn.functional.conv2d(wide, kernel, stride=stride, padding=padding).round()  # exact: far below 2^53
    assert float(sums.abs().max()) < 2**31
    out = sums.float() * scale[:, None, None] * scales[:, :, None, None]
    return (out if bias is None else out + bias.float()[:, None, None]).to(x.dtype)


@st.composite
def places(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """The side of a kernel, its stride and padding, and the height and width of images; as often as not they keep their size."""
    side = draw(st.sampled_from([1, 2, 3, 4, 5, 7]))
    stride, padding = (
        (1, side // 2) if draw(st.booleans()) else (draw(st.integers(1, side)), draw(st.integers(0, side - 1)))
    )
    least = max(1, side - 2 * padding)
    return side, stride, padding, draw(st.integers(least, 14)), draw(st.integers(least, 30))


TERMS = {
    "none": (3.97870267e-01, -6.45544128e-02, 8.76369110e-03, -8.12187477e-04, 4.77638856e-05, -1.58882703e-06, 2.25882055e-08),
    "tanh": (3.97713521e-01, -6.45966926e-02, 8.81870862e-03, -8.24474314e-04, 4.89344990e-05, -1.64072224e-06, 2.34688270e-08),
}  # fmt: skip
"""Of x, x^3, ...: an odd polynomial, plus a half, in the place of the normal distribution's function."""


def gelu(x: Tensor, approximate: str) -> Tensor:
    """What takes GELU's place between two layers of whole numbers, with the kernels' own roundings."""
    x, terms = x.clamp_min(-4), TERMS[approximate]
    near = x.clamp_max(4)
    squared, found = near * near, torch.full_like(x, terms[6])
    for term in terms[5::-1]:
        found = found * squared + term
    return x * (found * near + 0.5)


def pair(x: Tensor, first: nn.Linear, second: nn.Linear, approximate: str, chunk: int) -> Tensor:
    hidden = gelu(linear(x.float(), first.weight, first.bias), approximate)
    codes, scale = codes_of_weight(second.weight.float())
    largest = largest_of(codes)
    out = None
    for start in range(0, hidden.shape[-1], chunk):
        some = slice(start, start + chunk)
        part = product(hidden[..., some], codes[:, some], scale, largest)
        if out is None:
            out = part if second.bias is None else part + second.bias.float()
        else:
            out = out + part
    assert out is not None
    return out.to(x.dtype)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_what_takes_the_place_of_gelu_is_as_near_as_it_says(approximate: str) -> None:
    x = torch.linspace(-30, 30, 400_001)
    right = nn.functional.gelu(x.double(), approximate=approximate)
    assert 1e-4 < float((gelu(x, approximate) - right).abs().max()) < 2.2e-4
    assert float(gelu(torch.tensor([-1e9]), approximate).abs()) < 2e-6
    assert float(gelu(torch.tensor([1e9]), approximate)) == pytest.approx(1e9, rel=4e-7)


# --- Exactness. ---


def exact(
    make: Callable[[], nn.Module],
    x: Tensor,
    wanted: Tensor,
    levels: Sequence[str] = (),
    counts: Sequence[int] = (1, 2, 3),
) -> None:
    """What `make` makes gives `wanted` bit for bit: at each of `levels`, or at the one that is set, and on so many threads."""
    before, threads = extension.level(), torch.get_num_threads()
    try:
        for one in levels or [before]:
            extension.set_level(one)
            lowered = make()
            for count in counts:
                torch.set_num_threads(count)
                assert torch.equal(lowered(x), wanted), (one, count)
    finally:
        extension.set_level(before)
        torch.set_num_threads(threads)


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_linear_is_the_whole_number_reference_bit_for_bit(data: st.DataObject) -> None:
    pattern = NM(2, data.draw(st.sampled_from([4, 2])), data.draw(st.sampled_from([1, 2, 4, 8])))  # 2:2 is dense
    out, inner = pattern.v * data.draw(st.integers(1, 20)), 4 * data.draw(st.integers(1, 40))
    tokens, asked = data.draw(st.integers(1, 70)), data.draw(st.sampled_from([127, 1000, 32_767]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    options = {"block": 8 * data.draw(st.integers(1, 8)), "tile": data.draw(st.integers(1, 10)), "largest": asked}
    weight, bias = sparse(out, inner, pattern), normal(out) if data.draw(st.booleans()) else None
    x = (normal(tokens, inner, seed=data.draw(st.integers(0, 99))) * torch.logspace(-3, 3, tokens)[:, None]).to(dtype)
    wanted = linear(x, weight, bias, asked)
    exact(lambda: VNMLinear(int8(weight, bias, pattern, **options)), x, wanted, LEVELS)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [(4, 4), (2, 2), (2, 4)])
@pytest.mark.parametrize(
    ("v", "inner", "hidden", "out", "tokens"),
    [(4, 32, 384, 48, 41), (2, 20, 136, 24, 7), (8, 64, 1160, 40, 100), (1, 8, 1024, 9, 3)],
)
def test_a_pair_is_the_whole_number_reference_bit_for_bit(
    level: str,
    approximate: str,
    dtype: torch.dtype,
    groups: tuple[int, int],
    v: int,
    inner: int,
    hidden: int,
    out: int,
    tokens: int,
) -> None:
    one, two = (NM(2, group, v) for group in groups)
    layers = [dense(sparse(hidden, inner, one), normal(hidden)), dense(sparse(out, hidden, two), normal(out))]
    weights = [
        int8(layer.weight.detach(), layer.bias, rule, block=96) for layer, rule in zip(layers, (one, two), strict=True)
    ]
    lowered = VNMPair(*weights, approximate == "tanh").requires_grad_(False)
    x = (2 * normal(2, tokens, inner)).to(dtype)
    with torch.no_grad():
        wanted = pair(x, *layers, approximate, HIDDEN // 96 * 96)
    exact(lambda: lowered, x, wanted)


@pytest.mark.parametrize("pattern", [NM(2, 4, 2), NM(2, 4, 4), NM(2, 4, 8), Clustered(2, 4, 4)])
def test_what_the_backend_builds_is_exact_too(level: str, pattern: NM | Clustered) -> None:
    layer = dense(sparse(72, 640, pattern), normal(72))
    lowered, x = VNMInt8().build(unit(layer, pattern)), normal(2, 19, 640)
    assert torch.equal(lowered(x), linear(x, layer.weight, layer.bias))
    block = nn.Sequential(dense(sparse(96, 64, pattern), None), nn.GELU(), dense(sparse(40, 96, pattern), normal(40)))
    lowered, x = VNMInt8().build(unit(block, pattern, pattern)), normal(33, 64)
    assert isinstance(lowered, VNMPair) == isinstance(pattern, NM)
    if isinstance(pattern, NM):
        assert torch.equal(lowered(x), pair(x, block[0], block[2], "none", HIDDEN))
    assert float((lowered(x).double() - block.double()(x.double())).norm() / block(x.double()).norm()) < 1e-2


def test_the_largest_sums_that_there_can_be_are_exact(level: str) -> None:
    """Codes of inputs are as large as 32-bit sums allow, and no larger."""
    weight = NM(2, 4, 4).mask(torch.ones(8, 8192)).apply(torch.ones(8, 8192))
    weight[4:] *= -1
    lowered, x = int8(weight, None, NM(2, 4, 4), block=256), torch.tensor([[1.0], [-3.0]]).expand(2, 8192)
    assert lowered.layout.largest == (2**31 - 1) // (4096 * 127)
    out = VNMLinear(lowered)(x)
    assert torch.equal(out, linear(x, weight, None))
    torch.testing.assert_close(out, x[:, :1] * torch.tensor([4096.0] * 4 + [-4096.0] * 4))


def test_halves_are_rounded_to_even(level: str) -> None:
    eye = torch.zeros(8, 8)
    eye[:4, 1], eye[4:, 5] = 1.0, 1.0  # each result is one input
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.499, 126.5])[:, None].expand(7, 8).clone()
    x[:, 0] = 127.0  # the scale is one
    lowered = VNMLinear(int8(eye, None, NM(2, 4, 4), largest=127))
    torch.testing.assert_close(lowered(x), torch.tensor([0.0, 2, 2, 0, -2, 3, 126])[:, None].expand(7, 8))


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-31, 3e38])
def test_inputs_of_any_size_are_exact(level: str, size: float) -> None:
    pattern = NM(2, 4, 4)
    weight, bias, x = sparse(16, 32, pattern) * 1e-2, normal(16), normal(9, 32).clamp(-1, 1)
    x[4] *= size
    out = VNMLinear(int8(weight, bias, pattern))(x)
    assert bool(out.isfinite().all()) and torch.equal(out, linear(x, weight, bias))
    assert size > 1e-30 or torch.equal(out[4], bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_is_nan_and_no_other(level: str, dtype: torch.dtype, bad: float) -> None:
    pattern = NM(2, 4, 4)
    x = normal(20, 36).to(dtype)
    one = VNMLinear(int8(sparse(24, 36, pattern), normal(24), pattern))
    two = VNMPair(int8(sparse(24, 36, pattern), None, pattern), int8(sparse(8, 24, pattern), normal(8), pattern), False)
    for lowered in (one, two):
        whole = lowered(x)
        spoilt = x.clone()
        spoilt[5, 35] = bad
        out = lowered(spoilt)
        assert bool(out[5].isnan().all())
        out[5] = whole[5]
        assert torch.equal(out, whole)


def test_nothing_is_read_outside(level: str) -> None:
    pattern = NM(2, 4, 4)
    weight = sparse(20, 12, pattern)
    around = torch.full((64, 12), torch.nan)
    around[20:51] = normal(31, 12)
    out = VNMLinear(int8(weight, None, pattern, block=8))(around[20:51])
    assert torch.equal(out, linear(around[20:51], weight, None))


def test_what_8_bits_cost_is_the_rounding_of_weights() -> None:
    """Inputs have 16 bits here, of which 8 would show."""
    pattern = NM(2, 4, 4)
    weight, x = pattern.mask(normal(64, 256).abs()).apply(normal(64, 256)), normal(200, 256)
    wanted = x.double() @ weight.double().t()

    def error(largest: int) -> float:
        out = VNMLinear(int8(weight, None, pattern, largest=largest))(x)
        return float((out.double() - wanted).norm() / wanted.norm())

    codes, scale = codes_of_weight(weight)
    of_weights = float((x.double() @ (codes * scale[:, None]).double().t() - wanted).norm() / wanted.norm())
    assert abs(error(32_767) - of_weights) < 0.01 * of_weights
    assert error(127) > 1.2 * of_weights


# --- The backend. ---


@pytest.mark.parametrize(
    ("module", "patterns", "reason"),
    [
        (lambda: nn.Conv2d(8, 8, 3, stride=4, padding=1), [NM(2, 4, 4)], "stride"),
        (lambda: nn.Linear(8, 8), [NM(4, 8, 4)], "two of four"),
        (lambda: nn.Linear(8, 8), [NM(1, 4, 4)], "two of four"),
        (lambda: nn.Linear(8, 8), [NM(2, 4)], "shares no choice"),
        (lambda: nn.Linear(8, 8), [None], "obeys no N:M pattern"),
        (lambda: nn.Linear(LARGEST_INNER + 4, 4), [NM(2, 4, 4)], "could leave 32 bits"),
    ],
)
def test_what_it_does_not_take_is_refused(module: Callable[[], nn.Module], patterns: list[Any], reason: str) -> None:
    assert reason in str(VNMInt8().refusal(unit(module(), *patterns)))


def test_as_many_channels_as_32_bits_hold_are_taken() -> None:
    layer = nn.Linear(LARGEST_INNER, 4, bias=False)
    layer.weight.data = NM(2, 4, 4).mask(torch.ones(4, LARGEST_INNER)).apply(torch.ones(4, LARGEST_INNER))
    assert VNMInt8().refusal(unit(layer, NM(2, 4, 4))) is None
    assert VNMInt8().build(unit(layer, NM(2, 4, 4))).packed.layout.largest == 127
    with pytest.raises(CompressorError, match="do not fit 32 bits"):
        int8(torch.ones(4, LARGEST_INNER), None, NM(4, 4, 4))


def test_it_is_tried_only_where_a_tolerance_is_given() -> None:
    layer, x = dense(sparse(64, 64, NM(2, 4, 4)), None), normal(40, 64)
    assert compressor.lower(layer, x).plan.layers[0].candidate("vnm-int8") is None
    found = compressor.lower(layer, x, tolerance=0.05).plan.layers[0].candidate("vnm-int8")
    assert found is not None and found.refused is None and found.median_ms is not None
    assert found.error is not None and 1e-4 < found.error < 0.05
    tight = compressor.lower(layer, x, tolerance=1e-4).plan.layers[0].candidate("vnm-int8")
    assert tight is not None and "above 1e-04" in str(tight.refused)


def test_layers_that_are_alike_have_their_own_errors() -> None:
    layers = [dense(sparse(64, 64, NM(2, 4, 4), seed=seed), None) for seed in range(6)]
    with torch.no_grad():
        layers[5].weight[:, :2] *= 300  # next to which 8 bits leave little of the others
    plan = compressor.lower(nn.Sequential(*layers), normal(9, 64), tolerance=0.0065, cache=False).plan
    found = [layer.candidate("vnm-int8") for layer in plan.layers]
    assert [one.refused is None for one in found] == [True] * 5 + [False]
    assert all(one.error < 0.0065 < found[5].error for one in found[:5]) and found[5].median_ms is None


def test_a_weight_lowered_otherwise_is_refused() -> None:
    pattern = NM(2, 4, 4)
    layer = dense(sparse(16, 64, pattern), None)
    whole, floats = VNMInt8().build(unit(layer, pattern)), VNM().build(unit(layer, pattern))
    with pytest.raises((CompressorError, RuntimeError)):
        whole.load_state_dict(floats.state_dict())
    whole.load_state_dict(whole.state_dict())
    with pytest.raises(CompressorError, match="was cast"):
        whole.bfloat16()(normal(3, 64))


def test_operators_refuse_what_would_lead_outside() -> None:
    w = int8(sparse(16, 8, NM(2, 4, 4)), None, NM(2, 4, 4))
    values, index, bias, order, scale, total, numbers = w.arguments
    x = normal(3, 8)
    for wrong in (None, scale[:-1]):
        with pytest.raises((CompressorError, ValueError)):
            torch.ops.compressor.vnm_linear(x, values, index, bias, order, wrong, total, numbers, 3)
    for place, value in ((8, 3), (8, -1), (9, 0), (9, 32_768), (6, 2), (7, 4), (5, 2), (7, 1)):
        changed = [*numbers[:place], value, *numbers[place + 1 :]]
        with pytest.raises((CompressorError, ValueError)):
            torch.ops.compressor.vnm_linear(x, values, index, bias, order, scale, total, changed, 3)
    floats = KernelWeight(sparse(16, 8, NM(2, 4, 4)), None, NM(2, 4, 4), block=8)
    other = int8(sparse(8, 16, NM(2, 4, 4)), None, NM(2, 4, 4))
    with pytest.raises(ValueError, match="no such job"):
        torch.ops.compressor.vnm_pair(x, *floats.arguments, *other.arguments, False, 3)
    narrow = int8(sparse(8, 8, NM(2, 4, 4)), None, NM(2, 4, 4))
    for first, second in ((w, narrow), (int8(sparse(16, 8, Clustered(2, 4, 4)), None, Clustered(2, 4, 4)), other)):
        with pytest.raises(ValueError, match="in their order"):
            torch.ops.compressor.vnm_pair(x, *first.arguments, *second.arguments, False, 3)


def test_operators_work_under_compile_and_export() -> None:
    pattern = NM(2, 4, 4)
    block = nn.Sequential(dense(sparse(32, 16, pattern), None), nn.GELU(), dense(sparse(16, 32, pattern), normal(16)))
    model, x = nn.Sequential(VNMInt8().build(unit(block, pattern, pattern)), nn.SiLU()), normal(6, 16)
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        assert torch.equal(exported.module()(normal(9, 16)), model(normal(9, 16)))
    a, b = model[0].first, model[0].second
    torch.library.opcheck(torch.ops.compressor.vnm_pair, (x, *a.arguments, *b.arguments, False, 3))
    torch.library.opcheck(torch.ops.compressor.vnm_linear, (x, *a.arguments, 3))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("v", "shape", "out", "side"),
    [
        (4, (3, 16, 5, 7), 24, 3),
        (8, (2, 8, 32, 32), 16, 3),
        (2, (5, 12, 4, 4), 8, 3),
        (4, (1, 20, 9, 9), 12, 1),
        (1, (4, 4, 3, 11), 4, 5),
    ],
)
def test_a_convolution_is_exact(
    level: str, threads: int, dtype: torch.dtype, v: int, shape: tuple[int, ...], out: int, side: int
) -> None:
    pattern = NM(2, 4, v)
    weight = normal(out, shape[1], side, side) * torch.logspace(-2, 1, out)[:, None, None, None]
    weight = pattern.mask(weight.abs()).apply(weight)
    bias = normal(out, seed=3)
    x = (normal(*shape, seed=5) * torch.logspace(-3, 2, shape[0])[:, None, None, None]).to(dtype)
    packed = KernelWeight(weight, bias, pattern, lanes=Lanes.CODES, block=8, tile=5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = VNMConv(packed, side)(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, convolution(x, weight, bias))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_convolutions_of_every_size_are_exact(data: st.DataObject) -> None:
    v = data.draw(st.sampled_from([1, 2, 4, 8]))
    pattern = data.draw(st.sampled_from([NM(2, 4, v), NM(2, 2, v), *([Clustered(2, 4, v)] if v > 1 else [])]))
    side, stride, padding, height, width = data.draw(places())
    rows, channels = v * data.draw(st.integers(1, 6)), 4 * data.draw(st.integers(1, 8))
    shape = (data.draw(st.integers(1, 5)), channels, height, width)
    weight = normal(rows, channels, side, side, seed=data.draw(st.integers(0, 9)))
    weight = pattern.mask(weight.abs()).apply(weight)
    bias = normal(rows, seed=3) if data.draw(st.booleans()) else None
    largest, block = data.draw(st.sampled_from([127, 32_767])), 4 * data.draw(st.integers(1, 9))
    packed = KernelWeight(
        weight, bias, pattern, lanes=Lanes.CODES, block=block, largest=largest, tile=data.draw(st.integers(1, 20))
    )
    x = normal(*shape, seed=7)
    wanted, module = convolution(x, weight, bias, largest, stride, padding), VNMConv(packed, side, stride, padding)
    exact(lambda: module, x, wanted, LEVELS, (1, 2))


def test_an_image_that_is_not_finite_is_not_a_number_and_no_other_is(level: str) -> None:
    weight = NM(2, 4, 4).mask(torch.ones(8, 8, 3, 3)).apply(normal(8, 8, 3, 3))
    packed = KernelWeight(weight, None, NM(2, 4, 4), lanes=Lanes.CODES, block=8)
    x = normal(3, 8, 6, 6)
    x[1, 2, 3, 4] = torch.inf
    out = VNMConv(packed, 3)(x)
    assert bool(out[1].isnan().all()) and bool(out[[0, 2]].isfinite().all())
    x[1, 2, 3, 4] = torch.nan
    assert torch.equal(VNMConv(packed, 3)(x).isnan(), out.isnan())


def test_a_convolution_is_built_in_8_bits_and_is_near(level: str) -> None:
    layer = nn.Conv2d(16, 24, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(NM(2, 4, 4).mask(layer.weight.abs()).apply(layer.weight))
    one = unit(layer, NM(2, 4, 4))
    assert VNMInt8().refusal(one) is None
    x = normal(2, 16, 6, 6)
    with torch.no_grad():
        out, wanted = VNMInt8().build(one)(x), layer(x)
    assert 1e-4 < float((out - wanted).norm() / wanted.norm()) < 0.02


def test_magnitudes_of_a_convolution_are_for_a_compiler_to_see() -> None:
    """It takes them as it makes the input; the operator has to be given them."""
    pattern = NM(2, 4, 4)
    packed = int8(sparse(8, 4, pattern).unsqueeze(-1).unsqueeze(-1), None, pattern)
    module, x = VNMConv(packed, 1), normal(2, 4, 5, 5)
    torch.compiler.reset()
    compiled: Any = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for given in (x, x.to(memory_format=torch.channels_last), x[:, :, 1:, 1:], x[:0]):
            assert torch.equal(compiled(given), module(given.contiguous()))
        assert torch.equal(module(x[0]), module(x[:1])[0])
        with pytest.raises(CompressorError, match="a lowered layer got"):
            module(x[0, 0])
        for largest in (None, torch.ones(3), torch.ones(2, dtype=torch.float64)):
            with pytest.raises(CompressorError, match="largest magnitude of each image"):
                torch.ops.compressor.vnm_conv(x, *packed.arguments, largest, 1, 1, 0, packed.tile)
    torch.compiler.reset()
