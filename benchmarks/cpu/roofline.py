"""How near the kernels of each layer come to what this machine can do: its multiply-add rate, and its memory.

    python benchmarks/cpu/roofline.py --out benchmarks/results/roofline_cpu.json

One thread. Peaks are measured: loops of multiply-adds in registers, compiled here for the level of the kernels (COMPRESSOR_CPU_LEVEL),
of float32, of whole numbers of 16 bits and of bytes, by the instructions that the kernels use; and the rate at which a large array is
read. Each layer of U-ViT-S/2 with 4:2:4 weights is built in each form and runs alone on its inputs. Forms and loops take turns, and a
share is the median of those of single rounds, so that a phase in which the machine is slow counts for neither. Rates count the
multiply-adds that are really done: all for dense forms, half for 2:4.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import torch
from lowering import built, prune

from compressor.environment import environment
from compressor.lower.backend import Unit
from compressor.lower.chooser import groups
from compressor.lower.job import Job, prepared
from compressor.lower.units import Found
from compressor.lower.vnm_kernels import level

_MEMBERS = 4
"""Layers of one kind that run one after the other, so that weights come from memory as they do in the model."""

_WARM_UP = 2
"""Rounds that count for nothing."""

_SOURCE = """
#include <immintrin.h>
#ifdef __AVX512F__
#define BYTES 64
#define WITH(name) _mm512_##name
#else
#define BYTES 32
#define WITH(name) _mm256_##name
#endif
typedef float floats __attribute__((vector_size(BYTES)));
typedef long long ints __attribute__((vector_size(BYTES)));
enum { SUMS = 12 }; /* chains, to hide the latency of one */
#ifdef __AVX512VNNI__
#define WORDS _mm512_dpwssd_epi32((__m512i)sum[s], (__m512i)a, (__m512i)b)
#define CODES _mm512_dpbusd_epi32((__m512i)sum[s], (__m512i)a, (__m512i)b)
#elif defined(__AVXVNNI__)
#define WORDS _mm256_dpwssd_avx_epi32((__m256i)sum[s], (__m256i)a, (__m256i)b)
#define CODES _mm256_dpbusd_avx_epi32((__m256i)sum[s], (__m256i)a, (__m256i)b)
#else
#define WORDS WITH(add_epi32)(sum[s], WITH(madd_epi16)(a, b))
#define CODES WITH(add_epi16)(sum[s], WITH(maddubs_epi16)(a, b))
#endif
/* Rounds of one vector multiplied and added to each sum; how many multiply-adds that is. */
#define LOOP(name, type, next, lanes)                                   \\
    long name(long rounds) {                                            \\
        type sum[SUMS], a = {0}, b = {0};                               \\
        for (int s = 0; s < SUMS; s++) sum[s] = a;                      \\
        for (long r = 0; r < rounds; r++)                               \\
            _Pragma("GCC unroll 12") for (int s = 0; s < SUMS; s++) {   \\
                __asm__ volatile("" : "+x"(a), "+x"(b));                \\
                sum[s] = (type)(next);                                  \\
            }                                                           \\
        _Pragma("GCC unroll 12") for (int s = 0; s < SUMS; s++)         \\
            __asm__ volatile("" : : "x"(sum[s]));                       \\
        return rounds * SUMS * (lanes);                                 \\
    }
LOOP(multiply_floats, floats, sum[s] * a + b, BYTES / 4)
LOOP(multiply_words, ints, WORDS, BYTES / 2)
LOOP(multiply_bytes, ints, CODES, BYTES)
"""
_FLAGS = {
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx512_vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx512": ["-march=x86-64-v4"],
    "avx_vnni": ["-march=x86-64-v3", "-mavxvnni"],
    "avx2": ["-march=x86-64-v3"],
}
_MULTIPLIED = {"vnm-int8": "words", "vnm-w7a8": "bytes", "vnm-w8a8": "bytes"}
"""What a backend multiplies, if it is no float32."""


class Peaks:
    """Operations per nanosecond of a thread that does nothing but multiply and add in registers."""

    def __init__(self) -> None:
        if level() not in _FLAGS:
            raise click.UsageError(f"the level {level()!r} has no vectors of its own; measured are {', '.join(_FLAGS)}")
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
            source.write_text(_SOURCE)
            flags = ["-O3", *_FLAGS[level()], "-ffp-contract=fast", "-shared", "-fPIC"]
            subprocess.run([os.environ.get("CC", "gcc"), *flags, str(source), "-o", str(library)], check=True)
            self.library = ctypes.CDLL(str(library))

    def once(self, rounds: int = 2_000_000) -> dict[str, float]:
        """Those of "floats", "words" and "bytes" as measured now, for some milliseconds each."""
        return {what: self._of(what, rounds) for what in ("floats", "words", "bytes")}

    def _of(self, what: str, rounds: int) -> float:
        loop = getattr(self.library, f"multiply_{what}")
        loop.argtypes, loop.restype = [ctypes.c_long], ctypes.c_long
        began = time.perf_counter()
        done = loop(rounds)
        return float(2.0 * done / (time.perf_counter() - began) / 1e9)


def read_gbytes() -> float:
    """Bytes per nanosecond at which PyTorch reads an array of 512 MiB."""
    array = torch.ones(2**27)
    return array.nbytes / median(_seconds(array.sum) for _ in range(7)) / 1e9


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def shares(
    group: list[Found], job: Job, peaks: Peaks, rounds: int
) -> tuple[dict[str, dict[str, float]], list[dict[str, float]]]:
    """Each backend that takes the layers of `group`: its median time, rate and share of the peak in the same round. And the peaks.

    A round of a form is a call of each of its members, of which the first counts for nothing: it takes its memory anew after
    other forms, which no layer of a model does.
    """
    unit = group[0].unit
    x = torch.randn(unit.input_shape, generator=torch.Generator().manual_seed(0))
    built = {
        backend.name: [backend.build(one.unit) for one in group[:_MEMBERS]]
        for backend in job.backends
        if unit.kind in backend.takes and not (backend.unavailable(job.device) or backend.refusal(unit))
    }
    kept = {name: operations(unit, job.backend(name).skips_zeros) for name in built}
    times: dict[str, list[float]] = {name: [] for name in built}
    tops = []
    for _ in range(rounds + _WARM_UP):
        tops.append(peaks.once())
        for name, members in built.items():
            times[name].append(median([_seconds(partial(module, x)) for module in (*members, members[0])][1:]))
    found, tops = {}, tops[_WARM_UP:]
    for name, every in times.items():
        own = every[_WARM_UP:]
        rates = [kept[name] / seconds / 1e9 for seconds in own]
        what = _MULTIPLIED.get(name, "floats")
        of_peak = median(rate / top[what] for rate, top in zip(rates, tops, strict=True))
        found[name] = {"median_ms": median(own) * 1e3, "gflops": median(rates), "share_of_peak": of_peak}
    return found, tops


def operations(unit: Unit, skipped: bool) -> float:
    """Multiplications and additions of the unit's products; without those by zeros of a pattern where they are `skipped`."""
    tokens = torch.Size(unit.input_shape).numel() // unit.input_shape[-1]
    return sum(
        2.0 * tokens * layer.weight.numel() * (pattern.density if skipped and pattern else 1)
        for layer, pattern in zip(unit.layers, unit.patterns, strict=True)
    )


@torch.no_grad()
def rows(job: Job, peaks: Peaks, memory: float, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """A row for each kind of layer that has a pattern: the rate of each form, and its share of the peak."""
    found, tops = [], []
    for group in groups(job.found):
        unit = group[0].unit
        if not any(unit.patterns):
            continue
        forms, some = shares(group, job, peaks, rounds)
        tops += some
        tokens = torch.Size(unit.input_shape).numel() // unit.input_shape[-1]
        sizes = [(tokens, layer.weight.shape[0], layer.weight.shape[1]) for layer in unit.layers]
        moved = sum(4.0 * (m * n + m * k + n * k) for m, n, k in sizes)
        found.append(
            {
                "layer": group[0].at, "count": len(group), "shapes": sizes,
                "patterns": [str(p) for p in unit.patterns], "forms": forms,
                # every array once through memory: the least if nothing stays in a cache
                "memory_bound_ms": moved / memory / 1e6,
            }
        )  # fmt: skip
    return found, tops


@click.command()
@click.option("--batch", default=4, show_default=True)
@click.option("--rounds", default=31, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(batch: int, rounds: int, out: Path | None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # other threads wait for work by turning round, and would slow the peak's loop
    peaks, memory = Peaks(), read_gbytes()
    model, _, adapter = built("uvit-s2", batch)
    prune(model, {"model": "uvit-s2", "pattern": "4:2:4"})
    job = prepared(model, adapter.example_inputs(batch), "auto", None, adapter, quantising=True)
    layers, tops = rows(job, peaks, memory, rounds)
    measured = {what: [top[what] for top in tops] for what in tops[0]}
    facts = {
        **environment(torch.device("cpu")), "threads": 1, "model": "uvit-s2", "pattern": "4:2:4", "batch": batch, "seed": 0,
        "n": rounds, "level": level(), "peaks_gflops": {what: median(own) for what, own in measured.items()},
        "peaks_gflops_quartiles": {what: quantiles(own)[::2] for what, own in measured.items()}, "read_gbytes_per_s": memory,
        "layers": layers,
    }  # fmt: skip
    text = json.dumps(facts, indent=1)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
