"""The kernels of a masked step against torch, bit for bit, in Triton's interpreter; that they compile; and where they are used.

Only a GPU can show their speed, and that what ptxas makes of them gives the same bits (`tests/test_gpu.py`; `on_gpu` asks it, too).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from interpreter import INTERPRETS, compiled_for, in_the_interpreter, needs_triton, run_in_the_interpreter
from torch import Tensor, nn

import compressor
from compressor import NM, CompressorError, FineTuning, Training
from compressor.plugins.dense import DenseContinued
from compressor.plugins.sparsedm import SparseDM
from compressor.sparsity import estimator, on_gpu, pattern
from compressor.sparsity.estimator import SRSTE
from compressor.sparsity.pattern import Mask
from compressor.training import shadow

NAME = "compressor.sparsity.triton_kernels"


@pytest.fixture
def interpreted() -> ModuleType:
    return in_the_interpreter(NAME)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETS, reason="it is what runs")
def test_all_of_this_file_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def scores(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Many ties, both infinities and both zeros."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, -2.0, 3.5, float("inf"), -float("inf")])
    return values[torch.randint(8, shape, generator=torch.Generator().manual_seed(0))].to(dtype)


def same_bits(mine: Tensor, theirs: Tensor) -> bool:
    return torch.equal(mine, theirs) and torch.equal(mine.signbit(), theirs.signbit())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("n", "m", "shape"),
    [
        (2, 4, (33, 64)),
        (1, 2, (3, 6)),
        (3, 8, (4, 16, 3, 3)),
        (6, 8, (5, 8)),
        (9, 16, (2, 32, 2)),
        (4, 4, (2, 8)),
        (1, 4, (9, 16)),
        (3, 4, (1024, 4)),
        (2, 4, (3, 8, 5)),
    ],
)
def test_masks_are_those_of_torch(interpreted, n, m, shape, dtype) -> None:
    score = scores(shape, dtype)
    assert interpreted.takes(score, m, 1)
    assert torch.equal(interpreted.keep(score, n, m), NM(n, m).survivors(score))
    assert torch.equal(interpreted.keep(score, n, m, True), NM(n, m).survivors(score.abs()))
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(interpreted.keep(normal, n, m, True), NM(n, m).survivors(normal.abs()))


@needs_triton
def test_what_it_does_not_take_is_left_to_torch(interpreted) -> None:
    score = scores((4, 12))
    assert not interpreted.takes(score, 3, 1) and not interpreted.takes(score, 32, 1)
    assert not interpreted.takes(score, 4, 2) and not interpreted.takes(score.int(), 4, 1)


@needs_triton
def test_a_nan_is_told_and_other_numbers_are_not(interpreted) -> None:
    flag, score = torch.zeros(3, dtype=torch.int32), scores((700, 8))
    interpreted.keep(score, 2, 4, True, flag[1])
    assert flag.tolist() == [0, 0, 0]
    score[699, 7] = torch.nan
    interpreted.keep(score, 2, 4, True, flag[1])
    assert flag.tolist() == [0, 1, 0]


@needs_triton
@pytest.mark.parametrize("size", [(5, 8), (40, 64, 3)])
def test_weights_flips_and_gradients_are_those_of_torch(interpreted, size) -> None:
    rng = torch.Generator().manual_seed(0)
    dense, grad = (torch.randn(size, generator=rng) for _ in range(2))
    dense[0, 0] = -0.0
    dense[1, 1] = torch.nan
    mask, before = (Mask(torch.rand(size, generator=rng) < 0.5, NM(1, 1)) for _ in range(2))
    sparse = torch.full(size, 7.0)
    flips = interpreted.settle_(sparse, dense, mask.keep, before.keep)
    assert flips.dtype == torch.int64 and int(flips) == int((mask.keep ^ before.keep).sum()) > 0
    wanted = mask.apply(dense)
    assert torch.equal(sparse.nan_to_num(9.0), wanted.nan_to_num(9.0)) and torch.equal(
        sparse.signbit(), wanted.signbit()
    )
    assert int(interpreted.settle_(sparse, dense, mask.keep, None)) == 0
    dense[1, 1] = 1.5
    decay = 2e-4
    assert same_bits(interpreted.refined(grad, dense, mask.keep, decay), grad + decay * mask.rest(dense))


@needs_triton
def test_the_check_before_the_first_use_finds_a_wrong_kernel(interpreted, monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert interpreted.differences(cpu) is None
    for name, wrong, found in (
        ("keep", lambda score, n, m: score > 0, "masks"),
        ("settle_", lambda sparse, dense, keep, before: sparse.copy_(dense).sum(), "weights"),
        ("refined", lambda grad, dense, keep, decay: grad + 2 * decay * dense, "gradients"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(interpreted, name, wrong)
            assert found in interpreted.differences(cpu)


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETS, reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_the_kernels_compile_for_gpus(capability) -> None:
    """To machine code, without a GPU; the product of a gradient stays apart from its sum."""
    kernels = importlib.import_module(NAME)
    types = {
        "keep": "*i8",
        "nan": "*i32",
        "before": "*i8",
        "flips": "*i32",
        "groups": "i32",
        "inner": "i32",
        "count": "i32",
    }
    constants = {"N": 2, "M": 4, "MAGNITUDE": True, "COUNTED": True, "BLOCK": 512}
    for kernel in (kernels._keep, kernels._keep_of_four, kernels._settle, kernels._refined):
        own = {**types, "decay": "fp32"} | ({"keep": "*i32"} if kernel is kernels._keep_of_four else {})
        made = compiled_for(capability, kernel, own, constants, **kernels._UNFUSED)
        if kernel is kernels._refined:
            assert "mul" in made.asm["ptx"] and "fma.rn.f32" not in made.asm["ptx"]


# --- Where they are used: with the interpreted kernels in the place of a GPU's. ---


@pytest.fixture
def used(interpreted, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every place takes the kernels for any tensor; the names of those that were called."""
    calls: list[str] = []
    seen: Any = ModuleType("seen")
    seen.takes = interpreted.takes
    for name in ("keep", "settle_", "refined"):
        seen.__dict__[name] = lambda *arguments, name=name: (
            calls.append(name),
            getattr(interpreted, name)(*arguments),
        )[1]
    for module in (pattern, estimator, shadow):
        monkeypatch.setattr(module, "kernels_for", lambda *tensors: seen)
    return calls


@needs_triton
def test_a_run_with_the_kernels_is_a_run_without(used, model, adapter, samples, monkeypatch) -> None:
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.undo()
        used.clear()
        training = Training(steps=5, batch_size=8, lr=0.05)
        run = FineTuning(model, SparseDM(), adapter=adapter, data=samples, training=training)
        records = list(compressor.steps(run))
        assert set(used) == ({"keep", "settle_", "refined"} if kernels else set())
        found.append((records, [value.detach().clone() for value in run.finish().model.parameters()]))
    assert found[0][0] == found[1][0] and sum(step.flip_rate for step in found[0][0]) > 0
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0][1], found[1][1], strict=True))


@needs_triton
def test_masks_by_the_kernels_refuse_what_masks_refuse(used) -> None:
    good, odd = torch.ones(4, 8), torch.ones(4, 7)
    for ask in (NM(2, 4).masks, NM(2, 4).magnitude_masks):
        assert set(ask({"a": good, "b": good})) == {"a", "b"}
        with pytest.raises(CompressorError, match="the score holds NaN"):
            ask({"a": good, "b": good * torch.nan})
        with pytest.raises(CompressorError, match="divisible by 4"):
            ask({"a": odd})
    used.clear()
    assert NM(2, 4, 2).magnitude_masks({"a": good})["a"].pattern == NM(2, 4, 2)
    assert not used


def test_tensors_on_a_cpu_are_torchs(monkeypatch) -> None:
    monkeypatch.setattr(on_gpu, "_tried", lambda index: pytest.fail("asked for a GPU"))
    assert on_gpu.kernels_for(torch.ones(2, 4)) is None
    assert SRSTE().gradient(torch.ones(2, 4), torch.ones(2, 4), NM(2, 4).mask(torch.ones(2, 4))).shape == (2, 4)


def test_kernels_that_fail_are_left_with_one_warning(monkeypatch) -> None:
    class Broken(ModuleType):
        def differences(self, device: torch.device) -> str | None:
            raise RuntimeError("no C compiler\nin sight")

    monkeypatch.setitem(sys.modules, NAME, Broken(NAME))
    monkeypatch.setattr("compressor.sparsity.triton_kernels", Broken(NAME), raising=False)
    on_gpu.checked.cache_clear()
    with pytest.warns(UserWarning, match="RuntimeError: no C compiler") as seen:
        assert on_gpu._tried(0) is None and on_gpu._tried(0) is None
    assert len(seen) == 1
    on_gpu.checked.cache_clear()


# --- The Shadow's memory. ---


def test_a_step_that_fails_leaves_the_shadow_and_its_model_apart(model) -> None:
    """The parameter has the dense weight's memory while the optimizer works, and its own again after the next step."""
    weights = {name: value for name, value in model.named_parameters() if value.dim() == 2}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = {name: value.data_ptr() for name, value in weights.items()}
    held = shadow.Shadow(weights, SparseDM(), optimizer)
    seen: list[bool] = []
    failing = optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("once")))
    for value in weights.values():
        value.grad = torch.ones_like(value)
    with pytest.raises(MemoryError):
        optimizer.step()
    failing.remove()
    seen += [weights[name].data_ptr() == dense.data_ptr() for name, dense in held.dense.items()]
    assert seen == [True, True]
    before = {name: dense.clone() for name, dense in held.dense.items()}
    for value in weights.values():
        value.grad = torch.ones_like(value)
    optimizer.step()
    for name, value in weights.items():
        assert value.data_ptr() == own[name] != held.dense[name].data_ptr()
        assert not torch.equal(held.dense[name], before[name])
        assert torch.equal(value.detach(), held.masks[name].apply(held.dense[name]))


def test_an_optimizer_that_gives_other_memory_is_followed(model) -> None:
    class Renewing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for value in group["params"]:
                    value.data = value.data - value.grad

    weights = {name: value for name, value in model.named_parameters() if value.dim() == 2}
    optimizer = Renewing(weights.values(), lr=0.1)
    held = shadow.Shadow(weights, DenseContinued(), optimizer)
    wanted = {name: dense - 1 for name, dense in held.dense.items()}
    for value in weights.values():
        value.grad = torch.ones_like(value)
    optimizer.step()
    for name, value in weights.items():
        assert torch.equal(held.dense[name], wanted[name]) and torch.equal(value.detach(), wanted[name])
        assert isinstance(value, nn.Parameter)
