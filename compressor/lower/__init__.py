"""Lowering: sparse weights to kernels that are really faster, chosen layer by layer by measuring on the machine at hand."""

from __future__ import annotations

import sys
from types import ModuleType

from compressor.lower.backend import Backend as Backend
from compressor.lower.backend import Unit as Unit
from compressor.lower.lowering import Lowered as Lowered
from compressor.lower.lowering import lower, lowering
from compressor.lower.plan import Plan as Plan

__all__ = ["lower", "lowering"]  # what `help(compressor.lower)` shows: the verb, not pages of every class


class _Callable(ModuleType):
    """Lets `compressor.lower(...)` be the verb and `compressor.lower` the package, whichever was imported first."""

    __call__ = staticmethod(lower)


sys.modules[__name__].__class__ = _Callable
