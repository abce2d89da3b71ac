"""What an import costs: core pulls in no plugin, no zoo and none of their libraries, and help pulls in no torch."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

PLUGINS = Path(__file__).parent.parent / "plugins"
KEPT_OUT = [
    "compressor.plugins",
    "compressor.model_zoo",
    "diffusers",
    "torch_pruning",
    "onnx",
    "onnxruntime",
    "datasets",
    "torch_fidelity",
]

EVERYTHING_PUBLIC = "import compressor; [getattr(compressor, name) for name in compressor.__all__]"
HELP = """
import sys
sys.argv = ["compressor", "--help"]
from compressor.cli import main
try:
    main()
except SystemExit as exit:
    assert not exit.code, exit.code
"""


def loaded(code: str, unwanted: list[str], *path: Path) -> list[str]:
    """Those of `unwanted` that are imported once `code` has run in a fresh interpreter."""
    report = f"\nimport json, sys\nprint('\\n' + json.dumps([name for name in {unwanted!r} if name in sys.modules]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "code", ["import compressor; compressor.prune, compressor.load", EVERYTHING_PUBLIC], ids=["prune and load", "all"]
)
def test_core_pulls_in_neither_plugins_nor_zoo_nor_their_libraries(code: str) -> None:
    assert loaded(code, KEPT_OUT) == []


def test_importing_the_package_pulls_in_no_torch() -> None:
    assert loaded("import compressor", ["torch", "numpy", *KEPT_OUT]) == []


def test_help_pulls_in_no_torch() -> None:
    assert loaded(HELP, ["torch", "numpy", "pydantic", "importlib.metadata", *KEPT_OUT]) == []


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import compressor.plugins.magnitude", ["compressor.plugins"]),
        ("import compressor.model_zoo", ["compressor.model_zoo"]),
        ("import diffusers", ["diffusers"]),
        ("import onnx", ["onnx"]),
        ("import onnxruntime", ["onnxruntime"]),
        ("import torch_pruning", ["torch_pruning"]),
        ("import datasets", ["datasets"]),
        ("import torch_fidelity", ["torch_fidelity"]),
    ],
)
def test_the_check_can_fail(code: str, expected: list[str], tmp_path: Path) -> None:
    for absent in ("torch_pruning", "torch_fidelity"):
        if code.endswith(absent):
            (tmp_path / f"{absent}.py").touch()
    assert loaded(f"import compressor\n{code}", KEPT_OUT, tmp_path) == expected


def test_the_check_for_torch_can_fail() -> None:
    assert loaded("import compressor; compressor.NM", ["torch"]) == ["torch"]


def imported(source: str, package: str) -> Iterator[str]:
    """The modules, by full name, that the Python `source` of a module in `package` imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def others(source: str, plugin: str) -> set[str]:
    """The other plugins whose folders the `source` of a module of `plugin` imports."""
    found = [name.split(".") for name in imported(source, f"compressor.plugins.{plugin}")]
    return {parts[2] for parts in found if parts[:2] == ["compressor", "plugins"] and len(parts) > 2} - {plugin}


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in PLUGINS.glob("*/__init__.py")))
def test_no_plugin_imports_another(folder: str) -> None:
    """What two share is in the core; what one wants of another, it asks the registry for by name."""
    assert {
        p.name: found for p in (PLUGINS / folder).rglob("*.py") if (found := others(p.read_text("utf-8"), folder))
    } == {}


@pytest.mark.parametrize(
    "source",
    [
        "from ..obs import OBS",
        "from .. import obs",
        "def f():\n    from ..obs import OBS",
        "import compressor.plugins.obs",
        "from compressor.plugins.obs import OBS",
        "from compressor.plugins import obs",
    ],
)
def test_the_check_for_plugins_can_fail(source: str) -> None:
    assert others(source, "wanda") == {"obs"}
    assert others(source, "obs") == set()
    assert others("from . import scores\nfrom .groups import x\nfrom compressor import registry", "structured") == set()
