"""What training computes in: bfloat16 passes over float32 weights, the optimizer of the device, and runs that go on to the bit."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import FineTuning, Training, recipe
from compressor.errors import UsageError
from compressor.plugins.sparsedm import SparseDM
from compressor.runs import facts
from compressor.saving.state import load_state, save_state
from compressor.training.arithmetic import adamw, described, precision, restore_optimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def run(model: nn.Module, adapter: Any, samples: Tensor) -> Callable[..., FineTuning]:
    """A `FineTuning` in bfloat16 with small defaults."""

    def start(previous: Any = None, **changes: Any) -> FineTuning:
        settings = {"steps": 6, "batch_size": 8, "lr": 0.01, "warmup": 2, "dtype": "bfloat16", **changes}
        pruner, training = SparseDM(teacher=0.5), Training(**settings)
        return FineTuning(model, pruner, adapter=adapter, data=samples, training=training, previous=previous)

    return start


def floats(tree: Any) -> list[Tensor]:
    """The floating-point tensors in nested dicts and lists."""
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() else []
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return [one for value in inner for one in floats(value)]


@pytest.mark.parametrize(("dtype", "seen"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_products_are_in_the_precision_and_all_that_is_kept_in_float32(run, dtype, seen) -> None:
    tuning, found = run(dtype=dtype), []
    for network in (tuning.student, tuning.teacher):
        network[0].register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    tuning.advance()
    assert found == [seen, seen]
    kept = floats(tuning.state())
    assert len(kept) > 20 and {one.dtype for one in kept} == {torch.float32}
    assert all(parameter.grad.dtype == torch.float32 for parameter in tuning.parameters.values())


def test_bfloat16_changes_what_is_learned_and_keeps_2_4(run) -> None:
    found = {}
    for dtype in ("float32", "bfloat16"):
        tuning = run(dtype=dtype)
        losses = [tuning.advance().loss for _ in range(6)]
        found[dtype] = losses
        result = tuning.finish()
        for name, mask in result.masks.items():
            mask.pattern.verify(result.model.get_parameter(name).detach())
    assert found["float32"] != found["bfloat16"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "clip": 0.1}, {"mode": "lora"}])
def test_a_run_in_bfloat16_goes_on_to_the_bit(run, tmp_path, changes) -> None:
    whole = run(**changes)
    expected = [whole.advance() for _ in range(6)]
    first = run(**changes)
    for _ in range(3):
        first.advance()
    save_state(tmp_path, first.state())
    second = run(previous=load_state(tmp_path), **changes)
    assert [second.advance() for _ in range(3)] == expected[3:]
    for mine, theirs in zip(second.finish().model.parameters(), whole.finish().model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_optimizer_is_fused_on_gpus_alone() -> None:
    weights = [nn.Parameter(torch.randn(4, 4))]
    training = Training(lr=0.5, betas=(0.5, 0.6), weight_decay=0.7)
    on_gpu, on_cpu = (adamw(weights, training, device) for device in (GPU, CPU))
    assert on_gpu.defaults["fused"] is True and on_cpu.defaults["fused"] is None
    for optimizer in (on_gpu, on_cpu):
        assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (0.5, (0.5, 0.6))
        assert optimizer.defaults["weight_decay"] == 0.7


def test_an_optimizer_goes_on_with_the_code_of_its_own_device() -> None:
    """A checkpoint of a GPU's fused AdamW goes on on a CPU as one that was written there."""

    def trained(device: torch.device) -> tuple[nn.Parameter, torch.optim.AdamW]:
        weight = nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8))
        return weight, adamw([weight], Training(), device)

    weight, fused = trained(GPU)
    weight.grad = torch.ones_like(weight)
    fused.step()
    found = []
    for flag in (True, None):
        state = copy.deepcopy(fused.state_dict())
        state["param_groups"] = [{**group, "fused": flag} for group in state["param_groups"]]
        state["state"] = {str(index): value for index, value in state["state"].items()}  # as JSON has it
        again, optimizer = trained(CPU)
        restore_optimizer(optimizer, state)
        assert optimizer.param_groups[0]["fused"] is None
        again.grad = torch.full_like(again, 0.5)
        optimizer.step()
        found.append(again.detach())
    assert torch.equal(*found)


def test_auto_is_bfloat16_on_gpus_that_have_it(monkeypatch) -> None:
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert precision(Training(), GPU) == (torch.bfloat16 if has else torch.float32)
        assert precision(Training(dtype="float32"), GPU) == torch.float32
        assert precision(Training(), CPU) == torch.float32
    assert described(Training(dtype="bfloat16"), GPU) == {"passes": "bfloat16 (autocast)", "optimizer": "AdamW, fused"}


def test_a_run_says_what_it_computes_in(finished) -> None:
    found = json.loads((finished / "run.json").read_text())
    assert found["arithmetic"] == {"passes": "float32", "optimizer": "AdamW"}
    moved = {**found, "arithmetic": {"passes": "bfloat16 (autocast)", "optimizer": "AdamW, fused"}}
    assert facts.changed(found, moved) == [
        "optimizer AdamW, now AdamW, fused",
        "passes float32, now bfloat16 (autocast)",
    ]
    assert not facts.changed({key: value for key, value in found.items() if key != "arithmetic"}, found)


# --- Compiled. ---

pytest_compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


@pytest.fixture
def frames() -> Iterator[Callable[[], int]]:
    """How many graphs torch.compile has made since the test began."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield lambda: int(counters["stats"]["unique_graphs"])
    torch.compiler.reset()


@pytest.mark.slow
@pytest_compiles
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_run_is_the_run_up_to_rounding_and_compiles_once(run, frames) -> None:
    settings = {"dtype": "float32", "accumulate": 3}  # pieces of two sizes: 3, 3 and 2 samples
    compiled, plain = run(compiled=True, **settings), run(**settings)
    losses, seen = [], []
    for _ in range(6):
        losses.append((compiled.advance(), plain.advance()))
        seen.append(frames())
    flips = sum(mine.flip_rate for mine, _ in losses)
    assert flips > 0  # the masks did change
    assert seen[0] > 0 and seen[1:] == seen[:1] * 5
    for mine, theirs in losses:
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
    compiled.state()  # asks the model once more, as written
    assert frames() == seen[0]
    result = compiled.finish()
    assert result.model._compiled_call_impl is None
    assert type(result.model) is nn.Sequential
    for name, mask in result.masks.items():
        mask.pattern.verify(result.model.get_parameter(name).detach())


@pytest.mark.slow
@pytest_compiles
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_run_goes_on_to_the_bit(run, frames, tmp_path) -> None:
    settings = {"compiled": True, "accumulate": 3}  # in bfloat16
    whole = run(**settings)
    expected = [whole.advance() for _ in range(4)]
    first = run(**settings)
    for _ in range(2):
        first.advance()
    save_state(tmp_path, first.state())
    torch.compiler.reset()  # as in a new process
    second = run(previous=load_state(tmp_path), **settings)
    assert [second.advance() for _ in range(2)] == expected[2:]


def test_where_nothing_compiles_it_is_said_at_once(run, monkeypatch) -> None:
    def failing(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", failing)
    with pytest.raises(
        UsageError, match=r"train.compiled: torch.compile does not work here: RuntimeError: no compiler"
    ):
        run(compiled=True)
    assert run(compiled=True, steps=0).done == 0  # nothing is trained


def test_the_setting_is_written_where_it_is_given_alone() -> None:
    given = recipe.Recipe.model_validate({"train": {"compiled": True}})
    assert recipe.identity(given)["train"]["compiled"] and "compiled" not in recipe.identity(recipe.Recipe())["train"]
    assert described(given.train, CPU)["passes"] == "float32, compiled"
