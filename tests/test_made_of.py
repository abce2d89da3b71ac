"""What a comparison is made of: a change of it between two calls, or before a worker reads it, is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from compressor import CompressorError, comparison, discovery, environment, files, registry
from compressor.comparison import jobs, worker
from compressor.model_zoo.digits.classifier import FDDigits
from compressor.runs import facts

FEW = Path(__file__).with_name("few_digits.npz")
CHANGES = {
    "the data": "data.npz",
    "the model's weights": "weights.safetensors",
    "the method's own file": "helper.py",
    "the weights of the metric's extractor": "",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data, weights and a method of one's own, which imports a file beside it."""
    shutil.copyfile(FEW, tmp_path / "data.npz")
    save_file(registry.adapter("uvit-digits").load(None).state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "helper.py").write_text("FACTOR = 1\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text(
        "import helper\nfrom compressor.plugins.magnitude import Magnitude\n\nclass Mine(Magnitude):\n    pass\n",
        encoding="utf-8",
    )
    return tmp_path


def planned(place: Path, *methods: str) -> Any:
    common = {
        **{"data": str(place / "data.npz"), "weights": str(place / "weights.safetensors"), "steps": 1},
        "evaluate": {"samples": 8, "sampler_steps": 1, "bootstrap": 2, "latency_rounds": 0, "measures": []},
    }
    return comparison.planned([f"{place / 'mine.py'}:Mine", *methods], [], None, common, seeds=1)


def change(path: Path) -> None:
    if path.suffix == ".npz":
        held = dict(np.load(path))
        np.savez(path, images=held["images"][::-1], labels=held["labels"][::-1])
    elif path.suffix == ".py":
        path.write_text("FACTOR = 2\n", encoding="utf-8")
    else:
        save_file({name: value + 1 for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_between_two_calls_is_refused_before_anything_is_written(
    what: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, wanted = place / "out", planned(place)
    jobs._write_job(out / "dense", jobs._dense(wanted), ())
    (cell,) = wanted.cells({})
    for folder in (out / "dense", jobs._folder(wanted, cell, out)):
        (folder / "row.json").write_text("{}", encoding="utf-8")
    jobs._refuse_others(planned(place), out)
    if CHANGES[what]:
        change(place / CHANGES[what])
    else:
        monkeypatch.setattr(FDDigits, "sha256", "0" * 64)
    with pytest.raises(CompressorError, match=f"since it was made, {what}") as caught:
        next(comparison.conduct(planned(place, "magnitude"), out))
    assert "remove" in caught.value.hint and not list(out.glob("cells/magnitude*"))


@pytest.mark.parametrize("what", list(CHANGES)[:3])
def test_a_worker_finds_what_changed_since_the_comparison_was_called(what: str, place: Path) -> None:
    wanted = planned(place)
    folder = jobs._folder(wanted, wanted.cells({})[0], place / "out")
    change(place / CHANGES[what])
    with pytest.raises(CompressorError, match=f"since the comparison was called, {what}"):
        worker._done(folder, None, lambda text: None, None)
    assert not (folder / "run").exists()


def test_a_job_from_before_this_was_kept_is_judged_again(place: Path) -> None:
    out, wanted = place / "out", planned(place)
    folder = jobs._folder(wanted, wanted.cells({})[0], out)
    job = files.read_json(folder / "job.json")
    del job["made_of"]
    files.write_json(folder / "job.json", job)
    (folder / "row.json").write_text("{}", encoding="utf-8")
    jobs._folder(wanted, wanted.cells({})[0], out)
    assert not (folder / "row.json").exists()
    assert files.read_json(folder / "job.json")["made_of"]["data_sha256"] == wanted.inputs.data.sha256


PLUGIN = "from compressor.plugins.magnitude import Magnitude\n\nclass Theirs(Magnitude):\n    FACTOR = 1\n"


def edit(place: Path) -> None:
    (source,) = place.glob("site-theirs/theirs.py")
    source.write_text(PLUGIN.replace("FACTOR = 1", "FACTOR = 2"), encoding="utf-8")


def test_an_installed_method_that_was_edited_is_refused(place: Path, install: Any) -> None:
    install("theirs", PLUGIN, pruners={"theirs": "Theirs"})
    common = {"data": str(FEW), "steps": 1, "evaluate": {"samples": 0, "latency_rounds": 0}}

    def wanted() -> Any:
        return comparison.planned(["theirs", "magnitude"], [], None, common, seeds=1)

    out, cells = place / "out", wanted().cells({})
    folders = [jobs._folder(wanted(), cell, out) for cell in cells]
    for folder in folders:
        (folder / "row.json").write_text("{}", encoding="utf-8")
    jobs._refuse_others(wanted(), out)
    edit(place)
    with pytest.raises(
        CompressorError, match="theirs-seed-0: since it was made, the code of the method's plugin changed"
    ):
        jobs._refuse_others(wanted(), out)
    with pytest.raises(
        CompressorError, match="since the comparison was called, the code of the method's plugin changed"
    ):
        worker._done(folders[0], None, lambda text: None, None)
    assert "method_plugin_sha256" not in files.read_json(folders[1] / "job.json")["made_of"]


def test_a_run_of_an_installed_method_that_was_edited_is_not_resumed(place: Path, install: Any, cli: Any) -> None:
    install("theirs", PLUGIN, pruners={"theirs": "Theirs"})
    out = place / "run"
    made = cli.run(out, "--method", "theirs", "--set", "evaluate.samples=0")
    assert made.code == 0, made.err
    edit(place)
    (out / "report.json").unlink()
    again = cli("resume", str(out))
    assert again.code != 0 and "the code of the method's plugin changed" in again.err


def test_the_code_of_a_plugin_is_its_outermost_package_and_its_version(
    tmp_path: Path, install: Any, monkeypatch: Any
) -> None:
    assert discovery.code_sha256("pruners", "magnitude") is None and discovery.code_sha256("pruners", "unknown") is None
    package = tmp_path / "spaces" / "lab" / "methods" / "deep"  # lab is a namespace
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py", package.parent / "helper.py"):
        file.write_text("", encoding="utf-8")
    (package.parent.parent / "others.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "spaces"))
    install("theirs", "", pruners={"theirs": "Theirs"})
    (information,) = tmp_path.glob("site-theirs/*.dist-info")
    (information / "entry_points.txt").write_text("[compressor.pruners]\ntheirs = lab.methods.deep:Theirs\n")

    def found() -> Any:
        return discovery.code_sha256("pruners", "theirs")

    first = found()
    (package.parent.parent / "others.py").write_text("changed = 1", encoding="utf-8")
    (package.parent / "notes.txt").write_text("no module", encoding="utf-8")
    assert found() == first
    (package.parent / "helper.py").write_text("changed = 1", encoding="utf-8")
    second = found()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.1\n")
    assert len({first, second, found()}) == 3


def test_versions_name_the_code_of_the_toolkit_itself() -> None:
    assert len(environment.environment()["versions"][environment.CODE]) == 12
    was = {"versions": {"torch": "1"}}
    now = {"versions": {"torch": "1", environment.CODE: "abc"}}
    assert facts.changed(was, now) == [] and facts.changed(now, {"versions": {"torch": "1", environment.CODE: "def"}})
