"""The kernel that brings inputs to 8 bits, against torch, in Triton's interpreter, and that it compiles.

The interpreter rounds fp8 without a carry, so whole numbers are compared: all but the rounding is the same.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

import pytest
import torch
from interpreter import INTERPRETS, compiled_for, in_the_interpreter, needs_triton, run_in_the_interpreter

from compressor import CompressorError
from compressor.lower import quantised
from compressor.lower.quantised import rescaled
from compressor.sparsity.codes import gelu_quantised

# NumPy warns where a GPU is silent: of an exponential that becomes infinite, as in a GELU, and of NaN that becomes a whole number.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

NAME = "compressor.lower.triton_quantised"


@pytest.fixture
def eight() -> ModuleType:
    torch.manual_seed(0)  # a number halfway between two codes may go to either
    return in_the_interpreter(NAME)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETS, reason="it is what runs")
def test_all_of_this_file_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@needs_triton
@pytest.mark.parametrize("shape", [(3, 1152), (2, 64), (4, 1), (3, 5), (17, 200), (2, 4608)])
@pytest.mark.parametrize("gelu", ["", "tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
@pytest.mark.parametrize("scaled", ["", "scaled", "scaled and biased"])
def test_codes_are_those_of_torch(eight, shape, gelu, dtype, scaled) -> None:
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=rng) * (50 if dtype == torch.int32 else 1)).to(dtype)
    x[0, : shape[1] // 2] = 0
    more = [
        torch.rand(shape[0], 1, generator=rng),
        torch.rand(shape[1], generator=rng),
        torch.randn(shape[1]).bfloat16(),
    ]
    given = {"": [None, None, None], "scaled": [*more[:2], None]}.get(scaled, more)
    assert eight.takes(x)
    codes, scale = eight.quantised(x, torch.int8, gelu, *given)
    wanted, its = gelu_quantised(rescaled(x, *given, torch.float32) if scaled else x, torch.int8, gelu)
    torch.testing.assert_close(scale, its, rtol=1e-5, atol=0)
    off = (codes.int() - wanted.int()).abs()
    assert int(off.max()) <= 1 and int((off > 0).sum()) <= 1 + off.numel() // 200


@needs_triton
def test_rows_that_do_not_lie_close_and_sizes_that_it_does_not_take(eight) -> None:
    wide = torch.randn(6, 128)
    for x in (wide[:, :50], wide.t(), wide[::2], wide[:, ::2]):
        assert torch.equal(eight.quantised(x, torch.int8, "")[0], gelu_quantised(x, torch.int8, "")[0])
    assert not eight.takes(torch.empty(0, 8)) and not eight.takes(torch.empty(8, 0))
    assert not eight.takes(torch.empty(1, 2**16 + 1)) and not eight.takes(torch.empty(4, 4, dtype=torch.float64))


@needs_triton
def test_a_gelu_of_negative_numbers_keeps_its_digits(eight) -> None:
    x = torch.linspace(-9, -3, 256).repeat(3, 1) - torch.arange(3)[:, None]
    _, scale = eight.quantised(x, torch.int8, "tanh")
    wanted = torch.nn.functional.gelu(x.double(), approximate="tanh").abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(scale.double(), wanted, rtol=2e-5, atol=0)


@needs_triton
def test_scales_may_lie_apart(eight) -> None:
    x, wide = torch.randn(4, 32), torch.rand(4, 64)
    given = wide[:, ::7][:, :1], wide[0, ::2], wide[1, 1::2]
    codes, _ = eight.quantised(x, torch.int8, "", *given)
    assert torch.equal(codes, gelu_quantised(x * given[0] * given[1] + given[2], torch.int8, "")[0])


@needs_triton
def test_what_is_no_number_stays_none(eight) -> None:
    x = torch.randn(4, 64)
    x[1, 5], x[2, 5] = torch.nan, torch.inf
    codes, scale = eight.quantised(x, torch.int8, "")
    assert (codes.float() * scale).isfinite().all(1).tolist() == [True, False, False, True]


@needs_triton
def test_the_check_finds_codes_that_are_wrong(eight, monkeypatch) -> None:
    cpu, right = torch.device("cpu"), eight.quantised
    assert eight.differences(cpu) is None
    for wrong, found in (
        (lambda x, dtype, gelu, *more: right(x, dtype, "", *more), r"of a GELU"),
        (lambda x, dtype, gelu, *more: right(x, dtype, gelu), r"of a scaled product"),
        (lambda x, dtype, gelu, *more: right(x, dtype, gelu, *more[:2]), r"of a scaled product"),
        (lambda x, *more: [-part for part in right(x, *more)], r"codes$"),
    ):
        monkeypatch.setattr(eight, "quantised", wrong)
        assert re.search(found, eight.differences(cpu))


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETS, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(("capability", "codes"), [(80, "*i8"), (90, "*fp8e4nv"), (120, "*fp8e4nv")])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_kernel_of_codes_compiles_for_gpus(capability, codes, scaled) -> None:
    kernels = importlib.import_module(NAME)
    types = {
        "x": "*bf16",
        "bias": "*bf16",
        "codes": codes,
        "count": "i32",
        "stride": "i32",
        "columns": "i32",
        "largest": "fp32",
    }
    constants: dict[str, Any] = {"SCALED": scaled, "BIASED": scaled, "KIND": 1, "ROUND": codes == "*i8"}
    constants |= {"ROWS": 8, "A": 4096, "B": 512}
    constants |= {} if scaled else dict.fromkeys(("by_row", "by_column", "bias"))
    compiled_for(capability, kernels._quantise, types, constants, num_warps=4)


def test_codes_are_made_by_torch_where_there_is_no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(quantised, "checked", lambda *_: pytest.fail("asked for a GPU"))
    x = torch.randn(5, 64)
    codes, scale = torch.ops.compressor.quantised_rows(x, True, "tanh", None, None, None)
    assert torch.equal(codes, gelu_quantised(x, torch.int8, "tanh")[0]) and scale.shape == (5, 1)
    more = torch.rand(5, 1), torch.rand(64), torch.randn(64)
    codes, _ = torch.ops.compressor.quantised_rows(x, True, "", *more)
    assert torch.equal(codes, gelu_quantised(x * more[0] * more[1] + more[2], torch.int8, "")[0])
    arguments = (x, False, "none", *more)
    with pytest.raises(CompressorError, match="go together"):
        torch.ops.compressor.quantised_rows(x, True, "", None, None, more[2])
    torch.library.opcheck(torch.ops.compressor.quantised_rows, arguments, test_utils=("test_schema", "test_faketensor"))
