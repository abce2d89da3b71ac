"""Caches of diffusers: hooks on a model's blocks, which leave work out at steps where little changes, and repeat former answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
    """A cache by its `name` (a key of `CACHES`) and settings, the fields of its class in diffusers; `text` is what people call it.

    Raises UsageError where there is no such cache, or setting.
    """

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""

    def __post_init__(self) -> None:
        if self.name not in CACHES:
            raise UsageError(f"no cache {self.name!r}", did_you_mean(self.name, list(CACHES)))
        config = _class(self.name)
        known = [field.name for field in dataclasses.fields(config) if field.name != _NOW and field.name[0] != "_"]
        for key in self.settings:
            if key not in known:
                raise UsageError(f"cache {self.name}: no setting {key!r}", did_you_mean(key, known))
        try:
            config(**self.settings)
        except (TypeError, ValueError) as error:
            raise UsageError(f"cache {self.name}: {first_line(error)}", f"Settings: {', '.join(known)}.") from error

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
            raise UsageError(f"cache {cache.text or cache.name}: {first_line(error)}", "Try another cache.") from error
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
