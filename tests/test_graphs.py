"""Recorded forwards: modules that replay CUDA graphs, without a GPU: the recording is imitated."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from imitated import BF16, CUDA, normal
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor import CompressorError
from compressor.lower import graphs
from compressor.lower.graphs import Captured, Graphed

# --- Recorded forwards. ---


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Recordings without a GPU: a replay writes into the outputs of the recording. What is listed is how often it replayed."""
    replays: list[int] = []

    def recorded(run: Callable[[], Any], device: Any, warm_up: int) -> tuple[Callable[[], None], Any]:
        outputs = run()
        replays.append(0)
        mine = len(replays) - 1

        def replay() -> None:
            replays[mine] += 1
            for old, new in zip(tree_leaves(outputs), tree_leaves(run()), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        return replay, outputs

    monkeypatch.setattr(graphs, "_recorded", recorded)
    monkeypatch.setattr(graphs, "_device", lambda tensors: CUDA if tensors else None)
    return replays


class Net(nn.Module):
    title = "net"

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor, scale: float = 1.0, y: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += 1
        return {"out": self.layer(x) * scale + (0 if y is None else y)}


def test_a_recording_copies_what_goes_in_and_what_comes_out(recorder):
    example = torch.ones(2)
    forward = Captured(lambda inputs: {"twice": inputs["x"] * 2, "n": 3}, {"x": example})
    first = forward({"x": torch.full((2,), 5.0)})
    second = forward({"x": torch.full((2,), 7.0)})
    assert first["twice"].tolist() == [10, 10] and second["twice"].tolist() == [14, 14] and second["n"] == 3
    x = torch.full((2,), 3.0)
    forward({"x": x})["twice"].zero_()
    assert x.tolist() == [3, 3] and example.tolist() == [1, 1] and recorder == [3]


def test_a_module_is_recorded_for_a_few_shapes_and_right_for_all(recorder):
    net = Net().requires_grad_(False)
    wrapped = Graphed(net)
    for batch in (1, 2, 3, 4, 5, 6, 1, 5):
        x = normal(batch, 4, seed=batch)
        assert torch.equal(wrapped(x, 2.0)["out"], net(x, 2.0)["out"])
    assert recorder == [2, 1, 1, 1]
    x = normal(1, 4, seed=9)
    assert torch.equal(wrapped(x, 3.0)["out"], net(x, 3.0)["out"])
    assert torch.equal(wrapped(x, y=x)["out"], net(x, y=x)["out"])
    assert recorder == [2, 1, 1, 1]


def test_other_values_than_tensors_are_part_of_what_was_recorded(recorder):
    net = Net().requires_grad_(False)
    wrapped = Graphed(net)
    x = normal(2, 4)
    for scale in (1.0, 2.0, 1.0):
        assert torch.equal(wrapped(x, scale)["out"], net(x, scale)["out"])
    assert torch.equal(wrapped(x, y=x)["out"], net(x, y=x)["out"])
    assert recorder == [2, 1, 1]


def test_gradients_and_autocast_are_not_recorded(recorder):
    wrapped = Graphed(Net())
    x = normal(2, 4).requires_grad_()
    wrapped(x)["out"].sum().backward()
    assert x.grad is not None and recorder == []
    with torch.autocast("cuda", dtype=BF16, enabled=False):
        wrapped(x.detach())
    assert recorder == [1]


def test_copies_and_moves_record_anew(recorder):
    wrapped = Graphed(Net().requires_grad_(False)).eval()
    x = normal(2, 4)
    wrapped(x)
    twin = copy.deepcopy(wrapped)
    assert not twin.training and torch.equal(twin(x)["out"], wrapped(x)["out"]) and recorder == [2, 1]
    assert twin.layer.weight is not wrapped.layer.weight
    assert torch.equal(wrapped.float()(x)["out"], twin(x)["out"]) and recorder == [2, 2, 1]
    double = wrapped.double()
    assert double is wrapped and double(x.double())["out"].dtype == torch.float64 and recorder[3:] == [1]


def test_a_wrapper_has_the_attributes_of_its_module(recorder):
    wrapped = Graphed(Net())
    assert wrapped.title == "net" and wrapped.layer is wrapped.module.layer
    assert len(list(wrapped.parameters())) == 2
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing


def test_what_cannot_be_recorded_says_so_once(recorder, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    works = graphs._recorded
    monkeypatch.setattr(graphs, "_recorded", fails)
    wrapped = Graphed(Net())
    with torch.no_grad():
        with pytest.raises(CompressorError, match="cannot be recorded as a CUDA graph: RuntimeError: operation not"):
            wrapped(normal(2, 4))
        monkeypatch.setattr(graphs, "_recorded", works)
        wrapped(normal(2, 4))
        monkeypatch.setattr(graphs, "_recorded", fails)
        x = normal(3, 4)
        assert torch.equal(wrapped(x)["out"], wrapped.module(x)["out"]) and recorder == [1]


def test_outputs_that_would_be_overwritten_are_refused(recorder):
    class Box:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    with pytest.raises(CompressorError, match="gave Box"):
        Captured(Box, torch.ones(2))


def test_without_a_gpu_everything_runs_as_it_did():
    wrapped = Graphed(Net())
    with torch.no_grad():
        wrapped(normal(2, 4))
    assert wrapped.module.calls == 1 and wrapped._recordings == {}
    with pytest.raises(CompressorError, match="on one GPU"):
        Captured(lambda x: x, torch.ones(2))


def test_a_replay_keeps_the_weights_that_it_reads(monkeypatch):
    """A graph holds addresses alone: were the weights freed, it would read what comes to lie there next, or nothing at all."""
    monkeypatch.setattr(graphs, "_device", lambda tensors: torch.device("cuda", 0))
    monkeypatch.setattr(graphs, "_recorded", lambda run, device, warm_up: (lambda: None, run()))
    layer = nn.Linear(4, 4)
    alive = weakref.ref(layer)
    replay = Captured(layer, torch.ones(2, 4)).replay
    del layer
    gc.collect()
    replay()
    assert alive() is not None
    del replay
    gc.collect()
    assert alive() is None
