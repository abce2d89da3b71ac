"""The source distribution, wheels with the compiled kernels inside for Linux on x86-64 and 64-bit Arm, and a check of what is in them.

    python wheels/build.py [--out dist] [x86_64 aarch64]

GCC compiles the kernels, for the other architecture as a cross compiler. A wheel is refused where it would not run on what its
tag says: the kernels must need no newer glibc and no other library. What it holds must be what the packages' folders hold.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"compressor": "compressor", "plugins": "compressor/plugins", "model_zoo": "compressor/model_zoo"}
"""The folders of the code, and where they lie once installed."""
BESIDE = ("pyproject.toml", "README.md", "LICENSE", "wheels/DESCRIPTION.md")
GLIBC = (2, 17)
"""The oldest that the kernels run on; `manylinux_2_17` says so."""
KERNELS = "compressor/lower/_vnm.abi3.so"
MACHINES = {"x86_64": "X86-64", "aarch64": "AArch64"}
ALLOWED = {"libc.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}

_NO_SOURCE = {".so", ".pyd", ".pyc"}


def tag(architecture: str) -> str:
    """The wheel's tag: any CPython from 3.11 on, on any Linux with that glibc or a newer one."""
    return f"cp311-abi3-manylinux_{GLIBC[0]}_{GLIBC[1]}_{architecture}"


def compiler(architecture: str) -> str:
    """The GCC that compiles for `architecture`. Exits where it is not installed."""
    found = "gcc" if platform.machine() == architecture else f"{architecture}-linux-gnu-gcc"
    if shutil.which(found) is None:
        package = "gcc" if found == "gcc" else f"gcc-{architecture.replace('_', '-')}-linux-gnu"
        sys.exit(f"{found} is not installed; on Debian: apt-get install {package}")
    return found


def copy_sources(to: Path) -> Path:
    """What a distribution is made of, copied into the new folder `to`; that."""
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", *(f"*{suffix}" for suffix in _NO_SOURCE))
        shutil.copytree(ROOT / folder, to / folder, ignore=ignored)
    for file in BESIDE:
        (to / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, to / file)
    return to


def source(out: Path) -> Path:
    """The source distribution, in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out.absolute())!r}))"
        copied = copy_sources(Path(name) / "source")
        done = subprocess.run([sys.executable, "-c", code], cwd=copied, check=True, stdout=subprocess.PIPE, text=True)
    return out / done.stdout.splitlines()[-1]


def build(architecture: str, out: Path, *options: str) -> Path:
    """The wheel for `architecture`, in the folder `out`; `options` are further ones of pip.

    It is made of a copy of the sources, so that nothing of an earlier build gets in.
    """
    gcc = compiler(architecture)
    with tempfile.TemporaryDirectory() as name:
        copied = copy_sources(Path(name) / "source")
        environment = {
            **os.environ,
            "CC": gcc,
            "CFLAGS": f"-O3 -DNDEBUG -include {ROOT / 'wheels' / 'old_glibc.h'}",
            "LDSHARED": f"{gcc} -shared -s",  # not the interpreter's own, which may leave its folders in the file
            "_PYTHON_HOST_PLATFORM": f"linux-{architecture}",
        }
        made = Path(name) / "made"
        platform_tag = f"--config-settings=--build-option=--plat-name={tag(architecture).rpartition('-')[2]}"
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--disable-pip-version-check"]
        subprocess.run([*pip, *options, platform_tag, "-w", str(made), str(copied)], env=environment, check=True)
        (wheel,) = made.glob("*.whl")
        if faults := list(wrong(wheel, architecture)):
            sys.exit("\n".join([f"{wheel.name} is not as it must be:", *faults]))
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))


def contents(root: Path = ROOT) -> set[str]:
    """Every file of the packages, by its path once installed, and the kernels."""
    return {
        f"{installed}/{path.relative_to(root / folder).as_posix()}"
        for folder, installed in FOLDERS.items()
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix not in _NO_SOURCE and "__pycache__" not in path.parts
    } | {KERNELS}


def wrong(wheel: Path, architecture: str) -> Iterator[str]:
    """What is wrong with a wheel: its tag, its files, or what its kernels need."""
    with zipfile.ZipFile(wheel) as packed, tempfile.TemporaryDirectory() as name:
        found = {file for file in packed.namelist() if ".dist-info/" not in file}
        (about,) = (file for file in packed.namelist() if file.endswith(".dist-info/WHEEL"))
        told = packed.read(about.replace("WHEEL", "METADATA")).decode()
        if (
            told.partition("\n\n")[2].strip()
            != (ROOT / "wheels" / "DESCRIPTION.md").read_text(encoding="utf-8").strip()
        ):
            yield "its description is not wheels/DESCRIPTION.md"
        tags = re.findall(r"^Tag: (.+)$", packed.read(about).decode(), re.MULTILINE)
        if tags != [tag(architecture)] or not wheel.stem.endswith(tag(architecture)):
            yield f"its tag is {', '.join(tags)} and not {tag(architecture)}"
        yield from (f"missing: {file}" for file in sorted(contents() - found))
        yield from (f"not of the packages: {file}" for file in sorted(found - contents()))
        if KERNELS in found:
            yield from unfit(Path(packed.extract(KERNELS, name)), architecture)


def unfit(kernels: Path, architecture: str) -> Iterator[str]:
    """Why a shared library does not run on every Linux that the wheel's tag names."""
    told = _readelf("--file-header", "--dynamic", "--version-info", "--wide", str(kernels))
    if not re.search(rf"Machine: .*{MACHINES[architecture]}", told):
        yield f"the kernels are not for {architecture}"
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", told))
    yield from (f"the kernels need {library}" for library in sorted(needed - ALLOWED))
    if re.search(r"\((RPATH|RUNPATH)\)", told):
        yield "the kernels look for libraries in a folder of this machine"
    for version in sorted(set(re.findall(r"Name: (\S+)", told))):
        numbers = re.fullmatch(r"GLIBC_([\d.]+)", version)
        if numbers is None or tuple(map(int, numbers[1].split("."))) > GLIBC:
            yield f"the kernels need {version}"


def _readelf(*arguments: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(["readelf", *arguments], env=environment, check=True, capture_output=True, text=True).stdout


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help=", ".join(MACHINES))
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    given = parser.parse_args(arguments)
    for architecture in given.architectures or MACHINES:
        if architecture not in MACHINES:
            parser.error(f"no wheel for {architecture!r}, but for {', '.join(MACHINES)}")
        print(build(architecture, given.out), flush=True)
    print(source(given.out), flush=True)


if __name__ == "__main__":
    main()
