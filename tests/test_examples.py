"""The examples run as they are written, in a folder of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {
    "estimator.py": r"scale 0\.1: loss \d",
    "lowered_pipeline.py": r"taken: \w+ \(.+\)\nlargest difference of a pixel: [\d.]+e-0[4-9]|taken: .*\n.*: 0\.0e\+00",
    "own_loop.py": r"zeros 50\.0%",
    "own_pictures.py": r"look at .*report\.html",
    "pipeline.py": r"\d+ layers are 2:4, [\d,]+ weights are zero\na picture of 16x16",
}
"""What each script ends by saying. `tiny.py` is no example but what two of them use."""


def test_every_example_is_tested_and_on_the_page():
    scripts = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert scripts == {*SAYS, "tiny.py", "progress.ipynb"}
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in scripts if f"({name})" not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_runs(name, tmp_path):
    environment = os.environ | {"COMPRESSOR_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[name], done.stdout), done.stdout


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((EXAMPLES / "progress.ipynb").read_text(encoding="utf-8"))
    # what is committed has no outputs of some machine
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "progress.ipynb", "exec"), names)
    said = capsys.readouterr()
    assert "layers are 2:4" in said.out
    assert re.search(r"2:4: 100%.*30/30.*loss=", said.err)  # the bar, as text that a notebook shows
    assert (tmp_path / "sparse-digits" / "model.safetensors").is_file()
