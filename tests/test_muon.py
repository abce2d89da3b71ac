"""Muon beside torch's own, what it takes for matrices, and times that are drawn evenly: what methods may ask for in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor import NM, Training
from compressor.discovery import load
from compressor.errors import UsageError
from compressor.model_zoo.generic.noise import Noise
from compressor.model_zoo.sampling import even
from compressor.model_zoo.uvit.noise import ContinuousTimes, DiscreteTimes
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.sparsedm import SparseDM
from compressor.runs import inputs
from compressor.training.arithmetic import described
from compressor.training.muon import Muon, is_matrix, orthogonal
from compressor.training.optimizers import optimizer_of

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (16, 16), (20, 16, 3, 3), (64, 256)])
def test_the_step_of_a_matrix_is_that_of_torchs_muon(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which multiplies in bfloat16: kept in float32 here, so that the numbers can be held against each other closely."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    mine = nn.Parameter(torch.randn(shape, generator=rng()))
    theirs = nn.Parameter(mine.detach().flatten(1).clone())
    ours = Muon([mine], [mine], **SETTINGS)
    other = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        gradient = torch.randn(shape, generator=rng(step + 1))
        mine.grad, theirs.grad = gradient, gradient.flatten(1).clone()
        ours.step()
        other.step()
        torch.testing.assert_close(mine.detach().flatten(1), theirs.detach(), rtol=1e-5, atol=1e-5)


def test_what_is_no_matrix_takes_the_step_of_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 32))
    table = nn.Parameter(torch.randn(32, 32))  # a matrix by its shape, and no layer's: an embedding, or positions
    wide = model[3].weight
    rest = [*[p for p in model.parameters() if p is not wide], table]
    copies = [nn.Parameter(value.detach().clone()) for value in rest]
    given = Training(optimizer="muon", lr=0.02, betas=(0.9, 0.99), weight_decay=0.1)
    ours = optimizer_of(given, [*model.parameters(), table], CPU, [m.weight for m in model if isinstance(m, nn.Linear)])
    other = torch.optim.AdamW(copies, **SETTINGS)
    before = wide.detach().clone()
    for step in range(3):
        for number, (one, copy) in enumerate(zip(rest, copies, strict=True)):
            one.grad = torch.randn(one.shape, generator=rng(10 * step + number))
            copy.grad = one.grad.clone()
        wide.grad = torch.randn(32, 32, generator=rng(100 + step))
        ours.step()
        other.step()
    assert all(torch.equal(one, copy) for one, copy in zip(rest, copies, strict=True))
    assert [weight is wide for weight, own in ours.state.items() if set(own) == {"momentum"}] == [True]
    assert not torch.equal(wide, before)


@pytest.mark.parametrize("shape", [(16, 16), (16, 400), (300, 20)])
def test_orthogonal_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    found = torch.linalg.svdvals(orthogonal(1e-3 * torch.randn(shape, generator=rng())))
    # five steps bring what is not far below the largest to between 0.7 and 1.2; the least of a square matrix stay behind
    assert float(found.max()) < 1.25 and float(found.median()) > 0.65
    assert torch.equal(orthogonal(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 16), True),
        ((16, 15), False),
        ((15, 64), False),
        ((16, 2, 3, 3), True),
        ((64, 1, 3, 3), False),
        ((64,), False),
    ],
)
def test_matrices_have_sixteen_rows_and_columns(shape: tuple[int, ...], expected: bool) -> None:
    assert is_matrix(torch.zeros(shape)) is expected


@pytest.mark.parametrize("settings", [{"mode": "lora"}, {"parallel": "fsdp"}, {"offload": ["optimizer"]}])
def test_what_takes_matrices_apart_is_refused_and_not_chosen(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"train\.optimizer muon with train"):
        optimizer_of(Training(optimizer="muon", **settings), [nn.Parameter(torch.zeros(16, 16))], CPU)
    assert Training(**settings).settled({"optimizer": "muon"}).optimizer == "adamw"


def test_a_method_is_asked_where_nothing_is_given() -> None:
    asked = {"optimizer": "muon", "times": "even"}
    found = Training(steps=7).settled(asked)
    assert (found.optimizer, found.times, found.steps) == ("muon", "even", 7)
    given = Training(optimizer="adamw", times="independent").settled(asked)
    assert (given.optimizer, given.times) == ("adamw", "independent")
    plain = Training().settled({})
    assert (plain.optimizer, plain.times) == ("adamw", "independent")
    assert described(found, CPU) == {
        "passes": "float32",
        "optimizer": "Muon for matrices, AdamW for the rest",
        "times": "even",
    }


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"lr": "1e-3"}, "asks for training with 'lr'"),
        ({"optimizer": "sgd"}, "the method's training: optimizer: .*found 'sgd'"),
    ],
)
def test_a_method_that_asks_for_what_there_is_not_is_refused(asked: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Training().settled(asked)


def test_a_recipe_says_what_the_method_asked_for() -> None:
    best = inputs.load_inputs(inputs.resolve({"settings": {"preset": "best"}}, "test")).recipe
    assert (best.train.optimizer, best.train.times) == ("muon", "even")
    paper = inputs.load_inputs(inputs.resolve({}, "test")).recipe
    assert (paper.train.optimizer, paper.train.times) == ("adamw", "independent")
    own = inputs.load_inputs(inputs.resolve({"settings": {"preset": "best"}, "optimizer": "adamw"}, "test"))
    assert (own.recipe.train.optimizer, own.recipe.train.times) == ("adamw", "even")


# --- Times. ---


@pytest.mark.parametrize("count", [1, 2, 7, 128])
def test_even_numbers_lie_one_in_each_part(count: int) -> None:
    found = even(count, rng(count))
    assert sorted((found * count).long().tolist()) == list(range(count))
    if count == 128:
        assert found.tolist() != sorted(found.tolist())  # a piece of the batch sees all of the range
        assert float(even(count, rng(1)).mean() - even(count, rng(2)).mean()) != 0


@pytest.mark.parametrize("times", [ContinuousTimes(), DiscreteTimes()])
def test_even_times_of_a_uvit_are_of_its_range(times: Any) -> None:
    found = times.drawn(100, rng(), evenly=True)
    low, high = (0.0, 1.0) if times.continuous else (1.0, 1000.0)
    assert low <= float(found.min()) and float(found.max()) <= high
    width = (high - low + (not times.continuous)) / 100
    assert sorted(((found - low) / width).long().tolist()) == list(range(100))
    assert torch.equal(times.drawn(4, rng()), times.drawn(4, rng()))


@pytest.mark.parametrize("config", [{}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}])
def test_even_times_of_other_models_are_of_their_range(config: dict[str, Any]) -> None:
    time, noised, target = Noise.of(config).noised(torch.zeros(50, 3, 4, 4), rng(), "even")
    assert sorted((time / 20).long().tolist()) == list(range(50))
    assert noised.shape == target.shape == (50, 3, 4, 4)


@pytest.mark.parametrize("name", ["uvit-digits", "ddpm-digits"])
def test_noising_evenly_changes_the_times_alone(name: str) -> None:
    adapter = load("models", name)()
    batch = torch.zeros(64, *adapter.image_shape)
    plain, evenly = adapter.noised(batch, rng()), adapter.noised_evenly(batch, rng())
    assert len(plain[0]) == len(evenly[0]) and plain[1].shape == evenly[1].shape
    time = evenly[0]["timestep"] if isinstance(evenly[0], dict) else evenly[0][1]
    counts = torch.histc(time.float(), bins=64, min=0, max=1000)
    assert float(counts.max()) <= 2 and int(counts.sum()) == 64  # the histogram's bins are not quite those of the draw


@pytest.mark.parametrize("times", ["even", "independent"])
def test_training_draws_times_as_it_is_told(times: str) -> None:
    adapter = load("models", "uvit-digits")()
    seen: list[str] = []

    class Telling(type(adapter)):  # type: ignore[misc]
        def noised(self, batch: Any, rng: torch.Generator) -> Any:
            seen.append("independent")
            return super().noised(batch, rng)

        def noised_evenly(self, batch: Any, rng: torch.Generator) -> Any:
            seen.append("even")
            return super().noised_evenly(batch, rng)

    small = adapter.small()
    told = Telling(**{name: getattr(small, name) for name in small.__dataclass_fields__})
    images = torch.rand(8, *told.image_shape) * 2 - 1
    compressor.prune(told.build(), Magnitude(), adapter=told, data=images, steps=2, batch_size=4, times=times)
    assert set(seen) == {times}


def test_a_run_with_muon_is_repeated_and_resumed_to_the_bit() -> None:
    adapter = load("models", "uvit-digits")().small()
    torch.manual_seed(0)
    model, images = adapter.build(), torch.rand(16, *adapter.image_shape) * 2 - 1
    settings = {"steps": 5, "batch_size": 4, "device": "cpu", "lr": 1e-3}

    def tuning(previous: Any = None) -> compressor.FineTuning:
        method = SparseDM(NM(2, 4), preset="best")
        return compressor.FineTuning(
            model, method, adapter=adapter, data=images, training=Training(**settings), previous=previous
        )

    whole = tuning()
    assert isinstance(whole.optimizer, Muon) and whole.training.times == "even"
    list(compressor.steps(whole))
    first = tuning()
    for _ in range(3):
        first.advance()
    again = tuning(first.state())
    list(compressor.steps(again))
    one, other = whole.finish().model.state_dict(), again.finish().model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
