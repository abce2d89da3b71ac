"""Optimizers and memory: state in 8 bits or in the machine's memory, and what a run does not hold twice."""

from __future__ import annotations

import copy
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import Adapter, CompressorError, saving
from compressor.errors import UsageError
from compressor.plugins.sparsedm import SparseDM
from compressor.sparsity.estimator import StraightThrough
from compressor.sparsity.notation import parse
from compressor.sparsity.pattern import Mask
from compressor.training.optimizers import Visiting, average_, optimizer_of, revived, stored
from compressor.training.settings import Training

EIGHT = {"optimizer": "adamw-8bit"}
ALL = {"offload": ["optimizer", "ema", "shadow"]}


def large() -> nn.Sequential:
    """A model with weights that are kept in 8 bits, from 4,096 entries on, and others."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16))


def tuning(adapter: Adapter, samples: Tensor, previous: Any = None, steps: int = 6, **settings: Any) -> Any:
    training = Training(steps=steps, batch_size=8, device="cpu", lr=1e-2, **settings)
    return compressor.FineTuning(
        large(), SparseDM(), adapter=adapter, data=samples, training=training, previous=previous
    )


def finished(run: Any) -> dict[str, Tensor]:
    list(compressor.steps(run))
    return dict(run.finish().model.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("settings", [{}, ALL, EIGHT, {**EIGHT, "offload": ["ema", "shadow"]}, {"ema": 0.0}])
def test_an_interrupted_run_ends_with_the_same_bytes(
    adapter: Adapter, samples: Tensor, tmp_path: Path, settings: dict[str, Any]
) -> None:
    if settings.get("optimizer"):
        pytest.importorskip("torchao")
    whole = finished(tuning(adapter, samples, **settings))
    first = tuning(adapter, samples, **settings)
    for _ in range(3):
        first.advance()
    (tmp_path / "state").mkdir()
    saving.save_state(tmp_path / "state", first.state())
    assert same(finished(tuning(adapter, samples, saving.load_state(tmp_path / "state"), **settings)), whole)
    assert same(finished(first), whole)


def test_a_state_that_is_elsewhere_gives_the_numbers_of_adamw(adapter: Adapter, samples: Tensor) -> None:
    assert same(finished(tuning(adapter, samples)), finished(tuning(adapter, samples, **ALL)))


def test_hooks_of_an_optimizer_whose_state_visits_are_called_once(model: nn.Module) -> None:
    optimizer = optimizer_of(Training(offload=["optimizer"]), model.parameters(), torch.device("cpu"))
    assert isinstance(optimizer, Visiting)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(2, 16)).sum().backward()
    next(iter(model.parameters())).grad = None
    optimizer.step()
    assert called == ["before", "after"]
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["0.bias", "2.weight", "2.bias"]  # what has no gradient stays


def test_moments_in_8_bits_take_a_quarter_and_learn_as_well(adapter: Adapter, samples: Tensor) -> None:
    pytest.importorskip("torchao")
    runs = {name: tuning(adapter, samples, steps=60, **more) for name, more in (("float", {}), ("eight", EIGHT))}
    losses = {name: [step.noise_loss for step in compressor.steps(run)] for name, run in runs.items()}
    ends = {name: sum(found[-10:]) / 10 for name, found in losses.items()}
    assert ends["float"] < 0.95 * losses["float"][0]
    assert ends["eight"] == pytest.approx(ends["float"], rel=0.05)
    moments = runs["eight"].state()["optimizer"]["state"]
    sizes = [part["exp_avg"] for part in moments.values()]
    assert [isinstance(part, dict) for part in sizes] == [True, False, True, False]
    assert sizes[0]["codes"].dtype == torch.uint8 and sizes[0]["codes"].numel() == 16 * 256
    assert sum(value.nbytes for value in sizes[0].values() if isinstance(value, Tensor)) < 16 * 256 * 4 / 2


def test_a_state_is_stored_in_plain_tensors_and_revived(model: nn.Module) -> None:
    pytest.importorskip("torchao")
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = optimizer_of(Training(optimizer="adamw-8bit"), [weight], torch.device("cpu"))
    weight.grad = torch.randn(64, 64)
    optimizer.step()
    before = optimizer.state_dict()
    after = revived(stored(before))
    for name in ("exp_avg", "exp_avg_sq"):
        one, other = before["state"][0][name], after["state"][0][name]
        assert type(one) is type(other) and torch.equal(one.dequantize(), other.dequantize())
        assert one.signed == other.signed and one.dtype == other.dtype and one.block_size == other.block_size


def test_a_second_moment_too_small_for_8_bits_makes_no_long_step() -> None:
    pytest.importorskip("torchao")
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = optimizer_of(Training(optimizer="adamw-8bit", lr=1e-3), [weight], torch.device("cpu"))
    for small in (1e-4, 0.0, 0.0):  # of the largest gradient in its block
        weight.grad = torch.ones(64, 64)
        weight.grad[0, 0] = small
        optimizer.step()
    assert weight.detach().abs().max() < 10 * 1e-3  # without a floor: 7.3, in the third step


def test_a_missing_package_is_one_clear_line(
    adapter: Adapter, samples: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UsageError, match=r"needs torchao, which is not installed\npip install .*\[torchao\]"):
        tuning(adapter, samples, **EIGHT)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({**EIGHT, "offload": ["optimizer"]}, "Leave one of the two out"),
        ({"mode": "lora", "offload": ["shadow"]}, "adapters have no shadow"),
    ],
)
def test_settings_that_cannot_hold_together_are_refused(
    adapter: Adapter, samples: Tensor, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(CompressorError, match=said):
        tuning(adapter, samples, **settings)


def test_the_teacher_shares_the_given_models_memory_and_the_model_stays_as_it_is(
    adapter: Adapter, samples: Tensor
) -> None:
    model = large()
    before, flags = copy.deepcopy(model.state_dict()), [value.requires_grad for value in model.parameters()]
    training = Training(steps=2, batch_size=8, device="cpu")
    run = compressor.FineTuning(model, SparseDM(), adapter=adapter, data=samples, training=training)
    teacher, student = dict(run.teacher.named_parameters()), dict(run.student.named_parameters())
    for name, value in model.named_parameters():
        assert teacher[name].data_ptr() == value.data_ptr() != student[name].data_ptr()
        assert not teacher[name].requires_grad
    finished(run)
    assert same(before, dict(model.state_dict())) and model.training
    assert [value.requires_grad for value in model.parameters()] == flags
    half = compressor.FineTuning(model.half(), SparseDM(), adapter=adapter, data=samples, training=training)
    assert {value.dtype for value in half.teacher.parameters()} == {torch.float32}
    assert {value.dtype for value in model.parameters()} == {torch.float16}


def test_tied_weights_stay_tied_in_the_teacher(adapter: Adapter, samples: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.BatchNorm1d(16))
    model[2].weight = model[0].weight
    training = Training(steps=2, batch_size=8, device="cpu")
    run = compressor.FineTuning(model, SparseDM(), adapter=adapter, data=samples, training=training)
    assert run.teacher[2].weight is run.teacher[0].weight
    mean = model[3].running_mean.clone()
    finished(run)
    assert torch.equal(model[3].running_mean, mean)


def test_no_average_is_held_where_none_is_asked_for(adapter: Adapter, samples: Tensor) -> None:
    assert tuning(adapter, samples, ema=0.0).average == {} and tuning(adapter, samples).average


def test_an_average_moves_by_its_share() -> None:
    average, values = {"a": torch.zeros(3), "b": torch.ones(2)}, {"b": torch.zeros(2), "a": torch.ones(3), "c": None}
    average_(average, values, 0.25)  # type: ignore[arg-type]
    assert average["a"].tolist() == [0.25] * 3 and average["b"].tolist() == [0.75] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_what_is_offloaded_is_in_the_machines_memory_and_changes_little(
    adapter: Adapter, samples: Tensor
) -> None:
    training = {"steps": 6, "batch_size": 8, "device": "cuda", "lr": 1e-2, "dtype": "float32"}
    found = []
    for more in ({}, ALL):
        run = compressor.FineTuning(
            large(), SparseDM(), adapter=adapter, data=samples, training=Training(**training, **more)
        )
        list(compressor.steps(run))
        kept = [*run.average.values(), *run.shadow.dense.values()]
        kept += [state["exp_avg"] for state in run.optimizer.state.values()]
        assert {value.device.type for value in kept} == {"cpu" if more else "cuda"}
        assert {value.device.type for value in run.student.parameters()} == {"cuda"}
        found.append(dict(run.finish().model.state_dict()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_gradients_that_an_estimator_replaces_are_let_go(adapter: Adapter, samples: Tensor) -> None:
    replaced: list[weakref.ref[Tensor]] = []

    class Watched(StraightThrough):
        def gradient(self, grad: Tensor, dense: Tensor, mask: Mask) -> Tensor:
            replaced.append(weakref.ref(grad))
            return grad.clone()

    run, there = tuning(adapter, samples), []
    run.shadow.pruner = SimpleNamespace(estimator=Watched(), masks=run.pruner.masks, quantise="none")
    run.optimizer.register_step_pre_hook(lambda *_: there.append(sum(one() is not None for one in replaced)))
    run.advance()
    assert len(replaced) == 2 and there == [0]


@pytest.mark.parametrize("pattern", ["2:4", "2:2:4", "unstructured:0.5"])
def test_masks_do_not_depend_on_how_many_matrices_are_taken_as_one(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = [(8, 16), (4, 8), (16, 16), (8, 4, 3, 3), (4, 4), (32, 32), (2, 4)]
    weights = {str(index): torch.randn(shape, generator=rng) for index, shape in enumerate(shapes)}
    wanted = {name: parse(pattern).mask(weight.abs()).keep for name, weight in weights.items()}
    for most in (1, 100, 300, 10**6):
        monkeypatch.setattr("compressor.sparsity.pattern._JOINED", most)
        found = parse(pattern).magnitude_masks(weights)
        assert list(found) == list(weights)
        assert all(torch.equal(found[name].keep, keep) for name, keep in wanted.items())
