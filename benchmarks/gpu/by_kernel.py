"""Where the time of a model goes on a GPU, kernel by kernel, in each form; and what bringing inputs to 8 bits costs.

    python benchmarks/gpu/by_kernel.py                                 # inputs, in a minute
    python benchmarks/gpu/by_kernel.py --cells "dit-xl 64,uvit-h 16"   # models

The forms are those of `lowering.py`, under torch's profiler: microseconds of each kernel in one call, all blocks together. Inputs are
quantised by the kernel of `compressor/lower/triton_quantised.py` and by what torch.compile makes of torch's operators, alone and after
a GELU. Needs a GPU; what is measured is at once a line of `kernels_<GPU>.jsonl`. `kernels_h100.json` is of the first kernel.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from blocks import compiled
from lines import Lines, Session, lines_of, out_option, why
from lowering import Cell
from subjects import SUBJECTS
from torch.profiler import ProfilerActivity, profile

from compressor.lower.quantised import kernels
from compressor.sparsity.codes import gelu_quantised

BACKENDS = ("dense-gelu", "dense-fp8", "cusparselt", "cusparselt-fp8", "cusparselt-int8", "torchao-fp8")
SIZES = ((4128, 1152), (4128, 4608), (16384, 1152), (16384, 4608))
_CALLS = 3
_SHOWN = 16


def by_kernel(form: Any, inputs: Any) -> list[dict[str, Any]]:
    """The kernels of one call, the longest first: microseconds in all, how often, and the name."""
    for _ in range(_CALLS):  # compiled, loaded, tuned
        form(*inputs)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(_CALLS):
            form(*inputs)
        torch.cuda.synchronize()
    events = [one for one in seen.key_averages() if one.self_device_time_total]
    events.sort(key=lambda one: -one.self_device_time_total)
    return [
        {
            "us": one.self_device_time_total / _CALLS,
            "count": one.count / _CALLS,
            "kernel": one.key[:100],
        }
        for one in events
    ]


@torch.no_grad()
def profiled(name: str, batch: int, lines: Lines, device: torch.device) -> None:
    """The kernels of a model in each form; a form that does not run has its reason."""
    cell = Cell(f"{name} {batch}", SUBJECTS[name](), batch, Session(device, lines, time.monotonic()))
    cell.prepare()
    makes = {"dense": lambda: cell.dense, "dense, compiled": lambda: compiled(cell.dense)}
    makes |= {
        backend: lambda backend=backend: compiled(cell.on(backend))  # type: ignore[misc]
        for backend in BACKENDS
        if cell.fits(backend)
    }
    done = lines.done(cell.name)
    for form, make in makes.items():
        if form in done:
            continue  # of a session before
        found: dict[str, Any] = {"cell": cell.name, "form": form}
        try:
            spent = by_kernel(make(), cell.cast)
            found |= {"us": sum(one["us"] for one in spent), "kernels": spent[:_SHOWN]}
        except Exception as failure:  # a form that does not run is one result among others
            found["failed"] = why(f"{cell.name}, {form}", failure, device)
        lines.add(found)
        click.echo(f"{cell.name} {form}: {found.get('us', found.get('failed'))}")
        torch.cuda.empty_cache()


def inputs_in_8_bits(lines: Lines, device: torch.device) -> None:
    """Microseconds to quantise inputs of several sizes, by the kernel and by a compiler; medians."""
    from triton.testing import do_bench

    own = kernels(device.index)
    if own is None:
        raise click.ClickException("the kernel does not work here")
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would run the rest as it is, and not say so
    for rows, columns in SIZES:
        x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        for dtype in (torch.float8_e4m3fn, torch.int8):
            for gelu in ("", "tanh", "none") if columns > 2048 else ("",):
                asked = {"rows": rows, "columns": columns, "dtype": str(dtype), "gelu": gelu}
                if any(asked.items() <= line.items() for line in lines.all):
                    continue  # of a session before
                torch.compiler.reset()  # all of these are one function to it, compiled for what changes from call to call
                by_compiler = torch.compile(partial(gelu_quantised, dtype=dtype, gelu=gelu), dynamic=False)
                calls = {
                    "kernel": partial(own.quantised, x, dtype, gelu),
                    "compiler": partial(by_compiler, x),
                }
                times = {name: 1000 * do_bench(call, return_mode="median") for name, call in calls.items()}
                line = {**asked, "us": times}
                lines.add(line)
                click.echo(str(line))


@click.command()
@click.option("--cells", default="", help="Models, each with a batch; without any, inputs.")
@out_option
def main(cells: str, out: Path) -> None:
    """Profile forms kernel by kernel, and time the kernel of 8-bit inputs."""
    if not torch.cuda.is_available():
        raise click.ClickException("torch finds no CUDA GPU")
    device = torch.device("cuda", 0)
    lines = lines_of("kernels", out, device)
    if not cells:
        inputs_in_8_bits(lines, device)
    for cell in filter(None, cells.split(",")):
        name, batch = cell.rsplit(" ", 1)
        profiled(name, int(batch), lines, device)


if __name__ == "__main__":
    main()
