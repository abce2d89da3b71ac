"""What `compressor doctor` says of a machine; completion in shells; and what an installed package says without its repository."""

from __future__ import annotations

import ast
import json
import os
import pydoc
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

import compressor
from compressor import registry
from compressor.environment import versions_of
from compressor.runs import machine

ROOT = Path(__file__).parent.parent


def test_the_version_of_torch_names_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.environment.version", lambda _: "1")  # as torch's package for CUDA says it
    assert versions_of(["torch", "numpy"]) == {"torch": torch.__version__, "numpy": "1"}


def test_doctor_says_what_runs_here_and_how_to_get_the_rest(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ['onnx>=1; extra == "onnx"', "onnxruntime; extra == 'onnx'", 'pytest; extra == "test"', "torch"]
    monkeypatch.setattr(machine, "requires_of", lambda _: requirements)
    monkeypatch.setattr(machine, "_installed", lambda name: name != "onnxruntime")
    found = json.loads(cli("doctor", "--json").out)
    assert set(found["backends"]) == set(registry.names("backends")) and found["backends"]["eager"] is None
    assert found["extras"] == {
        "onnx": {
            "for": "export to ONNX, and ONNX Runtime beside our kernels",
            "missing": ["onnxruntime"],
            "pip": "pip install 'diffusion-compressor[onnx]'",
        }
    }
    assert found["missing"][-1]["how"] == "pip install 'diffusion-compressor[onnx]'"
    assert found["threads"] == torch.get_num_threads() and found["versions"]["torch"] == torch.__version__
    shown = cli("doctor")
    assert shown.code == 0 and "pip install 'diffusion-compressor[onnx]'" in shown.out and "onnxruntime" in shown.out


def test_every_extra_of_users_says_what_it_is_for() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for_users = set(settings["project"]["optional-dependencies"]) - set(machine._NOT_FOR_USERS)
    assert for_users == set(machine._FOR) and all(machine._FOR.values())


def test_templates_of_issues_are_forms() -> None:
    for name in ("fault", "idea"):
        form = YAML(typ="safe").load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
        assert form["name"] and form["description"]
        assert all(one["type"] == "markdown" or one["attributes"]["label"] for one in form["body"])


def test_missing_kernels_say_how_to_get_them() -> None:
    facts = {"kernels": {"file": None, "note": "install GCC"}, "threads": 2, "cores": 2.0, "gpus": [], "extras": {}}
    assert machine.missing(facts) == [{"what": "compiled CPU kernels", "how": "install GCC"}]
    slow = facts | {"kernels": {"file": "x.so", "note": "one thread"}, "threads": 1, "cores": 4.0}
    assert [line["what"] for line in machine.missing(slow)] == ["one thread", "torch runs on 1 of 4 cores"]


def test_what_linux_tells_is_read() -> None:
    told = "processor: 0\nflags\t\t: fpu sse4_2 avx avx2 fma avx512f\n\nprocessor: 1\nflags: none\n"
    assert machine.instruction_sets(told) == ["sse4_2", "avx", "avx2", "fma", "avx512f"]
    assert machine.instruction_sets("Features : fp asimd asimddp\n") == ["asimd", "asimddp"]
    assert machine.instruction_sets("") == []
    maps = "7f-80 r-xp 0 00:00 1 /a/libgomp.so.1\n7f-80 r-xp 0 00:00 1 /b/libtorch.so\n7f-80 r--p 0 00:00 2 /c/libiomp5.so\n"
    assert machine.openmp_runtimes(maps) == ["/a/libgomp.so.1", "/c/libiomp5.so"]


def test_backends_say_whether_they_run_on_this_machine(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    [lines] = json.loads(cli("list", "backends", "--json").out).values()
    here = {line["name"]: line["unavailable"] for line in lines}
    assert (
        here["cusparselt"] == here["dense-fp8"] == "needs an NVIDIA GPU" and here["eager"] is here["gathered"] is None
    )
    row = next(line for line in cli("list", "backends").out.splitlines() if "cusparselt " in line)
    assert "needs an NVIDIA GPU" in row


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell: str) -> None:
    """As docs/cli.md has it: the script, and what it asks for while one types."""
    command = [sys.executable, "-c", "from compressor.cli import main; main()"]
    asked = os.environ | {"COMP_WORDS": "compressor do", "COMP_CWORD": "1" if shell != "fish" else "do"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=asked | {"_COMPRESSOR_COMPLETE": f"{shell}_complete"}
    )
    assert "doctor" in done.stdout and "compare" not in done.stdout, done.stderr


def test_the_help_of_lower_is_short_and_has_the_verb() -> None:
    text = pydoc.plain(pydoc.render_doc(compressor.lower))
    assert len(text.splitlines()) < 100 and "fastest kernel of this machine" in text


def test_what_an_installation_shows_has_no_links_into_the_repository() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [file] = settings["tool"]["setuptools"]["dynamic"]["readme"]["file"]
    assert settings["project"]["dynamic"] == ["readme"] and "readme" not in settings["project"]
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.startswith("# ") and not re.search(r"\]\((?!https?://)", text)
    notices = [path for pattern in settings["project"]["license-files"] for path in ROOT.glob(pattern)]
    assert {path.parent.name for path in notices} >= {"digits", "pictures"}


def hints(source: str) -> list[str]:
    """The texts that a program may show: every string that is not a docstring."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    blocks = [node.body for node in ast.walk(tree) if isinstance(node, documented)]
    docs = {id(statement.value) for block in blocks for statement in block if isinstance(statement, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs]
    return [node.value for node in texts if isinstance(node.value, str)]


def test_no_message_sends_anybody_to_a_file_that_is_not_installed() -> None:
    assert hints('def f():\n    "docs/a.md"\n    raise E("see docs/b.md")') == ["see docs/b.md"]
    found = {
        f"{path.relative_to(ROOT)}: {text}"
        for folder in ("compressor", "plugins", "model_zoo")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent.name != "cli"  # the help of options names pages of the documentation
        if "docs/" in (source := path.read_text(encoding="utf-8"))
        for text in hints(source)
        if re.search(r"\bdocs/\w+\.md", text)
    }
    assert not found
