"""Installs a wheel as a user without a compiler does, and lowers with it.

    python wheels/check.py dist/diffusion_compressor-…_x86_64.whl

In a new environment in a temporary folder. pip may install wheels alone, and sees no other program; what runs then knows nothing
but where its own programs are. Dependencies are those of `constraints.txt`. Then the README is walked through there
(`tests/readme_walk.py`): what it needs is made by the environment that runs this script.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def check(wheel: Path) -> None:
    """Raises CalledProcessError where the wheel does not install or lower, or a command of the README fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "environment", with_pip=True)
        programs = folder / "environment" / "bin"
        alone = {"PATH": str(programs), "HOME": str(folder)}
        pip = [
            str(programs / "python"),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-compile",
            "--disable-pip-version-check",
        ]
        pinned = ["--only-binary=:all:", "-c", str(ROOT / "constraints.txt"), f"{wheel.resolve()}[onnx,pipelines]"]
        subprocess.run([*pip, *pinned], env={**os.environ, **alone}, cwd=folder, check=True)
        small = (ROOT / "wheels" / "lower_small.py").read_text(encoding="utf-8")
        for command in ([programs / "compressor", "list", "backends"], [programs / "python", "-I", "-c", small]):
            subprocess.run([str(word) for word in command], env=alone, cwd=folder, check=True)
        walk = [str(ROOT / "tests" / "readme_walk.py"), str(programs / "python"), "--folder", str(folder / "walk")]
        subprocess.run([sys.executable, *walk, "--log", str(wheel.with_name("walk.log"))], check=True)


if __name__ == "__main__":
    check(Path(sys.argv[1]))
