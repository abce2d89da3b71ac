"""What reading data costs: 60,000 small PNGs and the same pictures as CIFAR's binary files, read once and while training.

    python benchmarks/data_loading.py [--pictures 60000] [--steps 4]

In one process, one after the other; writes benchmarks/results/data_loading.json. The pictures are made in a temporary
folder, which the system has in its cache by the time they are read: a cold disk is not measured.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from compressor import FineTuning, Samples, SampleSet, Training, read_data
from compressor.data.batches import Batches
from compressor.environment import environment
from compressor.model_zoo.uvit.adapter import UViTAdapter
from compressor.model_zoo.uvit.sizes import DIGITS_CONFIG, cifar10
from compressor.plugins.sparsedm import SparseDM

SHAPE = (3, 32, 32)


def make(folder: Path, count: int) -> None:
    """`count` random pictures without edges: folder/png/*.png, and the same in folder/bin as CIFAR-10's five files."""
    rng = np.random.default_rng(0)
    (folder / "png").mkdir()
    (folder / "bin").mkdir()
    for number, indices in enumerate(np.array_split(np.arange(count), 5), 1):
        records = np.zeros((len(indices), 3073), np.uint8)
        for record, index in zip(records, indices, strict=True):
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            image = coarse.resize((32, 32), Image.Resampling.BICUBIC)
            image.save(folder / "png" / f"{index:06}.png")
            record[0] = index % 10
            record[1:] = np.asarray(image).transpose(2, 0, 1).ravel()
        (folder / "bin" / f"data_batch_{number}.bin").write_bytes(records.tobytes())


class Timed(Batches):
    """Batches, with the seconds that each was waited for."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.waits = batches, list[float]()

    def batch(self, step: int) -> Any:
        found, seconds = timed(lambda: self.batches.batch(step))
        self.waits.append(seconds)
        return found


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    found = action()
    return found, time.perf_counter() - began


def throughput(data: SampleSet, batches: int) -> float:
    """Images per second of batches of 128 that nobody trains on."""
    samples = Samples(data, 128, 0, flip=True)
    samples.batch(0)  # starts the workers, and makes the epoch's order
    _, seconds = timed(lambda: [samples.batch(step) for step in range(1, batches + 1)])
    return 128 * batches / seconds


def waiting(adapter: UViTAdapter, data: SampleSet, batch_size: int, steps: int) -> dict[str, float]:
    """A fine-tuning step, and the share of it that is waited for its batch; the first two steps warm up."""
    batches = Timed(Samples(data, batch_size, 0, flip=True))
    torch.manual_seed(0)
    training = Training(steps=steps + 2, batch_size=batch_size, device="cpu")
    run = FineTuning(adapter.build(), SparseDM(), adapter=adapter, data=batches, training=training)
    times = [timed(run.advance)[1] for _ in range(steps + 2)][2:]
    waits = batches.waits[2:]
    return {
        "batch_size": batch_size,
        "steps": steps,
        "step_ms": 1000 * median(times),
        "wait_ms": 1000 * median(waits),
        "data_wait_share": sum(waits) / sum(times),
    }


@click.command()
@click.option("--pictures", default=60_000, show_default=True)
@click.option(
    "--steps", default=4, show_default=True, help="Steps of the larger model; the small one takes five times."
)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "data_loading.json")
def main(pictures: int, steps: int, out: Path) -> None:
    small = UViTAdapter({**DIGITS_CONFIG, "img_size": 32, "patch_size": 4, "in_chans": 3}, "uvit-digits at 3x32x32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, pictures)
        reading: dict[str, float] = {}
        binary, reading["cifar_bin"] = timed(lambda: read_data(folder / "bin"))
        memory, reading["png_workers_0"] = timed(lambda: read_data(folder / "png", SHAPE, workers=0))
        again, reading["png_workers_2"] = timed(lambda: read_data(folder / "png", SHAPE, workers=2))
        lazy = {n: read_data(folder / "png", SHAPE, workers=n, cache_mb=0) for n in (0, 2)}
        assert torch.equal(memory.stored(torch.arange(pictures)), binary.stored(torch.arange(pictures)))
        assert memory.sha256 == again.sha256 == lazy[0].sha256 == lazy[2].sha256
        sets = {"memory": memory, **{f"lazy_workers_{n}": data for n, data in lazy.items()}}
        result = {
            **environment(),
            "pictures": pictures,
            "shape": SHAPE,
            "seconds_to_read_once": reading,
            "images_per_second": {
                name: throughput(data, 2000 if data is memory else 60) for name, data in sets.items()
            },
            "fine_tuning": {
                adapter.name: {name: waiting(adapter, data, size, count) for name, data in sets.items()}
                for adapter, size, count in ((small, 128, 5 * steps), (cifar10(), 4, steps))
            },
        }
    out.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
