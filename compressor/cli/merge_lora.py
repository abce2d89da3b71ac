"""`compressor merge-lora`."""

from __future__ import annotations

from pathlib import Path

import click

from compressor.cli.command import Command
from compressor.cli.options import folder_option, model_argument, options
from compressor.cli.run import free_directory
from compressor.cli.terminal import Output, print_json, say


@click.command(cls=Command, name="merge-lora")
@options(
    model_argument,
    click.argument("lora", metavar="LORA", type=click.Path(path_type=Path)),
    folder_option("--out", "-o", help="Default: RUN-LORA, beside RUN."),
    click.option("--scale", type=float, default=1.0, show_default=True, help="How strong the LoRA is."),
)
def merge_lora(output: Output, directory: Path, lora: Path, out: Path | None, scale: float) -> None:
    """Merge a LoRA of your own into the sparse model of a run, under its masks.

    LORA is a file in a layout that diffusers reads, or a folder of peft. Every zero stays, and the output says how much of the LoRA
    the masks removed. DIR gets model/ and pipeline/, as a run's directory has them.
    """
    from compressor.report.numbers import share
    from compressor.runs.lora import merge_lora as merged

    out = out if out is not None else free_directory(directory.with_name(f"{directory.name}-{lora.stem}"))
    found = merged(directory, lora, out, scale)
    if output.as_json:
        print_json({**found.as_json(), "out": str(out)})
        return
    if not output.quiet:
        for layer in found.layers:
            say(f"{layer.name}: the mask removed {share(layer.removed)}")
    for part, count in found.left_out.items():
        say(f"warning: {count} tensors of the LoRA are of {part}, which is not changed", err=True)
    say(f"{len(found.layers)} layers changed; the masks removed {share(found.removed)} of the LoRA's norm; {out}")
