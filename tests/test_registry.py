"""Plugins: found by name, isolated when they break, and their settings checked."""

from __future__ import annotations

import pytest

from compressor import NM, Pattern, Pruner, registry
from compressor.errors import CompressorError, UsageError

GOOD = """
from compressor import Pruner

class Good(Pruner):
    def masks(self, weights, progress, previous):
        return {}
"""


class Plain(Pruner):
    """A pruner that is no dataclass."""

    def __init__(self, *, share: float = 0.5, pattern: Pattern = NM(2, 4), rounds: int = 1) -> None:  # noqa: B008
        self.share, self.rule, self.rounds = share, pattern, rounds

    @property
    def pattern(self):
        return self.rule

    def masks(self, weights, progress, previous):
        return {}


class Heir(registry.pruner_class("sparsedm")):
    """A method that changes one thing of another and inherits its settings."""

    def masks(self, weights, progress, previous):
        return previous or super().masks(weights, progress, previous)


@pytest.mark.parametrize(
    ("find", "name", "meant"),
    [
        (registry.pruner_class, "sparsdm", "sparsedm"),
        (registry.adapter, "uvit-digit", "uvit-digits"),
        (registry.images, "digit", "digits"),
        (registry.metric, "fd-digit", "fd-digits"),
    ],
)
def test_an_unknown_name_suggests_the_nearest_one(find, name, meant):
    with pytest.raises(UsageError) as caught:
        find(name)
    assert repr(name) in caught.value.message
    assert f"Did you mean {meant!r}?" in caught.value.hint


@pytest.mark.parametrize(
    "line", ["raise RuntimeError('out of paper')", "raise SystemExit('out of paper')", "import nowhere"]
)
def test_a_plugin_that_fails_at_import_is_named_with_its_distribution(install, line):
    install("brittle", line, pruners={"glass": "Glass"})
    with pytest.raises(CompressorError) as caught:
        registry.pruner_class("glass")
    for part in ("'glass'", "brittle", "nowhere" if "nowhere" in line else "out of paper"):
        assert part in caught.value.message


def test_a_broken_plugin_does_not_end_the_listing(install):
    install("brittle", "raise SystemExit(7)", pruners={"glass": "Glass"})
    listed = {line.name: line for line in registry.listing("pruners")}
    assert "SystemExit" in listed["glass"].error
    assert listed["sparsedm"].error is None
    assert listed["sparsedm"].distribution == "diffusion-compressor"


@pytest.mark.parametrize("value", ["class Odd: pass", "def Odd(): pass", "Odd = 3"])
def test_a_pruner_of_another_type_is_refused(install, value):
    install("strange", value, pruners={"odd": "Odd"})
    with pytest.raises(CompressorError, match="'odd' is not a subclass"):
        registry.pruner_class("odd")


def test_a_model_of_another_type_is_refused(install):
    install("strange", "def odd():\n    return 3", models={"odd": "odd"})
    with pytest.raises(CompressorError, match="'odd' of strange gave int, not Adapter"):
        registry.adapter("odd")


def test_a_model_that_raises_when_made_is_named(install):
    install("brittle", "def glass():\n    raise RuntimeError('out of paper')", models={"glass": "glass"})
    with pytest.raises(CompressorError) as caught:
        registry.adapter("glass")
    for part in ("'glass'", "brittle", "out of paper"):
        assert part in caught.value.message


def test_a_name_registered_twice_is_refused_with_both_owners(install):
    install("usurper", GOOD, pruners={"sparsedm": "Good"})
    with pytest.raises(UsageError) as caught:
        registry.pruner_class("sparsedm")
    for part in ("'sparsedm'", "diffusion-compressor", "usurper"):
        assert part in caught.value.message


def test_an_installed_plugin_is_found(install):
    install("good", GOOD, pruners={"fine": "Good"})
    assert registry.pruner_class("fine").__name__ == "Good"
    assert "fine" in registry.names("pruners")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"decay": "much"}, "decay"),
        ({"decay": float("nan")}, "decay"),
        ({"decay": -1.0}, "decay"),
        ({"decay": True}, "decay"),
        ({"progressive": 1}, "progressive"),
        ({"pattern": 124}, "pattern"),
        ({"pattern": "2 of 4"}, "2 of 4"),
        ({"pattern": "5:4"}, "5"),
    ],
)
def test_a_setting_of_the_wrong_type_is_refused(settings, named):
    with pytest.raises(UsageError) as caught:
        registry.build_pruner(registry.pruner_class("sparsedm"), settings)
    assert named in caught.value.message


def test_an_unknown_setting_suggests_the_nearest_one():
    with pytest.raises(UsageError, match="no setting 'decays'") as caught:
        registry.build_pruner(registry.pruner_class("sparsedm"), {"decays": 1.0})
    assert "Did you mean 'decay'?" in caught.value.hint


@pytest.mark.parametrize("cls", [registry.pruner_class("sparsedm"), Plain, Heir])
def test_a_pattern_is_given_as_text(cls):
    assert registry.build_pruner(cls, {"pattern": "4:2:4"}).pattern == NM(2, 4, 4)


@pytest.mark.parametrize(
    ("cls", "settings"), [(Plain, {"rounds": 1.5}), (Plain, {"share": "x"}), (Heir, {"decay": "x"})]
)
def test_settings_of_a_class_that_is_no_dataclass_are_checked(cls, settings):
    with pytest.raises(UsageError) as caught:
        registry.build_pruner(cls, settings)
    assert next(iter(settings)) in caught.value.message


def test_a_whole_number_is_a_number():
    assert registry.build_pruner(Plain, {"share": 1}).share == 1


def test_a_setting_without_default_is_asked_for():
    class Demanding(Plain):
        def __init__(self, amount: float) -> None:
            super().__init__(share=amount)

    with pytest.raises(UsageError, match="amount"):
        registry.build_pruner(Demanding, {})


def test_a_pruner_without_masks_cannot_be_built():
    class Idle(Pruner):
        pass

    with pytest.raises(UsageError, match="masks"):
        registry.build_pruner(Idle, {})
