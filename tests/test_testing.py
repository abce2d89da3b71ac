"""The conformance suite catches broken pruners, for what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

from compressor import NM, CompressorError, Mask, Pattern, Pruner, Unstructured, found
from compressor.testing import CHECKS, check_pruner, families, findings


def only_uvit(monkeypatch):
    family = {"U-ViT": families()["U-ViT"]}
    monkeypatch.setattr("compressor.testing.families", lambda: family)


@dataclass(frozen=True)
class Plain(Pruner):
    """A right one, to break."""

    pattern: Pattern = NM(2, 4)

    def masks(self, weights, progress, previous):
        return {name: self.pattern.mask(weight.abs()) for name, weight in weights.items()}


class Illegal(Plain):
    def masks(self, weights, progress, previous):
        return {name: Mask(torch.ones_like(weight, dtype=torch.bool), self.pattern) for name, weight in weights.items()}


class Foreign(Plain):
    def masks(self, weights, progress, previous):
        return {**super().masks(weights, progress, previous), "elsewhere": next(iter(previous.values()), None)}


class Scribbling(Plain):
    def masks(self, weights, progress, previous):
        found = super().masks(weights, progress, previous)
        for weight in weights.values():
            weight.mul_(0.5)
        return found


class Random(Plain):
    def masks(self, weights, progress, previous):
        return {name: self.pattern.mask(torch.rand_like(weight)) for name, weight in weights.items()}


class Remembering(Plain):
    calls = 0

    def masks(self, weights, progress, previous):
        type(self).calls += 1
        sign = 1 if type(self).calls % 2 else -1
        return {name: self.pattern.mask(sign * weight.abs()) for name, weight in weights.items()}


@dataclass(frozen=True)
class Forgetful(Plain):
    """What `prepare` finds is not in its state, so a resumed run does not have it."""

    signs: dict[str, torch.Tensor] = found(dict)

    def prepare(self, model, adapter, batches):
        return replace(self, signs={"": torch.tensor(-1.0)})

    def masks(self, weights, progress, previous):
        sign = self.signs.get("", torch.tensor(1.0))
        return {name: self.pattern.mask(sign * weight.abs()) for name, weight in weights.items()}


@dataclass(frozen=True)
class Unmarked(Pruner):
    """Hides what it found from `repr`, and so says nothing of what it is."""

    pattern: NM = NM(2, 4)
    means: dict[str, float] = field(default_factory=dict, repr=False)

    def prepare(self, model, adapter, batches):
        return replace(self, means={name: float(value.detach().mean()) for name, value in model.named_parameters()})

    def masks(self, weights, progress, previous):
        return {name: self.pattern.mask(weight.abs()) for name, weight in weights.items()}


@dataclass
class InPlace(Pruner):
    """Keeps what it finds in itself, and tells no checkpoint of it."""

    pattern: Pattern = NM(2, 4)
    signs: dict[str, torch.Tensor] = found(dict)

    def prepare(self, model, adapter, batches):
        self.signs[""] = torch.tensor(-1.0)
        return self

    def masks(self, weights, progress, previous):
        sign = self.signs.get("", torch.tensor(1.0))
        return {name: self.pattern.mask(sign * weight.abs()) for name, weight in weights.items()}


FIRST: dict[str, torch.Tensor] = {}


class OfTheModule(Plain):
    """What it finds of the first model that this process sees goes for every model."""

    def prepare(self, model, adapter, batches):
        for name, value in model.named_parameters():
            FIRST.setdefault(name, value.detach().abs().clone())
        return self

    def masks(self, weights, progress, previous):
        return {name: self.pattern.mask(FIRST.get(name, weight.abs())) for name, weight in weights.items()}


class OfHashes(Plain):
    """Python's hashes of names differ from process to process."""

    def masks(self, weights, progress, previous):
        return {name: self.pattern.mask(self.drawn(name, weight)) for name, weight in weights.items()}

    def drawn(self, name, weight):
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(hash(name) % 2**31))


class Idle(Plain):
    def masks(self, weights, progress, previous):
        return {}


class OfAnotherPattern(Plain):
    def masks(self, weights, progress, previous):
        return {name: NM(3, 4).mask(weight.abs()) for name, weight in weights.items()}


class OfAnotherShare(Plain):
    pattern = Unstructured(0.5)

    def __init__(self):
        pass

    def masks(self, weights, progress, previous):
        return {name: Unstructured(0.9).mask(weight.abs()) for name, weight in weights.items()}


class Emptying(Plain):
    def masks(self, weights, progress, previous):
        return {
            name: Mask(torch.zeros_like(weight, dtype=torch.bool), self.pattern) for name, weight in weights.items()
        }


class Uneven(Pruner):
    """A right one: layers have shares of their own, which come to the pattern's."""

    pattern = Unstructured(0.5)

    def masks(self, weights, progress, previous):
        total = sum(weight.numel() for weight in weights.values())
        left, shares = 0.5 * total, {}
        for name, weight in sorted(weights.items()):
            shares[name] = min(0.6, left / weight.numel()) if left > 0.02 * weight.numel() else 0.02
            left -= shares[name] * weight.numel()
        return {name: Unstructured(shares[name]).mask(weight.abs()) for name, weight in weights.items()}


class Remembered(InPlace):
    """A right one: what it keeps in itself, checkpoints have."""

    def state(self):
        return {"signs": self.signs}

    def restored(self, state):
        return replace(self, signs=dict(state["signs"]))


class RankDependent(Plain):
    def prepare(self, model, adapter, batches):
        for parameter in model.parameters():
            parameter.data.add_(1e-3 * torch.randn_like(parameter))
        return self


class Unseeded(Plain):
    def prepare(self, model, adapter, batches):
        drawn = torch.Generator()
        drawn.seed()
        for parameter in model.parameters():
            parameter.data.add_(1e-3 * torch.rand(parameter.shape, generator=drawn))
        return self


class Seeding(Plain):
    """What a loop around it draws next is the same after every step."""

    def masks(self, weights, progress, previous):
        torch.manual_seed(0)
        return super().masks(weights, progress, previous)


class Demanding(Plain):
    def __init__(self, needed):
        super().__init__()


class Crashing(Plain):
    def targets(self, model):
        raise KeyError("nothing here")


class Leaving(Plain):
    def masks(self, weights, progress, previous):
        raise SystemExit(0)


@pytest.mark.parametrize(
    ("cls", "check"),
    [
        (Illegal, "Masks obey their pattern"),
        (Foreign, "Masks obey their pattern"),
        (Scribbling, "masks() changes nothing"),
        (Random, "masks() changes nothing"),
        (Remembering, "masks() changes nothing"),
        (Seeding, "masks() changes nothing"),
        (Forgetful, "An interrupted run goes on"),
        (InPlace, "An interrupted run goes on"),
        (InPlace, "prepare() leaves the pruner"),
        (OfTheModule, "A process of its own"),
        (OfHashes, "A process of its own"),
        (Idle, "The finished masks"),
        (OfAnotherPattern, "The finished masks"),
        (OfAnotherShare, "The finished masks"),
        (Emptying, "The finished masks"),
        (Unmarked, "prepare() leaves the settings"),
        (RankDependent, "Every rank gets the same"),
        (Unseeded, "The same seed gives the same bytes"),
        (Demanding, "is made without settings"),
        (Crashing, "Targets are parameters"),
        (Leaving, "Masks obey their pattern"),
    ],
)
def test_a_broken_pruner_is_caught(cls, check, monkeypatch):
    only_uvit(monkeypatch)
    assert any(finding.check.startswith(check) for finding in findings(cls) if finding.fault is not None)


@pytest.mark.parametrize(
    "right", [Plain, *(pytest.param(one, marks=pytest.mark.slow) for one in (Plain(NM(1, 4)), Uneven, Remembered))]
)
def test_what_is_right_passes(right, monkeypatch):
    only_uvit(monkeypatch)
    check_pruner(right)


def test_the_error_lists_what_is_wrong(monkeypatch):
    only_uvit(monkeypatch)
    with pytest.raises(CompressorError, match=r"breaks \d+ promises:\n.*Masks obey"):
        check_pruner(Illegal)
    with pytest.raises(CompressorError, match="no subclass"):
        check_pruner(3)


def test_what_no_process_can_import_is_not_said_to_hold_there(monkeypatch):
    only_uvit(monkeypatch)

    class Local(Plain):
        pass

    (untried,) = [finding for finding in findings(Local) if finding.check.startswith("A process of its own")]
    assert untried.fault is None and "not tried in another process" in untried.check


def test_the_families_are_what_they_are_called_and_always_the_same():
    first, second = families(), families()
    assert sorted(first) == ["DiT", "U-ViT", "UNet"]
    for family, (adapter, model) in first.items():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second[family][1].parameters(), strict=True))
        assert sum(parameter.numel() for parameter in model.parameters()) < 300_000
        assert adapter.predict(model, adapter.example_inputs(2)).shape[0] == 2


def test_the_command_says_what_holds_and_what_does_not(cli, tmp_path, monkeypatch):
    only_uvit(monkeypatch)
    right = cli("check-plugin", "magnitude")
    assert right.code == 0 and f"magnitude: {len(CHECKS)} of {len(CHECKS)} checks hold" in right.out
    (tmp_path / "mine.py").write_text(
        "from compressor import NM, Pruner\n\n\nclass Mine(Pruner):\n    pattern = NM(2, 4)\n\n"
        "    def masks(self, weights, progress, previous):\n        return {name: None for name in weights}\n",
        encoding="utf-8",
    )
    wrong = cli("check-plugin", f"{tmp_path / 'mine.py'}:Mine")
    assert wrong.code == 1 and "FAIL U-ViT: Masks obey their pattern" in wrong.out and "returned NoneType" in wrong.out
    (tmp_path / "two.py").write_text(
        "from compressor import NM, CompressorError, Pruner\n\n\nclass Two(Pruner):\n    pattern = NM(2, 4)\n\n"
        "    def masks(self, weights, progress, previous):\n        raise CompressorError('A fact', 'And a hint')\n",
        encoding="utf-8",
    )
    assert "CompressorError: A fact\n     And a hint\n" in cli("check-plugin", f"{tmp_path / 'two.py'}:Two").out
    assert cli("check-plugin", "magnitud").code == 2


def test_checks_have_names_where_python_keeps_no_docstrings(monkeypatch):
    only_uvit(monkeypatch)
    for check in CHECKS:
        monkeypatch.setattr(check, "__doc__", None)
    assert [finding.check for finding in findings(Plain)][:2] == ["targets", "legal"]
