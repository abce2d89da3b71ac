"""Files that survive: folders are committed whole or not at all, and read back only where every byte is as written.

A folder is written beside its target, each file flushed to disk, a manifest of hashes written last, and the folder
renamed. A reader that finds a manifest which verifies has exactly what the writer had.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError

from compressor.errors import CompressorError, LockedError, how_to_finish
from compressor.foreign.bounded import open_regular, read_bytes

MANIFEST = "manifest.json"
LOCK = ".lock"
"""The file in a run's or a comparison's directory that whoever writes there holds; beside other results, `.lock-NAME`."""
RUN = "run.json"
_STRAY = re.compile(r"\.(partial|old|lock)-")
_ANOTHER = "another process"
_TOKEN = f"{secrets.randbelow(10**9):09d}"  # processes of two computers, or containers, may have one number
_PATIENCE = 600.0
"""Seconds that a writer waits for another one of the same folder."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ROOM = "Free some space or choose another folder."
_MAX_JSON_BYTES = 16 * 1024 * 1024


def commit(target: Path, write: Callable[[Path], None], listed: bool = True, needs: int = 0) -> None:
    """Let `write` fill a folder, and make it `target` in one step. A folder that was there before is replaced.

    Where it is not `listed`, it has no manifest: what is in it is for other libraries, and nothing here reads it. `needs`: the
    bytes that `write` will write, as far as they are known. Writers of one target take turns. Of a link, what it leads to is replaced.

    Raises CompressorError where the disk is full or not writable, and before anything is written where it has fewer bytes free
    than `needs`; LockedError where another process does not let go of `target`. What was at `target` is then still there.
    """
    target = real(target)
    old = _replaced(target)
    with workshop(target, _PATIENCE, needs) as partial:
        try:
            write(partial)
            _list(partial, listed)
            if target.exists():
                target.rename(old)
            partial.rename(target)
            sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            with suppress(OSError):  # where this fails too, `recover` does it later
                _restore(target)


@contextmanager
def workshop(target: Path, wait: float = 0.0, needs: int = 0) -> Iterator[Path]:
    """A new folder beside `target` for this process alone, which holds `target` (`claimed`). It is gone when the block ends.

    What former writers of `target` left when they died is put back where it is whole (`recover`), and else cleared. An error of
    the disk in the block is a CompressorError that names `target` and the bytes that are free.
    """
    target = real(target)
    partial = target.parent / f".partial-{os.getpid()}{_TOKEN}-{target.name}"
    with _said(target, needs), claimed(target, wait):
        _restore(target)
        for leftover in leftovers(target):  # their writers are gone: they would hold `target`
            remove(leftover)
        refuse_full(target, needs)
        try:
            partial.mkdir()
            yield partial
        except (OSError, SafetensorError) as error:
            written = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
            raise _failure(target, error, needs, written) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def real(path: Path) -> Path:
    """`path`, or where it leads as a link: who writes to a link means what is there, which may be on another disk."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def leftovers(target: Path) -> list[Path]:
    """What writers of `target` that died, or are at work, have beside it."""
    mine = re.compile(rf"\.(partial-(\d+-)?|old-){re.escape(target.name)}")
    return [path for path in target.parent.glob(".*") if mine.fullmatch(path.name)]


def strays(folder: Path) -> list[Path]:
    """What writers in `folder` that died left there. To be asked by who holds it."""
    own = (LOCK, f"{LOCK}-holder")
    return [path for path in folder.glob(".*") if _STRAY.match(path.name) and path.name not in own]


def recover_all(folder: Path) -> None:
    """As `recover`, for every folder that was being replaced in `folder`."""
    for path in folder.glob(".old-*"):
        recover(folder / path.name.removeprefix(".old-"))


def recover(target: Path) -> bool:
    """Put back the folder that a writer was about to replace when it died, where there is none at `target` because of that.

    True where there was none, and there was one when the writers had let go of `target`.
    """
    target = real(target)
    with suppress(OSError, CompressorError):  # where nothing may be written, readers say what is missing
        if not target.exists() and _replaced(target).is_dir():
            with _locked(_beside(target), target, _PATIENCE):
                _restore(target)
                return target.exists()
    return False


def refuse_full(path: Path, needs: int, what: str = "it") -> None:
    """Raise CompressorError where the disk of `path` has fewer bytes free than `what` `needs`."""
    free = _free(path)
    if needs > free:
        raise CompressorError(f"{path}: {what} needs {needs:,} bytes on the disk, and {free:,} bytes are free", _ROOM)


@contextmanager
def _said(path: Path, needs: int = 0) -> Iterator[None]:
    """An error of the disk in the block is a CompressorError that names `path`, and how many bytes are free."""
    try:
        yield
    except OSError as error:
        raise _failure(path, error, needs) from error


@contextmanager
def enough(path: Path) -> Iterator[None]:
    """An error in the block that says that the disk is full is a CompressorError, with a file's name and the bytes that are free."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _failure(Path(error.filename or path), error) from error


def _failure(path: Path, error: Exception, needs: int = 0, written: int = 0) -> CompressorError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    needed = f"{needs:,} bytes needed, " if needs else ""
    return CompressorError(
        f"{path}: cannot be written: {reason} ({needed}{written:,} bytes written so far, {_free(path):,} bytes free)",
        f"{_way(error)}; what was saved before is intact.",
    )


def _way(error: Exception) -> str:
    """What helps, by what the system says; safetensors has its number in a text."""
    said = re.search(r"os error (\d+)", str(error))
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    if number == errno.EFBIG:
        return "Files may not be so large here: raise the limit (ulimit -f), or choose another disk"
    return _ROOM[:-1] if number in _FULL else "Choose another folder, which can be written to"


def _list(folder: Path, listed: bool) -> None:
    """Have every file of `folder` on the disk, and then its manifest, where it is to be `listed`."""
    entries = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        path.chmod(0o644)  # safetensors writes 0600
        sync(path)
        entries[path.relative_to(folder).as_posix()] = {"sha256": file_sha256(path), "size": path.stat().st_size}
    if listed:
        manifest = folder / MANIFEST
        manifest.write_text(json.dumps({"schema_version": 1, "files": entries}, indent=1), encoding="utf-8")
        sync(manifest)
    sync(folder)


# --- Who may write. ---


@contextmanager
def claimed(target: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold `target`, a folder or file that is to be written, for this thread; and the directory of the run that it belongs to.

    Again in the same thread, it does nothing. Raises LockedError where another process or thread still has either after `wait`
    seconds; CompressorError where the folder around it cannot be written to.
    """
    target = real(target)
    home = target.parent
    with ExitStack() as stack:
        with _said(target):
            home.mkdir(parents=True, exist_ok=True)
        if (home / LOCK).exists() or (home / RUN).is_file():
            stack.enter_context(held(home, wait))
        stack.enter_context(_locked(_beside(target), target, wait))
        yield


@contextmanager
def held(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """As `claimed`, for all that is in `folder`, which must be there: the directory of a run or of a comparison."""
    with _locked(folder / LOCK, folder, wait):
        yield


_mine: set[tuple[int, int, str]] = set()
"""What is held: by which process, since a fork inherits the set and not the locks, and by which thread."""


@contextmanager
def _locked(file: Path, what: Path, wait: float) -> Iterator[None]:
    """Hold the lock `file`, and so `what`. A lock dies with its process, and its file is gone when it is let go."""
    if (key := (os.getpid(), threading.get_ident(), os.path.realpath(file))) in _mine:
        yield
        return
    holder = file.with_name(f"{file.name}-holder")
    try:
        lock = _acquired(file, wait)
    except Timeout as error:
        try:
            who = holder.read_text(encoding="utf-8") or _ANOTHER
        except OSError:
            who = _ANOTHER
        raise LockedError(f"{what} is in use by {who}", "Wait for it, or choose another place (--out).") from error
    except OSError as error:
        raise CompressorError(f"{what}: {error.strerror or error}", "Choose a folder that you may write to.") from error
    _mine.add(key)
    try:
        with _said(what):
            holder.write_text(f"process {os.getpid()}", encoding="utf-8")
        yield
    finally:
        _mine.discard(key)
        for path in (holder, file):  # before it is let go: whoever waits for it finds another one, and looks again
            with suppress(OSError):
                path.unlink()
        lock.release()


def _acquired(file: Path, wait: float) -> BaseFileLock:
    """The lock of `file`. Who lets a lock go removes its file, so that one may have been taken that nobody else will see."""
    deadline = time.monotonic() + wait
    tempfile.TemporaryFile(dir=file.parent).close()  # raises where none can be made, as in /proc: a lock would wait
    while True:
        before = _stat(file)
        lock = FileLock(file, timeout=max(0.0, deadline - time.monotonic()))
        lock.acquire()
        after = _stat(file)
        if type(lock) is not FileLock:  # a file system without locks: there the file itself is the lock
            return lock
        if before is not None and after is not None and os.path.samestat(before, after):
            return lock
        lock.release()


def _stat(path: Path) -> os.stat_result | None:
    with suppress(FileNotFoundError):
        return path.stat()
    return None


def _beside(target: Path) -> Path:
    return target.parent / f"{LOCK}-{target.name}"


def _replaced(target: Path) -> Path:
    """Where a folder at `target` is while another one takes its place."""
    return target.parent / f".old-{target.name}"


def _restore(target: Path) -> None:
    old = _replaced(target)
    if old.is_dir() and not old.is_symlink() and not target.exists():
        old.rename(target)


def _free(path: Path) -> int:
    return shutil.disk_usage(next(parent for parent in (path, *path.absolute().parents) if parent.exists())).free


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
                f"{folder / MANIFEST}: {name[:80]!r}: {error}",
                "Let it be read, where it is yours; else do not trust it.",
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
    """The JSON object in `path`; CompressorError where it is missing, too large, not JSON, or not an object. NaN and infinity,
    which are no JSON but which other libraries write, are allowed where it may be `infinite`."""
    constant = float if infinite else _no_constant
    try:
        loaded = json.loads(read_bytes(path, _MAX_JSON_BYTES).decode("utf-8"), parse_constant=constant)
    except OSError as error:
        how = how_to_finish(path.parent, "Give the folder of a run, or its model/ folder.")
        raise CompressorError(f"{path}: {error.strerror}", how) from error
    except (ValueError, RecursionError) as error:
        raise CompressorError(f"{path}: not JSON: {error}", "The file is damaged; use another copy.") from error
    if not isinstance(loaded, dict):
        raise CompressorError(f"{path}: not a JSON object", "The file is damaged; use another copy.")
    return loaded


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` in one step. Raises CompressorError where the disk does not take it."""
    with _said(path), replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` (`real`) to write to, which takes its place, in one step and flushed to disk, when the block ends. Where it
    raises, `path` stays as it was and nothing is left beside it. Raises CompressorError for a device, which would be a file then."""
    if (path := real(path)).exists() and not path.is_file():
        raise CompressorError(f"{path} is there already, and is no file that can be replaced", "Choose another name.")
    # with the process in its name: two that write the same file at once do not write into one
    partial = path.with_name(f".partial-{os.getpid()}{_TOKEN}-{path.name}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:  # the errors of a full disk name no file
            error.filename = str(path)
        with suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Replace the JSON file at `path` in one step; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


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
