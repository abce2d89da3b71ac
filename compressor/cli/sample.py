"""`compressor sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compressor.cli.command import Command, suggested
from compressor.cli.options import folder_option, model_argument, options
from compressor.cli.terminal import Output, print_json, say, watch
from compressor.processes import team


@click.command(cls=Command, shared=True)
@options(
    model_argument,
    click.option("--n", type=click.IntRange(1), default=64, show_default=True, help="Images."),
    folder_option("--out", "-o", help="Default: RUN/drawn."),
    click.option(
        "--sampler", metavar="NAME", help="ddim, ddpm, dpm-solver++, unipc, euler-maruyama. Default: the model's."
    ),
    click.option("--spacing", metavar="NAME", help="Of ddim's timesteps: uniform, trailing, quadratic."),
    click.option("--steps", type=click.IntRange(1, 1000), default=50, show_default=True, help="Sampler steps."),
    click.option("--guidance", type=click.FloatRange(0), help="Scale of classifier-free guidance; 1 is none."),
    click.option(
        "--class",
        "classes",
        type=click.IntRange(0),
        multiple=True,
        help="Draw images of this class; may be repeated, in turn then. Default: each image's by chance.",
    ),
    click.option(
        "--batch", "batch_size", type=click.IntRange(1), default=64, show_default=True, help="Images per batch."
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise."),
    click.option(
        "--processes",
        type=click.IntRange(1, 256),
        default=1,
        show_default=True,
        help="Share the batches; one GPU each.",
    ),
    click.option(
        "--vae", metavar="DIR", shell_complete=suggested, help="An AutoencoderKL of diffusers, for models of latents."
    ),
    click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, …"),
    click.option("--overwrite", is_flag=True, help="Replace former samples in DIR."),
)
def sample(
    output: Output,
    directory: Path,
    out: Path | None,
    overwrite: bool,
    processes: int,
    sampler: str | None,
    spacing: str | None,
    guidance: float | None,
    classes: tuple[int, ...],
    **flags: Any,
) -> None:
    """Draw images from the model of a run, or of a saved model's folder: a PNG each, and a sheet of the first 64.

    The images depend on the seed and the batch size, not on the number of processes.
    """
    from compressor import files
    from compressor.adapter import Sampling
    from compressor.runs import drawing

    folder = out if out is not None else directory / "drawn"
    request = drawing.Draw(
        str(directory),
        how=Sampling(sampler, spacing, guidance, classes),
        **flags,  # n, steps, batch_size, seed, device, vae
    )
    watch(drawing.draw(request, folder, processes, overwrite), output.quiet)
    if not team().leads:
        return
    if output.as_json:
        print_json(files.read_json(folder / drawing.FILE))
        return
    say(f"{request.n} images: {folder}")
