"""What masking costs: a masked fine-tuning step against a dense one, and the 2:4 mask against argsort and scatter.

    python benchmarks/step_overhead.py [--rounds 60] [--device cuda]

Side by side in one process, interleaved, medians; writes benchmarks/results/step_overhead.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import click
import torch
from torch import Tensor

from compressor import FineTuning, Training, parse
from compressor.environment import environment
from compressor.model_zoo.digits import images
from compressor.model_zoo.uvit.sizes import digits
from compressor.plugins.dense import DenseContinued
from compressor.plugins.sparsedm import SparseDM


def argsort_mask(score: Tensor) -> Tensor:
    """The usual way to a 2:4 mask: sort every group of four, and scatter the first two."""
    groups = score.view(-1, 4)
    order = groups.argsort(dim=1, descending=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :2], True).view(score.shape)


def interleaved(first: Callable[[], object], second: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median milliseconds of both, and the median of their ratios round by round."""
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 5):
        pair = [0.0, 0.0]
        for index in (0, 1) if turn % 2 else (1, 0):
            began = time.perf_counter()
            (first, second)[index]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair[index] = 1000 * (time.perf_counter() - began)
        times.append((pair[0], pair[1]))
    kept = times[5:]  # the first rounds warm up
    return {
        "first_ms": median(a for a, _ in kept),
        "second_ms": median(b for _, b in kept),
        "ratio": median(a / b for a, b in kept),
    }


@click.command()
@click.option("--rounds", default=60, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "step_overhead.json"
)
def main(rounds: int, batch_size: int, device: str, out: Path) -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).abs().to(device)
    pattern = parse("2:4")
    assert torch.equal(pattern.mask(weight).keep, argsort_mask(weight))
    mask = interleaved(lambda: argsort_mask(weight), lambda: pattern.mask(weight), 5 * rounds)
    adapter, data = digits(), images()
    model = adapter.load(None)
    training = Training(steps=10**6, batch_size=batch_size, device=device)
    masked, dense = (
        FineTuning(model, pruner, adapter=adapter, data=data, training=training)
        for pruner in (SparseDM(teacher=0.0), DenseContinued())
    )
    step = interleaved(masked.advance, dense.advance, rounds)
    result = {
        **environment(),
        "rounds": rounds,
        "step": {
            "batch_size": batch_size,
            "masked_ms": step["first_ms"],
            "dense_ms": step["second_ms"],
            "ratio": step["ratio"],
        },
        "mask": {
            "weights": weight.numel(),
            "argsort_scatter_ms": mask["first_ms"],
            "pattern_ms": mask["second_ms"],
            "speedup": mask["ratio"],
        },
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
