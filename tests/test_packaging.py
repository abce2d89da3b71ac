"""What pyproject.toml packs is what the folders hold, packages and other files; the oldest versions that it allows are tested."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETTINGS = PYPROJECT["tool"]["setuptools"]
FOLDERS = {"compressor": "compressor", "compressor.plugins": "plugins", "compressor.model_zoo": "model_zoo"}
BUILT = {".so", ".pyd", ".pyc"}


def packages(root: Path) -> dict[str, Path]:
    """Every package in the folders, by its name once installed."""
    return {
        ".".join((name, *path.parent.relative_to(root / folder).parts)): path.parent
        for name, folder in FOLDERS.items()
        for path in (root / folder).rglob("__init__.py")
    }


def unpacked(root: Path, packed: dict[str, list[str]]) -> list[str]:
    """The files in the folders that are no Python and that `packed`, patterns by package, leaves out."""
    found = packages(root)
    owners = {folder: name for name, folder in found.items()}
    return [
        str(path.relative_to(root))
        for folder in FOLDERS.values()
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix not in {".py", *BUILT} and "__pycache__" not in path.parts
        if not any(fnmatch(path.name, pattern) for pattern in packed.get(owners.get(path.parent, ""), []))
    ]


def test_every_package_is_packed():
    assert SETTINGS["package-dir"] == FOLDERS
    assert sorted(SETTINGS["packages"]) == sorted(packages(ROOT))


def test_every_file_that_is_no_python_is_packed():
    assert unpacked(ROOT, SETTINGS["package-data"]) == []


def test_every_pattern_of_files_finds_some():
    found = packages(ROOT)
    for name, patterns in SETTINGS["package-data"].items():
        for pattern in patterns:
            assert list(found[name].glob(pattern)), f"{name}: no {pattern}"


@pytest.mark.parametrize("name", [name for name in packages(ROOT) if name.startswith("compressor.plugins.")])
def test_every_method_has_its_card_in_the_package(name):
    assert (packages(ROOT)[name] / "README.md").is_file()
    assert any(fnmatch("README.md", pattern) for pattern in SETTINGS["package-data"].get(name, []))


def test_the_check_can_fail():
    packed = {
        name: patterns for name, patterns in SETTINGS["package-data"].items() if name != "compressor.plugins.depth"
    }
    assert unpacked(ROOT, packed) == ["plugins/depth/README.md"]


def test_the_oldest_versions_that_are_allowed_are_those_that_are_tested():
    """Not with nvmath-python, which needs a GPU, torch-fidelity, which needs torchvision, and nni, in an environment of its own."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    for_users = {
        name: extras[name] for name in extras.keys() - {"test", "lint", "docs", "screens", "nni", "cusparselt", "fid"}
    }
    allowed = {line.replace(">=", "==") for line in sum(for_users.values(), PYPROJECT["project"]["dependencies"])}
    tested = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    assert {line for line in tested if "==" in line} == allowed
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    installed = re.search(r"constraints-lowest\.txt -e \"\.\[([\w,-]+)\]", make)
    assert installed and set(installed[1].split(",")) == {"test", *for_users}
