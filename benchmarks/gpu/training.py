"""What masks cost while training on a GPU: a masked step against a dense one, as written and compiled.

    python benchmarks/gpu/training.py --cells "dit-xl 128,uvit-h 128,uvit-s 128"
    python benchmarks/gpu/training.py --imitate      # anywhere: the same steps with a small model on the CPU; its times mean nothing

Random weights and data, a batch per step, noise drawn as in training, bfloat16 passes; sr-ste at 2:4 against `dense-continued`. The
masked step runs with Triton's kernels and with torch's operators, in turns with the dense one. A line per form goes into
`training_<GPU>.jsonl`; what is there is not measured again. `report.py` writes the table. Goal: at most 1.02x a dense step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from lines import lines_of, out_option, why

from compressor import FineTuning, Training, registry
from compressor.cost.timing import interleaved, iqr_ms, median_ms
from compressor.plugins.dense import DenseContinued
from compressor.plugins.ste import STE
from compressor.sparsity import on_gpu

MODELS = {"uvit-s": "uvit-cifar10", "uvit-h": "uvit-imagenet256-h", "dit-xl": "dit-xl-2-256"}
CELLS = "dit-xl 128,uvit-h 128,uvit-s 128,dit-xl 32,uvit-h 32"
FORMS = ("as written", "compiled")
ROUNDS = 15


def runs(name: str, batch: int, device: torch.device, compiled: bool) -> tuple[FineTuning, FineTuning]:
    """A masked run and a dense one of the same model, on one batch of random pictures or latents."""
    adapter = registry.adapter(name)
    torch.manual_seed(0)
    model = adapter.build()
    shape = adapter.image_shape
    if shape is None:
        raise click.ClickException(f"{name} does not say what it takes")
    pictures = torch.rand(batch, *shape) * 2 - 1
    data = (pictures, torch.zeros(batch, dtype=torch.int64)) if adapter.num_classes else pictures
    training = Training(
        **{"steps": 10**6, "batch_size": batch, "device": str(device), "dtype": "bfloat16", "compiled": compiled}
    )
    masked, dense = (
        FineTuning(model, pruner, adapter=adapter, data=[data], training=training)
        for pruner in (STE(), DenseContinued())
    )
    return masked, dense


@contextmanager
def by_torch() -> Iterator[None]:
    """Without Triton's kernels."""
    with patch.object(on_gpu, "_tried", lambda index: None):
        yield


def measured(masked: FineTuning, dense: FineTuning, rounds: int, device: torch.device) -> dict[str, Any]:
    """The three steps in turns, in milliseconds, and the ratios of single rounds."""

    def plain() -> None:
        with by_torch():
            masked.advance()

    calls: dict[str, Callable[[], object]] = {"dense": dense.advance, "masked": masked.advance, "by torch": plain}
    seconds = dict(zip(calls, interleaved(list(calls.values()), rounds, device), strict=True))
    found: dict[str, Any] = {f"{name} ms": median_ms(own) for name, own in seconds.items()}
    for name in ("masked", "by torch"):
        ratios = [mine / theirs for mine, theirs in zip(seconds[name], seconds["dense"], strict=True)]
        found |= {f"{name} ratio": median_ms(ratios) / 1000, f"{name} iqr": iqr_ms(ratios) / 1000}
    return found


@click.command()
@click.option("--cells", default=CELLS, show_default=True, help="Models, each with a batch.")
@click.option("--forms", default=",".join(FORMS), show_default=True, help="A whole compiled model takes minutes.")
@click.option("--seconds", default=540.0, show_default=True, help="No form is begun after this.")
@click.option("--imitate", is_flag=True, help="On the CPU with a small model: tries the steps, measures nothing.")
@out_option
def main(cells: str, forms: str, seconds: float, imitate: bool, out: Path) -> None:
    """Time masked training steps against dense ones."""
    wanted = [tuple(cell.rsplit(" ", 1)) for cell in cells.split(",")]
    if unknown := ({name for name, *_ in wanted} - set(MODELS)) | (set(forms.split(",")) - set(FORMS)):
        raise click.UsageError(f"unknown {', '.join(sorted(unknown))}; there are {', '.join([*MODELS, *FORMS])}")
    if not imitate and not torch.cuda.is_available():
        raise click.ClickException("torch finds no CUDA GPU")
    device, end = torch.device("cpu" if imitate else "cuda:0"), time.monotonic() + seconds
    lines = lines_of("training", out, device, imitate)
    for name, batch in wanted:
        cell = f"{name} {batch}"
        for form in forms.split(","):
            if form in lines.done(cell) or time.monotonic() > end:
                continue
            model, size = ("uvit-digits", 2) if imitate else (MODELS[name], int(batch))
            line: dict[str, Any] = {"cell": cell, "form": form}
            try:
                both = runs(model, size, device, form == "compiled" and not imitate)
                if device.type == "cuda":
                    line["kernels"] = on_gpu.kernels_for(torch.ones(2, 4, device=device)) is not None
                line |= measured(*both, 2 if imitate else ROUNDS, device)
            except Exception as failure:  # too little memory is one result among others
                line["failed"] = why(f"{cell}, {form}", failure, device)
            both = None
            gc.collect()
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            lines.add(line)
            said = line.get("failed") or f"{line['masked ratio']:.3f}x, by torch {line['by torch ratio']:.3f}x"
            click.echo(f"  {cell:14} {form:12} {said}")


if __name__ == "__main__":
    main()
