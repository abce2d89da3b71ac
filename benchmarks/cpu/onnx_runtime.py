"""ONNX Runtime on a CPU: the gathered form of U-ViT-S/2 against the dense form, at several V, and int8 of the dense form.

    python benchmarks/cpu/onnx_runtime.py [--rounds 40] [--batches 4,1]

Random weights with V:2:4 masks on the linears of every block. All forms take turns in one process, on as many threads as
PyTorch has; medians; the files are checked against PyTorch before. Writes benchmarks/results/onnx.json. Nothing else should
run meanwhile.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import click
import torch

from compressor import NM, registry
from compressor.cost.timing import interleaved, iqr_ms, median_ms
from compressor.environment import environment
from compressor.export.onnx import Exported, OnnxRunner, export_onnx, random_inputs
from compressor.sparsity.layers import select

MODEL = "uvit-cifar10"
SEED = 0
CPU = torch.device("cpu")


def exported(v: int, form: str, int8: bool, folder: Path) -> Exported:
    """The model with V:2:4 masks on its targets, as a file."""
    adapter, pattern = registry.adapter(MODEL), NM(2, 4, v)
    torch.manual_seed(SEED)
    model = adapter.build()
    allowed = {name for name, _ in model.named_parameters()}
    layers = [
        layer for layer in select(model, pattern, allowed, adapter.targets, adapter.ignore) if layer.reason is None
    ]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(pattern.mask(layer.weight.abs()).apply(layer.weight))
    path = folder / f"{form}-{v}-{'int8' if int8 else 'float32'}.onnx"
    return export_onnx(model, adapter, path, form=form, int8=int8, patterns={layer.name: pattern for layer in layers})


@click.command()
@click.option("--rounds", default=40, show_default=True)
@click.option("--batches", default="4,1", show_default=True)
@click.option("--vs", default="4,64,128,256,512", show_default=True, help="The values of V.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parents[1] / "results" / "onnx.json",
    show_default=True,
)
def main(rounds: int, batches: str, vs: str, out: Path) -> None:
    values = [int(v) for v in vs.split(",")]
    largest = max(values)
    adapter, rng = registry.adapter(MODEL), torch.Generator().manual_seed(SEED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The time of the dense forms does not depend on where their zeros are.
        forms = {
            "dense": exported(largest, "dense", False, folder),
            "dense int8": exported(largest, "dense", True, folder),
        }
        forms |= {f"gathered {v}:2:4": exported(v, "gathered", False, folder) for v in values}
        runners = [OnnxRunner(form.path) for form in forms.values()]
        rows = []
        for batch in (int(size) for size in batches.split(",")):
            inputs = random_inputs(adapter.example_inputs(batch), 0, rng)
            times = interleaved([partial(runner, inputs) for runner in runners], rounds, CPU)
            for (label, form), seconds in zip(forms.items(), times, strict=True):
                row = {
                    "form": label,
                    "batch": batch,
                    "median_ms": median_ms(seconds),
                    "iqr_ms": iqr_ms(seconds),
                    "speedup": median(dense / own for dense, own in zip(times[0], seconds, strict=True)),
                    "gathered_layers": len(form.gathered),
                    "size_bytes": form.size_bytes,
                    "max_error": form.parity.max_error,
                    "rms_error": form.parity.rms_error,
                    "tolerance": form.parity.tolerance,
                }
                rows.append(row)
                click.echo(
                    f"batch {batch}  {label:18} {row['median_ms']:7.1f} ms (iqr {row['iqr_ms']:.1f})  {row['speedup']:.2f}x  "
                    f"error {row['max_error']:.1e}"
                )
        versions = forms["dense"].versions
    about = environment()
    about["versions"].update(versions)
    result = {**about, "model": MODEL, "seed": SEED, "rounds": rounds, "against": "dense, same batch", "rows": rows}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
