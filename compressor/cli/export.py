"""`compressor export`."""

from __future__ import annotations

from pathlib import Path

import click

from compressor.cli.command import Command
from compressor.cli.options import model_argument, options
from compressor.cli.terminal import Output, print_json, say
from compressor.errors import UsageError, did_you_mean

_DEFAULT_FILE = {"onnx": "model.onnx", "tensorrt-ready": "tensorrt.onnx"}


@click.command(cls=Command)
@options(
    model_argument,
    click.option("--to", "target", required=True, metavar="FORMAT", help="onnx, tensorrt-ready."),
    click.option(
        "--out",
        "-o",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Default: RUN/model.onnx.",
    ),
    click.option("--form", default="dense", show_default=True, metavar="dense|gathered", help="See docs/onnx.md."),
    click.option("--int8", is_flag=True, help="Quantize the weights of matrix products to int8."),
    click.option(
        "--batch",
        type=click.IntRange(1),
        metavar="N",
        help="tensorrt-ready: what the engine is tuned for. [default: 16]",
    ),
    click.option("--overwrite", is_flag=True, help="Replace FILE."),
)
def export(
    output: Output,
    directory: Path,
    target: str,
    out: Path | None,
    form: str,
    int8: bool,
    batch: int | None,
    overwrite: bool,
) -> None:
    """Write the model of a run, or of a saved model's folder, for another engine, and check it there.

    --form dense keeps the zeros, for engines that look for them (TensorRT). --form gathered leaves them out by itself, for
    engines that do not (ONNX Runtime on CPUs); it takes patterns with V of 64 or more.

    --to tensorrt-ready writes float16 (with --int8, 8 bits around products of 2:4) to RUN/tensorrt.onnx, and beside it the command
    that builds an engine, and which layers TensorRT may take as sparse.
    """
    if target not in _DEFAULT_FILE:
        raise UsageError(f"no format {target!r}", did_you_mean(target, list(_DEFAULT_FILE)))
    ready = target == "tensorrt-ready"
    if ready and form != "dense":
        raise UsageError(f"--form {form} with --to {target}", "TensorRT looks for the zeros itself: leave --form out.")
    if batch is not None and not ready:
        raise UsageError(f"--batch with --to {target}", "That file takes any batch: leave --batch out.")
    from compressor import saving
    from compressor.export import onnx, tensorrt
    from compressor.runs.saved import saved_model
    from compressor.sparsity.notation import parse

    path = out if out is not None else directory / _DEFAULT_FILE[target]
    onnx.refuse(path, form, int8 and not ready, overwrite, *[tensorrt.description_of(path)] * ready)
    adapter, model = saved_model(directory)
    texts = saving.read_config(saving.model_folder(directory)).patterns
    patterns = {name: parse(text) for name, text in texts.items()}
    if not output.quiet:
        say(f"exporting {adapter.name} to {path}", err=True)
    exported: onnx.Exported | tensorrt.ReadyForTensorRT
    if ready:
        exported = tensorrt.export_tensorrt(
            model, adapter, path, int8=int8, batch=batch or 16, patterns=patterns, overwrite=overwrite
        )
    else:
        exported = onnx.export_onnx(model, adapter, path, form=form, int8=int8, patterns=patterns, overwrite=overwrite)
    if output.as_json:
        print_json(exported.as_json())
        return
    for line in exported.lines():
        say(line)
