"""How near the kernels of each layer come to what this machine can do: its multiply-add rate, and its memory.

    python benchmarks/cpu/roofline.py --out benchmarks/results/roofline_cpu.json

One thread. The peak is measured: a loop of float32 multiply-adds in registers, compiled here for this processor; and the rate at
which a large array is read. Each layer of U-ViT-S/2 with 4:2:4 weights is built in each form and runs alone on its inputs. Forms and
the loop take turns, and a share is the median of those of single rounds, so that a phase in which the machine is slow counts for
neither. Rates count the multiply-adds that are really done: all for dense forms, half for 2:4.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
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

_MEMBERS = 4  # layers of one kind that take turns, so that weights come from memory as they do in the model

_SOURCE = """
#ifdef __AVX512F__
#define BYTES 64
#elif defined(__AVX2__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vec __attribute__((vector_size(BYTES)));
enum { SUMS = 12 };
int lanes(void) { return SUMS * BYTES / 4; }
float loop(long rounds) { /* SUMS independent chains hide the latency of one */
    vec sum[SUMS], a, b;
    for (int i = 0; i < BYTES / 4; i++) a[i] = 0.999f, b[i] = 0.001f;
    for (int s = 0; s < SUMS; s++) sum[s] = b;
    for (long r = 0; r < rounds; r++) {
        __asm__ volatile("" : "+x"(a), "+x"(b));
        for (int s = 0; s < SUMS; s++) sum[s] = sum[s] * a + b;
    }
    float found = 0;
    for (int s = 0; s < SUMS; s++)
        for (int i = 0; i < BYTES / 4; i++) found += sum[s][i];
    return found;
}
"""


class Peak:
    """Float32 operations per nanosecond of a thread that does nothing but multiply and add in registers."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
            source.write_text(_SOURCE)
            flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
            subprocess.run([os.environ.get("CC", "gcc"), *flags, str(source), "-o", str(library)], check=True)
            self.library = ctypes.CDLL(str(library))
        self.library.loop.argtypes, self.library.loop.restype = [ctypes.c_long], ctypes.c_float

    def once(self, rounds: int = 4_000_000) -> float:
        """As measured now, for some milliseconds."""
        return _rate(lambda: self.library.loop(rounds), 2.0 * rounds * self.library.lanes())


def read_gbytes() -> float:
    """Bytes per nanosecond at which PyTorch reads an array of 512 MiB."""
    array = torch.ones(2**27)
    return median(_rate(array.sum, array.nbytes) for _ in range(7))


def _rate(call: Callable[[], object], amount: float) -> float:
    began = time.perf_counter()
    call()
    return amount / (time.perf_counter() - began) / 1e9


def shares(group: list[Found], job: Job, peak: Peak, rounds: int) -> tuple[dict[str, dict[str, float]], list[float]]:
    """Each backend that takes the layers of `group`: its median time, rate and share of the peak in the same round. And the peaks."""
    unit = group[0].unit
    x = torch.randn(unit.input_shape, generator=torch.Generator().manual_seed(0))
    turns = {
        backend.name: itertools.cycle([backend.build(one.unit) for one in group[:_MEMBERS]])
        for backend in job.backends
        if unit.kind in backend.takes and not (backend.unavailable(job.device) or backend.refusal(unit))
    }
    kept = {True: operations(unit, True), False: operations(unit, False)}
    times: dict[str, list[float]] = {name: [] for name in turns}
    peaks = []
    for number in range(rounds + 2):
        peaks.append(peak.once())
        for name, turn in turns.items():
            module = next(turn)
            began = time.perf_counter()
            module(x)
            times[name].append(time.perf_counter() - began)
        if number == 1:  # the first two warm up
            peaks.clear()
            for own in times.values():
                own.clear()
    found = {}
    for name, own in times.items():
        rates = [kept[job.backend(name).skips_zeros] / seconds / 1e9 for seconds in own]
        of_peak = median(rate / top for rate, top in zip(rates, peaks, strict=True))
        found[name] = {"median_ms": median(own) * 1e3, "gflops": median(rates), "share_of_peak": of_peak}
    return found, peaks


def operations(unit: Unit, skipped: bool) -> float:
    """Multiplications and additions of the unit's products; without those by zeros of a pattern where they are `skipped`."""
    tokens = torch.Size(unit.input_shape).numel() // unit.input_shape[-1]
    return sum(
        2.0 * tokens * layer.weight.numel() * (pattern.density if skipped and pattern else 1)
        for layer, pattern in zip(unit.layers, unit.patterns, strict=True)
    )


@torch.no_grad()
def rows(job: Job, peak: Peak, memory: float, rounds: int) -> tuple[list[dict[str, Any]], list[float]]:
    """A row for each kind of layer that has a pattern: the rate of each form, and its share of the peak."""
    found, peaks = [], []
    for group in groups(job.found):
        unit = group[0].unit
        if not any(unit.patterns):
            continue
        forms, some = shares(group, job, peak, rounds)
        peaks += some
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
    return found, peaks


@click.command()
@click.option("--batch", default=4, show_default=True)
@click.option("--rounds", default=31, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(batch: int, rounds: int, out: Path | None) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # other threads wait for work by turning round, and would slow the peak's loop
    peak, memory = Peak(), read_gbytes()
    model, _, adapter = built("uvit-s2", batch)
    prune(model, {"model": "uvit-s2", "pattern": "4:2:4"})
    job = prepared(model, adapter.example_inputs(batch), "auto", None, adapter, quantising=True)
    layers, peaks = rows(job, peak, memory, rounds)
    facts = {
        **environment(torch.device("cpu")), "threads": 1, "model": "uvit-s2", "pattern": "4:2:4", "batch": batch, "seed": 0,
        "n": rounds, "peak_gflops": median(peaks), "peak_gflops_quartiles": quantiles(peaks)[::2], "read_gbytes_per_s": memory,
        "layers": layers,
    }  # fmt: skip
    text = json.dumps(facts, indent=1)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
