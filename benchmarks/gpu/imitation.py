"""A GPU that is imitated, so that a first session's steps can be tried anywhere. Its times are those of a CPU and mean nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from subjects import SUBJECTS, Subject, dit, uvit

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from imitated import Library

from compressor.lower import cusparselt, cusparselt_library, quantised
from compressor.lower.cusparselt_tuning import Algorithm, Tuned
from compressor.model_zoo.uvit.sizes import digits


@contextmanager
def imitated(benchmark: ModuleType) -> Iterator[None]:
    """cuSPARSELt imitated on the CPU; its backends, and the dense ones in 8 bits, available there. `benchmark` compiles nothing."""
    library = Library()
    with ExitStack() as stack:
        for owner, name, value in (
            (torch, "_cslt_compress", library.compress),
            (torch, "_cslt_sparse_mm", library.sparse_mm),
            (torch.backends.cusparselt, "is_available", lambda: True),
            (torch.backends.cusparselt, "version", lambda: 801),
            (cusparselt_library, "missing", lambda device: None),
            (cusparselt_library, "missing_8_bits", lambda device, dtype: None),
            (cusparselt.CuSparseLt, "unavailable", lambda self, device: None),
            (cusparselt.CuSparseLtQuantised, "unavailable", lambda self, device: None),
            (quantised.DenseQuantised, "unavailable", lambda self, device: None),
            (cusparselt, "tuned", lambda product, index: Tuned(Algorithm())),
            (cusparselt, "search_together", lambda products, index: None),
            (benchmark, "compiled", lambda model, mode="": model),
            (benchmark, "ROUNDS", 3),
        ):
            stack.enter_context(patch.object(owner, name, value))
        yield


def small() -> dict[str, Callable[[], Subject]]:
    """A tiny DiT and the smallest U-ViT, on two pictures, in place of every model at every batch."""

    def made(subject: Subject) -> Subject:
        return replace(subject, inputs=lambda batch: subject.inputs(2))

    of_uvit = dict.fromkeys(SUBJECTS, lambda: made(uvit(digits())))
    return of_uvit | {"dit-xl": lambda: made(dit(layers=2, heads=2, channels=32))}
