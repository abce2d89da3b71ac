"""Dense layers in few bits by the CPU kernels: what they are, what they refuse, and that 2:4 in few bits is held against them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_kernels_bytes import convolution as convolution_of_bytes
from test_kernels_bytes import linear as linear_of_bytes
from test_kernels_bytes import pair as pair_of_bytes
from test_kernels_int8 import HIDDEN, convolution, dense, linear, normal, pair, sparse, unit
from torch import Tensor, nn

import compressor
from compressor import CompressorError
from compressor.lower.backend import Backend
from compressor.lower.forms import dense_forms
from compressor.lower.plan import Plan
from compressor.lower.vnm import VNNI, kernels
from compressor.lower.vnm import level as level_here
from compressor.lower.vnm_dense import VNMDenseInt8, VNMDenseW7A8, VNMDenseW8A8
from compressor.lower.vnm_weight import LARGEST_INNER, LARGEST_INNER_OF_BYTES
from compressor.runs.trade_offs import called
from compressor.sparsity.pattern import NM

pytestmark = pytest.mark.skipif(kernels()[0] is None, reason="the compiled kernels are not installed")
FEW_BITS = [VNMDenseInt8, VNMDenseW7A8, VNMDenseW8A8]


def near(out: Tensor, wanted: Tensor) -> float:
    return float((out.double() - wanted.double()).norm() / wanted.double().norm())


def skip_without_vnni(backend: type[Backend]) -> None:
    if backend is VNMDenseW8A8 and level_here() not in VNNI:
        pytest.skip("this level has no VNNI")


@pytest.mark.parametrize("backend", FEW_BITS)
def test_a_linear_of_any_rows_is_exact(level: str, backend: type[Backend]) -> None:
    skip_without_vnni(backend)
    for out in (72, 6, 5):  # of which four rows, two or one are taken at a time
        layer, x = dense(normal(out, 660), normal(out, seed=2)), normal(2, 19, 660)
        lowered = backend().build(unit(layer, None))
        if backend is VNMDenseInt8:
            wanted = linear(x, layer.weight, layer.bias)
        else:
            bits = 32 if backend is VNMDenseW8A8 else 16
            wanted = linear_of_bytes(x, layer.weight, layer.bias, lowered.packed.layout.block, bits, 2)
        assert torch.equal(lowered(x), wanted)
        assert 1e-4 < near(wanted, layer(x)) < 2e-2
        assert torch.equal(lowered(x.bfloat16()), lowered(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("backend", FEW_BITS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_pair_is_exact(level: str, backend: type[Backend], approximate: str) -> None:
    skip_without_vnni(backend)
    block = nn.Sequential(
        dense(normal(1160, 64), normal(1160)), nn.GELU(approximate), dense(normal(40, 1160), normal(40))
    )
    lowered, x = backend().build(unit(block, None, None)), normal(33, 64)
    blocks = lowered.first.layout.block, lowered.second.layout.block
    if backend is VNMDenseInt8:
        wanted = pair(x, block[0], block[2], approximate, HIDDEN // blocks[1] * blocks[1] or blocks[1])
    else:
        bits = 32 if backend is VNMDenseW8A8 else 16
        wanted = pair_of_bytes(x, block[0], block[2], approximate, blocks, bits, (2, 2))
    assert torch.equal(lowered(x), wanted)
    assert torch.equal(lowered(x.bfloat16()), lowered(x.bfloat16().float()).bfloat16())
    assert 1e-4 < near(wanted, block(x)) < 3e-2


@pytest.mark.parametrize("backend", FEW_BITS)
@pytest.mark.parametrize(
    ("channels", "out", "side", "stride", "padding"),
    [(4, 24, 3, 1, 1), (16, 3, 3, 1, "same"), (40, 16, 3, 2, 1), (260, 8, 1, 1, 0), (12, 8, 2, 2, "valid")],
)
def test_a_convolution_is_exact(
    level: str, backend: type[Backend], channels: int, out: int, side: int, stride: int, padding: int | str
) -> None:
    skip_without_vnni(backend)
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, out, side, stride=stride, padding=padding)
    lowered, x = backend().build(unit(conv, None)), normal(3, channels, 9, 13)
    zeros = {"same": side // 2, "valid": 0}[padding] if isinstance(padding, str) else padding
    if backend is VNMDenseInt8:
        wanted = convolution(x, conv.weight, conv.bias, 32_767, stride, zeros)
    else:
        bits = 32 if backend is VNMDenseW8A8 else 16
        wanted = convolution_of_bytes(
            x, conv.weight, conv.bias, lowered.packed.layout.block, bits, stride, zeros, group=2
        )
    assert torch.equal(lowered(x), wanted)
    assert torch.equal(lowered(x.bfloat16()), lowered(x.bfloat16().float()).bfloat16())
    assert 1e-4 < near(wanted, F.conv2d(x, conv.weight, conv.bias, stride, padding)) < 3e-2


def test_a_pruned_layer_is_multiplied_as_a_dense_one(level: str) -> None:
    """Zeros of a pattern among its weights change nothing."""
    layer = dense(sparse(16, 64, NM(2, 4, 4)), None)
    lowered, x = VNMDenseInt8().build(unit(layer, NM(2, 4, 4))), normal(5, 64)
    assert torch.equal(lowered(x), linear(x, layer.weight, None))


@pytest.mark.parametrize("backend", FEW_BITS)
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: nn.Linear(10, 8), "10 input channels"),
        (lambda: nn.Conv2d(3, 8, 3), "3 input channels"),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), "8 groups"),
        (lambda: nn.Conv2d(8, 8, 3, dilation=2), "dilation"),
        (lambda: nn.Conv2d(8, 8, (1, 3)), "squares"),
        (lambda: nn.Linear(8, 8).double(), "float64"),
        (lambda: nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4)), "6 input channels"),
        (lambda: nn.Linear(LARGEST_INNER // 2 + 4, 2), "could leave 32 bits"),
    ],
)
def test_what_they_do_not_take_is_refused(backend: type[Backend], module: Callable[[], nn.Module], reason: str) -> None:
    made = module()
    dtype = next(made.parameters()).dtype
    patterns = [None for layer in made.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    assert reason in str(backend().refusal(unit(made, *patterns, dtype=dtype)))


@pytest.mark.parametrize(("backend", "most"), [(VNMDenseInt8, LARGEST_INNER), (VNMDenseW8A8, LARGEST_INNER_OF_BYTES)])
def test_as_many_channels_as_32_bits_hold_are_taken(backend: type[Backend], most: int) -> None:
    skip_without_vnni(backend)
    channels = most // 2 // 4 * 4
    layer, x = dense(torch.ones(1, channels), None), torch.ones(1, channels)
    one = unit(layer, None)
    assert backend().refusal(one) is None
    assert near(backend().build(one)(x), layer(x)) < 1e-2
    with pytest.raises(CompressorError, match="do not fit 32 bits"):
        backend().build(unit(dense(torch.ones(1, 2 * channels), None), None))


# --- In a plan. ---


def bytes_here() -> str:
    return "vnm-dense-w8a8" if level_here() in VNNI else "vnm-dense-w7a8"


def test_they_are_dense_forms_that_are_tried_where_an_error_is_allowed() -> None:
    pattern = NM(2, 4, 4)
    model, x = nn.Sequential(dense(sparse(64, 64, pattern), None), nn.SiLU(), nn.Linear(64, 64)), normal(40, 64)
    names = [bytes_here(), "vnm-dense-int8"]
    assert all(layer.candidate(name) is None for layer in compressor.lower(model, x).plan.layers for name in names)
    plan = compressor.lower(model, x, tolerance=0.05, cache=False).plan
    for layer in plan.layers:
        coarse, fine = (layer.candidate(name) for name in names)
        assert coarse is not None and coarse.median_ms is not None and coarse.error is not None
        assert fine is not None and fine.error is not None and fine.error < coarse.error < 0.05
    sparse_one = plan.layers[0].candidate(bytes_here().replace("-dense", ""))
    assert sparse_one is not None and names[0] in sparse_one.against  # a dense form, which it has to beat
    tight = compressor.lower(model, x, tolerance=1e-4, cache=False).plan.layers[1].candidate(names[0])
    assert tight is not None and "above 1e-04" in str(tight.refused) and tight.median_ms is None


class Residual(nn.Module):
    """Layers of one shape, whose errors add up to the model's."""

    def __init__(self, pattern: NM | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(6))
        for layer in self.layers if pattern is not None else ():
            layer.weight.data = pattern.mask(layer.weight.abs()).apply(layer.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 2 * F.silu(layer(x))
        return x


@pytest.mark.usefixtures("few_bits_fast")
def test_a_model_that_was_never_pruned_gains_in_few_bits_within_an_error() -> None:
    model, x = Residual(None).eval(), normal(64, 128)
    found = compressor.lower(model, x, max_error=0.05, cache=False)
    assert found.plan.choice == "dense" and {layer.choice for layer in found.plan.layers} == {bytes_here()}
    form = found.plan.form("dense")
    assert form is not None and form.products == (bytes_here()[-4:],)
    assert f"dense, in {bytes_here()[-4:]}, has 6.67x the speed of eager" in found.plan.reason
    with torch.no_grad():
        wanted = model(x)
        assert 1e-3 < near(found.model(x), wanted) < 0.05
        again = compressor.lower(model, x, max_error=0.05, plan=Plan.model_validate_json(found.plan.model_dump_json()))
        assert torch.equal(again.model(x), found.model(x))
        exact = compressor.lower(model, x, max_error=1e-4, cache=False)
        assert near(exact.model(x), wanted) < 1e-4
    compressor.lower(model, x, max_error=0.05)
    kept = compressor.lower(model, x, max_error=0.05).plan  # by times from the cache
    assert [called(kept, name) for name in ("eager", "dense")] == ["eager", "prepacked, few bits"]
    packed, dense_form = kept.form("dense, packed"), kept.form("dense")
    assert packed is not None and packed.products == () and dense_form is not None and dense_form.products


@pytest.mark.usefixtures("few_bits_fast")
@pytest.mark.parametrize("pattern", [None, NM(2, 4, 4)])
def test_the_dense_form_goes_back_as_far_as_the_lowered_one(pattern: NM | None) -> None:
    """Where the model's error asks for finer forms in some layers, the dense form has them in those, and few bits in all."""
    model, x = Residual(pattern).eval(), normal(64, 128)
    free = compressor.lower(model, x, max_error=0.5, cache=False).plan
    assert free.search is not None and free.search.free is not None and not free.alike
    most = 0.7 * free.search.free
    found = compressor.lower(model, x, max_error=most, cache=False)
    plan = found.plan
    choices = {layer.choice for layer in plan.layers}
    name = bytes_here() if pattern is None else bytes_here().replace("-dense", "")
    assert choices == {name, "vnm-dense-int8" if pattern is None else "vnm-int8"}
    form = plan.form("dense")
    assert form is not None and set(form.products) == {"int8", bytes_here()[-4:]}
    assert form.error is not None and form.error <= most and plan.alike and plan.exact == ()
    assert "none in few bits" not in plan.reason
    with torch.no_grad():
        assert near(found.model(x), model(x)) <= most
        again = compressor.lower(model, x, max_error=most, plan=Plan.model_validate_json(plan.model_dump_json()))
        assert torch.equal(again.model(x), found.model(x))
        few, floats = (dense_forms(model, x, plan, few_bits=few)["dense"] for few in (True, False))
        assert near(floats(x), model(x)) < 1e-5
        assert 1e-3 < near(few(x), model(x)) <= most
