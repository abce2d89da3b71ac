"""`compressor check-plugin`."""

from __future__ import annotations

import click

from compressor.cli.command import Command
from compressor.cli.terminal import Output, print_json, say


@click.command("check-plugin", cls=Command)
@click.argument("name", metavar="NAME|FILE.py:CLASS")
def check_plugin(output: Output, name: str) -> None:
    """Whether a pruner keeps the promises of its interface, on tiny models of three families. Exits with 1 where not."""
    from compressor import registry, testing

    cls = registry.pruner_class_from_file(name) if registry.is_file_reference(name) else registry.pruner_class(name)
    findings = []
    for finding in testing.findings(cls):
        findings.append(finding)
        if not output.as_json and (finding.fault is not None or not output.quiet):
            say(f"{'ok  ' if finding.fault is None else 'FAIL'} {finding.family}: {finding.check}")
            if finding.fault is not None:
                for line in finding.fault.splitlines():
                    say(f"     {line}")
    faults = [finding for finding in findings if finding.fault is not None]
    if output.as_json:
        print_json([vars(finding) for finding in findings])
    else:
        say(f"{name}: {len(findings) - len(faults)} of {len(findings)} checks hold")
    if faults:
        raise click.exceptions.Exit(1)
