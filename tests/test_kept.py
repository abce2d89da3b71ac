"""What models keep of their calls beside their weights: nothing that the toolkit asked stays in what it gives back, or was given."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import Adapter
from compressor.cost.macs import layer_macs
from compressor.foreign.kept import Kept, Place, undone
from compressor.lower.job import prepared
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.sparsedm import SparseDM
from compressor.plugins.wanda import Wanda


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Prompted(nn.Module):
    """Attention that makes its keys of the first prompt that it is given, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.keys, self.query, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.cache: Tensor | None = None

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.keys(prompt).detach()
        return self.out(torch.softmax(self.query(x) @ self.cache.transpose(1, 2) / 8, -1) @ self.cache)


class Streaming(nn.Module):
    """Each row is seen with the one before it, the first with the last of the former call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(32, 16)
        self.register_buffer("last", torch.zeros(1, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(torch.cat([torch.cat([self.last, x[:-1]]), x], -1))
        self.last.copy_(x[-1:])
        return y  # type: ignore[no-any-return]


class Scaling(nn.Module):
    """Writes to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.linear = nn.Parameter(torch.ones(16)), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x *= 0.5
        return self.linear(x + self.first)  # type: ignore[no-any-return]


class Averaging(nn.Module):
    """Moves an average in a buffer and counts its calls, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.calls = nn.Linear(16, 16), 0
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.linear(x - self.mean)  # type: ignore[no-any-return]


class Plain(Adapter):
    """Noise is added, and is what is to be answered."""

    def __init__(self) -> None:
        self.asked: list[tuple[nn.Module, float]] = []

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        noise = torch.randn(batch.shape, generator=rng)
        return batch + noise, noise

    def predict(self, model: nn.Module, inputs: Any) -> Tensor:
        self.asked.append((model, float(inputs.norm())))
        return model(inputs)  # type: ignore[no-any-return]

    def example_inputs(self, batch_size: int) -> Tensor:
        return numbers(batch_size, 16)


EXAMPLE = (numbers(2, 8, 64), numbers(2, 5, 64, seed=1))
OTHER = (numbers(2, 8, 64, seed=2), numbers(2, 5, 64, seed=3))


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_a_lowered_model_starts_where_the_given_one_does(compiled: bool) -> None:
    model = Prompted().eval()
    wanted = copy.deepcopy(model)(*OTHER)
    lowered = compressor.lower(model, EXAMPLE, compiled=compiled, cache=False)
    assert model.cache is None
    assert torch.allclose(lowered.model(*OTHER), wanted, rtol=1e-4, atol=1e-5)
    assert any("a call changes cache" in note for note in lowered.plan.notes)
    assert "keys" in [
        layer.name for layer in lowered.plan.layers
    ]  # it was reached, though the first call fills the cache
    again = compressor.lower(model, EXAMPLE, plan=lowered.plan).model
    assert torch.allclose(again(*OTHER), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_buffer_that_calls_write_to_is_in_a_lowered_model_as_it_was_given() -> None:
    model = Streaming().eval()
    model.last.fill_(0.5)
    wanted = copy.deepcopy(model)(numbers(12, 16, seed=2))
    lowered = compressor.lower(model, numbers(12, 16), cache=False)  # asked twice, it does not answer the same
    assert torch.allclose(lowered.model(numbers(12, 16, seed=2)), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.last, torch.full((1, 16), 0.5))
    job = prepared(model, numbers(12, 16), "auto", torch.bfloat16, None)
    job.forward(job.base)
    job.forward.rest(job.base)
    assert torch.equal(job.base.last, model.last.bfloat16())


@torch.no_grad()
def test_an_example_whose_numbers_share_memory_is_lowered() -> None:
    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.linear(x) * time[:, None]

    model, one = Timed().eval(), torch.tensor(0.5).expand(1)
    lowered = compressor.lower(model, (numbers(1, 16), one), cache=False).model
    assert torch.allclose(
        lowered(numbers(1, 16, seed=2), one), model(numbers(1, 16, seed=2), one), rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_a_model_that_writes_to_its_inputs_is_lowered_and_the_example_stays() -> None:
    model, example = Scaling().eval(), numbers(4, 16)
    before = example.clone()
    lowered = compressor.lower(model, example, cache=False).model
    assert torch.equal(example, before)
    assert torch.allclose(lowered(before.clone()), model(before.clone()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruner", [SparseDM(), Magnitude(), Wanda(timesteps=2)], ids=lambda one: type(one).__name__)
def test_prune_leaves_what_the_given_model_keeps(pruner: Any) -> None:
    model, adapter = Averaging(), Plain()
    result = compressor.prune(model, pruner, adapter=adapter, data=numbers(64, 16) + 3, steps=4, batch_size=8)
    assert model.calls == 0 and torch.equal(model.mean, torch.zeros(16))
    assert result.model.calls == 4  # the steps of training, and neither a check nor a calibration


def test_the_teacher_is_asked_what_the_student_was_and_keeps_nothing() -> None:
    adapter = Plain()
    compressor.prune(Scaling(), SparseDM(), adapter=adapter, data=numbers(64, 16), steps=3, batch_size=8)
    students, teachers = adapter.asked[0:6:2], adapter.asked[1:6:2]
    assert len({id(model) for model, _ in adapter.asked}) == 2
    assert [norm for _, norm in students] == [norm for _, norm in teachers]
    adapter = Plain()
    compressor.prune(Averaging(), SparseDM(), adapter=adapter, data=numbers(64, 16), steps=3, batch_size=8)
    (teacher, _), (student, _) = adapter.asked[1], adapter.asked[0]
    assert teacher.calls == 0 and torch.equal(teacher.mean, torch.zeros(16)) and student.calls == 3


def test_counting_leaves_nothing_in_the_model() -> None:
    model = Averaging()
    layer_macs(model, Plain())
    assert model.calls == 0 and torch.equal(model.mean, torch.zeros(16))


class Holding(nn.Module):
    """Holds all sorts of things."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Averaging()
        self.hidden = [Averaging()]  # a module that torch does not know
        self.shapes: dict[Any, Any] = OrderedDict(a=[1, (2.0, "x")], b={3})
        self.cache: Any = None
        self.number = float("nan")
        self.lock = (one for one in ())  # cannot be copied
        self.register_buffer("empty", None)


def test_what_changes_is_found_and_put_back() -> None:
    model = Holding()
    kept = Kept(model)
    assert kept.changed(model) == set()
    model.inner.calls, model.inner.mean[0] = 2, 1.0
    model.shapes["a"].append(numbers(2))
    model.cache, model.late = {"k": numbers(3)}, True
    model.empty = torch.ones(1)
    model.register_buffer("more", torch.ones(2))
    model.lock = model.hidden = None  # not looked at
    changed = kept.changed(model)
    names = {"inner.calls", "inner.mean", "shapes", "cache", "late", "empty", "more"}
    assert {str(place) for place in changed} == names
    mean = model.inner.mean
    twin = copy.deepcopy(model)
    for one in (model, twin):
        kept.put_back(one, changed)
        assert kept.changed(one) == set()
        assert not hasattr(one, "late") and "more" not in one._buffers and one.empty is None
    assert model.inner.mean is mean and twin.inner.mean is not mean
    twin.shapes["a"].append(0)
    assert model.shapes["a"] == [1, (2.0, "x")] and kept.changed(model) == set()
    kept.put_back(nn.Linear(2, 2), {Place("inner", "calls")})  # another model: nothing
    with pytest.raises(RuntimeError, match="16"), undone(model):
        model.inner(numbers(2, 17))
    assert model.inner.calls == 0


def test_the_graph_of_a_module_of_torch_fx_is_no_change() -> None:
    """A plan told that every call changes it, and on a GPU such a model was not replayed."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(16, 16), nn.GELU()))
    kept = Kept(model)
    model(numbers(2, 16))
    assert kept.changed(model) == kept.changed(copy.deepcopy(model)) == set()


def test_equal_values_are_no_change_whatever_they_are() -> None:
    model = Averaging()
    model.register_buffer("odd", torch.tensor([float("nan"), -0.0, float("inf")]))
    model.register_buffer("codes", torch.zeros(3, dtype=torch.float8_e4m3fn))
    model.register_buffer("waves", torch.polar(torch.ones(3), torch.ones(3)).conj())
    model.register_buffer("scalar", torch.tensor(True))
    model.register_buffer("one", torch.tensor(2.0).expand(1))
    model.register_buffer("many", torch.ones(3, 1).expand(3, 4).t())
    model.register_buffer("none", torch.empty(0, 3))
    model.sparse = torch.eye(3).to_sparse()
    kept, other = Kept(model), copy.deepcopy(model)
    assert kept.changed(other) == set()
    other.odd[1], other.waves, other.scalar = 0.0, torch.zeros(3, dtype=torch.complex64), torch.tensor(False)
    assert {place.name for place in kept.changed(other)} == {"odd", "waves", "scalar"}
