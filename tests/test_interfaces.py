"""What plugins say of themselves, so that the core need not know any of them by name: settings, costs, comparisons, weights."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from compressor import NM, CompressorError, Preset, Pruner, comparison, found, registry
from compressor.comparison.presets import compared_by_default, presets
from compressor.discovery import KINDS
from compressor.errors import UsageError
from compressor.quality.metric import Metric
from compressor.registry import build_pruner
from compressor.runs import inputs
from compressor.runs.rows import method_settings
from compressor.training.pruner import setting_names, settings_of

ROOT = Path(__file__).parent.parent

NARROW = """
from dataclasses import dataclass, replace

from compressor import Pruner, Surgery, found


@dataclass(frozen=True)
class Narrow(Pruner):
    keep: float = 0.9
    strength: float = 1.0
    surgery: Surgery | None = found()

    def targets(self, model):
        return {}

    def masks(self, weights, progress, previous):
        return {}

    def with_cost(self, share, measure="macs"):
        return replace(self, keep=share) if measure == "macs" else None
"""


@dataclass(frozen=True)
class Learning(Pruner):
    """Has settings of every visibility, and two things that it finds."""

    pattern: NM = NM(2, 4)
    share: float = 0.5
    token: str = field(default="secret", repr=False)
    norms: dict[str, Tensor] = found(dict)
    best: float | None = found()

    def masks(self, weights, progress, previous):
        return {}


# --- Settings, and what was found. ---


def test_what_is_found_is_no_setting_and_what_is_hidden_from_repr_is_one():
    assert setting_names(Learning) == ("pattern", "share", "token")
    pruner = Learning(share=0.25, norms={"w": torch.ones(1)}, best=2.0)
    assert settings_of(pruner) == {"pattern": NM(2, 4), "share": 0.25, "token": "secret"}
    assert method_settings(pruner) == {"pattern": "2:4", "share": 0.25, "token": "secret"}
    assert "norms" not in repr(pruner) and Learning().norms == {} and Learning().best is None
    assert Learning().norms is not Learning().norms


def test_recipes_give_settings_and_not_what_is_found():
    assert build_pruner(Learning, {"token": "mine"}).token == "mine"
    with pytest.raises(UsageError, match="Learning has no setting 'best'"):
        build_pruner(Learning, {"best": 1.0})


def test_a_subclass_keeps_what_is_found_apart():
    @dataclass(frozen=True)
    class Heir(Learning):
        extra: int = 3

    assert setting_names(Heir) == ("pattern", "share", "token", "extra")


@pytest.mark.parametrize("method", registry.names("pruners"))
def test_every_method_declares_what_it_finds(method):
    """Nothing that a report would have to print as an object is a setting."""
    settings = settings_of(registry.pruner_class(method)())
    plain = (bool, int, float, str, type(None))
    assert [n for n, v in settings.items() if not isinstance(v, plain) and n not in ("pattern", "estimator")] == []


# --- Costs. ---


@pytest.fixture
def narrow(tmp_path):
    """A recipe of a third party's method, which can be told what to cost."""
    (tmp_path / "mine.py").write_text(NARROW, encoding="utf-8")
    path = tmp_path / "narrow.yaml"
    path.write_text(f"pruner: {tmp_path / 'mine.py'}:Narrow\n", encoding="utf-8")
    return path


def test_a_third_partys_method_is_told_what_a_mask_costs(narrow):
    planned = comparison.planned(["magnitude"], [narrow], None, {}, match="macs")
    assert list(planned.matched) == ["narrow"] and list(planned.matched["narrow"]) == ["keep"]
    assert 0.5 < planned.matched["narrow"]["keep"] < 0.6
    pruner = inputs.load_inputs(planned.recipes["narrow"]).pruner
    assert pruner.keep == planned.matched["narrow"]["keep"] and pruner.strength == 1.0


def test_what_has_no_density_is_told_its_macs_instead(narrow):
    planned = comparison.planned(["magnitude"], [narrow], None, {"pattern": "1:4"}, match="density")
    assert planned.matched == {"narrow": {"keep": 0.25}}


def test_who_says_the_cost_himself_is_not_overruled(narrow):
    narrow.write_text(narrow.read_text(encoding="utf-8") + "settings: {keep: 0.7}\n", encoding="utf-8")
    planned = comparison.planned(["magnitude"], [narrow], None, {}, match="macs")
    assert planned.matched == {} and planned.recipes["narrow"].settings == {"keep": 0.7}


def test_a_cost_that_reaches_no_setting_is_refused(narrow):
    source = narrow.parent / "mine.py"
    source.write_text(NARROW.replace("replace(self, keep=share)", "replace(self)"), encoding="utf-8")
    with pytest.raises(CompressorError, match=r"Narrow: with_cost\(\) changes no setting"):
        comparison.planned(["magnitude"], [narrow], None, {}, match="macs")


def test_a_search_for_equal_latency_asks_the_method(narrow, monkeypatch):
    from compressor.comparison import latency

    lowered = []
    settings = {"train": {"steps": 0}}
    masked = inputs.load_inputs(inputs.resolve({"method": "magnitude", **settings}, "here"))
    other = inputs.load_inputs(inputs.resolve({"pruner": f"{narrow.parent / 'mine.py'}:Narrow", **settings}, "here"))

    def only_once(model, example, adapter):
        if lowered:
            raise CompressorError("too small", "")
        lowered.append(model)
        return SimpleNamespace(model=model)

    monkeypatch.setattr(latency, "lower", only_once)
    assert latency.macs_of_equal_latency(masked, other) == pytest.approx(1.0, abs=0.02)  # every smaller one failed
    lowered.clear()
    with pytest.raises(TypeError, match="cannot be told"):
        latency.macs_of_equal_latency(masked, masked)


@pytest.mark.parametrize("method", registry.names("pruners"))
@pytest.mark.parametrize("measure", ["macs", "density"])
def test_costs_are_settings_of_the_methods_that_can_be_told(method, measure):
    pruner = registry.pruner_class(method)()
    told = pruner.with_cost(0.25, measure)
    if told is None:
        assert (method, measure) == ("depth", "density") or method not in ("structured", "depth")
        return
    changed = {n: v for n, v in settings_of(told).items() if v != settings_of(pruner)[n]}
    assert changed == {measure: 0.25}


# --- Comparisons and presets. ---


def test_methods_say_whether_they_are_compared():
    assert compared_by_default() == (
        *("dense-continued", "magnitude", "obs", "sparsedm", "sr-ste", "structured", "wanda"),
    )


def test_presets_are_those_of_the_methods(monkeypatch):
    assert sorted(presets()) == ["sparsedm-ablation", "sparsedm-best"]
    mine = type("Mine", (Learning,), {"presets": {"parts": Preset("mine", {"a": {"method": "magnitude"}})}})
    theirs = type("Theirs", (Learning,), {"presets": {"parts": Preset("theirs", {})}})
    classes = {"mine": mine, "theirs": theirs}
    monkeypatch.setattr(registry, "names", lambda kind: list(classes))
    monkeypatch.setattr(registry, "pruner_class", classes.__getitem__)
    with pytest.raises(CompressorError, match="mine and theirs both have a preset 'parts'"):
        presets()
    del classes["theirs"]
    assert presets()["parts"].about == "mine"


# --- Metrics. ---


class Dino(Metric):
    name = "dino"
    weights_setting = "inception_weights"

    def features(self, images):
        return images.flatten(1)

    @property
    def sha256(self):
        return "0" * 64

    def with_weights(self, path):
        return self


def test_weights_choose_the_metric_that_takes_them(monkeypatch, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    given = {"evaluate": {"inception_weights": str(tmp_path / "w.pth")}}
    assert inputs.resolve(given, "here").evaluate.metric == "fid"
    real = registry.metric
    monkeypatch.setattr(registry, "metric", lambda name: Dino() if name == "fid" else real(name))
    assert inputs.resolve(given, "here").evaluate.metric == "fid"  # by its registered name
    named = inputs.resolve({"evaluate": {**given["evaluate"], "metric": "fd-digits"}}, "here")
    with pytest.raises(UsageError, match="fd-digits takes no weights") as caught:
        inputs.load_inputs(named)
    assert "evaluate.metric=fid" in caught.value.hint


def test_a_registered_data_set_says_what_its_models_are_judged_by():
    def metric(**given):
        return inputs.resolve(given, "here").evaluate.metric

    assert metric(model="uvit", data="pictures-32") == "fd-pictures"
    assert metric(model="uvit", data="digits") == "fd-digits"
    assert metric(model="uvit", data="pictures-32", evaluate={"metric": "fd-digits"}) == "fd-digits"
    assert metric(model="uvit", data="photos/") is None
    assert metric() == "fd-digits"


def test_measures_are_named_by_their_metric():
    assert Dino().measure_name("recall") == "recall-dino"
    assert registry.metric("fid").measure_name("sfd") == "sfid"
    assert registry.metric("fid").measure_name("kid") == "kid"
    assert registry.metric("fd-digits").measure_name("kid") == "kid-digits"


# --- No name of a plugin is in the core. ---

KNOWN_NAMES = {
    ("compressor/recipe.py", "uvit-digits"): "the model of a recipe that names none",
    ("compressor/recipe.py", "sparsedm"): "the method of a recipe that names none",
    ("compressor/data/outsized.py", "depth"): "a setting of models in configurations, which is no pruner",
    ("compressor/cli/train.py", "dense-continued"): "what training without masks is",
    ("compressor/runs/machine.py", "fid"): "an extra of this package, which `doctor` looks for",
    ("compressor/runs/machine.py", "nni"): "an extra of this package, which `doctor` looks for",
    ("compressor/report/in_short.py", "fid"): "whose features a reader may know",
    ("compressor/environment.py", "diffusers"): "the library, whose version a report has",
    ("compressor/lower/held.py", "diffusers"): "the library, which may ask a lowered model for its weights",
}


def test_the_core_knows_no_plugin_by_name():
    names = {
        entry.name
        for kind in KINDS
        for entry in entry_points(group=f"compressor.{kind}")
        if entry.value.startswith(("compressor.plugins.", "compressor.model_zoo."))
    }
    assert {"sparsedm", "fid", "uvit-digits", "digits"} <= names
    used = {
        (path.relative_to(ROOT).as_posix(), node.value)
        for path in (ROOT / "compressor").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names
    }
    assert used == set(KNOWN_NAMES)
