"""Lowering: sparse weights to kernels that are really faster, chosen layer by layer by measuring on the machine at hand."""

from __future__ import annotations

import sys
from types import ModuleType

from compressor.lower.backend import Backend, Unit
from compressor.lower.lowering import Lowered, lower, lowering
from compressor.lower.plan import Plan

__all__ = ["Backend", "Lowered", "Plan", "Unit", "lower", "lowering"]


class _Callable(ModuleType):
    """Lets `compressor.lower(...)` be the verb and `compressor.lower` the package, whichever was imported first."""

    __call__ = staticmethod(lower)


sys.modules[__name__].__class__ = _Callable
