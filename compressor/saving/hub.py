"""Saved models on the hub of Hugging Face: fetched as safetensors and JSON alone, and never run."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.errors import CompressorError, UsageError, first_line
from compressor.files import MANIFEST
from compressor.sparsity.surgery import FILE as SURGERY

FILES = ("config.json", "model.safetensors", SURGERY, MANIFEST)
"""What is fetched of a repository: no pickle, no code."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(path: str | Path) -> bool:
    """Whether `path` can only be OWNER/NAME on the hub: it looks like it, and nothing of that name is on the disk."""
    return isinstance(path, str) and _NAME.fullmatch(path) is not None and not Path(path).exists()


def checked_name(name: str) -> str:
    """`name`. Raises UsageError where it is not OWNER/NAME."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"{name!r} is not the name of a repository", "Give OWNER/NAME.")
    return name


def is_offline() -> bool:
    """Whether the user has said that the hub is not to be asked."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextmanager
def fetched(name: str, revision: str | None = None) -> Iterator[Path]:
    """A folder with the saved model OWNER/NAME at `revision` (a branch, a tag, a commit; None: the newest), for the block.

    It comes from the hub's cache where it is there already. Raises CompressorError where it cannot be had.
    """
    from huggingface_hub import snapshot_download

    where = name if revision is None else f"{name} at {revision}"
    try:
        cached = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), etag_timeout=10))
    except Exception as error:  # the hub's own errors, and those of the network beneath
        said, hint = first_line(error), "Check the name, the revision and the network"
        if is_offline():
            said, hint = "not in the hub's cache", "HF_HUB_OFFLINE is set: unset it"
        raise CompressorError(f"{where}: {said}", f"{hint}, or give a folder, with its whole path.") from error
    with tempfile.TemporaryDirectory(prefix="compressor-") as text:
        folder = Path(text)
        for file in FILES:  # the cache has links out of its folder, which a saved model may not have
            if (cached / file).is_file():
                shutil.copyfile(cached / file, folder / file)
        if not (folder / MANIFEST).is_file():
            raise CompressorError(
                f"{where} is not a saved model of compressor: no {MANIFEST}", "`compressor push` makes one."
            )
        yield folder
