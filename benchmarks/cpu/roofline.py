"""How near the kernels of each layer come to what this machine can do: its multiply-add rate, and its memory.

    python benchmarks/cpu/roofline.py --out benchmarks/results/roofline_cpu.json

The peak is measured: a loop of float32 multiply-adds in registers, compiled here for this processor, on as many threads as PyTorch
has; and the rate at which a large array is read. Each layer's time is that of `compressor.lower`, alone on its inputs, of U-ViT-S/2
with 4:2:4 weights. Rates count the multiply-adds that are really done: all for dense forms, half for 2:4.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from lowering import built, prune

import compressor
from compressor.environment import environment
from compressor.sparsity.notation import parse

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


def peak_gflops(threads: int) -> float:
    """Float32 operations per nanosecond of `threads` threads that do nothing but multiply and add in registers."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(_SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CC", "gcc"), *flags, str(source), "-o", str(library)], check=True)
        peak = ctypes.CDLL(str(library))
        peak.loop.argtypes, peak.loop.restype = [ctypes.c_long], ctypes.c_float
        rounds, lanes = 20_000_000, peak.lanes()

        def once() -> float:
            workers = [threading.Thread(target=peak.loop, args=(rounds,)) for _ in range(threads)]  # without the GIL
            began = time.perf_counter()
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            return 2 * rounds * lanes * threads / (time.perf_counter() - began) / 1e9

        return median(once() for _ in range(7))


def read_gbytes() -> float:
    """Bytes per nanosecond at which PyTorch reads an array of 512 MiB."""
    array = torch.ones(2**27)
    return median(_rate(array.sum, array.nbytes) for _ in range(7))


def _rate(call: Callable[[], object], amount: float) -> float:
    began = time.perf_counter()
    call()
    return amount / (time.perf_counter() - began) / 1e9


def rows(plan: Any, peak: float, memory: float) -> list[dict[str, Any]]:
    """A row for each kind of layer that has a pattern: the rate of each form, and its share of the peak."""
    found: dict[str, dict[str, Any]] = {}
    for layer in plan.layers:
        if not any(layer.patterns):
            continue
        operations = sum(2.0 * m * n * k for m, n, k in layer.shapes)
        kept = sum(
            2.0 * m * n * k * (parse(p).density if p else 1)
            for (m, n, k), p in zip(layer.shapes, layer.patterns, strict=True)
        )
        moved = sum(4.0 * (m * n + m * k + n * k) for m, n, k in layer.shapes)
        row = found.setdefault(
            f"{layer.kind} {layer.shapes} {layer.patterns}",
            {"layer": layer.name, "count": 0, "shapes": layer.shapes, "patterns": layer.patterns},
        )
        row["count"] += 1
        row["forms"] = {}
        for one in layer.candidates:
            if one.median_ms is None:
                continue
            done = kept if one.backend.startswith(("vnm", "gathered")) else operations
            rate = done / one.median_ms / 1e6
            row["forms"][one.backend] = {"median_ms": one.median_ms, "gflops": rate, "share_of_peak": rate / peak}
        row["memory_bound_ms"] = (
            moved / memory / 1e6
        )  # every array once through memory: the least if nothing stays in a cache
    return list(found.values())


@click.command()
@click.option("--batch", default=4, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(batch: int, out: Path | None) -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    peak, memory = peak_gflops(threads), read_gbytes()
    model, _, adapter = built("uvit-s2", batch)
    prune(model, {"model": "uvit-s2", "pattern": "4:2:4"})
    plan = compressor.lower(model, adapter.example_inputs(batch), adapter=adapter, tolerance=0.02, cache=False).plan
    again = peak_gflops(threads)
    facts = {
        **environment(torch.device("cpu")), "threads": threads, "model": "uvit-s2", "pattern": "4:2:4", "batch": batch, "seed": 0,
        "peak_gflops": peak, "peak_gflops_after": again, "read_gbytes_per_s": memory, "layers": rows(plan, peak, memory),
    }  # fmt: skip
    text = json.dumps(facts, indent=1)
    click.echo(text)
    if out is not None:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
