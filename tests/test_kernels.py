"""The compiled CPU kernels against plain arithmetic in float64, at every instruction set of this machine."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import compressor
from compressor import CompressorError
from compressor.lower import Unit, vnm_kernels
from compressor.lower.vnm import VNM, VNMConv, VNMLinear, VNMPair, kernels
from compressor.lower.vnm_dense import VNMDense
from compressor.lower.vnm_weight import KernelWeight
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.pattern import NM

extension: Any = kernels()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the compiled kernels are not installed")
LEVELS = extension.levels() if extension is not None else []
EXACT = 2e-6
HALF = 4e-3  # bfloat16 has 8 bits: the inputs, and the result


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def sparse(shape: tuple[int, ...], pattern: NM, seed: int = 0) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return pattern.mask(weight.abs()).apply(weight) / shape[1] ** 0.5


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(out: Tensor, wanted: Tensor) -> float:
    assert out.shape == wanted.shape
    return float((out.double() - wanted).norm() / wanted.norm())


def unit(
    module: nn.Module, shape: tuple[int, ...], *patterns: NM | Clustered | None, dtype: torch.dtype = torch.float32
) -> Unit:
    return Unit("layer", module.to(dtype).requires_grad_(False), shape, dtype, torch.device("cpu"), patterns)


def test_this_machine_runs_more_than_the_portable_kernels_where_it_can() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert LEVELS[-1] == "portable"
    assert ("avx2" in LEVELS) == (" avx2 " in flags and " fma " in flags)
    assert extension.level() == (os.environ.get("COMPRESSOR_CPU_LEVEL") or LEVELS[0])


@pytest.mark.parametrize("v", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("tokens", "inner", "out"), [(1, 8, 8), (5, 20, 24), (37, 96, 104), (257, 64, 160), (1028, 256, 40)]
)
def test_linear_equals_dense_arithmetic(level: str, threads: int, v: int, tokens: int, inner: int, out: int) -> None:
    pattern = NM(2, 4, v)
    weight, bias, x = sparse((out, inner), pattern), normal(out), normal(tokens, inner)
    lowered = VNMLinear(KernelWeight(weight, bias, pattern, block=16))
    assert error(lowered(x), F.linear(x.double(), weight.double(), bias.double())) < EXACT


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_linear_takes_every_pattern_and_size(data: st.DataObject) -> None:
    m = data.draw(st.sampled_from([2, 3, 4, 5, 8, 16]))
    pattern = NM(data.draw(st.integers(1, m)), m, data.draw(st.sampled_from([2, 4, 8])))
    out, inner = pattern.v * data.draw(st.integers(1, 9)), m * data.draw(st.integers(1, 9))
    shape = (*data.draw(st.lists(st.integers(1, 5), max_size=2)), data.draw(st.integers(1, 40)))
    before = extension.level()
    extension.set_level(data.draw(st.sampled_from(LEVELS)))
    try:
        weight, x = sparse((out, inner), pattern), normal(*shape, inner)
        bias = normal(out) if data.draw(st.booleans()) else None
        lowered = VNM().build(unit(_linear(weight, bias), tuple(x.shape), pattern))
        wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert error(lowered(x), wanted) < EXACT
    finally:
        extension.set_level(before)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


@pytest.mark.parametrize("v", [2, 4, 8])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_bfloat16_differs_by_its_rounding_alone(level: str, v: int, pattern: tuple[int, int]) -> None:
    rule = NM(*pattern, v)
    weight, bias, x = sparse((72, 96), rule).bfloat16(), normal(72), normal(3, 37, 96).bfloat16()
    lowered = VNM().build(unit(_linear(weight, bias), tuple(x.shape), rule, dtype=torch.bfloat16))
    out = lowered(x)
    assert out.dtype == torch.bfloat16
    assert error(out, F.linear(x.double(), weight.double(), bias.bfloat16().double())) < HALF


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("v", "hidden", "tokens"), [(4, 384, 41), (2, 136, 7), (8, 64, 200)])
def test_a_pair_equals_linear_gelu_linear(
    level: str, threads: int, approximate: str, dtype: torch.dtype, v: int, hidden: int, tokens: int
) -> None:
    first, second = NM(2, 4, v), NM(2, 4, 2)
    dense = nn.Sequential(nn.Linear(32, hidden), nn.GELU(approximate), nn.Linear(hidden, 48))
    for layer, pattern in ((dense[0], first), (dense[2], second)):
        layer.weight.data = pattern.mask(layer.weight.abs()).apply(layer.weight.data) * 2
    x = (3 * normal(2, tokens, 32)).to(dtype)
    lowered = VNM().build(unit(dense, tuple(x.shape), first, second, dtype=dtype))
    assert isinstance(lowered, VNMPair)
    assert error(lowered(x), dense.double()(x.double())) < (EXACT if dtype == torch.float32 else HALF)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_accurate_everywhere(level: str, approximate: str) -> None:
    """Through identity matrices of one kept channel, so that nothing but GELU rounds."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 1e30])])
    eye = torch.zeros(2, 4)
    eye[0, 0] = 1
    one = NM(1, 4, 2)
    pair = VNMPair(
        KernelWeight(torch.cat([eye, torch.zeros(2, 4)]), None, NM(2, 4, 2), block=8),
        KernelWeight(eye, None, one, block=8),
        approximate == "tanh",
    )
    out = pair(F.pad(x[:, None], (0, 3)))[:, 0]
    wanted = F.gelu(x.double(), approximate=approximate)
    assert bool(torch.isfinite(out).all())
    assert float(((out - wanted).abs() / (1 + wanted.abs())).max()) < 1e-6  # 1 + erf loses digits


@pytest.mark.parametrize("v", [2, 4, 8])
@pytest.mark.parametrize(
    ("batch", "height", "width", "side"),
    [
        (2, 32, 32, 3),
        (3, 8, 8, 3),
        (5, 4, 4, 3),
        (7, 2, 2, 3),
        (2, 7, 5, 1),
        (2, 9, 9, 3),
        (1, 33, 3, 5),
        (2, 1, 1, 5),
        (1, 5, 70, 7),
    ],
)
def test_convolution_equals_dense_arithmetic(
    level: str, threads: int, v: int, batch: int, height: int, width: int, side: int
) -> None:
    pattern = NM(2, 4, v)
    weight, bias = sparse((40, 12, side, side), pattern), normal(40)
    x = normal(batch, 12, height, width)
    lowered = VNMConv(KernelWeight(weight, bias, pattern, block=8), side)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), padding=side // 2)
    assert error(lowered(x), wanted) < EXACT
    half = lowered(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert error(half, F.conv2d(x.bfloat16().double(), weight.double(), bias.double(), padding=side // 2)) < HALF


@pytest.mark.parametrize(
    ("batch", "height", "width", "side", "stride", "padding"),
    [
        (2, 33, 33, 3, 2, 0),  # as DDPM's downsampling
        (4, 17, 17, 3, 2, 1),
        (2, 16, 16, 3, 2, 1),
        (3, 12, 20, 4, 4, 0),  # as the patches of a transformer
        (5, 4, 4, 2, 2, 0),
        (1, 9, 50, 5, 3, 4),
        (3, 8, 8, 3, 1, 0),
        (2, 7, 9, 3, 1, 2),
        (2, 6, 6, 2, 1, 1),
        (1, 1, 1, 7, 7, 6),
        (2, 40, 41, 1, 1, 0),
        (2, 3, 70, 3, 3, 0),
    ],
)
def test_a_convolution_of_any_stride_and_padding_equals_dense_arithmetic(
    level: str, threads: int, batch: int, height: int, width: int, side: int, stride: int, padding: int
) -> None:
    pattern = NM(2, 4, 4)
    conv = nn.Conv2d(12, 40, side, stride=stride, padding=padding)
    with torch.no_grad():
        conv.weight.copy_(sparse((40, 12, side, side), pattern))
    x = normal(batch, 12, height, width)
    one = unit(conv, tuple(x.shape), pattern)
    assert VNM().refusal(one) is None
    lowered = VNM().build(one)
    assert isinstance(lowered, VNMConv)
    assert error(lowered(x), conv.double()(x.double())) < EXACT
    assert error(lowered(x.bfloat16()), conv(x.bfloat16().double())) < HALF


def test_images_that_are_smaller_than_the_kernel_are_an_error() -> None:
    lowered = VNMConv(KernelWeight(sparse((8, 4, 3, 3), NM(2, 4, 4)), None, NM(2, 4, 4), block=8), 3, 2, 0)
    with pytest.raises(CompressorError, match=r"2 x 5 pixels.*kernel of 3 x 3"):
        lowered(normal(1, 4, 2, 5))


def test_nothing_is_read_or_written_outside(level: str) -> None:
    """Inputs and outputs end at the end of a page, where one entry too many is a fault; NaN around them must not leak in."""
    pattern = NM(2, 4, 4)
    weight = sparse((20, 12), pattern)
    lowered = VNMLinear(KernelWeight(weight, None, pattern, block=8))
    around = torch.full((64, 12), torch.nan)
    around[20:51] = normal(31, 12)
    assert error(lowered(around[20:51]), F.linear(around[20:51].double(), weight.double())) < EXACT
    taps = sparse((20, 12, 3, 3), pattern)
    images = torch.full((3, 12, 6, 6), torch.nan)
    images[1] = normal(12, 6, 6)
    for stride, padding in ((1, 1), (2, 0), (2, 2)):
        out = VNMConv(KernelWeight(taps, None, pattern, block=8), 3, stride, padding)(images[1:2])
        assert error(out, F.conv2d(images[1:2].double(), taps.double(), stride=stride, padding=padding)) < EXACT


def test_not_a_number_goes_through(level: str) -> None:
    pattern = NM(2, 4, 4)
    weight = torch.ones(4, 4) * pattern.mask(torch.ones(4, 4)).keep
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([[torch.nan, 0, 0, 0], [1, 1, 1, 1], [torch.inf, 0, 0, 0]], dtype=dtype)
        out = VNM().build(unit(_linear(weight, None), (3, 4), pattern, dtype=dtype))(x)
        assert bool(out[0].isnan().all()) and out[1].tolist() == [2, 2, 2, 2] and bool(out[2].isinf().all())


def test_inputs_of_other_layouts_and_sizes_work(level: str) -> None:
    pattern = NM(2, 4, 4)
    weight = sparse((16, 8), pattern)
    lowered = VNMLinear(KernelWeight(weight, None, pattern, block=8))
    x = normal(8, 5).t()
    assert error(lowered(x), F.linear(x.double(), weight.double())) < EXACT
    assert lowered(torch.empty(0, 8)).shape == (0, 16)
    taps = sparse((16, 8, 3, 3), pattern)
    images = normal(2, 8, 5, 5).to(memory_format=torch.channels_last)
    out = VNMConv(KernelWeight(taps, None, pattern, block=8), 3)(images)
    assert error(out, F.conv2d(images.double(), taps.double(), padding=1)) < EXACT


def test_what_does_not_fit_is_refused_before_it_reaches_the_kernel() -> None:
    pattern = NM(2, 4, 4)
    lowered = VNMLinear(KernelWeight(sparse((16, 8), pattern), normal(16), pattern, block=8))
    with pytest.raises(CompressorError, match="takes float32 or bfloat16 with 8 channels"):
        lowered(normal(3, 12))
    with pytest.raises(CompressorError, match=r"torch\.float64"):
        lowered(normal(3, 8).double())
    with pytest.raises(CompressorError, match="was cast"):
        lowered.bfloat16()(normal(3, 8))


@pytest.mark.parametrize("seed", range(5))
def test_clustered_rows_with_zeros_of_their_own_are_right_at_every_level(level: str, seed: int) -> None:
    pattern = Clustered(2, 4, 8)
    module = nn.Linear(64, 128)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = torch.randn(128, 64, generator=rng)
        weight = pattern.mask(weight.abs()).apply(weight)
        module.weight.copy_(weight * (torch.rand(weight.shape, generator=rng) > 0.02))
    one = unit(module, (32, 64), pattern)
    x = normal(32, 64)
    assert error(VNM().build(one)(x), module.double()(x.double())) < EXACT


def test_a_weight_that_does_not_obey_its_pattern_is_not_packed() -> None:
    with pytest.raises(CompressorError, match="does not obey 4:2:4"):
        KernelWeight(torch.ones(8, 8), None, NM(2, 4, 4), block=8)


def test_tanh_gelu_of_very_negative_numbers_is_zero(level: str) -> None:
    eye = torch.eye(8)
    pattern = NM(4, 4, 1)
    pair = VNMPair(KernelWeight(eye, None, pattern, block=8), KernelWeight(eye, None, pattern, block=8), True)
    x = torch.tensor([[-1e36, -3e38, -31.0, -29.0, -5.0, 0.0, 5.0, 3e38]])
    torch.testing.assert_close(pair(x), F.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)


def test_a_layer_lowered_in_bfloat16_is_right_in_float32_or_refuses_it(level: str) -> None:
    pattern = NM(2, 4, 4)
    weight, x = sparse((16, 32), pattern).bfloat16(), normal(7, 32)
    lowered = VNM().build(unit(_linear(weight, None), (7, 32), pattern, dtype=torch.bfloat16))
    if level == "avx512_bf16":  # whose weights are pairs of bfloat16
        with pytest.raises(ValueError, match="take inputs in bf16"):
            lowered(x)
    else:
        assert error(lowered(x), F.linear(x.double(), weight.double())) < EXACT


@torch.no_grad()
def test_a_layer_in_half_precision_that_is_cast_to_it_is_as_it_was() -> None:
    """As `pipe.to(torch.bfloat16)` does with one that is in it already: what is packed is of float32 in name alone."""
    weight, x = sparse((16, 64), NM(2, 4, 4)).bfloat16(), normal(5, 64).bfloat16()
    layer = VNMLinear(KernelWeight(weight, normal(16), NM(2, 4, 4), block=32))
    expected = layer(x)
    assert torch.equal(layer.to(torch.bfloat16).bfloat16()(x), expected)
    assert torch.equal(copy.deepcopy(layer).float()(x), expected)
    with pytest.raises(CompressorError, match="was cast"):
        layer.half()(x)


def test_a_state_of_another_packing_is_refused() -> None:
    pattern = NM(2, 4, 4)
    weight = sparse((16, 64), pattern)
    one, other = (KernelWeight(weight, None, pattern, block=block) for block in (32, 64))
    before = other.packed.clone()
    with pytest.raises(CompressorError, match="lowered otherwise"):
        other.load_state_dict(one.state_dict())
    assert torch.equal(other.packed.view(torch.int32), before.view(torch.int32))
    other.load_state_dict(other.state_dict())


def test_a_state_with_other_parts_of_the_same_size_is_refused() -> None:
    """A bias read as the places of rows would be written to anywhere."""
    weight, bias = sparse((16, 32), NM(2, 4, 4)), normal(16)
    one = KernelWeight(weight, bias, NM(2, 4, 4), block=32)
    other = KernelWeight(weight, None, Clustered(2, 4, 4), block=32)
    assert one.packed.shape == other.packed.shape and one.layout == other.layout
    for target, source in ((one, other), (other, one)):
        for state in (source.state_dict(), {"packed": nn.Parameter(source.packed)}):
            with pytest.raises(CompressorError, match="lowered otherwise"):
                target.load_state_dict(state)


@pytest.mark.parametrize("part", ["index", "order"])
def test_a_state_whose_places_lead_outside_is_refused(part: str) -> None:
    pattern = Clustered(2, 4, 4)
    weight = KernelWeight(sparse((16, 32), NM(2, 4, 4)), None, pattern, block=32)
    other = copy.deepcopy(weight)
    getattr(other.parts, part)[3] = 32
    with pytest.raises(CompressorError, match="not as its numbers say"):
        weight.load_state_dict(other.state_dict())


def test_what_a_mode_of_torch_makes_of_a_weight_is_not_kept() -> None:
    weight = KernelWeight(sparse((16, 32), NM(2, 4, 4)), None, NM(2, 4, 4), block=32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(weight.parts.values, FakeTensor)
    assert not isinstance(weight.parts.values, FakeTensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_weight_is_packed_whatever_torch_makes_by_default(dtype: torch.dtype) -> None:
    pattern = NM(2, 4, 4)
    weight = sparse((16, 32), pattern)
    wanted = KernelWeight(weight, None, pattern, block=32).packed
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = KernelWeight(weight, None, pattern, block=32).packed
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize(
    "change",
    [
        {"tile": 0},
        {"numbers": {2: 16}},
        {"numbers": {3: 81}},
        {"numbers": {0: 32}},
        {"numbers": {5: 0}},
        {"index": slice(0, -1)},
        {"values": slice(0, -4)},
    ],
)
def test_operators_refuse_what_would_lead_outside(change: dict[str, Any]) -> None:
    pattern = NM(2, 4, 4)
    w = KernelWeight(sparse((16, 8), pattern), None, pattern, block=8)
    numbers = list(w.layout)
    for place, value in change.get("numbers", {}).items():
        numbers[place] = value
    values, index = w.parts.values[change.get("values", slice(None))], w.parts.index[change.get("index", slice(None))]
    with pytest.raises((CompressorError, ValueError)):
        torch.ops.compressor.vnm_linear(
            normal(3, 8), values, index, *w.arguments[2:6], numbers, change.get("tile", w.tile)
        )


def test_scratch_is_given_back_when_its_thread_ends() -> None:
    import resource
    import threading

    pattern = NM(2, 4, 4)
    lowered = VNMLinear(KernelWeight(sparse((256, 2048), pattern), None, pattern, block=2048))
    x = normal(64, 2048)

    def work() -> None:
        lowered(x)

    def threads(count: int) -> int:
        for _ in range(count):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = threads(5)
    assert threads(100) - before < 20_000  # KiB; each thread takes about a MiB


@pytest.mark.parametrize("tokens", [300, 9])
def test_the_same_input_gives_the_same_bits_whatever_the_threads(level: str, tokens: int) -> None:
    """With 64 there are more of them than vectors of tokens."""
    pattern = NM(2, 4, 4)
    weights = [KernelWeight(sparse((64, 64), pattern), None, pattern, block=64) for _ in range(2)]
    x = normal(tokens, 64)
    before = torch.get_num_threads()
    for lowered in (VNMLinear(weights[0]), VNMPair(weights[0], weights[1], False).requires_grad_(False)):
        outs = []
        for count in (1, 2, 3, 64):
            torch.set_num_threads(count)
            outs += [lowered(x) for _ in range(3)]
        torch.set_num_threads(before)
        assert all(torch.equal(out, outs[0]) for out in outs)


def test_operators_work_under_compile_and_export() -> None:
    pattern = NM(2, 4, 4)
    model = nn.Sequential(
        VNMLinear(KernelWeight(sparse((32, 16), pattern), normal(32), pattern, block=16)),
        nn.SiLU(),
        VNMLinear(KernelWeight(sparse((16, 32), pattern), None, pattern, block=16)),
    )
    x = normal(6, 16)
    with torch.no_grad():
        wanted = model(x)
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), wanted)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        assert torch.allclose(exported.module()(normal(9, 16)), model(normal(9, 16)))
    for module in (model[0], VNMConv(KernelWeight(sparse((8, 4, 3, 3), pattern), None, pattern, block=8), 3)):
        w: Any = module.packed
        if isinstance(module, VNMLinear):
            torch.library.opcheck(torch.ops.compressor.vnm_linear, (x, *w.arguments, 6))
        else:
            torch.library.opcheck(torch.ops.compressor.vnm_conv, (normal(2, 4, 5, 5), *w.arguments, None, 3, 2, 0, 6))


def test_only_one_openmp_runtime_is_loaded() -> None:
    script = (
        "import torch; from compressor.lower.vnm import kernels\n"
        "extension, note = kernels(); torch.randn(300, 300) @ torch.randn(300, 300)\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(note, sorted({p.rsplit('/', 1)[-1] for p in maps if 'omp' in p.rsplit('/', 1)[-1] and '.so' in p}))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.startswith("None [") and out.count(".so") == 1, out


def test_the_runtime_is_torchs_own_where_there_is_another(tmp_path: Path) -> None:
    """As with sentencepiece, a tokenizer that brings a libgomp of its own."""
    script = (
        "import ctypes, sys, torch; from pathlib import Path\n"
        "own = next(p for p in open('/proc/self/maps').read().split() if 'libgomp' in p.rsplit('/', 1)[-1])\n"
        "other, named = str(Path(sys.argv[1]) / 'libgomp-0123.so.1'), Path(own).read_bytes()\n"
        "Path(other).write_bytes(named.replace(b'libgomp.so.1', b'libgomq.so.1'))  # of its name there is one\n"
        "ctypes.CDLL(other)\n"
        "from compressor.lower import vnm_kernels\n"
        "runtime, note = vnm_kernels._threads()\n"
        "address = vnm_kernels._address(runtime, 'GOMP_parallel')\n"
        "spans = [(line.split()[0].split('-'), line.split()[-1]) for line in open('/proc/self/maps')]\n"
        "(where,) = [p for (low, high), p in spans if int(low, 16) <= address < int(high, 16)]\n"
        "print(note, where == own, any(p == other for _, p in spans))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.split() == ["None", "True", "True"], out


@pytest.mark.parametrize(
    ("maps", "said"),
    [
        (
            "7f-80 r-xp 0 0 1 /a/libgomp.so.1\n7f-80 r-xp 0 0 1 /b/libiomp5.so",
            "is not the only one in this process (/a/libgomp.so.1, /b/",
        ),
        ("7f-80 r-xp 0 0 1 /a/libc.so", "is not the only one in this process (none)"),
        (None, "cannot be found on this system"),
    ],
)
def test_where_torchs_runtime_is_not_clear_kernels_say_that_they_run_on_one_thread(
    maps: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, **_: object) -> str:
        if maps is None:
            raise PermissionError(path)
        return maps

    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(Path, "read_text", read)
    runtime, note = vnm_kernels._threads()
    assert runtime is None and note is not None and said in note and note.endswith("the kernels run on one thread")


def test_an_unknown_level_is_an_error_that_names_the_known_ones() -> None:
    script = "from compressor.lower.vnm import kernels; kernels()"
    environment = {**os.environ, "COMPRESSOR_CPU_LEVEL": "sse9"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert run.returncode != 0 and "sse9" in run.stderr and "portable" in run.stderr


def test_a_stride_that_was_set_to_a_number_is_refused_and_no_error() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1)
    conv.stride = 1  # type: ignore[assignment]  # torch takes it so
    assert "stride 1" in str(VNM().refusal(unit(conv, (1, 8, 6, 6), NM(2, 4, 4))))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 3, padding=1, groups=2), "2 groups"),
        (nn.Conv2d(8, 8, 3, padding=1, stride=(1, 2)), "stride"),
        (nn.Conv2d(8, 8, 3, padding=1, stride=4), "stride"),
        (nn.Conv2d(8, 8, 3, padding=2, dilation=2), "dilation"),
        (nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), "squares"),
        (nn.Conv2d(8, 8, 3, padding=(1, 0)), "padding"),
        (nn.Conv2d(8, 8, 3, padding=3), "padding"),
        (nn.Conv2d(8, 8, 2, padding="same"), "padding"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "circular"),
        (nn.Conv2d(8, 8, 8), "squares"),
    ],
)
def test_convolutions_that_the_kernels_do_not_do_are_refused(layer: nn.Conv2d, reason: str) -> None:
    refusal = VNM().refusal(unit(layer, (1, 8, 6, 6), NM(2, 4, 4)))
    assert refusal is not None and reason in refusal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "out", "side", "stride", "padding"),
    [(3, 40, 3, 1, 1), (4, 24, 2, 2, 0), (16, 7, 3, 1, "same"), (130, 3, 3, 2, 1), (5, 1, 7, 2, 3), (1, 1, 1, 1, 0)],
)
def test_dense_convolutions_of_few_channels_are_exact(
    level: str, dtype: torch.dtype, channels: int, out: int, side: int, stride: int, padding: int | str
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, side, stride=stride, padding=padding)
    one = unit(conv, (2, channels, 9, 13), None, dtype=dtype)
    x = normal(2, channels, 9, 13).to(dtype)
    assert VNMDense().refusal(one) is None and not VNMDense().skips_zeros
    found = VNMDense().build(one)(x)
    wanted = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), stride, padding)
    assert found.dtype == dtype and error(found, wanted) < (EXACT if dtype == torch.float32 else HALF)


def test_dense_convolutions_that_others_do_better_are_refused() -> None:
    assert "17 channels" in str(VNMDense().refusal(unit(nn.Conv2d(17, 20, 3), (1, 17, 6, 6), None)))
    assert "2 groups" in str(VNMDense().refusal(unit(nn.Conv2d(4, 8, 3, groups=2), (1, 4, 6, 6), None)))
    assert "float64" in str(VNMDense().refusal(unit(nn.Conv2d(4, 8, 3), (1, 4, 6, 6), None, dtype=torch.float64)))
    plan = compressor.lower(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(6, 4)), torch.randn(1, 3, 8, 8)).plan
    assert [one.candidate("vnm-dense") is not None for one in plan.layers] == [True, False]


def test_plain_2_4_is_refused_with_what_would_help() -> None:
    refusal = VNM().refusal(unit(nn.Linear(8, 8), (1, 8), NM(2, 4)))
    assert refusal is not None and "4:2:4" in refusal and "V = 1" in refusal
    assert VNM().refusal(unit(nn.Linear(8, 8), (1, 8), None)) == "its weight obeys no N:M pattern"
    assert "float16" in str(VNM().refusal(unit(nn.Linear(8, 8), (1, 8), NM(2, 4, 4), dtype=torch.float16)))
    assert "cuda" in str(VNM().unavailable(torch.device("cuda")))
