"""Muon beside torch's own, what it takes for matrices, and times that are drawn evenly: what methods may ask for in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor import NM, Training
from compressor.discovery import load
from compressor.errors import CompressorError, UsageError
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
    monkeypatch.setattr(torch, "bfloat16", torch.float32)  # torch 2.15 casts with to()
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
def test_what_takes_matrices_apart_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"train\.optimizer muon with train"):
        optimizer_of(Training(optimizer="muon", **settings), [nn.Parameter(torch.zeros(16, 16))], CPU)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "muon", "mode": "lora"}, "muon with train.mode lora"),
        ({"optimizer": "adamw-8bit", "offload": ["optimizer"]}, "adamw-8bit with train.offload optimizer"),
        ({"mode": "lora", "offload": ["shadow"]}, "adapters have no shadow"),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_before_anything_is_prepared(
    settings: dict[str, Any], said: str
) -> None:
    recipe = inputs.resolve({"settings": {"preset": "best"}, "train": settings}, "test")
    with pytest.raises(UsageError, match=said):
        inputs.load_inputs(recipe)


def test_a_run_says_its_optimizer() -> None:
    assert described(Training(optimizer="muon"), CPU)["optimizer"] == "Muon for matrices, AdamW for the rest"
    on_gpu = described(Training(optimizer="muon"), torch.device("cuda"))
    assert on_gpu["optimizer"] == "Muon for matrices, AdamW for the rest"


# --- Times. ---


@pytest.mark.parametrize("count", [1, 2, 7, 128])
def test_even_numbers_lie_one_in_each_part(count: int) -> None:
    found = even(count, rng(count))
    assert sorted((found * count).long().tolist()) == list(range(count))
    assert found.dtype == torch.float64 and float(found.max()) <= 1
    if count == 128:  # a piece of the batch sees all of the range
        assert all(float(piece.max() - piece.min()) > 0.6 for piece in found.split(16))


def test_means_over_even_times_vary_less() -> None:
    """A mean over n of them varies as 1 / n³, over independent ones as 1 / n."""
    spread = [torch.stack([one(16, rng(seed)).mean() for seed in range(200)]).std() for one in (even, _independent)]
    assert float(spread[0]) < 0.1 * float(spread[1])


def _independent(count: int, rng: torch.Generator) -> torch.Tensor:
    return torch.rand(count, generator=rng)


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
def test_the_adapters_of_the_zoo_noise_a_batch_at_even_times(name: str) -> None:
    adapter = load("models", name)()
    batch = torch.zeros(64, *adapter.image_shape)
    inputs, noise = adapter.noised_evenly(batch, rng())
    time = (inputs["timestep"] if isinstance(inputs, dict) else inputs[1]).float()
    counts = torch.histc(time, bins=64, min=0, max=1000)
    assert float(counts.max()) <= 2 and int(counts.sum()) == 64  # the histogram's bins are not quite those of the draw
    again, same = adapter.noised_evenly(batch, rng())
    assert torch.equal(noise, same) and torch.equal(
        time, (again["timestep"] if isinstance(again, dict) else again[1]).float()
    )
    alone, _ = adapter.noised(batch, rng())
    drawn = torch.histc((alone["timestep"] if isinstance(alone, dict) else alone[1]).float(), bins=64, min=0, max=1000)
    assert float(drawn.max()) > 2


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
    settings = {"steps": 5, "batch_size": 4, "device": "cpu", "lr": 1e-3, "times": "even"}

    def tuning(previous: Any = None, optimizer: str = "muon") -> compressor.FineTuning:
        method = SparseDM(NM(2, 4), preset="best")
        return compressor.FineTuning(
            model,
            method,
            adapter=adapter,
            data=images,
            training=Training(**settings, optimizer=optimizer),
            previous=previous,
        )

    whole = tuning()
    assert isinstance(whole.optimizer, Muon)
    list(compressor.steps(whole))
    kinds = {name: set(whole.optimizer.state[value]) for name, value in whole.parameters.items()}
    assert kinds["in_blocks.0.attn.qkv.weight"] == kinds["mid_block.mlp.fc1.weight"] == {"momentum"}
    assert kinds["pos_embed"] == kinds["norm.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    first = tuning()
    for _ in range(3):
        first.advance()
    again = tuning(first.state())
    list(compressor.steps(again))
    one, other = whole.finish().model.state_dict(), again.finish().model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    state = first.state()
    with pytest.raises(CompressorError, match=r"train\.optimizer was muon, and is adamw"):
        tuning(state, "adamw")
    del state["of"]  # as earlier versions wrote it
    with pytest.raises(CompressorError, match="the state is that of another optimizer"):
        tuning(state, "adamw")
