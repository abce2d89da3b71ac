"""Counter-based randomness: every draw is a pure function of a key, so that a resumed run needs no hidden state."""

from __future__ import annotations

import hashlib

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key`, for example `generator(seed, "noise", step)`. Same key, same stream, anywhere."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
