"""The operators that the extension itself gives to torch: what compiled models call."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.lower import vnm_operators
from compressor.lower.vnm import VNMConv, VNMLinear, VNMPair
from compressor.lower.vnm_kernels import VNNI, kernels, level
from compressor.lower.vnm_operators import attention
from compressor.lower.vnm_weight import KernelWeight, Lanes
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.pattern import NM

pytestmark = pytest.mark.skipif(not vnm_operators._SERVED, reason="kernels that are not installed")

PATTERN = NM(2, 4, 4)
operators: Any = torch.ops.compressor


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def sparse(shape: tuple[int, ...], pattern: NM | Clustered = PATTERN) -> Tensor:
    weight = torch.randn(shape)
    return pattern.mask(weight.abs()).apply(weight)


def packed(*shape: int, biased: bool = True, pattern: NM | Clustered = PATTERN, **options: Any) -> KernelWeight:
    bias = torch.randn(shape[0]) if biased else None
    return KernelWeight(sparse(shape, pattern), bias, pattern, **{"block": 16, **options})


def compiled(model: nn.Module) -> tuple[Any, list[str]]:
    """It in the graph that torch makes of it, run line by line; and the operators there once it ran."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True), seen


class _Attention(nn.Module):
    def __init__(self, lanes: Lanes) -> None:
        super().__init__()
        self.lanes = lanes

    def forward(self, qkv: Tensor) -> Tensor:
        return attention(*qkv.permute(2, 0, 3, 1, 4), 0.3, self.lanes)


LANES = [Lanes.FLOATS, Lanes.CODES, Lanes.BYTES]


def layers(lanes: Lanes) -> dict[str, tuple[nn.Module, Tensor]]:
    """A layer of each kind whose weights have such lanes, and an input."""
    clustered = Clustered(2, 4, 4)
    return {
        "linear": (VNMLinear(packed(24, 40, lanes=lanes)), torch.randn(2, 37, 40)),
        "clustered": (VNMLinear(packed(24, 40, lanes=lanes, pattern=clustered)), torch.randn(5, 40)),
        "pair": (
            VNMPair(packed(48, 40, lanes=lanes), packed(24, 48, lanes=lanes, biased=False), True),
            torch.randn(37, 40),
        ),
        "conv": (VNMConv(packed(24, 12, 3, 3, lanes=lanes), 3, 2, 1), torch.randn(3, 12, 9, 7)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("kind", ["linear", "clustered", "pair", "conv"])
@torch.no_grad()
def test_a_compiled_layer_gives_the_bits_of_the_same_one_line_by_line(
    kind: str, lanes: Lanes, dtype: torch.dtype
) -> None:
    layer, x = layers(lanes)[kind]
    x = x.to(dtype)
    model, seen = compiled(layer)
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(model(x), layer(x))
    torch.set_num_threads(before)
    name = "linear" if kind == "clustered" else kind
    assert {found for found in seen if "vnm" in found} == {f"compressor.vnm_{name}_direct"}


@pytest.mark.parametrize("lanes", LANES)
@torch.no_grad()
def test_compiled_attention_gives_the_same_bits_and_strides(lanes: Lanes) -> None:
    if lanes == Lanes.BYTES and level() not in VNNI:
        pytest.skip("products of bytes need VNNI")
    layer, x = _Attention(lanes), torch.randn(2, 37, 3, 4, 24)
    model, seen = compiled(layer)
    found, wanted = model(x), layer(x)
    assert torch.equal(found, wanted) and found.stride() == wanted.stride()
    assert "compressor.attention_direct" in seen


@pytest.mark.parametrize("threads", [5, 40])
@torch.no_grad()
def test_every_part_is_done_once_by_more_threads_than_have_a_share_of_their_own(threads: int) -> None:
    image, qkv = torch.randn(90, 12, 9, 7), torch.randn(9, 37, 3, 11, 8)
    layer, attention_layer = VNMConv(packed(24, 12, 3, 3), 3), _Attention(Lanes.FLOATS)
    before = torch.get_num_threads()
    found = []
    for count in (1, threads):
        torch.set_num_threads(count)
        found.append((layer(image), attention_layer(qkv)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
def test_what_is_exported_runs_where_the_extension_gives_torch_nothing() -> None:
    layer, x = layers(Lanes.FLOATS)["linear"]
    exported = torch.export.export(layer, (x,))
    assert "vnm_linear.default" in exported.graph_module.code and "direct" not in exported.graph_module.code
    assert torch.equal(exported.module()(x), layer(x))


def test_torch_finds_them_as_it_says() -> None:
    w, bytes_ = packed(16, 8), packed(16, 8, 3, 3, lanes=Lanes.BYTES)
    x, image = torch.randn(5, 8), torch.randn(2, 8, 5, 5)
    ends = torch.stack((image.amin((1, 2, 3)), image.amax((1, 2, 3))))
    torch.library.opcheck(operators.vnm_linear_direct, (x, w.packed, 16))
    torch.library.opcheck(operators.vnm_pair_direct, (x, w.packed, packed(8, 16).packed, 8, False))
    torch.library.opcheck(operators.vnm_conv_direct, (image, bytes_.packed, ends, 16, 3, 1, 1))
    torch.library.opcheck(operators.vnm_conv_direct, (image, packed(16, 8, 3, 3).packed, image, 16, 3, 2, 0))
    q = torch.randn(2, 3, 5, 8)
    torch.library.opcheck(operators.attention_direct, (q, q, q, 0.5, int(Lanes.FLOATS)))


def test_nothing_to_do_is_done() -> None:
    w = packed(16, 8)
    assert operators.vnm_linear_direct(torch.empty(2, 0, 8), w.packed, 16).shape == (2, 0, 16)
    assert operators.vnm_conv_direct(
        torch.empty(0, 8, 5, 4), packed(16, 8, 3, 3).packed, torch.empty(0), 16, 3, 1, 1
    ).shape == (0, 16, 5, 4)
    assert operators.vnm_linear_direct(torch.empty(2, 0, 8), w.packed, 16).stride() == torch.empty(2, 0, 16).stride()


def changed(w: KernelWeight, place: int, number: int) -> Tensor:
    other = w.packed.clone()
    other[: 2 * 24].view(torch.int64)[place] = number
    return other


NUMBERS = [
    *[(0, 0), (1, 64), (1, -4)],  # what it is, its bytes
    *[(place, number) for place in range(2, 13) for number in (-1, 2**31, 2**40)],  # its layout and its tile
    *[(2, 32), (3, 16), (4, 16), (5, 81), (7, 0), (8, 3), (10, 2), (10, 3), (10, 7), (12, 0)],
    *[(place, number) for place in range(13, 19) for number in (-64, 8, 190, 2**20, 2**62)],  # where its parts are
    *[(13, 0), (14, 0)],
    (19, 0x7FC00001),  # what a cast to fp64 and back makes of it
]


@pytest.mark.parametrize(("place", "number"), NUMBERS)
def test_a_weight_that_would_lead_outside_is_refused(place: int, number: int) -> None:
    w, x = packed(16, 8), torch.randn(3, 8)
    with pytest.raises(RuntimeError):
        operators.vnm_linear_direct(x, changed(w, place, number), 16)


@pytest.mark.parametrize("place", range(13, 19))
def test_a_part_that_ends_outside_is_refused(place: int) -> None:
    w = packed(16, 8, lanes=Lanes.BYTES)
    end = 4 * w.packed.numel() - 4
    with pytest.raises(RuntimeError, match="not as its numbers say"):
        operators.vnm_linear_direct(torch.randn(3, 8), changed(w, place, end), 16)


def test_what_does_not_fit_is_refused() -> None:
    w, x = packed(16, 8), torch.randn(3, 8)
    for wrong in (torch.randn(3, 12), x.double(), x.half(), torch.randn(8, 3).t(), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="another dtype, number of channels or layout"):
            operators.vnm_linear_direct(wrong, w.packed, 16)
    for weight in (w.packed.bfloat16(), w.packed[:10], w.packed.to(torch.float64)):
        with pytest.raises(RuntimeError, match="was cast or moved"):
            operators.vnm_linear_direct(x, weight, 16)
    with pytest.raises(RuntimeError, match="not as its numbers say"):
        operators.vnm_linear_direct(x, w.packed[:-16], 16)
    with pytest.raises(RuntimeError, match="other rows"):
        operators.vnm_linear_direct(x, w.packed, 12)
    with pytest.raises(RuntimeError, match="in their order"):
        operators.vnm_pair_direct(x, w.packed, packed(8, 12).packed, 8, False)


def test_convolutions_refuse_what_does_not_fit() -> None:
    w, x = packed(16, 8, 3, 3), torch.randn(2, 8, 5, 5)
    for where in ((3, 0, 1), (3, 4, 1), (3, 1, 3), (3, 1, -1), (5, 1, 1), (9, 1, 1), (2**40, 1, 1)):
        with pytest.raises(RuntimeError):
            operators.vnm_conv_direct(x, w.packed, x, 16, *where)
    with pytest.raises(RuntimeError, match="these sizes"):
        operators.vnm_conv_direct(x[:, :, :0], w.packed, x, 16, 3, 1, 2)
    with pytest.raises(RuntimeError):
        operators.vnm_conv_direct(torch.randn(2, 8, 2, 2), w.packed, x, 16, 3, 1, 0)
    whole = packed(16, 8, 3, 3, lanes=Lanes.BYTES)
    for largest in (x, torch.zeros(2), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(4, 2)[::2].t()):
        with pytest.raises(RuntimeError, match="largest numbers"):
            operators.vnm_conv_direct(x, whole.packed, largest, 16, 3, 1, 1)


def test_attention_refuses_what_does_not_fit() -> None:
    q = torch.randn(2, 3, 5, 8)
    others = (
        q.double(),
        q[0],
        torch.randn(2, 3, 8, 5).transpose(2, 3),
        torch.randn(2, 3, 5, 9),
        torch.randn(1, 3, 5, 8),
    )
    for key in (*others, torch.randn(2, 3, 4, 8)):
        with pytest.raises(RuntimeError, match="another dtype, shape or layout"):
            operators.attention_direct(q, key, q, 0.5, 0)
    for lanes in (1, 4, -1, 2**33):
        with pytest.raises(RuntimeError, match="does not run at this level"):
            operators.attention_direct(q, q, q, 0.5, lanes)
    with pytest.raises(RuntimeError, match="these sizes"):
        operators.attention_direct(q[:, :, :0], q, q, 0.5, 0)


def test_nothing_is_kept_by_a_call_or_a_refusal() -> None:
    w, x, image = packed(256, 64), torch.randn(512, 64), torch.randn(2, 8, 64, 64)
    conv, q = packed(16, 8, 3, 3), torch.randn(2, 8, 64, 64)

    def some(count: int) -> int:
        for _ in range(count):
            operators.vnm_linear_direct(x, w.packed, 256)
            operators.vnm_conv_direct(image, conv.packed, image, 16, 3, 1, 1)
            operators.attention_direct(q, q, q, 0.5, 0)
            for wrong in (x.clone().double(), x.clone()[:, :32].contiguous()):
                with pytest.raises(RuntimeError):
                    operators.vnm_linear_direct(wrong, w.packed, 256)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = some(20)
    assert some(200) - before < 50_000  # KiB; one kept result a call would be 200 MiB


@torch.no_grad()
def test_a_weight_is_what_it_holds_also_after_it_was_copied_or_read_again() -> None:
    one, other, x = VNMLinear(packed(16, 8)), VNMLinear(packed(16, 8)), torch.randn(3, 8)
    for copied in (copy.deepcopy(one), pickle.loads(pickle.dumps(one)), one.to("cpu")):
        assert torch.equal(copied(x), one(x)) and copied.packed.parts.values.data_ptr() != 0
    taken = copy.deepcopy(one)
    taken.load_state_dict(other.state_dict())
    assert torch.equal(taken(x), other(x)) and not torch.equal(taken(x), one(x))
    assert torch.equal(operators.vnm_linear_direct(x, taken.packed.packed, 16), other(x))
    taken.load_state_dict(one.state_dict(), assign=True)
    assert torch.equal(taken(x), one(x))
    again = copy.deepcopy(one).bfloat16().float()  # which no number outlives
    with pytest.raises(RuntimeError, match="not as its numbers say"):
        operators.vnm_linear_direct(x, again.packed.packed, 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("kind", ["linear", "clustered", "pair", "conv"])
@torch.no_grad()
def test_a_layer_that_was_cast_there_and_back_is_refused(kind: str, lanes: Lanes, dtype: torch.dtype) -> None:
    """Some of its lanes are other numbers then, in every dtype: those of fp64 too, where a lane reads as a signalling NaN."""
    layer, x = layers(lanes)[kind]
    expected, state = layer(x), copy.deepcopy(layer.state_dict())
    cast = layer.to(dtype).float()
    with pytest.raises(CompressorError, match="was cast"):
        cast(x)
    with pytest.raises(RuntimeError, match=r"was cast|not as its numbers say"):
        compiled(cast)[0](x)
    with pytest.raises(CompressorError, match="was cast"):
        torch.export.export(cast, (x,), strict=False)
    cast.load_state_dict(state)
    assert torch.equal(torch.export.export(cast, (x,), strict=False).module()(x), expected)


ELSEWHERE = """
import pickle, sys
import torch
from compressor.lower import vnm_kernels
layer = pickle.load(open(sys.argv[1], "rb"))
with torch.no_grad():
    torch.compile(layer, backend="eager", fullgraph=True)(torch.randn(3, 8))
print(vnm_kernels.kernels.cache_info().currsize, vnm_kernels.import_module("compressor.lower._vnm").level())
"""


def test_a_process_that_runs_only_what_was_compiled_takes_the_level_that_it_was_told(tmp_path: Path) -> None:
    file = tmp_path / "layer"
    file.write_bytes(pickle.dumps(VNMLinear(packed(16, 8))))
    told = {**os.environ, "COMPRESSOR_CPU_LEVEL": "portable"}
    ran = subprocess.run([sys.executable, "-c", ELSEWHERE, file], env=told, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["0", "portable"]
    wrong = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, file],
        env={**told, "COMPRESSOR_CPU_LEVEL": "mmx"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode and "COMPRESSOR_CPU_LEVEL" in wrong.stderr


def test_they_are_given_to_torch_once() -> None:
    extension, _ = kernels()
    assert extension is not None and vnm_operators._SERVED
    assert vnm_operators.served()  # again, with no second registration
    with pytest.raises(TypeError, match="torch's functions"):
        extension.serve(1, 2)
    with pytest.raises(CompressorError, match="was cast"):
        VNMLinear(packed(16, 8)).bfloat16()(torch.randn(3, 8))
