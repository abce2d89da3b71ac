"""`compressor export`."""

from __future__ import annotations

from pathlib import Path

import click

from compressor.cli.command import Command
from compressor.cli.options import options, run_argument
from compressor.cli.terminal import Output, print_json, say
from compressor.errors import UsageError, did_you_mean


@click.command(cls=Command)
@options(
    run_argument,
    click.option("--to", "target", required=True, metavar="FORMAT", help="onnx."),
    click.option("--out", "-o", type=click.Path(path_type=Path), metavar="FILE", help="Default: RUN/model.onnx."),
    click.option("--form", default="dense", show_default=True, metavar="dense|gathered", help="See docs/onnx.md."),
    click.option("--int8", is_flag=True, help="Quantize the weights of matrix products to int8."),
    click.option("--overwrite", is_flag=True, help="Replace FILE."),
)
def export(
    output: Output, directory: Path, target: str, out: Path | None, form: str, int8: bool, overwrite: bool
) -> None:
    """Write the model of a run, or of a saved model's folder, for another engine, and check it there.

    --form dense keeps the zeros, for engines that look for them (TensorRT). --form gathered leaves them out by itself, for
    engines that do not (ONNX Runtime on CPUs); it takes patterns with V of 64 or more.
    """
    if target != "onnx":
        raise UsageError(f"no format {target!r}", did_you_mean(target, ["onnx"]))
    from compressor import saving
    from compressor.export import onnx
    from compressor.runs.saved import saved_model
    from compressor.sparsity.notation import parse

    path = out if out is not None else directory / "model.onnx"
    onnx.refuse(path, form, int8, overwrite)
    adapter, model = saved_model(directory)
    texts = saving.read_config(saving.model_folder(directory)).patterns
    patterns = {name: parse(text) for name, text in texts.items()}
    if not output.quiet:
        say(f"exporting {adapter.name} to {path}", err=True)
    exported = onnx.export_onnx(model, adapter, path, form=form, int8=int8, patterns=patterns, overwrite=overwrite)
    if output.as_json:
        print_json(exported.as_json())
        return
    for line in exported.lines():
        say(line)
