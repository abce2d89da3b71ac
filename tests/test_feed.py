"""What feeds the steps: the same batches whether they are made ahead or not, and errors when they are due."""

from __future__ import annotations

from typing import Any

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
