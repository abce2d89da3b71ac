"""Operators of torch under the name `compressor`, which compilers leave as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_torch_library: Any = torch.library  # it has no annotations
_library = _torch_library.Library("compressor", "FRAGMENT")


def define(
    schema: str, fake: Callable[..., Any], real: Callable[..., Any] | None, where: str = "CompositeExplicitAutograd"
) -> None:
    """The operator of this `schema`: `fake` makes room for its result, and `real` is what it does on devices `where`.

    `real` is None of an operator that compiled code gives to torch by itself.
    """
    _library.define(schema)
    name = schema.partition("(")[0]
    if real is not None:
        _library.impl(name, real, where)
    _torch_library.register_fake(f"compressor::{name}", fake, lib=_library)
