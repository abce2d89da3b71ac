"""Whose code a run is made by, besides this toolkit's: the user's own files, and installed plugins of others."""

from __future__ import annotations

from compressor import discovery, registry
from compressor.recipe import Recipe


def own_source(name: str | None) -> bytes:
    """The source of what `name` names, with the files beside it that it imported, where it is FILE.py:NAME; else nothing."""
    if name is None or not registry.is_file_reference(name):
        return b""
    return b"".join(path.read_bytes() for path in discovery.sources(name))


def trained_by(recipe: Recipe) -> dict[str, str]:
    """The hashes of the plugins of others that decide what the model of `recipe` becomes."""
    pattern = "" if recipe.pattern is None else recipe.pattern.partition(":")[0]
    method = "" if recipe.pruner else recipe.method
    return {**modelled_by(recipe), **_hashes({"method": ("pruners", method), "pattern": ("patterns", pattern)})}


def modelled_by(recipe: Recipe) -> dict[str, str]:
    """The hash of the plugin that the model is of, where others have made it."""
    return _hashes({"model": ("models", recipe.model)})


def judged_by(recipe: Recipe) -> dict[str, str]:
    """The hashes of the plugins of others that judge samples."""
    scores = {f"{name}_score": ("scores", name) for name in recipe.evaluate.scores}
    return _hashes({"metric": ("metrics", recipe.evaluate.metric or ""), **scores})


def _hashes(named: dict[str, tuple[str, str]]) -> dict[str, str]:
    found = {what: discovery.code_sha256(kind, name) for what, (kind, name) in named.items()}
    return {f"{what}_plugin_sha256": digest for what, digest in found.items() if digest is not None}
