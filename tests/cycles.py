"""The same work, again and again in one process: what it takes of memory, files and threads must not grow.

    python tests/cycles.py [--cycles 500] [--seed 0] [--log FILE]

A cycle builds a small model (U-ViT or a UNet of diffusers, in turn), prunes it (2:4, 4:2:4 or 8:2:4) with one step of fine-tuning,
saves it, loads it into a fresh one, lowers that by measuring (float32, bfloat16, or with 8-bit kernels allowed), runs it, and applies
its plan once more. The first fifth, when libraries load and keep what they keep, is not counted; then the medians of the first and
the last tenth of the rest are compared. Exit code 1 where memory grew by 2% or more, or a file, thread or process is left.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import compressor
from compressor import NM
from compressor.environment import environment
from compressor.model_zoo.ddpm.sizes import DIGITS_CONFIG, SCHEDULER
from compressor.model_zoo.generic import DiffusersAdapter
from compressor.model_zoo.uvit.adapter import UViTAdapter
from compressor.plugins.sparsedm import SparseDM

LARGEST = 0.02
"""By so much memory may have grown."""
UVIT = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
UNET = {
    **DIGITS_CONFIG,
    "block_out_channels": [16],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}
PATTERNS = (NM(2, 4), NM(2, 4, 4), NM(2, 4, 8))
WAYS: tuple[dict[str, Any], ...] = ({}, {"dtype": torch.bfloat16}, {"max_error": 0.05})


@dataclass(frozen=True)
class Held:
    """What this process holds: bytes of memory, open files, threads of Python and of the system, child processes."""

    memory: int
    files: int
    threads: int
    tasks: int
    children: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        own = Path("/proc/self")
        resident = int((own / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        children = (own / "task" / str(os.getpid()) / "children").read_text().split()
        files = len(list((own / "fd").iterdir()))
        return cls(resident, files, threading.active_count(), len(list((own / "task").iterdir())), len(children))


def cycle(number: int, seed: int, folder: Path) -> None:
    """One, whose model, pattern and way of lowering follow from its number."""
    adapter = UViTAdapter(UVIT, "cycles") if number % 2 else DiffusersAdapter(UNET, SCHEDULER)
    pattern, way = PATTERNS[number // 2 % 3], WAYS[number // 6 % 3]
    torch.manual_seed(seed + number)
    data = torch.randn(4, 1, 8, 8)
    pruned = compressor.prune(adapter.build(), SparseDM(pattern), adapter=adapter, data=data, steps=1, batch_size=2)
    compressor.save(folder / "model", pruned.model, pruned.masks)
    model = compressor.load(folder / "model", adapter.build())
    inputs = adapter.example_inputs(2)
    lowered = compressor.lower(model, inputs, adapter=adapter, cache=False, **way)
    again = compressor.lower(model, inputs, dtype=way.get("dtype"), adapter=adapter, plan=lowered.plan)
    with torch.no_grad():
        first, second = adapter.predict(lowered.model, inputs), adapter.predict(again.model, inputs)
    if not torch.equal(first, second):
        raise SystemExit(f"cycle {number}: the plan, applied again, gives other numbers")


def grown(held: list[Held]) -> tuple[float, dict[str, int]]:
    """By which share memory grew after the first fifth, and of what else there is more at the end."""
    counted = held[len(held) // 5 :]
    some = max(len(counted) // 10, 1)
    first, last = counted[:some], counted[-some:]
    share = statistics.median(one.memory for one in last) / statistics.median(one.memory for one in first) - 1
    names = ("files", "threads", "tasks", "children")
    more = {name: min(getattr(o, name) for o in last) - max(getattr(o, name) for o in first) for name in names}
    return share, {name: count for name, count in more.items() if count > 0}


def play(cycles: int, seed: int) -> list[Held]:
    """What was held after each."""
    held = []
    with tempfile.TemporaryDirectory(prefix="cycles-") as folder:
        os.environ["COMPRESSOR_CACHE"] = str(Path(folder) / "cache")
        for number in range(cycles):
            cycle(number, seed, Path(folder))
            held.append(Held.now())
            if number % 25 == 24:
                print(f"{number + 1}: {held[-1]}", flush=True)
    return held


def main() -> int:
    options = argparse.ArgumentParser(description="Prune, save, load and lower, again and again.")
    options.add_argument("--cycles", type=int, default=500)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--log", type=Path, help="append a line of JSON to this file")
    given = options.parse_args()
    began = time.monotonic()
    held = play(given.cycles, given.seed)
    share, more = grown(held)
    seconds = round(time.monotonic() - began)
    print(f"{given.cycles} cycles in {seconds} s: memory {share:+.2%}, left over: {more or 'nothing'}")
    if given.log is not None:
        line = {"date": time.strftime("%Y-%m-%d"), "seed": given.seed, "cycles": given.cycles, "seconds": seconds}
        line |= {"memory_grew": round(share, 5), "left_over": more}
        line |= {"after": {n + 1: asdict(held[n]) for n in range(len(held)) if n % 50 == 49 or n == 0}}
        with given.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | environment(torch.device("cpu"))) + "\n")
    return int(share >= LARGEST or bool(more))


if __name__ == "__main__":
    sys.exit(main())
