"""The CPU kernels of bytes (7-bit weights, 8-bit inputs) against whole-number arithmetic in plain torch, bit for bit, at every
instruction set of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels_int8 import HIDDEN, LEVELS, dense, exact, extension, gelu, normal, places, sparse, unit
from torch import Tensor, nn

import compressor
from compressor import CompressorError
from compressor.lower.vnm import VNM, VNMW7A8, VNMW8A8, VNMConv, VNMLinear, VNMPair
from compressor.lower.vnm_dense import VNMDenseW7A8, VNMDenseW8A8
from compressor.lower.vnm_kernels import level as level_here
from compressor.lower.vnm_weight import LARGEST_INNER, KernelWeight, Lanes
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.pattern import NM

pytestmark = pytest.mark.skipif(extension is None, reason="the compiled kernels are not installed")


VNNI = [name for name in LEVELS if name in ("avx512_bf16", "avx512_vnni", "avx_vnni")]
"""The levels that sum products of bytes in 32 bits."""
BITS = (16, *([32] if VNNI else []))


def packed(weight: Tensor, bias: Tensor | None, pattern: NM | Clustered, **options: Any) -> KernelWeight:
    return KernelWeight(weight, bias, pattern, lanes=Lanes.BYTES, **{"block": 64, **options})


# --- The reference. ---


def codes_of_weight(weight: Tensor, block: int, bits: int = 16, group: int = 4) -> tuple[Tensor, Tensor]:
    """Whole numbers (rows, in, *kernel) and float32 scales (rows): pairs of one sign up to 127, and sums of every other pair of eight
    up to 251, before rounding. Pairs are what is kept of a `group` of channels that follow each other: of four, or, in a dense weight,
    both of two. Of 32 bits: up to 127."""
    shape = (-1, *[1] * (weight.dim() - 1))
    if bits == 32:
        scale = (weight.double().flatten(1).abs().amax(1) / 127).float().clamp_min(1e-30)
        return (weight.float() / scale.view(shape)).round().to(torch.int64), scale
    grouped = weight.double().reshape(len(weight), -1, group, weight[0, 0].numel())  # (rows, groups, 4, taps)
    most = torch.zeros(len(weight), dtype=torch.float64)
    for part in grouped.split(block // group, 1):
        one_sign = torch.maximum(part.clamp_min(0).sum(2), (-part).clamp_min(0).sum(2))
        most = torch.maximum(most, one_sign.amax((1, 2)) / 127)
        for start in range(0, part.shape[1], 8):
            for parity in (0, 1):
                every_other = part[:, start : start + 8][:, parity::2]
                if every_other.numel():
                    most = torch.maximum(most, every_other.abs().sum((1, 2)).amax(1) / 251)
    scale = most.float().clamp_min(1e-30)
    return (weight.float() / scale.view(shape)).round().to(torch.int64), scale


def codes_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers less their zero (rows, in), and float32 scales (rows, 1), of 254 steps from the lowest to the highest, or zero."""
    low, high = rows.amin(-1, keepdim=True).clamp_max(0), rows.amax(-1, keepdim=True).clamp_min(0)
    steps = torch.full_like(low, 254.0)
    scale = (high / steps - low / steps).clamp_min(1e-32)
    inverse = torch.ones_like(scale) / scale
    zero = (-low * inverse).round()
    codes = (rows * inverse).round() + zero
    assert float(codes.min()) >= 0 and float(codes.max()) <= 255
    return (codes - zero).to(torch.int64), scale


def product(rows: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    inputs, scales = codes_of(rows)
    return (inputs @ codes.t()).to(torch.int32).float() * scale * scales


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, block: int, bits: int = 16, group: int = 4) -> Tensor:
    out = product(x.float(), *codes_of_weight(weight, block, bits, group))
    return (out if bias is None else out + bias.float()).to(x.dtype)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: int,
    bits: int = 16,
    stride: int = 1,
    padding: int | None = None,
    group: int = 4,
) -> Tensor:
    codes, scale = codes_of_weight(weight, block, bits, group)
    inputs, scales = codes_of(x.float().flatten(1))
    padding = weight.shape[-1] // 2 if padding is None else padding
    sums = F.conv2d(inputs.view(x.shape).double(), codes.double(), stride=stride, padding=padding).round()
    out = sums.float() * scale[:, None, None] * scales[:, :, None, None]
    return (out if bias is None else out + bias.float()[:, None, None]).to(x.dtype)


def pair(
    x: Tensor,
    first: nn.Linear,
    second: nn.Linear,
    approximate: str,
    blocks: tuple[int, int],
    bits: int = 16,
    groups: tuple[int, int] = (4, 4),
) -> Tensor:
    hidden = gelu(linear(x.float(), first.weight, first.bias, blocks[0], bits, groups[0]), approximate)
    codes, scale = codes_of_weight(second.weight, blocks[1], bits, groups[1])
    out, chunk = None, HIDDEN // blocks[1] * blocks[1] or blocks[1]
    for start in range(0, hidden.shape[-1], chunk):
        some = slice(start, start + chunk)
        part = product(hidden[..., some], codes[:, some], scale)
        if out is None:
            out = part if second.bias is None else part + second.bias.float()
        else:
            out = out + part
    assert out is not None
    return out.to(x.dtype)


# --- Exactness. ---


@st.composite
def patterns(draw: st.DrawFn) -> NM | Clustered:
    """Of 2:4, and of a dense weight, which keeps both of two."""
    v = draw(st.sampled_from([1, 2, 4, 8]))
    return draw(st.sampled_from([NM(2, 4, v), NM(2, 2, v), *([Clustered(2, 4, v)] if v > 1 else [])]))


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_linear_is_the_whole_number_reference_bit_for_bit(data: st.DataObject) -> None:
    pattern = data.draw(patterns())
    v = pattern.v
    out, inner = v * data.draw(st.integers(1, 20)), 4 * data.draw(st.integers(1, 60))
    tokens, block = data.draw(st.integers(1, 70)), 4 * data.draw(st.integers(1, 30))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    weight, bias = sparse(out, inner, pattern), normal(out) if data.draw(st.booleans()) else None
    x = normal(tokens, inner, seed=data.draw(st.integers(0, 99))) * torch.logspace(-3, 3, tokens)[:, None]
    x = (x + data.draw(st.sampled_from([0.0, 1.0, -30.0]))).to(dtype)
    tile = data.draw(st.integers(1, 10))
    for bits in BITS:
        wanted = linear(x, weight, bias, block, bits, pattern.m)
        made = lambda bits=bits: VNMLinear(packed(weight, bias, pattern, block=block, tile=tile, bits=bits))  # noqa: E731
        exact(made, x, wanted, LEVELS if bits == 16 else VNNI)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_sums_of_the_largest_products_fit_16_bits(data: st.DataObject) -> None:
    """Weights that are alike, or few, reach what their sums allow; inputs are at both ends of their codes."""
    pattern, inner = NM(2, data.draw(st.sampled_from([2, 4])), 4), 4 * data.draw(st.integers(1, 40))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    values = torch.tensor(
        data.draw(
            st.sampled_from(
                [
                    [1.0],
                    [1.0, -1.0],
                    [0.0, 1.0],
                    [0.0, 0.0, 0.0, 1.0, -1.0],
                    [1.0, 0.01],
                    [31.5, 31.501, -30.5, 30.5, 32.0],
                ]
            )
        )
    )
    weight = values[torch.randint(len(values), (8, inner), generator=rng)]
    weight = pattern.mask(torch.rand((8, inner), generator=rng) + weight.abs()).apply(weight)
    ends = torch.tensor(data.draw(st.sampled_from([[1.0], [-1.0], [1.0, -1.0], [0.0, 1.0]])))
    x = ends[torch.randint(len(ends), (20, inner), generator=rng)]
    for sign in (1, -1, 0):  # 0: each input has the sign of the first row's weight
        given_x = x * sign if sign else weight[:1].sign().expand(20, -1)
        wanted = linear(given_x, weight, None, 32, group=pattern.m)
        counts = [torch.get_num_threads()]
        exact(lambda: VNMLinear(packed(weight, None, pattern, block=32)), given_x, wanted, LEVELS, counts)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [(4, 4), (2, 2), (4, 2)])
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
    rules = [NM(2, group, v) for group in groups]
    layers = [dense(sparse(hidden, inner, rules[0]), normal(hidden)), dense(sparse(out, hidden, rules[1]), normal(out))]
    x = (2 * normal(2, tokens, inner)).to(dtype)
    for bits in (16, 32) if level in VNNI else (16,):
        weights = [
            packed(layer.weight.detach(), layer.bias, rule, block=96, bits=bits)
            for layer, rule in zip(layers, rules, strict=True)
        ]
        lowered = VNMPair(*weights, approximate == "tanh").requires_grad_(False)
        with torch.no_grad():
            wanted = pair(x, *layers, approximate, (96, 96), bits, groups)
        exact(lambda lowered=lowered: lowered, x, wanted)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_convolutions_of_every_size_are_exact(data: st.DataObject) -> None:
    pattern = data.draw(patterns())
    side, stride, padding, height, width = data.draw(places())
    rows, channels = pattern.v * data.draw(st.integers(1, 6)), 4 * data.draw(st.integers(1, 20))
    shape = (data.draw(st.integers(1, 5)), channels, height, width)
    weight = normal(rows, channels, side, side, seed=data.draw(st.integers(0, 9)))
    weight = pattern.mask(weight.abs()).apply(weight)
    bias, block = normal(rows, seed=3) if data.draw(st.booleans()) else None, 4 * data.draw(st.integers(1, 20))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = (normal(*shape, seed=7) * torch.logspace(-3, 2, shape[0])[:, None, None, None]).to(dtype)
    tile = data.draw(st.integers(1, 64))
    for bits in BITS:
        kernel = packed(weight, bias, pattern, block=block, tile=tile, bits=bits)
        wanted = convolution(x, weight, bias, block, bits, stride, padding, pattern.m)
        module = VNMConv(kernel, side, stride, padding)
        exact(lambda module=module: module, x, wanted, LEVELS if bits == 16 else VNNI, (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("group", [4, 2])
@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (4, 8, 4, 4), (5, 8, 3, 5), (3, 8, 7, 9), (16, 8, 2, 2), (7, 8, 5, 3)])
def test_small_images_that_share_a_tile_give_what_each_gives_alone(
    level: str, shape: tuple[int, ...], group: int, side: int, dtype: torch.dtype
) -> None:
    weight, pattern = normal(8, 8, side, side), NM(2, group, 4)
    weight = pattern.mask(weight.abs()).apply(weight)
    module = VNMConv(packed(weight, normal(8), pattern, block=8, tile=24), side)
    # each with a scale of its own
    x = (normal(*shape) * torch.logspace(-2, 2, shape[0])[:, None, None, None] + 1).to(dtype)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(module(x), torch.cat([module(image[None]) for image in x]))
    torch.set_num_threads(before)


@pytest.mark.parametrize("v", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(2, 8, 4, 5), (4, 8, 3, 5), (2, 8, 9, 5), (2, 8, 2, 17), (8, 8, 3, 3)])
def test_images_that_lie_apart_in_a_panel_of_a_linears_size(level: str, shape: tuple[int, ...], v: int) -> None:
    """As many numbers in a row of the panel as of tokens, and yet vectors of several images."""
    weight = normal(16, 8, 2, 2)
    weight = NM(2, 4, v).mask(weight.abs()).apply(weight)
    x = normal(*shape)
    for bits in (16, 32) if level in VNNI else (16,):
        module = VNMConv(packed(weight, normal(16), NM(2, 4, v), block=8, tile=24, bits=bits), 2, 1, 0)
        exact(lambda module=module: module, x, convolution(x, weight, normal(16), 8, bits, 1, 0))


def test_weights_whose_sums_leave_16_bits_run_where_32_hold_them(level: str) -> None:
    weight, x = sparse(16, 64, NM(2, 4, 4)), normal(3, 64)
    module = VNMLinear(packed(weight, None, NM(2, 4, 4), bits=32))
    if level in VNNI:
        assert torch.equal(module(x), linear(x, weight, None, 64, 32))
    else:
        with pytest.raises(ValueError, match="do not fit 16 bits"):
            module(x)


@pytest.mark.parametrize("name", ["avx512", "avx2", "avx_vnni", "avx512_vnni", "avx512_bf16"])
@pytest.mark.parametrize("backends", [(VNMW7A8(), VNMW8A8()), (VNMDenseW7A8(), VNMDenseW8A8())])
def test_bytes_have_all_their_bits_where_there_is_vnni(
    monkeypatch: pytest.MonkeyPatch, name: str, backends: tuple[VNMW7A8, VNMW8A8]
) -> None:
    monkeypatch.setattr("compressor.lower.vnm.level", lambda: name)
    monkeypatch.setattr("compressor.lower.vnm_kernels.level", lambda: name)
    seven, eight = (backend.unavailable(torch.device("cpu")) for backend in backends)
    vnni = "vnni" in name or name == "avx512_bf16"
    assert (seven, eight)[vnni] is None
    assert ("more exact" in str(seven)) == vnni and ("needs VNNI" in str(eight)) != vnni
    assert (f"{backends[1].name} is as fast" in str(seven)) == vnni
    assert (f"{backends[0].name} is for that" in str(eight)) != vnni
    assert "cuda" in str(backends[0].unavailable(torch.device("cuda")))


@pytest.mark.parametrize("pattern", [NM(2, 4, 2), NM(2, 4, 4), NM(2, 4, 8), Clustered(2, 4, 4)])
def test_what_the_backend_builds_is_near(level: str, pattern: NM | Clustered) -> None:
    layer = dense(sparse(72, 640, pattern), normal(72))
    lowered, x = VNMW7A8().build(unit(layer, pattern)), normal(2, 19, 640)
    assert torch.equal(lowered(x), linear(x, layer.weight, layer.bias, lowered.packed.layout.block))
    block = nn.Sequential(dense(sparse(96, 64, pattern), None), nn.GELU(), dense(sparse(40, 96, pattern), normal(40)))
    lowered, x = VNMW7A8().build(unit(block, pattern, pattern)), normal(33, 64)
    assert isinstance(lowered, VNMPair) == isinstance(pattern, NM)
    assert 1e-3 < float((lowered(x).double() - block.double()(x.double())).norm() / block(x.double()).norm()) < 3e-2
    conv = nn.Conv2d(16, 24, 3, padding=1)
    with torch.no_grad():
        conv.weight.copy_(pattern.mask(conv.weight.abs()).apply(conv.weight))
        x = normal(2, 16, 6, 6)
        out, wanted = VNMW7A8().build(unit(conv, pattern))(x), conv(x)
    assert 1e-3 < float((out - wanted).norm() / wanted.norm()) < 3e-2


def test_inputs_of_one_sign_have_all_codes(level: str) -> None:
    """A zero of 128 would leave half of them unused, and the error would be twice as large. Weights are exact in codes here."""
    pattern = NM(2, 4, 4)
    weight, x = torch.zeros(16, 512), normal(50, 512).abs()
    weight[:, ::32] = normal(16, 16).sign()
    lowered = VNMLinear(packed(weight, None, pattern))
    lost = lowered(x).double() - x.double() @ weight.double().t()
    step = x.amax(1, keepdim=True).double() / 254
    wanted = step / 12**0.5 * 16**0.5  # uniform in a step, 16 of them
    assert 0.9 < float((lost / wanted).square().mean().sqrt()) < 1.1


# --- The ends. ---


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-31, 3e38])
def test_inputs_of_any_size_are_exact(level: str, size: float) -> None:
    pattern = NM(2, 4, 4)
    weight, bias, x = sparse(16, 32, pattern) * 1e-2, normal(16), normal(9, 32).clamp(-1, 1)
    x[4] *= size
    out = VNMLinear(packed(weight, bias, pattern))(x)
    assert bool(out.isfinite().all()) and torch.equal(out, linear(x, weight, bias, 64))
    assert size > 1e-32 or torch.equal(out[4], bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_is_nan_and_no_other(level: str, dtype: torch.dtype, bad: float) -> None:
    pattern = NM(2, 4, 4)
    x = normal(20, 36).to(dtype)
    one = VNMLinear(packed(sparse(24, 36, pattern), normal(24), pattern))
    two = VNMPair(
        packed(sparse(24, 36, pattern), None, pattern), packed(sparse(8, 24, pattern), normal(8), pattern), False
    )
    for lowered in (one, two):
        whole = lowered(x)
        spoilt = x.clone()
        spoilt[5, 35] = bad
        out = lowered(spoilt)
        assert bool(out[5].isnan().all())
        out[5] = whole[5]
        assert torch.equal(out, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_image_that_is_not_finite_is_not_a_number_and_no_other_is(
    level: str, bad: float, dtype: torch.dtype
) -> None:
    weight = NM(2, 4, 4).mask(torch.ones(8, 8, 3, 3)).apply(normal(8, 8, 3, 3))
    x = normal(3, 8, 6, 6).to(dtype)
    x[1, 2, 3, 4] = bad
    for stride, padding in ((1, 1), (2, 0), (3, 2)):
        out = VNMConv(packed(weight, None, NM(2, 4, 4)), 3, stride, padding)(x)
        assert bool(out[1].isnan().all()) and bool(out[[0, 2]].isfinite().all())


def test_nothing_is_read_outside(level: str) -> None:
    pattern = NM(2, 4, 4)
    weight = sparse(20, 12, pattern)
    around = torch.full((64, 12), torch.nan)
    around[20:51] = normal(31, 12)
    out = VNMLinear(packed(weight, None, pattern, block=8))(around[20:51])
    assert torch.equal(out, linear(around[20:51], weight, None, 8))


# --- The backend. ---


def test_it_is_one_of_the_backends_that_an_error_allows() -> None:
    layer, x = dense(sparse(64, 64, NM(2, 4, 4)), None), normal(40, 64)
    name = "vnm-w8a8" if level_here() in VNNI else "vnm-w7a8"
    assert compressor.lower(layer, x).plan.layers[0].candidate(name) is None
    plan = compressor.lower(layer, x, tolerance=0.05, cache=False).plan.layers[0]
    found, finer = plan.candidate(name), plan.candidate("vnm-int8")
    assert found is not None and found.refused is None and found.median_ms is not None
    assert finer is not None and finer.error is not None and found.error is not None
    assert (1.5 if name == "vnm-w7a8" else 1.2) * finer.error < found.error < 0.05
    assert "two of four" in str(VNMW7A8().refusal(unit(nn.Linear(8, 8), NM(4, 8, 4))))
    assert "could leave 32 bits" in str(VNMW7A8().refusal(unit(nn.Linear(LARGEST_INNER + 4, 4), NM(2, 4, 4))))
    with pytest.raises(CompressorError, match="do not fit 32 bits"):
        packed(
            NM(1, 4, 4).mask(torch.ones(4, LARGEST_INNER)).apply(torch.ones(4, LARGEST_INNER)),
            None,
            NM(2, 4, 4),
            block=4,
        )


def test_a_weight_lowered_otherwise_is_refused() -> None:
    pattern = NM(2, 4, 4)
    layer = dense(sparse(16, 64, pattern), None)
    whole, floats = VNMW7A8().build(unit(layer, pattern)), VNM().build(unit(layer, pattern))
    with pytest.raises((CompressorError, RuntimeError)):
        whole.load_state_dict(floats.state_dict())
    whole.load_state_dict(whole.state_dict())
    with pytest.raises(CompressorError, match="was cast"):
        whole.bfloat16()(normal(3, 64))


def test_operators_refuse_what_would_lead_outside() -> None:
    w = packed(sparse(16, 40, NM(2, 4, 4)), None, NM(2, 4, 4))
    values, index, bias, order, scale, total, numbers = w.arguments
    x = normal(3, 40)
    for wrong in (
        None,
        total[:-1],
        total[:, :-1],
        total.float(),
        total.t().contiguous().t(),
        total[:, :1].expand(-1, 16),
    ):
        with pytest.raises((CompressorError, ValueError)):
            torch.ops.compressor.vnm_linear(x, values, index, bias, order, scale, wrong, numbers, 3)
    with pytest.raises((CompressorError, ValueError)):
        torch.ops.compressor.vnm_linear(x, values, index, bias, order, None, total, numbers, 3)
    for place, value in ((8, 2), (8, 4), (9, 0), (4, 8), (4, 32), (1, 72)):
        changed = [*numbers[:place], value, *numbers[place + 1 :]]
        with pytest.raises((CompressorError, ValueError)):
            torch.ops.compressor.vnm_linear(normal(3, changed[1]), values, index, bias, order, scale, total, changed, 3)
    other = KernelWeight(sparse(8, 16, NM(2, 4, 4)), None, NM(2, 4, 4), block=8, lanes=Lanes.CODES)
    with pytest.raises(ValueError, match="no such job"):
        torch.ops.compressor.vnm_pair(x, *w.arguments, *other.arguments, False, 3)
    kernel = packed(
        normal(8, 4, 3, 3) * NM(2, 4, 4).mask(torch.ones(8, 4, 3, 3)).apply(torch.ones(8, 4, 3, 3)), None, NM(2, 4, 4)
    )
    for limits in (None, torch.zeros(2), torch.zeros(2, 3), torch.zeros(2, 2).double()):
        with pytest.raises(CompressorError, match="lowest and the highest"):
            torch.ops.compressor.vnm_conv(normal(2, 4, 5, 5), *kernel.arguments, limits, 3, 1, 1, 5)


def test_operators_work_under_compile_and_export() -> None:
    pattern = NM(2, 4, 4)
    block = nn.Sequential(dense(sparse(32, 16, pattern), None), nn.GELU(), dense(sparse(16, 32, pattern), normal(16)))
    model, x = nn.Sequential(VNMW7A8().build(unit(block, pattern, pattern)), nn.SiLU()), normal(6, 16)
    kernel = sparse(8, 4, pattern).unsqueeze(-1).unsqueeze(-1)
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), model(x))
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        assert torch.equal(exported.module()(normal(9, 16)), model(normal(9, 16)))
        conv, images = VNMConv(packed(kernel, None, pattern), 1), normal(2, 4, 5, 5)
        compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
        for given_x in (images, images.to(memory_format=torch.channels_last), images[:0]):
            assert torch.equal(compiled(given_x), conv(given_x.contiguous()))
    a, b = model[0].first, model[0].second
    torch.library.opcheck(torch.ops.compressor.vnm_pair, (x, *a.arguments, *b.arguments, False, 3))
    torch.library.opcheck(torch.ops.compressor.vnm_linear, (x, *a.arguments, 3))
