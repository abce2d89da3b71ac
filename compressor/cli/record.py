"""`compressor record`."""

from __future__ import annotations

from pathlib import Path

import click

from compressor.cli.command import Command, suggested
from compressor.cli.options import folder_option, options
from compressor.cli.terminal import Output, print_json, say, watch


@click.command(cls=Command, shared=True)
@click.argument("pipeline", metavar="PIPELINE", shell_complete=suggested)
@options(
    click.option(
        "--prompts",
        required=True,
        metavar="FILE",
        shell_complete=suggested,
        help="One a line, JSON objects of arguments (.jsonl), or a list (.json).",
    ),
    click.option("--n", type=click.IntRange(1), default=16, show_default=True, help="Pictures to learn from."),
    click.option("--unseen", type=click.IntRange(1), default=4, show_default=True, help="Pictures to be judged on."),
    click.option("--steps", type=click.IntRange(1), help="Sampler steps. Default: the pipeline's own number."),
    click.option("--keep", type=click.IntRange(1), help="Calls of each picture to keep, by chance. Default: all."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Chooses prompts and noise."),
    click.option("--part", metavar="NAME", help="unet, transformer, vae.decoder, … Default: what denoises."),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, …"),
    click.option(
        "--argument", "arguments", multiple=True, metavar="KEY=VALUE", help="The pipeline's own, e.g. guidance_scale=3."
    ),
    folder_option("--out", "-o", required=True, help="The records."),
)
def record(
    output: Output,
    pipeline: str,
    prompts: str,
    n: int,
    unseen: int,
    steps: int | None,
    keep: int | None,
    seed: int,
    part: str | None,
    device: str,
    arguments: tuple[str, ...],
    out: Path,
) -> None:
    """Run PIPELINE and keep every call of its denoiser: what it was told, and what it answered.

    `compressor run --pipeline PIPELINE --prompts FILE --records DIR` learns from them. Interrupted, the same command goes on.
    """
    from compressor import recipe as recipes
    from compressor.data.settings import Record
    from compressor.runs.piped import recorded
    from compressor.runs.unread import refuse_unread
    from compressor.validation import validated

    own = recipes.plain_assignments(arguments, "--argument")
    settings = {"n": n, "unseen": unseen, "steps": steps, "keep": keep, "seed": seed, "arguments": own}
    wanted = validated(Record, settings, "record")
    recipe = recipes.Recipe(pipeline=pipeline, part=part, prompts=prompts, records=str(out), record=wanted)
    refuse_unread([recipe], recipe.model_dump(exclude_unset=True))
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"device": device})})
    found = watch(recorded(recipe), output.quiet)
    records = found[1]
    if records.short is not None:
        say(f"warning: {records.short}", err=True)
    size = sum(path.stat().st_size for path in out.iterdir())
    facts = {
        "records": str(out),
        "pipeline": records.index.pipeline,
        "part": records.index.part,
        "pictures": len(records.index.pictures),
        "calls": len(records),
        "unseen_calls": len(records.unseen),
        "size_bytes": size,
        "sha256": records.sha256,
    }
    if output.as_json:
        print_json(facts)
        return
    from compressor.report import numbers

    say(
        f"{out}: {facts['calls']} calls of {facts['part']} to learn from, {facts['unseen_calls']} to be judged on, "
        f"{numbers.size(size)}"
    )
