"""Caches of diffusers: hooks on a model's blocks, which leave work out at steps where little changes, and repeat former answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml
from torch import nn

from compressor.errors import UsageError, did_you_mean, first_line
from compressor.pipelines.opened import Opened

CACHES: Mapping[str, str] = {
    "first-block": "FirstBlockCacheConfig",
    "faster": "FasterCacheConfig",
    "pyramid": "PyramidAttentionBroadcastConfig",
    "taylor": "TaylorSeerCacheConfig",
}
"""The class of diffusers that each name stands for. Not among them: MagCache, which has to be calibrated first, and SeaCache, which
does nothing in pipelines that do not tell it their steps."""

_NOW = "current_timestep_callback"


@dataclasses.dataclass(frozen=True)
class Cache:
    """A cache by its `name` (a key of `CACHES`) and settings (fields of its class in diffusers); `text` is as it was written."""

    text: str
    name: str
    settings: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Cache:
        """`first-block:threshold=0.1`; settings have colons between them, and values are YAML. Raises UsageError."""
        name, *pairs = text.split(":")
        if name not in CACHES:
            raise UsageError(f"no cache {name!r}", did_you_mean(name, list(CACHES)))
        config = _class(name)
        known = [f.name for f in dataclasses.fields(config) if f.name != _NOW and not f.name.startswith("_")]
        settings = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals or key not in known:
                raise UsageError(f"cache {text!r}: no setting {key!r}", f"Write {name}:NAME=VALUE; {', '.join(known)}.")
            try:
                settings[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UsageError(f"cache {text!r}: {value!r} is no value", "Write a number, or [1, 2].") from error
        try:
            config(**settings)
        except (TypeError, ValueError) as error:
            raise UsageError(f"cache {text!r}: {first_line(error)}", f"Settings: {', '.join(known)}.") from error
        return cls(text, name, settings)

    def config(self, pipe: Any) -> Any:
        """The object that diffusers takes, for the model of `pipe`."""
        made = _class(self.name)(**self.settings)
        if hasattr(made, _NOW):
            setattr(made, _NOW, lambda: pipe.current_timestep)
        return made


@contextmanager
def cached(opened: Opened, module: nn.Module, cache: Cache | None) -> Iterator[Any]:
    """The pipeline with `module` in the place of the part, and `cache` on it, empty, until the block ends. None is no cache.

    Raises UsageError where diffusers has no caches for such a model.
    """
    with opened.having(module) as pipe:
        if cache is None:
            yield pipe
            return
        if not callable(getattr(module, "enable_cache", None)):
            raise UsageError(
                f"{type(module).__name__}: diffusers has no caches for it", "Leave --cache out for this pipeline."
            )
        model: Any = module
        try:
            model.enable_cache(cache.config(pipe))
        except Exception as error:  # whatever diffusers raises where a cache does not fit the model's blocks
            raise UsageError(f"cache {cache.text!r}: {first_line(error)}", "Try another cache.") from error
        try:
            yield pipe
        finally:
            model.disable_cache()


def _class(name: str) -> Any:
    import diffusers.hooks

    found = getattr(diffusers.hooks, CACHES[name], None)
    if found is None:
        raise UsageError(
            f"cache {name!r}: diffusers {diffusers.__version__} has no {CACHES[name]}", "Install a later one."
        )
    return found
