"""Counter-based randomness: every draw is a pure function of a key, so that a resumed run needs no hidden state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key`, for example `generator(seed, "noise", step)`. Same key, same stream, anywhere."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def repeatable(*key: int | str, gpus: bool = False) -> Iterator[None]:
    """What draws on the CPU (and on `gpus`) from the global generators of torch, NumPy and Python in the block gives the same for the
    same `key`. The caller's generators are then as they were."""
    seed, python, numpy = generator(*key).initial_seed(), random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if gpus else []):
        (torch.manual_seed if gpus else torch.default_generator.manual_seed)(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
