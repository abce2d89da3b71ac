"""What a pipeline is called with: a file of prompts, one a line, or of JSON objects with the pipeline's own arguments."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from errno import EFBIG
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.data.calls import Picture, hash_of
from compressor.data.reading.decoded import FORMATS, opened_picture
from compressor.errors import CompressorError, UsageError, first_line
from compressor.foreign.bounded import parse_json, read_bytes
from compressor.seeds import generator

_MOST_BYTES = 16 * 2**20
_MOST_CHARACTERS = 4000
_MOST_BYTES_OF_A_PICTURE = 256 * 2**20
COUNT = "num_inference_steps"
"""What pipelines call the number of steps of their sampler."""
_FILE = "file_name"
"""The one key of what stands for a picture among arguments, as the captions of a folder name theirs."""
_FORM = (
    "Write a prompt per line (.txt), a JSON object of the pipeline's arguments per line (.jsonl), or a JSON list of texts or such "
    "objects (.json)."
)
_LINE_END = re.compile(r"\r\n|\r|\n")  # str.splitlines would part a prompt, or JSON, at a page break or U+2028 in it
_TABLES = (".csv", ".tsv", ".yaml", ".yml")


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The arguments of each line of `path`: `{"prompt": line}`, or in a `.jsonl` file what the line holds; of a `.json` file, those of
    each entry of its list. Empty lines are left out.

    Raises UsageError, with the line, where the file is empty, too large, no text, of another kind (a table), or has a line that no
    prompt can be.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in _TABLES:
        raise UsageError(f"{path}: prompts are not read from {kind} files", _FORM)
    try:
        content = read_bytes(path, _MOST_BYTES)
    except OSError as error:
        hint = "Give fewer prompts; a few hundred are many." if error.errno == EFBIG else _FORM
        raise UsageError(f"{path}: {error.strerror or error}", hint) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file in UTF-8", _FORM) from error
    if "\0" in text:
        raise UsageError(f"{path}: not a text file", _FORM)
    if kind == ".json" and text.strip():
        return _listed(text, path)
    lines = [(number, line.strip()) for number, line in enumerate(_LINE_END.split(text), 1) if line.strip()]
    if not lines:
        raise UsageError(f"{path}: no prompt in it", _FORM)
    return [_line(line, f"{path}:{number}", kind == ".jsonl") for number, line in lines]


def with_pictures(arguments: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`arguments` with the picture, in colour, in the place of each `{"file_name": PATH}`, which may be relative to `folder`. Raises
    UsageError where there is none."""
    return {name: _with_pictures(value, folder, name) for name, value in arguments.items()}


def _with_pictures(value: Any, folder: Path, where: str) -> Any:
    if isinstance(value, list):
        return [_with_pictures(one, folder, where) for one in value]
    if not isinstance(value, Mapping) or set(value) != {_FILE}:
        return value
    path = folder / str(value[_FILE])
    try:
        return opened_picture(read_bytes(path, _MOST_BYTES_OF_A_PICTURE)).convert("RGB")
    except Exception as error:  # Pillow raises a dozen types on damaged pictures
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UsageError(
            f"{where}: {path}: no picture: {reason}",
            f"{{{_FILE!r}: PATH}} is a picture of the formats {', '.join(FORMATS)}; paths are relative to the file of prompts.",
        ) from error


def as_calls(prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """`prompts`, texts or mappings of the pipeline's arguments, as mappings. Raises UsageError for anything else."""
    if isinstance(prompts, str) or not prompts:
        raise UsageError("no prompts", "Give a list of texts, or of mappings of the pipeline's arguments.")
    found = []
    for number, one in enumerate(prompts):
        if not isinstance(one, (str, Mapping)):
            raise UsageError(
                f"prompt {number} is a {type(one).__name__}", "Allowed: a text, or a mapping of arguments."
            )
        found.append({"prompt": one} if isinstance(one, str) else dict(one))
    return found


def described(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline's arguments as JSON has them, for an index: a tensor, an array or a picture by its hash. Raises CompressorError for
    what has none."""
    return {name: _described(value, name) for name, value in arguments.items()}


def _described(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        return f"tensor {hash_of(value)}"
    if isinstance(value, Mapping):
        return {str(key): _described(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(one, f"{where}.{at}") for at, one in enumerate(value)]
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    # arrays of NumPy, and pictures of PIL
    if hasattr(value, "__array_interface__") and not (array := np.asarray(value)).dtype.hasobject:
        kind = f"{getattr(value, 'mode', '')} {array.dtype} {array.shape}\n"
        return f"array {hashlib.sha256(kind.encode() + array.tobytes()).hexdigest()}"
    raise CompressorError(
        f"argument {where}: a {type(value).__name__} cannot be kept in records",
        "Tensors, arrays, pictures, numbers and text can. Anything else can be passed on by a pipeline class of your own.",
    )


def pictures(lines: Sequence[Mapping[str, Any]], n: int, unseen: int, seed: int) -> list[Picture]:
    """`n` pictures to record and `unseen` ones to hold out, each with a line of its own kind and a seed for its noise.

    At most a fifth of the lines is held out, and never all: held-out pictures of one line alone have unseen noise only. Which
    lines, and in which order, `seed` decides; where they are fewer than the pictures, they are taken again with other noise.
    """
    order = torch.randperm(len(lines), generator=generator(seed, "prompts")).tolist()
    held = order[: min(unseen, max(1, len(lines) // 5))] if len(lines) > 1 else []
    rest = order[len(held) :]

    def made(kind: str, number: int, own: Sequence[int]) -> Picture:
        noise = int(torch.randint(2**31, (), generator=generator(seed, kind, number)))
        return Picture(arguments=dict(lines[own[number % len(own)]]), seed=noise, unseen=kind == "unseen")

    return [made("seen", i, rest) for i in range(n)] + [made("unseen", i, held or rest) for i in range(unseen)]


def _line(line: str, where: str, is_json: bool) -> dict[str, Any]:
    _refuse_long(line, f"{where}: a line")
    if not is_json:
        return {"prompt": line}
    found = _json(line, where)
    if not isinstance(found, dict):
        raise UsageError(f"{where}: not a JSON object", _FORM)
    return found


def _listed(text: str, path: Path) -> list[dict[str, Any]]:
    """The arguments of each entry of a JSON list of texts or objects."""
    every = _json(text, str(path))
    if not isinstance(every, list):
        raise UsageError(f"{path}: not a JSON list", _FORM)
    if not every:
        raise UsageError(f"{path}: no prompt in it", _FORM)
    found: list[dict[str, Any]] = []
    for number, entry in enumerate(every):
        if not isinstance(entry, (str, dict)) or (isinstance(entry, str) and not entry.strip()):
            raise UsageError(f"{path}: entry {number} is no text and no JSON object: {json.dumps(entry)[:60]}", _FORM)
        _refuse_long(entry if isinstance(entry, str) else json.dumps(entry), f"{path}: entry {number} is a text")
        found.append({"prompt": entry.strip()} if isinstance(entry, str) else entry)
    return found


def _json(text: str, where: str) -> Any:
    try:
        found = parse_json(text)
        json.dumps(found, ensure_ascii=False).encode()  # half of a pair of surrogates is no text
        return found
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}", _FORM) from error


def _refuse_long(text: str, what: str) -> None:
    if len(text) > _MOST_CHARACTERS:
        raise UsageError(
            f"{what} of {len(text):,} characters",
            f"Allowed: up to {_MOST_CHARACTERS:,}; encoders read 77 to 512 tokens.",
        )
