"""Runs a benchmark as if this processor had AVX2 alone: the kernels here, PyTorch, ONNX Runtime and OpenVINO.

    python benchmarks/cpu/without_avx512.py benchmarks/cpu/opponents.py --only "uvit-s2 4"

The first two have settings for that. Of the engines this makes copies in which every CPUID instruction is one that no processor knows;
a handler answers it as the processor would, but without AVX-512, VNNI, bfloat16 and AMX. Needs Linux on x86-64, GCC and binutils.
What Inductor compiles is for AVX2 too. A benchmark says so in its results by `hidden`. The C library stays as it is. With
`--avx-vnni`, which the processor has to have, engines see AVX-VNNI, as on newer processors without AVX-512.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from lowering import AVX2

_HANDLER = r"""
#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <ucontext.h>
#define BIT(n) (1u << (n))
static struct sigaction former;
static void answer(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)r[REG_RIP];
    if (at[0] != 0x0F || at[1] != 0xFF) { /* not ours: it happens again, for whom it is meant */
        sigaction(SIGILL, &former, NULL);
        return;
    }
    unsigned leaf = r[REG_RAX], part = r[REG_RCX], a, b, c, d;
    __cpuid_count(leaf, part, a, b, c, d);
    if (leaf == 7 && part == 0) {
        b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)); /* F DQ IFMA PF ER CD BW VL */
        c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)); /* VBMI VBMI2 VNNI BITALG VPOPCNTDQ */
        d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25)); /* 4VNNIW 4FMAPS VP2INTERSECT AMX FP16 */
    } else if (leaf == 7 && part == 1) {
        a &= ~(BIT(5) | BIT(21) | BIT(23)); /* BF16 AMX-FP16 AVX-IFMA */
#ifndef WITH_AVX_VNNI
        a &= ~BIT(4);
#endif
        d &= ~(BIT(4) | BIT(5) | BIT(10) | BIT(19)); /* AVX-VNNI-INT8 AVX-NE-CONVERT AVX-VNNI-INT16 AVX10 */
    }
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d, r[REG_RIP] += 2;
}
__attribute__((constructor)) static void begin(void) {
    struct sigaction own;
    memset(&own, 0, sizeof own);
    own.sa_sigaction = answer, own.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGILL, &own, &former);
}
"""
_CPUID, _UNKNOWN = b"\x0f\xa2", b"\x0f\xff"
_LIBRARIES = {
    "openvino": ("libs/libopenvino_intel_cpu_plugin.so", "libs/libopenvino.so.*", "libs/libtbb.so.*"),
    "onnxruntime": ("capi/onnxruntime_pybind11_state*.so",),
}
"""Packages, and those of their libraries that ask the processor what it is."""


def hidden(library: Path) -> int:
    """Replace each CPUID instruction in the file. How many those were."""
    headers = subprocess.run(["readelf", "-lW", library], capture_output=True, text=True, check=True).stdout
    segments = [
        tuple(int(number, 16) for number in found)
        for found in re.findall(r"LOAD\s+(0x\w+)\s+(0x\w+)\s+0x\w+\s+(0x\w+)", headers)
    ]
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True
    ).stdout
    code, addresses = bytearray(library.read_bytes()), re.findall(r"^ *(\w+):\tcpuid\b", listing, re.MULTILINE)
    for address in (int(found, 16) for found in addresses):
        (at,) = (offset + address - start for offset, start, size in segments if start <= address < start + size)
        if code[at : at + 2] != _CPUID:
            raise click.ClickException(f"{library}: no CPUID instruction at {address:#x}")
        code[at : at + 2] = _UNKNOWN
    if not addresses:
        raise click.ClickException(f"{library} asks the processor nothing: what it would choose cannot be kept from it")
    library.write_bytes(code)
    return len(addresses)


def engines_without(folder: Path) -> None:
    """Copies of the engines' packages in `folder`, whose libraries ask the handler."""
    for package, patterns in _LIBRARIES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise click.ClickException(f"{package} is not installed")
        shutil.copytree(Path(spec.origin).parent, folder / package)
        for pattern in patterns:
            (library,) = (folder / package).glob(pattern)
            click.echo(f"{library.name}: {hidden(library)} CPUID instructions", err=True)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--avx-vnni", is_flag=True, help="Leave AVX-VNNI to see.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(command: tuple[str, ...], avx_vnni: bool) -> None:
    if avx_vnni and " avx_vnni " not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        raise click.ClickException("this processor has no AVX-VNNI")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engines_without(folder)
        source, handler = folder / "handler.c", folder / "handler.so"
        source.write_text(_HANDLER)
        options = ["-O2", "-D_GNU_SOURCE", *(["-DWITH_AVX_VNNI"] if avx_vnni else []), "-shared", "-fPIC"]
        subprocess.run(["gcc", *options, source, "-o", handler], check=True)
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {
            **AVX2,
            **({"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "COMPRESSOR_CPU_LEVEL": "avx_vnni"} if avx_vnni else {}),
            "BENCHMARK_HIDES": "AVX-512" if avx_vnni else "AVX-512 and AVX-VNNI",
            "LD_PRELOAD": str(handler),
            "PYTHONPATH": path,
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        }
        done = subprocess.run([sys.executable, *command], env={**os.environ, **own}, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
