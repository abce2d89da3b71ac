"""What files of other people may ask for: regular files alone, no more bytes than are expected, no more unpacked than is packed.

A device, a pipe or a socket has no end, or waits for ever for one; a small archive may hold gigabytes; a link may lead anywhere.
Everything that opens a file which it did not write asks here first. What is refused is an OSError with a reason, so that each
reader says where it happened and what to do in the way in which it says so of missing files.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError

MOST_PICTURE_BYTES = 512 * 2**20
"""As much as a picture file may have; the largest camera files have a tenth."""
MOST_NESTED = 64
"""As many folders as may lie in each other."""
_MOST_ENTRIES = 100_000
_ALWAYS_UNPACKED = 256 * 2**20
_MOST_RATIO = 100
_PIECE = 2**20
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


@contextmanager
def mapping() -> Iterator[None]:
    """Where torch cannot open a file that it is to map, because it has gone a moment before, it says so with a RuntimeError: in the
    block that is the OSError that it is."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"unable to open file .*\((\d+)\)$", str(error), re.DOTALL)
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def open_regular(path: str | bytes | os.PathLike[str]) -> BufferedReader:
    """The regular file at `path`, to read bytes from. Raises OSError where it is anything else, at once."""
    # without O_NONBLOCK, opening a pipe waits until somebody writes to it
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse(os.fstat(descriptor).st_mode, path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | bytes | os.PathLike[str]) -> None:
    """Raise OSError unless `path` is a regular file: for libraries that open files themselves."""
    _refuse(os.stat(path).st_mode, path)


def read_bytes(path: str | bytes | os.PathLike[str], most: int) -> bytes:
    """What the regular file at `path` holds. Raises OSError where that is more than `most` bytes, without reading them."""
    with open_regular(path) as file:
        pieces, left = [], most
        # files of the system say that they have no bytes, and have some
        while piece := file.read(min(_PIECE, left + 1)):
            left -= len(piece)
            if left < 0:
                raise OSError(errno.EFBIG, f"larger than {most:,} bytes", os.fspath(path))
            pieces.append(piece)
    return b"".join(pieces)


def parse_json(text: str) -> Any:
    """What the JSON `text` of somebody holds. Raises ValueError or RecursionError, also for an object that has a key twice, of which
    the last alone would count."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def check_unpacked(archive: zipfile.ZipFile, size: int) -> None:
    """Raise OSError where a zip file of `size` bytes says that it unpacks to far more.

    Up to 256 MiB, or a hundred times its size, may come out of it. What it says binds: members are read no further.
    """
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > max(_ALWAYS_UNPACKED, _MOST_RATIO * size) or len(members) > _MOST_ENTRIES:
        raise OSError(errno.EFBIG, f"{size:,} bytes that would unpack to {total:,} in {len(members):,} members")


def check_zip(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless each member of the zip file at `path` has the bytes that it was written with, and unpacks to no more.

    A member whose checksum is 0 was written without one (torch.serialization.set_crc32_options) and is not checked.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        check_unpacked(archive, os.fstat(file.fileno()).st_size)
        for member in archive.infolist():
            if not member.CRC:
                continue
            try:
                with archive.open(member) as content:
                    while content.read(_PIECE):
                        pass
            except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
                raise OSError(errno.EIO, f"damaged: {member.filename[:80]!r}: {error}", os.fspath(path)) from error


def check_tree(folder: Path) -> None:
    """Raise CompressorError unless all below `folder` are regular files and folders, of a moderate number, that lie in it.

    Links may lead to other places in it, and, where it is a snapshot in the cache of the Hugging Face hub, to that cache's own
    files (`snapshots/REVISION/name` leads to `blobs/HASH`). Other libraries follow every link, and open whatever it leads to.
    """
    top = folder.resolve()
    roots = [top, *_blobs(top)]
    waiting, count = [(folder, 0)], 0
    while waiting:
        here, depth = waiting.pop()
        for entry in sorted(os.scandir(here), key=lambda one: one.name):
            count += 1
            if count > _MOST_ENTRIES or depth > MOST_NESTED:
                raise CompressorError(
                    f"{folder}: more than {_MOST_ENTRIES:,} files, or folders in more than {MOST_NESTED} others",
                    "Give the folder of the model or pipeline alone.",
                )
            if entry.is_symlink():
                _check_link(Path(entry.path), roots, folder)
                continue  # what it leads to is met where it lies, or is a file of the cache
            if entry.is_dir():
                waiting.append((Path(entry.path), depth + 1))
                continue
            try:
                check_regular(entry.path)
            except OSError as error:
                raise CompressorError(f"{entry.path}: {error.strerror}", "Remove it.") from error


def _blobs(top: Path) -> list[Path]:
    """The files of the hub's cache that `top` is a snapshot of, or lies in one."""
    for inner in (top, *top.parents):
        if inner.parent.name == "snapshots":
            blobs = inner.parent.parent / "blobs"
            return [blobs] if blobs.is_dir() and blobs.resolve() == blobs else []
    return []


def _check_link(link: Path, roots: list[Path], folder: Path) -> None:
    try:
        target = link.resolve(strict=True)
        if not target.is_dir():
            check_regular(target)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle, in older Pythons
        reason = error.strerror if isinstance(error, OSError) else "a link to itself"
        raise CompressorError(f"{link}: a link that leads nowhere ({reason})", "Remove the link.") from error
    if not any(target.is_relative_to(root) for root in roots):
        raise CompressorError(
            f"{link}: a link that leads out of {folder}, to {target}", "Copy there what it leads to, if you trust it."
        )


def _refuse(mode: int, path: str | bytes | os.PathLike[str]) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"not a regular file but {kind}", os.fspath(path))
