"""What feeds the steps: the same batches whether they are made ahead or not, and errors when they are due."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import compressor
from compressor import CompressorError, FineTuning, Training
from compressor.adapter import Shared
from compressor.data.batches import Batches, as_batches
from compressor.plugins.sparsedm import SparseDM
from compressor.seeds import generator
from compressor.training.feed import Feed

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def pins(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was pinned: there is no memory of that kind without a GPU, so tensors stay what they are."""
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return pinned


class Told(Batches):
    """Tells which steps were asked for; the third is damaged."""

    def __init__(self, samples: Tensor, damaged: int | None = None) -> None:
        self.samples, self.damaged, self.asked = as_batches(samples, 8, 0), damaged, []

    def batch(self, step: int) -> Any:
        self.asked.append(step)
        if step == self.damaged:
            raise CompressorError(f"batch {step} is damaged")
        return self.samples.batch(step)


def test_what_is_made_ahead_is_what_would_be_made(adapter, samples, pins) -> None:
    training = Training(steps=4, batch_size=8)
    ahead, plain = (Feed(adapter, Told(samples), training, device) for device in (GPU, CPU))
    for step in range(4):
        for mine, theirs in zip(ahead.at(step), plain.at(step), strict=True):
            assert torch.equal(mine, theirs)
        ahead.ahead(step + 1)
        plain.ahead(step + 1)
    assert ahead.batches.asked == plain.batches.asked == [0, 1, 2, 3]  # none beyond the last
    assert len(pins) == 6  # inputs and target, but for those of the first step; none for a CPU


def test_an_error_comes_with_its_own_step(adapter, samples, pins) -> None:
    feed = Feed(adapter, Told(samples, damaged=2), Training(steps=4, batch_size=8), GPU)
    feed.at(1)
    feed.ahead(2)  # says nothing yet: step 1 ends, and can be saved
    with pytest.raises(CompressorError, match="batch 2 is damaged"):
        feed.at(2)
    assert feed.batches.asked == [1, 2]


def test_another_step_than_expected_is_made_anew(adapter, samples, pins) -> None:
    feed = Feed(adapter, Told(samples), Training(steps=9, batch_size=8), GPU)
    feed.ahead(1)
    wanted = Feed(adapter, Told(samples), Training(steps=9, batch_size=8), CPU).at(5)
    assert torch.equal(feed.at(5)[0], wanted[0])


def test_shared_tensors_stay_shared(adapter, samples, pins, monkeypatch) -> None:
    monkeypatch.setattr(
        type(adapter), "noised", lambda self, batch, rng: ({"x": batch, "all": Shared(batch[0])}, batch)
    )
    feed = Feed(adapter, Told(samples), Training(steps=4, batch_size=8), GPU)
    feed.ahead(1)
    inputs, target = feed.at(1)
    assert isinstance(inputs["all"], Shared) and torch.equal(inputs["all"].tensor, target[0])


def test_the_global_generator_is_left_alone_and_repeats(adapter, samples, monkeypatch) -> None:
    monkeypatch.setattr(type(adapter), "noised", lambda self, batch, rng: (batch, torch.rand(batch.shape)))
    feed = Feed(adapter, Told(samples), Training(steps=4, batch_size=8), CPU)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = feed.at(3)[1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert torch.equal(feed.at(3)[1], first)
    assert generator(0, "model", 3).initial_seed() != generator(0, "model", 2).initial_seed()


def test_a_run_asks_for_each_batch_once(model, adapter, samples) -> None:
    told = Told(samples)
    run = FineTuning(model, SparseDM(), adapter=adapter, data=told, training=Training(steps=3, batch_size=8))
    list(compressor.steps(run))
    assert told.asked == [0, 1, 2]


class ByChance(torch.utils.data.Dataset[torch.Tensor]):
    """Samples that are changed by chance, from each of the global generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        drawn = torch.rand(6), torch.tensor([random.random()]), torch.from_numpy(np.random.rand(1)).float()
        return torch.full((8,), float(index)) + torch.cat(drawn)


def _shuffled() -> Any:
    return torch.utils.data.DataLoader(ByChance(), batch_size=4, shuffle=True)


def _stream() -> Any:
    return (torch.rand(4, 8) for _ in range(20))


@pytest.mark.parametrize("data", [ByChance, _shuffled, _stream])
def test_what_data_draw_by_chance_is_given_by_the_seed(data: Callable[[], Any]) -> None:
    def drawn(seed: int, first: int = 0) -> torch.Tensor:
        torch.manual_seed(next(others))
        np.random.seed(next(others))
        random.seed(next(others))
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        batches = as_batches(data(), 4, seed)
        found = [batches.batch(step) for step in range(first, 7)]  # more than two epochs of the first two
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]
        return torch.stack(found)

    others = iter(range(100))
    whole = drawn(0)
    assert torch.equal(drawn(0), whole) and not torch.equal(drawn(1), whole)
    assert torch.equal(drawn(0, first=4), whole[4:])  # as a run that is resumed
    assert not torch.equal(whole[0], whole[3])
