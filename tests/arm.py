"""The kernels' own tests, held against their code for 64-bit Arm, which QEMU runs.

    python tests/arm.py [pytest's options]

PyTorch is this machine's: only the jobs go to the emulated program (`arm.c`), with what their addresses hold, and their results
come back. Needs `aarch64-linux-gnu-gcc` and `qemu-aarch64`, of Debian's packages gcc-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "compressor" / "lower"
KERNELS = [
    "tests/test_kernels.py",
    "tests/test_kernels_int8.py",
    "tests/test_kernels_bytes.py",
    "tests/test_kernels_dense.py",
]
NEEDS = ("aarch64-linux-gnu-gcc", "qemu-aarch64")
OF_THIS_MACHINE = "tests/test_kernels.py::test_this_machine_runs_more_than_the_portable_kernels_where_it_can"

_JOB, _MATRIX = 14, 16  # the numbers of a job and of a matrix, as `_vnm.c` takes them
_CONVOLUTION = 2


def missing() -> list[str]:
    """The programs that are not installed here."""
    return [name for name in NEEDS if shutil.which(name) is None]


def compiled(folder: Path) -> Path:
    """The program, for 64-bit Arm, with OpenMP's threads."""
    made = folder / "arm"
    subprocess.run(
        [
            *(NEEDS[0], "-O2", "-std=gnu11", "-fno-math-errno", "-fwrapv", "-Wno-psabi", "-static", "-fopenmp"),
            *("-Wl,--unresolved-symbols=ignore-all", f"-I{SOURCES}", f"-I{sysconfig.get_paths()['include']}"),
            *(str(Path(__file__).with_suffix(".c")), "-o", str(made)),
        ],
        check=True,
    )
    return made


class Emulated:
    """Looks like the extension `_vnm`, and runs jobs in the emulated program."""

    def __init__(self, program: Path) -> None:
        self._process = subprocess.Popen([NEEDS[1], str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._names: list[str] = []
        while name := self._said():
            self._names.append(name)
        self.set_level(self._names[0])

    def close(self) -> None:
        """End the program."""
        self._process.communicate()

    def levels(self) -> list[str]:
        return list(self._names)

    def level(self) -> str:
        return self._level

    def set_level(self, name: str) -> None:
        if name not in self._names:
            raise ValueError(f"this machine has no level {name!r}")
        self._level = name
        self._send(struct.pack("<q", self._names.index(name)))

    def serve(self, *functions: int) -> bool:
        """torch is in another process, on another processor."""
        return False

    def set_parallel(self, *addresses: int) -> None:
        """The program has its own OpenMP."""

    def run(self, *numbers: int) -> None:
        addresses = _addresses(numbers)
        parts = [struct.pack(f"<{2 + len(numbers)}q", -1, len(numbers), *numbers), struct.pack("<q", len(addresses))]
        for number, (place, size) in enumerate(addresses.items()):
            parts += [struct.pack("<qq", place, size), ctypes.string_at(numbers[place], size) if number else b""]
        self._send(b"".join(parts))
        if fault := self._said():
            raise MemoryError if fault == "no memory" else ValueError(fault)
        place, size = next(iter(addresses.items()))
        ctypes.memmove(numbers[place], self._received(size), size)

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _received(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) != size:
            raise RuntimeError(f"the emulated program ended, with {self._process.wait()}")
        return data

    def _said(self) -> str:
        return self._received(struct.unpack("<q", self._received(8))[0]).decode()


def _addresses(numbers: tuple[int, ...]) -> dict[int, int]:
    """The bytes at each address of a job, by its place; the result's first."""
    from compressor.lower.vnm_weight import Lanes, Layout

    kind, half, side, stride, padding, height, width, units = (numbers[i] for i in (0, 3, 5, 6, 7, 8, 9, 10))
    matrices = range(_JOB, len(numbers), _MATRIX)
    pixels, places = 1, 1
    if kind == _CONVOLUTION:
        pixels = height * width
        places = ((height + 2 * padding - side) // stride + 1) * ((width + 2 * padding - side) // stride + 1)
    unit = units * (2 if half else 4)
    sizes = {2: unit * places * numbers[matrices[-1]], 1: unit * pixels * numbers[_JOB + 1]}
    if numbers[_JOB - 1]:  # the largest magnitude of each image, or its lowest and highest number
        sizes[_JOB - 1] = 4 * units * (2 if numbers[_JOB + 8] == Lanes.BYTES else 1)
    for at in matrices:
        layout = Layout(*numbers[at : at + 10])
        (values, places), row = layout.lengths, 4 * layout.out
        lengths = (values * 4, places * 2, row, row, row, (layout.blocks + 1) * row)
        parts = zip(range(at + 10, at + _MATRIX), lengths, strict=True)
        sizes |= {place: size for place, size in parts if numbers[place]}
    return sizes


def main(options: list[str]) -> int:
    """Run the kernels' tests in this process, with the emulated program in the extension's place."""
    import pytest

    if gone := missing():
        sys.exit(f"not installed: {', '.join(gone)} (apt-get install gcc-aarch64-linux-gnu qemu-user)")
    with tempfile.TemporaryDirectory() as name:
        emulated = Emulated(compiled(Path(name)))
        sys.modules["compressor.lower._vnm"] = cast(Any, emulated)
        print("aarch64, emulated:", ", ".join(emulated.levels()), flush=True)
        chosen = [option for option in options if option.startswith("tests/")] or KERNELS
        others = [option for option in options if not option.startswith("tests/")]
        failed = int(pytest.main([*chosen, "-n", "0", "--deselect", OF_THIS_MACHINE, *others]))
        emulated.close()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
