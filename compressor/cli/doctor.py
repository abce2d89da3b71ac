"""`compressor doctor`."""

from __future__ import annotations

import click

from compressor.cli.command import Command
from compressor.cli.terminal import Output, print_json, print_table, say


@click.command(cls=Command)
def doctor(output: Output) -> None:
    """Look at this machine: hardware, kernels, versions, what is missing and the command that gets it.

    Nothing is changed, downloaded or measured.
    """
    from compressor.runs.machine import examined

    found = examined()
    if output.as_json:
        print_json(found)
        return
    from compressor.cli.tables import plain_table
    from compressor.report.numbers import size

    kernels = found["kernels"]
    built = (
        "not installed"
        if kernels["file"] is None
        else f"{kernels['used']} (of {', '.join(kernels['levels'])}), {kernels['file']}"
    )
    gpus = ", ".join(f"{g['name']} ({g['capability']}, {size(g['memory_bytes'])})" for g in found["gpus"]) or "none"
    lines = [
        ("hardware", found["hardware"]),
        ("platform", found["platform"]),
        ("cores for this process", f"{found['cores']:g}"),
        ("instruction sets", ", ".join(found["instruction_sets"]) or "not known on this system"),
        ("CPU kernels", built),
        ("OpenMP runtimes loaded", ", ".join(found["openmp"]) or "not known on this system"),
        ("GPUs", gpus),
        ("cuSPARSELt", found["cusparselt"] or "none"),
        ("versions", ", ".join(f"{name} {number}" for name, number in found["versions"].items())),
    ]
    print_table(plain_table(("machine", ""), lines))
    print_table(
        plain_table(("backend of lowering", "here"), [(name, why or "runs") for name, why in found["backends"].items()])
    )
    if not found["missing"]:
        say("Nothing is missing.")
        return
    print_table(plain_table(("missing", "how to get it"), [(line["what"], line["how"]) for line in found["missing"]]))
