"""Files that survive: folders are committed whole or not at all, and read back only where every byte is as written.

A folder is written beside its target, each file flushed to disk, a manifest of hashes written last, and the folder
renamed. A reader that finds a manifest which verifies has exactly what the writer had.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from compressor.errors import CompressorError
from compressor.foreign.bounded import open_regular, read_bytes

MANIFEST = "manifest.json"
_MAX_JSON_BYTES = 16 * 1024 * 1024


def commit(target: Path, write: Callable[[Path], None], listed: bool = True) -> None:
    """Let `write` fill a folder, and make it `target` in one step. A folder that was there before is replaced.

    Where it is not `listed`, it has no manifest: what is in it is for other libraries, and nothing here reads it.

    Raises CompressorError where the disk is full or not writable; what was at `target` is then still there.
    """
    partial = target.parent / f".partial-{target.name}"
    old = target.parent / f".old-{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _restore_old(old, target)  # of a process that died between the two renames below
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        write(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        entries = {}
        for path in files:
            path.chmod(0o644)  # safetensors writes 0600
            sync(path)
            entries[path.relative_to(partial).as_posix()] = {"sha256": file_sha256(path), "size": path.stat().st_size}
        if listed:
            manifest = partial / MANIFEST
            manifest.write_text(json.dumps({"schema_version": 1, "files": entries}, indent=1), encoding="utf-8")
            sync(manifest)
        sync(partial)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
        free = shutil.disk_usage(_existing(target)).free
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CompressorError(
            f"{target}: cannot be written: {reason} ({written:,} bytes written so far, {free:,} bytes free)",
            "Free some space or choose another folder; what was saved before is intact.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # there only where something failed
        _restore_old(old, target)


def verify(folder: Path, needs: Sequence[str] = ()) -> None:
    """Raise CompressorError unless `folder` has a manifest that lists `needs`, and every file in it is as listed."""
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if manifest.get("schema_version") != 1 or not isinstance(files, dict):
        raise CompressorError(
            f"{folder / MANIFEST}: not a manifest of version 1", "The folder is damaged, or from a newer version."
        )
    if lost := [name for name in needs if name not in files]:
        raise CompressorError(
            f"{folder / MANIFEST}: {lost[0]} is not listed", "The folder is damaged; use another copy."
        )
    for name, entry in files.items():
        path = folder / name
        try:
            inside = not Path(name).is_absolute() and path.resolve() == folder.resolve() / name
            found = inside and path.is_file()
            same = found and isinstance(entry, dict) and path.stat().st_size == entry.get("size")
            same = same and file_sha256(path) == entry.get("sha256")
        except (OSError, ValueError) as error:
            raise CompressorError(
                f"{folder / MANIFEST}: {name[:80]!r}: {error}", "Do not trust this folder."
            ) from error
        if not inside:
            raise CompressorError(
                f"{folder / MANIFEST}: the path {name!r} is not one inside the folder", "Do not trust this folder."
            )
        if not found:
            raise CompressorError(f"{path}: missing", "The folder is incomplete; use another copy.")
        if not same:
            raise CompressorError(
                f"{path}: its bytes are not those that were saved", "The file is damaged; use another copy."
            )


def read_json(path: Path, infinite: bool = False) -> dict[str, Any]:
    """The JSON object in `path`; CompressorError where it is missing, too large, not JSON, or not an object.

    NaN and infinity, which are no JSON, are allowed where it may be `infinite`: other libraries write them.
    """
    try:
        constant = float if infinite else _no_constant
        loaded = json.loads(read_bytes(path, _MAX_JSON_BYTES).decode("utf-8"), parse_constant=constant)
    except OSError as error:
        raise CompressorError(f"{path}: {error.strerror}", "Give the folder of a run, or its model/ folder.") from error
    except (ValueError, RecursionError) as error:
        raise CompressorError(f"{path}: not JSON: {error}", "The file is damaged; use another copy.") from error
    if not isinstance(loaded, dict):
        raise CompressorError(f"{path}: not a JSON object", "The file is damaged; use another copy.")
    return loaded


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` in one step."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place, in one step and flushed to disk, when the block ends.

    Where the block raises, `path` stays as it was and nothing is left beside it.
    """
    # with the process in its name: two that write the same file at once do not write into one
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace the JSON file at `path` in one step; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _restore_old(old: Path, target: Path) -> None:
    if old.is_dir() and not target.exists():
        old.rename(target)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Have what was written to `path` on the disk before anything else is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def cache_folder(kind: str) -> Path:
    """Where numbers of a `kind` are kept: in `COMPRESSOR_CACHE`, else `compressor` in the user's cache folder."""
    base = os.environ.get("COMPRESSOR_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if base is None:
        home = os.path.expanduser("~")
        base = os.path.join(home if home != "~" else tempfile.gettempdir(), ".cache")
    return Path(base) / "compressor" / kind


def file_name(row: str) -> str:
    """The stem of a row's picture."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", row)
