"""The files of weights in a folder of diffusers or transformers: in which variants (`fp16`) they lie there, and what they hold."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from compressor.errors import CompressorError, UsageError
from compressor.weights import kind_of, read_outline

_STORED = re.compile(r"(?:(?:diffusion_)?pytorch_)?model(?:\.(\w+))?(?:-\d{5}-of-(\d{5}))?\.(?:safetensors|bin)$")


def variant_of(folder: Path) -> str | None:
    """The variant (`fp16`) of the weights in a folder of diffusers or transformers, where they are there as that alone; else None."""
    found = set(stored_in(folder).values())
    return found.pop() if len(found) == 1 else None  # beside plain ones, those are taken, as others do


def stored_in(folder: Path) -> dict[Path, str | None]:
    """The files of weights of a model of diffusers or transformers in `folder`, and the variant (`fp16`) that each is of."""
    return {path: match[1] for path in sorted(folder.glob("*model*")) if (match := _STORED.match(path.name))}


def outline_of(folder: Path, variant: str | None) -> dict[str, Tensor]:
    """What the files hold that are opened of a model in `folder`, those of the `variant` or, where there are none, the plain ones:
    tensors without values (`read_outline`).

    Raises CompressorError where two of the several files that make a model have one name, of which the last read alone would
    count, and for a pickle of more than tensors. A safetensors file that cannot be read is left to whoever loads it.
    """
    every = stored_in(folder)
    wanted = variant if variant in every.values() else None
    paths = [path for path, own in every.items() if own == wanted]
    safe = [path for path in paths if path.suffix == ".safetensors"]
    found: dict[str, Tensor] = {}
    held: dict[tuple[str, str], Path] = {}
    for path in safe or paths:
        try:
            outline = read_outline(path)
        except CompressorError:
            if not safe:
                raise
            continue
        match = _STORED.match(path.name)
        several = match[2] if match is not None else None
        for name in outline if several is not None else ():
            if (other := held.setdefault((str(several), name), path)) != path:
                raise CompressorError(
                    f"{folder}: {name} is in {other.name} and in {path.name}",
                    "Files of two models were mixed: use another copy.",
                )
        found.update(outline)
    return found


def copy_others(pipeline: Path, folder: Path, own: Path) -> None:
    """Copy what is in the folder `pipeline`, but for what is in `own`, into `folder`. Raises UsageError where that lies in it: the
    copy would be copied, and so on."""
    if folder.resolve().is_relative_to(pipeline.resolve()):
        raise UsageError(f"{folder} lies in the pipeline, {pipeline}, which is copied there", "Choose another --out.")
    shutil.copytree(pipeline, folder, dirs_exist_ok=True, ignore=lambda at, names: names if Path(at) == own else [])


def refuse_codes(outline: Mapping[str, Tensor], where: object) -> None:
    """Raise UsageError where the files of `where` hold weights in whole numbers: other libraries read codes as if they were the
    weights, and drop the scales."""
    for name, value in outline.items():
        if name.endswith(("weight", "bias")) and kind_of(value) == "whole":
            raise UsageError(
                f"{where}: {name} is {value.dtype}",
                "Weights that were quantised are not read without their scales: save them as floating-point numbers.",
            )
