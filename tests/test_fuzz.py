"""A few of the random jobs that `make fuzz` draws by the thousand, without sanitizers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fuzz_kernels import Fuzz

from compressor.lower.vnm_kernels import kernels

extension: Any = kernels()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the compiled kernels are not installed")


@pytest.fixture
def fuzz() -> Iterator[Fuzz]:
    level, threads = extension.level(), torch.get_num_threads()
    yield Fuzz(extension)
    extension.set_level(level)
    torch.set_num_threads(threads)


def test_random_jobs_are_right_or_refused(fuzz: Fuzz) -> None:
    for number in range(150):
        fuzz.job(random.Random(f"few/{number}"))
    assert len({name.split()[0] for name in fuzz.counts}) == 6  # of every kind


def test_no_wrong_number_is_taken(fuzz: Fuzz) -> None:
    for level in extension.levels():
        extension.set_level(level)
        for number in range(400):
            fuzz.refused(random.Random(f"wrong/{number}"))
