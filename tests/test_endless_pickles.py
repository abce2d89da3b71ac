"""Pickles that run nothing, and that PyTorch's own reader would never be done with, or would not survive."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from compressor.errors import CompressorError
from compressor.foreign.pickles import check_keys
from compressor.weights import read_outline, read_weights

EMPTY, TUPLE1 = b"\x80\x02}", b"\x85"


def doubled(levels: int) -> bytes:
    """A dict whose key is a tuple of two equal tuples, and so on."""
    return (
        EMPTY
        + b")"
        + b"".join(b"r" + n.to_bytes(4, "little") + b"j" + n.to_bytes(4, "little") + b"\x86" for n in range(levels))
        + b"K\x01s."
    )


def deep(levels: int) -> bytes:
    """A dict whose key is a tuple in a tuple, and so on."""
    return EMPTY + b")" + TUPLE1 * levels + b"K\x01s."


def in_zip(content: bytes) -> bytes:
    torch.save({}, whole := io.BytesIO())
    made = io.BytesIO()
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(made, "w") as changed:
        for member in archive.infolist():
            changed.writestr(member.filename, content if member.filename.endswith("data.pkl") else archive.read(member))
    return made.getvalue()


@pytest.mark.parametrize("packed", [in_zip, bytes], ids=["zip", "plain"])
@pytest.mark.parametrize("content", [doubled(60), deep(5000)], ids=["doubled", "deep"])
@pytest.mark.parametrize("read", [read_weights, read_outline])
def test_a_key_without_end_is_refused(tmp_path: Path, content: bytes, packed, read) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(packed(content))
    with pytest.raises(CompressorError, match="nested without end"):
        read(path)


def test_they_are_what_they_are_made_for() -> None:
    assert pickle.loads(doubled(3)) == {((((), ()), ((), ())), (((), ()), ((), ()))): 1}


@pytest.mark.parametrize("protocol", range(6))
def test_honest_pickles_are_taken(protocol: int) -> None:
    shared = ("a", (1, 2))
    value = {"w": [shared] * 5000, shared: {"x": {(1, 2): {3}}}, "deep": [[[[[[1]]]]]], "set": frozenset({1, "b"})}
    check_keys(pickle.dumps(value, protocol))


def test_what_is_no_pickle_is_left_to_its_reader() -> None:
    check_keys(b"")
    check_keys(b"\x80\x02\xff\xff")
    check_keys(b"s.")
