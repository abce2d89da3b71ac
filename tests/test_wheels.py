"""Wheels hold the packages and the kernels, and nothing else; what their tags say is read from the files themselves."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import arm
import numpy as np
import pytest

from compressor.environment import processor_in

ROOT = Path(__file__).parent.parent
HERE = platform.machine()


@pytest.fixture(scope="module")
def building() -> ModuleType:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("wheels_build", ROOT / "wheels" / "build.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel_of(folder: Path, tag: str, files: set[str], name_tag: str = "") -> Path:
    """A wheel with those files, all empty."""
    wheel = folder / f"some-1-{name_tag or tag}.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        packed.writestr("some-1.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        packed.writestr("some-1.dist-info/METADATA", "Name: some\n\n")
        for file in files:
            packed.writestr(file, "")
    return wheel


def test_what_a_wheel_must_hold_is_in_the_folders(building: ModuleType) -> None:
    files = building.contents()
    for known in (
        "compressor/py.typed",
        "compressor/plugins/sparsedm/README.md",
        "compressor/report/run.html",
        "compressor/report/schema.json",
        "compressor/model_zoo/uvit/sizes.py",
        building.KERNELS,
    ):
        assert known in files
    assert sum(file.endswith("/README.md") for file in files) == len(list((ROOT / "plugins").glob("*/README.md")))
    kinds = {Path(file).suffix for file in files} | {Path(file).name for file in files if not Path(file).suffix}
    assert kinds <= {".py", ".typed", ".md", ".json", ".html", ".css", ".safetensors", ".npz", ".c", ".h", ".so"}
    for path in (ROOT / "model_zoo").rglob("*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype != object for name in arrays)


def test_a_wheel_with_other_files_or_another_tag_is_refused(building: ModuleType, tmp_path: Path) -> None:
    tag, files = building.tag(HERE), building.contents() - {building.KERNELS}
    stale = wheel_of(tmp_path, tag, files - {"compressor/py.typed"} | {"compressor/gone.py"})
    assert list(building.wrong(stale, HERE)) == [
        "its description is not wheels/DESCRIPTION.md",
        "missing: compressor/lower/_vnm.abi3.so",
        "missing: compressor/py.typed",
        "not of the packages: compressor/gone.py",
    ]
    other = wheel_of(tmp_path, "cp311-cp311-linux_x86_64", files)
    assert any("its tag is cp311-cp311-linux_x86_64" in fault for fault in building.wrong(other, HERE))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="reads files with readelf")
def test_a_library_that_needs_more_than_the_tag_says_is_refused(building: ModuleType) -> None:
    """This Python, whose library needs newer glibc or more libraries than the kernels may."""
    library = Path(sys.executable).resolve()
    other = next(name for name in building.MACHINES if name != HERE)
    faults = list(building.unfit(library, other))
    assert f"the kernels are not for {other}" in faults
    assert any(fault.startswith("the kernels need lib") for fault in faults)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles")
def test_a_wheel_is_built_for_any_python_from_3_11_on(building: ModuleType, tmp_path: Path) -> None:
    wheel = building.build(HERE, tmp_path, "--no-build-isolation")
    assert wheel.name.endswith(f"-cp311-abi3-manylinux_2_17_{HERE}.whl")
    assert list(building.wrong(wheel, HERE)) == []


@pytest.mark.slow
def test_of_the_source_distribution_a_wheel_is_built_without_a_compiler_too(
    building: ModuleType, tmp_path: Path
) -> None:
    source = building.source(tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*pip, str(source)], env={**os.environ, "CC": "no-such-compiler"}, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        assert building.contents() - set(packed.namelist()) == {building.KERNELS}


@pytest.mark.slow
@pytest.mark.skipif(bool(arm.missing()), reason=f"needs {', '.join(arm.NEEDS)}")
@pytest.mark.timeout(900)
def test_the_kernels_are_right_on_64_bit_arm() -> None:
    run = subprocess.run([sys.executable, "tests/arm.py", "-q"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "emulated: neon, portable" in run.stdout, run.stdout + run.stderr


def test_a_processor_is_told_from_another_by_name_or_numbers() -> None:
    assert (
        processor_in("processor\t: 0\nmodel name\t: Some CPU\n\nprocessor\t: 1\nmodel name\t: Some CPU\n") == "Some CPU"
    )
    cores = "processor : {}\nCPU implementer : 0x41\nCPU part : {}\nCPU variant : 0x1\n"
    little, big = cores.format(0, "0xd05"), cores.format(1, "0xd0c")
    machine = platform.machine()
    assert processor_in(big) == f"{machine}, implementer 0x41, part 0xd0c, variant 0x1"
    assert processor_in("\n".join([little, big, big])).count("implementer") == 2
    zen = "model name : AMD EPYC\ncpu family : {}\nmodel : {}\n"
    assert processor_in(zen.format(26, 2)) == "AMD EPYC (family 26, model 2)" != processor_in(zen.format(25, 17))
    assert processor_in("") == processor_in("Hardware : board\n") == ""
