"""In which variants (`fp16`) weights lie in a folder, by the names that diffusers and transformers give their files."""

from __future__ import annotations

import re
from pathlib import Path

_STORED = re.compile(r"(?:(?:diffusion_)?pytorch_)?model(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)$")


def variant_of(folder: Path) -> str | None:
    """The variant (`fp16`) of the weights in a folder of diffusers or transformers, where they are there as that alone; else None."""
    found = set(stored_in(folder).values())
    return found.pop() if len(found) == 1 else None  # beside plain ones, those are taken, as others do


def stored_in(folder: Path) -> dict[Path, str | None]:
    """The files of weights of a model of diffusers or transformers in `folder`, and the variant (`fp16`) that each is of."""
    return {path: match[1] for path in sorted(folder.glob("*model*")) if (match := _STORED.match(path.name))}
