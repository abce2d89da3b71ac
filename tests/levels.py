"""The tests that the instruction set touches, at every level of this machine, and at those that it lacks as far as they can
be emulated.

    python tests/levels.py [pytest's options]

A machine's own levels are chosen by COMPRESSOR_CPU_LEVEL; the lowest also keeps PyTorch and oneDNN to what every x86-64 has.
The kernels of AVX-512 and AVX-VNNI are written with vectors that GCC can take apart, so they are compiled once more for AVX2, with the
instructions for pairs, of bfloat16 and of whole numbers, and for bytes written out: their arithmetic, tails and layouts are
tested, but not the instructions themselves.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "compressor" / "lower"
KERNELS = [
    f"tests/test_{name}.py" for name in ("kernels", "kernels_int8", "kernels_bytes", "kernels_dense", "attention")
]
TOUCHED = [
    *KERNELS,
    *(f"tests/test_{name}.py" for name in ("lower", "lower_doubt", "gathered", "export", "speed", "planning")),
]
LOWEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}

BFLOAT16 = """
typedef float f512 __attribute__((vector_size(64)));
typedef unsigned u512 __attribute__((vector_size(64)));
typedef unsigned short u256 __attribute__((vector_size(32)));
static inline u256 emulated_cvtneps_pbh(f512 x) { /* to nearest even, NaN kept quiet */
    u512 bits = (u512)x;
    u512 nan = (u512)(x != x);
    return __builtin_convertvector((nan & ((bits >> 16) | 0x40)) | (~nan & ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)), u256);
}
static inline u512 emulated_cvtepu16_epi32(u256 x) { return __builtin_convertvector(x, u512); }
static inline f512 emulated_dpbf16_ps(f512 sum, u512 a, u512 b) { /* the odd lanes first */
    sum += (f512)(a & 0xffff0000u) * (f512)(b & 0xffff0000u);
    return sum + (f512)(a << 16) * (f512)(b << 16);
}
typedef int i512 __attribute__((vector_size(64)));
static inline i512 emulated_madd_epi16(i512 a, i512 b) {
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
static inline i512 emulated_max_epi32(i512 a, i512 b) { return (a & (a > b)) | (b & ~(a > b)); }
static inline i512 emulated_dpwssd_epi32(i512 sum, i512 a, i512 b) { return sum + emulated_madd_epi16(a, b); }
typedef short s512 __attribute__((vector_size(64)));
typedef unsigned char b512 __attribute__((vector_size(64)));
static inline s512 emulated_maddubs_epi16(i512 a, i512 b) { /* it saturates */
    s512 found;
    for (int i = 0; i < 32; i++) {
        int sum = ((b512)a)[2 * i] * (signed char)((b512)b)[2 * i] + ((b512)a)[2 * i + 1] * (signed char)((b512)b)[2 * i + 1];
        found[i] = (short)(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum);
    }
    return found;
}
static inline i512 emulated_dpbusd_epi32(i512 sum, i512 a, i512 b) {
    for (int i = 0; i < 64; i++) sum[i / 4] += ((b512)a)[i] * (signed char)((b512)b)[i];
    return sum;
}
static inline i512 emulated_packus_epi32(i512 a, i512 b) { /* 128 bits at a time: of `a`, then of `b`; both saturate */
    s512 found;
    for (int i = 0; i < 32; i++) {
        int x = (i % 8 < 4 ? a : b)[i / 8 * 4 + i % 4];
        found[i] = (short)(x < 0 ? 0 : x > 65535 ? 65535 : x);
    }
    return (i512)found;
}
static inline i512 emulated_packus_epi16(i512 a, i512 b) {
    b512 found;
    for (int i = 0; i < 64; i++) {
        int x = (i % 16 < 8 ? (s512)a : (s512)b)[i / 16 * 8 + i % 8];
        found[i] = (unsigned char)(x < 0 ? 0 : x > 255 ? 255 : x);
    }
    return (i512)found;
}
typedef int i256 __attribute__((vector_size(32)));
/* Here vectors of 32 bytes are passed in memory, and in code for AVX2 in registers. */
#define IN_PLACE static inline __attribute__((always_inline))
IN_PLACE i256 emulated_vpdpwssd(i256 sum, i256 a, i256 b) {
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}
typedef unsigned char b256 __attribute__((vector_size(32)));
IN_PLACE i256 emulated_vpdpbusd(i256 sum, i256 a, i256 b) {
    for (int i = 0; i < 32; i++) sum[i / 4] += ((b256)a)[i] * (signed char)((b256)b)[i];
    return sum;
}
#define __builtin_ia32_vpdpwssd_v8si emulated_vpdpwssd
#define __builtin_ia32_vpdpbusd_v8si emulated_vpdpbusd
static inline f512 emulated_either(i512 first, f512 a, f512 b) { return (f512)(((i512)a & first) | ((i512)b & ~first)); }
static inline f512 emulated_max_ps(f512 a, f512 b) { return emulated_either(a > b, a, b); } /* b where one is NaN */
static inline f512 emulated_min_ps(f512 a, f512 b) { return emulated_either(a < b, a, b); }
#define _mm512_max_ps emulated_max_ps
#define _mm512_min_ps emulated_min_ps
#define _mm512_max_epi32 emulated_max_epi32
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_dpwssd_epi32 emulated_dpwssd_epi32
#define _mm512_packus_epi32 emulated_packus_epi32
#define _mm512_packus_epi16 emulated_packus_epi16
#define _mm512_maddubs_epi16 emulated_maddubs_epi16
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define __m512i i512
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define __m512 f512
#define __m512bh u512
#define __m256i u256
"""


def emulated(folder: Path, *options: str) -> Path:
    """Compile the kernels with every level of x86 made of AVX2, and the best one chosen; `options` are further ones of GCC."""
    code = (SOURCES / "_vnm.c").read_text(encoding="utf-8")
    code = re.sub(r'target\("(avx512|avx2,fma,avxvnni)[^"]*"\)', 'target("avx2,fma")', code)
    code = re.sub(r'__builtin_cpu_supports\("avx(512\w*|vnni)"\)', "1", code)
    code = code.replace('"+x"', '"+m"').replace('"+v"', '"+m"')  # vectors of 64 bytes have no register
    code = code.replace("#define INLINE", BFLOAT16 + "#define INLINE", 1)
    (folder / "_vnm.c").write_text(code, encoding="utf-8")
    made = folder / "_vnm.abi3.so"
    subprocess.run(
        [
            *("gcc", "-O1", "-std=gnu11", "-fno-math-errno", "-Wno-psabi", "-fPIC", "-shared"),
            *options,
            *(f"-I{SOURCES}", f"-I{sysconfig.get_paths()['include']}", str(folder / "_vnm.c"), "-o", str(made)),
        ],
        check=True,
    )
    return made


def with_kernels(file: Path, options: list[str]) -> int:
    """Run pytest in this process, with the kernels of `file` in place of those that are installed."""
    import pytest

    name = "compressor.lower._vnm"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    print("emulated:", ", ".join(module.levels()), flush=True)
    return int(pytest.main([*KERNELS, "-n", "0", *options]))


def main(options: list[str]) -> int:
    from compressor.lower.vnm import kernels

    os.chdir(ROOT)
    extension, why = kernels()
    if extension is None:
        sys.exit(f"nothing to test: {why}")
    failed = []
    levels = list(extension.levels())
    for level in levels:
        lowest = LOWEST if level == levels[-1] else {}
        environment = {**os.environ, **lowest, "COMPRESSOR_CPU_LEVEL": level, "HF_HUB_OFFLINE": "1"}
        print(f"--- {level}", *(f"{k}={v}" for k, v in lowest.items()), flush=True)
        run = subprocess.run([sys.executable, "-m", "pytest", *TOUCHED, *options], env=environment, check=False)
        failed += [level] if run.returncode else []
    if "avx2" in levels:
        with tempfile.TemporaryDirectory() as name:
            failed += ["emulated"] if with_kernels(emulated(Path(name)), options) else []
    else:
        print("--- emulated: needs AVX2")
    print(
        f"failed at: {', '.join(failed)}" if failed else f"all levels pass: {', '.join(levels)}, emulated", flush=True
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
