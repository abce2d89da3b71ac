"""A pattern of one's own: refused before it trains where nothing reads its text, and like any other where a plugin does."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
import torch

import compressor
from compressor import Pattern, discovery
from compressor.errors import CompressorError, UsageError
from compressor.runs import inputs
from compressor.sparsity.notation import refuse_unreadable


@dataclass(frozen=True)
class Checker(Pattern):
    """Every second input channel, from the `first` on."""

    first: int = 0
    density = 0.5

    def misfit(self, shape):
        return None if len(shape) > 1 and shape[1] % 2 == 0 else "needs an even dim 1"

    def survivors(self, score):
        keep = torch.zeros_like(score, dtype=torch.bool)
        keep[:, self.first :: 2] = True
        return keep

    def violations(self, keep):
        return int(keep[:, 1 - self.first :: 2].sum())

    def __str__(self):
        return f"checker:{self.first}"


def read(text):
    return Checker(int(text.partition(":")[2]))


def wrong(text):
    return Checker(1 - int(text.partition(":")[2]))


@pytest.fixture
def registered(monkeypatch):
    """What registers a function of this file under `checker`."""

    def register(name):
        own = EntryPoint("checker", f"{__name__}:{name}", "compressor.patterns")
        found = discovery.entry_points
        monkeypatch.setattr(discovery, "entry_points", lambda **q: [own] if q.get("group") == own.group else found(**q))

    return register


def of_checkers(**settings):
    given = {"method": "magnitude", "train": {"steps": 1, "batch_size": 4}, "evaluate": {"samples": 0}, **settings}
    return inputs.load_inputs(inputs.resolve(given, "test"))


def test_what_nothing_reads_back_is_refused_before_training_and_before_saving(tmp_path):
    with pytest.raises(UsageError, match="nothing reads this text back"):
        refuse_unreadable(Checker())
    with pytest.raises(UsageError, match="not one that exists"):
        of_checkers(pattern="checker:0")
    model = torch.nn.Linear(4, 2)
    mask = Checker().mask(model.weight.detach())
    model.weight.data.copy_(mask.apply(model.weight.detach()))
    with pytest.raises(UsageError, match="nothing reads this text back"):
        compressor.save(tmp_path / "model", model, {"weight": mask})
    assert not (tmp_path / "model").exists()


def test_a_registered_one_is_a_pattern_of_recipes_and_files(registered, tmp_path):
    registered("read")
    assert compressor.parse("checker:1") == Checker(1)
    found = of_checkers(pattern="checker:1")
    result = found.one_shot()
    compressor.save(tmp_path / "model", result.model, result.masks, "uvit-digits")
    loaded = dict(compressor.load(tmp_path / "model").named_parameters())
    assert result.masks and all(not loaded[name][:, 0::2].any() for name in result.masks)


def test_a_plugin_that_reads_something_else_is_named(registered):
    registered("wrong")
    with pytest.raises(CompressorError, match="patterns plugin 'checker' gave checker:1 for 'checker:0'"):
        compressor.parse("checker:0")
