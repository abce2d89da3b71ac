"""Where the time of a model goes on a GPU, kernel by kernel, in each form; and what bringing inputs to 8 bits costs.

    python benchmarks/gpu/kernels.py --cells "dit-xl 64,uvit-h 16"

The forms are those of `lowering.py`, under torch's profiler: microseconds of each kernel in one call, all blocks together. Inputs are
quantised by the kernel of `compressor/lower/triton_quantised.py` and by what torch.compile makes of torch's operators, alone and after
a GELU. Needs a GPU; writes `kernels.json`.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from lowering import Cell, Session, compiled
from subjects import SUBJECTS
from torch.profiler import ProfilerActivity, profile

from compressor.environment import environment
from compressor.errors import first_line
from compressor.lower.quantised import kernels
from compressor.sparsity.codes import gelu_quantised

OUT = Path(__file__).parent / "kernels.json"
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
def profiled(name: str, batch: int, device: torch.device) -> dict[str, Any]:
    """The kernels of a model in each form; a form that does not run has its reason."""
    cell = Cell(f"{name} {batch}", SUBJECTS[name](), batch, Session(device, OUT, {}, time.monotonic()))
    cell.prepare()
    makes = {"dense": lambda: cell.dense, "dense, compiled": lambda: compiled(cell.dense)}
    makes |= {
        backend: lambda backend=backend: compiled(cell.on(backend))  # type: ignore[misc]
        for backend in BACKENDS
        if cell.fits(backend)
    }
    found: dict[str, Any] = {}
    for form, make in makes.items():
        try:
            spent = by_kernel(make(), cell.cast)
            found[form] = {"us": sum(one["us"] for one in spent), "kernels": spent[:_SHOWN]}
        except Exception as failure:  # a form that does not run is one result among others
            found[form] = {"failed": f"{type(failure).__name__}: {first_line(failure)}"}
        click.echo(f"{cell.name} {form}: {found[form].get('us', found[form].get('failed'))}")
        torch.cuda.empty_cache()
    return found


def inputs_in_8_bits(device: torch.device) -> list[dict[str, Any]]:
    """Microseconds to quantise inputs of several sizes, by the kernel and by a compiler; medians."""
    from triton.testing import do_bench

    own = kernels(device.index)
    if own is None:
        raise click.ClickException("the kernel does not work here")
    lines = []
    for rows, columns in SIZES:
        x = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
        for dtype in (torch.float8_e4m3fn, torch.int8):
            for gelu in ("", "tanh", "none") if columns > 2048 else ("",):
                by_compiler = torch.compile(partial(gelu_quantised, dtype=dtype, gelu=gelu))
                calls = {
                    "kernel": partial(own.quantised, x, dtype, gelu),
                    "compiler": partial(by_compiler, x),
                }
                times = {name: 1000 * do_bench(call, return_mode="median") for name, call in calls.items()}
                lines.append({"rows": rows, "columns": columns, "dtype": str(dtype), "gelu": gelu, "us": times})
                click.echo(str(lines[-1]))
    return lines


@click.command()
@click.option("--cells", default="dit-xl 64,uvit-h 16", show_default=True, help="Models, each with a batch.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(cells: str, out: Path) -> None:
    """Profile forms kernel by kernel, and time the kernel of 8-bit inputs."""
    if not torch.cuda.is_available():
        raise click.ClickException("torch finds no CUDA GPU")
    device = torch.device("cuda", 0)
    found = {"about": environment(device), "inputs": inputs_in_8_bits(device), "models": {}}
    for cell in cells.split(","):
        name, batch = cell.rsplit(" ", 1)
        found["models"][cell] = profiled(name, int(batch), device)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
