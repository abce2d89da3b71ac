"""`compressor list`."""

from __future__ import annotations

from collections.abc import Mapping
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

    kind = "pruners" if kind == "methods" else kind  # as the other commands call them
    if kind and kind not in registry.KINDS:
        raise UsageError(f"nothing is called {kind!r}", did_you_mean(kind, registry.KINDS))
    listings = {name: registry.listing(name) for name in ([kind] if kind else registry.KINDS)}
    if output.as_json:
        here = _unavailable(listings)
        shown = {name: [asdict(plugin) for plugin in plugins] for name, plugins in listings.items()}
        for line in shown.get("backends", ()):
            line["unavailable"] = here[line["name"]]
        print_json(shown)
        return
    from compressor.cli.tables import plain_table

    here = _unavailable(listings)
    for name, plugins in listings.items():
        more = ("on this machine",) if name == "backends" else ()
        details = ("size", "data", "licence", "weights") if name == kind == "models" else ()
        lines = [
            (
                plugin.name,
                f"cannot be loaded: {plugin.error}" if plugin.error else plugin.summary,
                *[plugin.about.get(key, "") for key in details],
                *[here[plugin.name] or "runs" for _ in more],
            )
            for plugin in plugins
        ]
        print_table(plain_table((name, "what it is", *details, *more), lines))


def _unavailable(listings: Mapping[str, object]) -> Mapping[str, str | None]:
    """Of each backend, why it does not run on this machine; None where it does, and nothing where none is listed."""
    if "backends" not in listings:
        return {}
    from compressor.runs.machine import backends

    return backends()
