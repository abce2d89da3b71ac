"""What commands and pages say beside their figures: warnings, shares, what a word means, and what is only noise."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_comparison import TINY
from torch import nn

import compressor
import compressor.report
from compressor import Adapter, Plan, files, read_data, registry
from compressor.cli.tables import plan_tables
from compressor.errors import UsageError
from compressor.plugins.magnitude import Magnitude
from compressor.report.in_short import glossary

MINE = """
from compressor.plugins.magnitude import Magnitude


class Mine(Magnitude):
    pass
"""


DERIVED = """
from __future__ import annotations

from dataclasses import dataclass

from compressor.plugins.magnitude import Magnitude


@dataclass(frozen=True)
class Stronger(Magnitude):
    power: float = 1.0


class Given(Stronger):
    def __init__(self, power: float = 2.0, twice: bool = False):
        super().__init__(power=power * (1 + twice))


@dataclass(frozen=True)
class Unknown(Magnitude):
    power: Power = 1.0
"""


def test_a_method_with_settings_of_its_own_may_derive_from_a_bundled_one(tmp_path: Path) -> None:
    """Whose settings have types that its own file does not import."""
    path = tmp_path / "derived.py"
    path.write_text(DERIVED)
    built = {name: registry.pruner_class_from_file(f"{path}:{name}") for name in ("Stronger", "Given", "Unknown")}
    found: Any = registry.build_pruner(built["Stronger"], {"power": 3.0, "pattern": "1:4"})
    assert (found.power, str(found.pattern)) == (3.0, "1:4")
    found = registry.build_pruner(built["Given"], {"twice": True})
    assert found.power == 4.0
    with pytest.raises(UsageError, match=r"Unknown: the type of a setting is not known.*'Power'"):
        registry.build_pruner(built["Unknown"], {"power": 1.0})


def test_a_class_in_place_of_a_pruner_is_named() -> None:
    adapter = registry.adapter("uvit-digits")
    made: Any = Magnitude
    with pytest.raises(UsageError, match="the pruner is the class Magnitude"):
        compressor.prune(adapter.load(None), made, adapter=adapter, data=registry.images("digits"), steps=0)


def test_methods_may_be_listed_by_the_name_of_the_option(cli: Any) -> None:
    assert cli("list", "methods").out == cli("list", "pruners").out != ""


def test_every_backend_says_what_it_is() -> None:
    said = {one.name: one.summary for one in registry.listing("backends")}
    assert said and not [name for name, summary in said.items() if summary == f"The backend `{name}`."]


def test_a_comparison_in_place_of_a_run_is_named(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    files.write_json(tmp_path / "report.json", {"kind": "comparison"})
    for command in ("lower", "evaluate", "bench"):
        done = cli(command, tmp_path)
        assert done.code and "comparison" in done.err and "cells/NAME/run" in done.err, (command, done.err)


def test_colours_that_a_model_does_not_take_are_spoken_of_and_weights_are_timed_once(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "photos" / f"{number}.png")
    given = ("run", "--data", tmp_path / "photos", "--model", "uvit-digits", "--method", "magnitude", "--steps", "0")
    judged = ("samples=4", "sampler_steps=1", "bootstrap=0", "latency_rounds=2")
    few = [part for one in judged for part in ("--set", f"evaluate.{one}")]
    done = cli(*given, *few, "--out", tmp_path / "run")
    assert done.code == 0 and "photos is in colour, uvit-digits is not" in done.err
    _, before, after = files.read_json(tmp_path / "run" / "report.json")["rows"]
    assert before["weights_sha256"] == after["weights_sha256"] and before["latency"] == after["latency"] != []
    for path in (tmp_path / "photos").iterdir():
        Image.open(path).convert("L").convert("RGB").save(path)
    assert not read_data(tmp_path / "photos", (1, 8, 8)).greyed and not read_data(tmp_path / "photos", (3, 8, 8)).greyed
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photos" / "3.png")  # the others stay grey
    assert read_data(tmp_path / "photos", (1, 8, 8)).greyed and not read_data(tmp_path / "photos", (3, 8, 8)).greyed


@pytest.mark.slow
def test_a_pruner_in_a_file_is_compared_with_registered_ones(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    done = cli("compare", "--methods", "magnitude,mine.py:Mine", "--seeds", "1", "--out", tmp_path / "out", *TINY)
    assert done.code == 0, done.err
    report = files.read_json(tmp_path / "out" / "report.json")
    first, second = report["entries"]
    assert first["label"] == "magnitude" and second["method"].endswith("mine.py:Mine") and "Mine" in second["label"]
    assert first["cells"][0]["weights_sha256"] == second["cells"][0]["weights_sha256"]  # it is the same method
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "What the measures mean" in page and "compressor run --config cells/CELL/run/recipe.yaml" in page
    assert page.count('class="command"') == 1 and page.count('class="zoom"') >= 4


def test_the_words_of_a_page_are_explained() -> None:
    told = dict(glossary("fd-digits", ["fd-digits", "prediction error"]))
    assert "lower" in str(told).lower() and {"fd-digits", "prediction error"} <= set(told)


def test_pages_have_a_dark_form_and_a_narrow_one() -> None:
    style = (Path(compressor.report.__file__).parent / "style.css").read_text(encoding="utf-8")
    assert "@media (prefers-color-scheme: dark)" in style and "@media (max-width: 40rem)" in style
    # what is still too wide moves by itself, not with the page
    assert re.search(r"\.scroll \{ overflow-x: auto", style)


def test_a_run_says_which_layers_stay_dense(cli: Any, tmp_path: Path) -> None:
    done = cli.trial(tmp_path / "run", "--method", "magnitude", "--pattern", "128:2:4", "--steps", "0")
    assert done.code == 0, done.err
    assert re.search(r"warning: \d+ of \d+ layers stay dense, as 128:2:4 does not fit them \(", done.err)


def test_pictures_that_no_metric_knows_are_said_to_go_unmeasured(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for number in range(8):
        Image.new("RGB", (16, 16), (30 * number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    small = (
        "architecture.embed_dim=32 architecture.depth=2 architecture.num_heads=2 train.batch_size=4 evaluate.samples=4"
    )
    settings = [
        part
        for one in f"{small} evaluate.sampler_steps=2 evaluate.latency_rounds=0 loading.size=16".split()
        for part in ("--set", one)
    ]
    command = ("train", "--model", "uvit", "--data", tmp_path / "pictures", "--steps", "1", "--out", tmp_path / "run")
    done = cli(*command, *settings)
    assert done.code == 0, done.err
    assert "no quality is measured: --set evaluate.metric=fd-scattering needs no network" in done.err


def test_the_share_of_operations_is_of_the_dense_model(cli: Any, tmp_path: Path) -> None:
    done = cli.trial(tmp_path / "run", "--method", "structured", "--steps", "0", "--set", "settings.macs=0.6")
    assert done.code == 0, done.err
    row = next(line for line in done.out.splitlines() if "structured" in line and " M (" in line)
    assert re.search(r"M \((59|60|61)%\)", row), row


def test_a_finished_run_is_judged_by_another_sampler(cli: Any, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    few = ("--set", "evaluate.measures=[]", "--set", "evaluate.bootstrap=0")
    before = files.read_json(tmp_path / "run" / "report.json")["sampler"]
    done = cli("evaluate", tmp_path / "run", "--samples", "8", "--sampler", "ddim", "--sampler-steps", "2", *few)
    assert done.code == 0, done.err
    assert "DDIM" in files.read_json(tmp_path / "run" / "report.json")["sampler"] and "DDIM" not in before


def test_a_result_is_one_line() -> None:
    class Noise(Adapter):
        def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Any]:
            return batch, batch

        def predict(self, module: nn.Module, inputs: Any) -> Any:
            return module(inputs)

    result = compressor.prune(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), Magnitude(), adapter=Noise(), data=torch.zeros(4, 8), steps=0
    )
    assert repr(result) == "Result(Sequential, 2 of 2 layers masked, 0 steps)"


@pytest.mark.parametrize(("wins", "said"), [(11, "1.05x"), (6, "1.05x, within noise"), (0, "1.05x")])
def test_what_chance_explains_is_marked_in_the_forms_of_a_plan(wins: int, said: str) -> None:
    form = {"name": "dense", "dense": True, "median_ms": 2.0, "iqr_ms": 0.1, "speedup": 1.0}
    other = {"name": "lowered", "dense": False, "median_ms": 1.9, "iqr_ms": 0.1, "speedup": 1.05}
    plan = Plan.model_validate(
        {
            "weights_sha256": "0" * 64,
            "dtype": "float32",
            "input_shapes": [],
            "setting": {"device": "cpu", "hardware": "x", "threads": 1, "versions": {}},
            "layers": [],
            "left_out": {},
            "forms": [form, other | {"against": {"dense": {"ratio": 1.05, "wins": wins, "rounds": 11}}}],
            "choice": "dense",
            "reason": "",
        }
    )
    _, forms = plan_tables(plan)
    assert list(forms.columns[2].cells) == ["1.00x", said]
