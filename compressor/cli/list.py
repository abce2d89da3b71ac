"""`compressor list`."""

from __future__ import annotations

from dataclasses import asdict

import click

from compressor.cli.command import Command
from compressor.cli.terminal import Output, print_json, print_table
from compressor.errors import UsageError, did_you_mean


@click.command("list", cls=Command)
@click.argument("kind", default="", metavar="[pruners|models|data|metrics|backends]")
def list_plugins(output: Output, kind: str) -> None:
    """Show the methods, models, data sets, metrics and lowering backends that are installed.

    `compressor list models` has more of each: its size, data, licence, and how to get weights.
    """
    from compressor import registry

    if kind and kind not in registry.KINDS:
        raise UsageError(f"nothing is called {kind!r}", did_you_mean(kind, registry.KINDS))
    listings = {name: registry.listing(name) for name in ([kind] if kind else registry.KINDS)}
    if output.as_json:
        print_json({name: [asdict(plugin) for plugin in plugins] for name, plugins in listings.items()})
        return
    from compressor.cli.tables import plain_table

    for name, plugins in listings.items():
        details = ("size", "data", "licence", "weights") if name == kind == "models" else ()
        lines = [
            (
                plugin.name,
                f"cannot be loaded: {plugin.error}" if plugin.error else plugin.summary,
                *[plugin.about.get(key, "") for key in details],
            )
            for plugin in plugins
        ]
        print_table(plain_table((name, "what it is", *details), lines))
