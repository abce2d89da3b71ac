"""Hostile files: changes of valid ones, from single bits to whole structures that stay well-formed. All are drawn from an `rng`."""

from __future__ import annotations

import copy
import io
import json
import pickletools
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Mutator = Callable[[bytes, random.Random], bytes]

NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63,
    2**64,
    10**18,
    10**30,
]
FLOATS = [0.5, -0.0, 1e-320, 1e308, -1e308, 1e400, float("inf"), float("-inf"), float("nan")]
TEXTS = [
    "",
    " ",
    "a",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "é\u202e",
    "x" * 5000,
    "../../etc/passwd",
    "/dev/zero",
    "re:((a+)+)+$",
    "{{7*7}}",
    "<script>",
    "__class__",
    "2:4",
    "4:2:4",
    "0:4",
    "4:99999999999",
    "nan",
    "torch.float32",
    "os.system",
    "UNet2DModel",
    "1e999",
]


def hostile(rng: random.Random) -> Any:
    """A value that no file should have where it is put."""
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice(NUMBERS) * rng.choice([1, -1])
    if kind == 1:
        return rng.choice(FLOATS)
    if kind == 2:
        return rng.choice(TEXTS)
    if kind == 3:
        return rng.choice([None, True, False])
    if kind == 4:
        return [hostile(rng) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(TEXTS): hostile(rng) for _ in range(rng.randrange(3))}
    if kind == 6:
        return [rng.choice(NUMBERS)] * rng.choice([1, 5, 300, 5000])
    return f"@{rng.choice(['list', 'dict'])}{rng.choice([3, 40, 90, 400, 3000])}@"


def written(tree: Any, **how: Any) -> bytes:
    """A tree as JSON, with what is nested too deep for Python to hold where its place was kept."""

    def nested(match: re.Match[str]) -> str:
        opening, closing = ("[", "]") if match[1] == "list" else ('{"dict": ', "}")
        return opening * int(match[2]) + "1" + closing * int(match[2])

    return re.sub(r'"@(list|dict)(\d{1,4})@"', nested, json.dumps(tree, **how)).encode()


# --- Bytes. ---


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to a few changes that know nothing of the format."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        size = min(len(data) - at, rng.choice([1, 1, 2, 4, 8, 100]))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 50]))
        elif kind == 4:
            data[at:at] = data[at : at + size] * rng.choice([1, 2, 50])
        elif kind == 5:
            number = rng.choice(NUMBERS) & (2**64 - 1)
            packed = struct.pack("<Q" if rng.random() < 0.5 else ">Q", number)[: rng.choice([1, 2, 4, 8])]
            data[at : at + len(packed)] = packed
        elif kind == 6:
            other = rng.randrange(len(data) + 1)
            data[at : at + size] = data[other : other + size]
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


# --- Trees, as JSON and YAML have them. ---


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    found: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        here = waiting.pop()
        pairs = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, value in pairs:
            found.append((here, key))
            if isinstance(value, (dict, list)):
                waiting.append(value)
    return found


def of_tree(tree: Any, rng: random.Random) -> Any:
    """One to a few changes of a tree: values replaced, moved, renamed, taken out, put in."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        places = _places(tree)
        if not places:
            return hostile(rng)
        here, key = rng.choice(places)
        kind = rng.randrange(7)
        if kind in (0, 1):
            here[key] = hostile(rng)
        elif kind == 2:
            del here[key]
        elif kind == 3 and isinstance(here, dict):
            here[rng.choice([*TEXTS, "extra", f"{key}.values"])] = rng.choice([here[key], hostile(rng)])
        elif kind == 3:
            here.insert(key, rng.choice([here[key], hostile(rng)]))
        elif kind == 4:
            other, there = rng.choice(places)
            with suppress(KeyError, IndexError):  # taken out before
                here[key] = copy.deepcopy(other[there])
        elif kind == 5 and type(here[key]) in (int, float):
            here[key] = here[key] * rng.choice([-1, 2, 0.5, 1000, 10**9]) + rng.choice([0, 1, -1])
        elif kind == 5 and isinstance(here[key], str):
            here[key] = of_bytes(here[key].encode("utf-8", "replace"), rng).decode("utf-8", "replace")
        elif isinstance(here, dict):
            here[str(rng.choice([*here, "extra"])) + rng.choice(["", "_", "s"])] = here.pop(key)
    return tree


def of_json(content: bytes, rng: random.Random) -> bytes:
    """JSON that stays JSON, or nearly."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):  # changed before: no JSON any more
        return of_bytes(content, rng)
    if rng.random() < 0.2:
        return of_bytes(content, rng)
    text = written(of_tree(tree, rng), indent=rng.choice([None, 1]))
    if rng.random() < 0.1:
        text = text.replace(b"{", b'{"schema_version": 2, ', 1)  # a key twice
    return of_bytes(text, rng) if rng.random() < 0.1 else text


def of_lines(content: bytes, rng: random.Random) -> bytes:
    """A JSON object per line."""
    lines = content.splitlines()
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(lines)) if lines else 0
        if lines and rng.random() < 0.8:
            lines[at] = of_json(lines[at], rng) if lines[at].startswith(b"{") else of_bytes(lines[at], rng)
        else:
            lines[at:at] = [rng.choice([b"", b"{}", b"[" * 3000, b"null", *(lines or [b"1"])])]
    return b"\n".join(lines)


_YAML = [
    "&a ",
    "*a",
    "!!python/name:os.system ",
    "!x ",
    "{",
    "}",
    "[",
    "]",
    ": ",
    "- ",
    "? ",
    "|",
    ">",
    "%YAML 1.1\n",
    "---\n",
]
_YAML += [
    "<<: ",
    "#",
    "'",
    '"',
    "\t",
    "\n",
    "  ",
    "0x7f",
    "1_0",
    ".inf",
    ".nan",
    "2:4",
    "1e-4",
    "~",
    "yes",
    "2020-01-01",
    "\ufeff",
]


def of_yaml(content: bytes, rng: random.Random) -> bytes:
    """YAML with its own signs put in, lines moved, or the tree of it changed (which JSON, a part of YAML, writes)."""
    kind = rng.randrange(3)
    if kind == 0:
        return of_bytes(content, rng)
    if kind == 1:
        from ruamel.yaml import YAML

        tree = of_tree(YAML(typ="safe", pure=True).load(content.decode()), rng)
        return written(tree)
    lines = content.decode().split("\n")
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(lines))
        column = rng.randrange(len(lines[at]) + 1)
        change = rng.randrange(4)
        if change == 0:
            lines[at] = lines[at][:column] + rng.choice(_YAML) * rng.choice([1, 1, 1, 30]) + lines[at][column:]
        elif change == 1:
            lines.insert(at, rng.choice(lines))
        elif change == 2:
            lines[at] = "  " * rng.randrange(4) + lines[at].lstrip()
        elif len(lines) > 1:
            del lines[at]
    return "\n".join(lines).encode("utf-8", "replace")


# --- Binary formats. ---


def of_safetensors(content: bytes, rng: random.Random) -> bytes:
    """The header's JSON changed as a tree, its length with it or not; or bytes."""
    if rng.random() < 0.3:
        return of_bytes(content, rng)
    (size,) = struct.unpack("<Q", content[:8])
    header, body = of_tree(json.loads(content[8 : 8 + size]), rng), content[8 + size :]
    text = written(header)
    text += b" " * rng.choice([-len(text) % 8, 0, 1])
    said = len(text) if rng.random() < 0.9 else rng.choice(NUMBERS) & (2**64 - 1)
    return struct.pack("<Q", said) + text + (of_bytes(body, rng) if rng.random() < 0.2 else body)


def of_pickle(content: bytes, rng: random.Random) -> bytes:
    """Instructions of a pickle taken out, doubled, exchanged, put in."""
    if rng.random() < 0.25:
        return of_bytes(content, rng)
    try:
        starts = [place for _, _, place in pickletools.genops(content)]
    except Exception:  # changed before: no pickle any more
        return of_bytes(content, rng)
    ends = [*starts[1:], len(content)]
    parts = [content[a:b] for a, b in zip(starts, ends, strict=True)]
    extra = [
        b"(",
        b"0",
        b"2",
        b"t",
        b"\x85",
        b"\x86",
        b"R",
        b"b",
        b"}",
        b"]",
        b")",
        b"N",
        b"u",
        b"s",
        b"e",
        b"a",
        b"q\x00",
        b"h\x00",
    ]
    extra += [
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        b"ctorch\nload\n",
        b"\x81",
        b"\x93",
        b"o",
        b"Q",
        b"\x8c\x04true",
        b"K\x01",
    ]
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(len(parts))
        kind = rng.randrange(5)
        if kind == 0 and len(parts) > 1:
            del parts[at]
        elif kind == 1:
            parts.insert(at, rng.choice(parts))
        elif kind == 2:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts.insert(at, rng.choice(extra) * rng.choice([1, 1, 1, 200]))
        else:
            parts[at] = of_bytes(parts[at], rng)
    return b"".join(parts)


_SHAPES = [
    "()",
    "(0,)",
    "(1,)",
    "(4, 8, 8)",
    "(10**9,)",
    "(9999999999,)",
    "(-1,)",
    "(4, 8, 8, 3)",
    "(2**40, 0)",
    "4",
    "None",
]
_DESCR = [
    "|u1",
    "<f4",
    "<f8",
    ">f4",
    "<f2",
    "|O",
    "|S0",
    "|V8",
    "<c8",
    "<U4",
    "|b1",
    "<i8",
    "<M8[s]",
    "[('a', '<f4')]",
    "x",
]


def of_npy(content: bytes, rng: random.Random) -> bytes:
    """The header of an array changed, its length right or not."""
    if rng.random() < 0.3 or content[:6] != b"\x93NUMPY":
        return of_bytes(content, rng)
    (size,) = struct.unpack("<H", content[8:10])
    body = content[10 + size :]
    descr, shape = rng.choice(_DESCR), rng.choice(_SHAPES)
    quoted = descr if descr.startswith("[") else repr(descr)
    text = f"{{'descr': {quoted}, 'fortran_order': {rng.choice(['True', 'False', '1'])}, 'shape': {shape}, }}".encode()
    if rng.random() < 0.2:
        text = of_bytes(text, rng)
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    said = len(text) if rng.random() < 0.9 else rng.randrange(65_536)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", said) + text + body


def of_zip(inner: Callable[[str], Mutator]) -> Mutator:
    """Changes the members of a zip file, each by the mutator of its name, and how they are packed; or bytes."""

    def mutate(content: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.25:
            return of_bytes(content, rng)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(one.filename, archive.read(one)) for one in archive.infolist()]
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.randrange(len(members))
            name, data = members[at]
            kind = rng.randrange(10)
            if kind < 6:
                members[at] = (name, inner(name)(data, rng))
            elif kind == 6:
                members[at] = (rng.choice([name, "../x.npy", "images.npy", f"{name}x", "a/b.npy", "labels.npy"]), data)
            elif kind == 7:
                members.append((name if rng.random() < 0.5 else f"more/{name}", data))
            elif kind == 8 and len(members) > 1:
                del members[at]
            else:
                members[at] = (name, data[:128] + bytes(rng.choice([10_000, 1_000_000])))
        made = io.BytesIO()
        packing = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
        with zipfile.ZipFile(made, "w", packing) as archive:
            for name, data in members:
                archive.writestr(zipfile.ZipInfo(name), data, compress_type=packing)
        return of_bytes(made.getvalue(), rng) if rng.random() < 0.1 else made.getvalue()

    return mutate


def of_png(content: bytes, rng: random.Random) -> bytes:
    """Chunks of a PNG changed, with right checksums mostly: sizes, colours, what is packed, what is not known."""
    if rng.random() < 0.25 or content[:4] != b"\x89PNG":
        return of_bytes(content, rng)
    chunks, at = [], 8
    while at + 8 <= len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.randrange(len(chunks))
        kind, data = chunks[place]
        change = rng.randrange(5)
        if change == 0:
            sizes = struct.pack(
                ">II", rng.choice([1, 8, 65_535, 2**31 - 1, 30_000]), rng.choice([1, 8, 65_535, 30_000])
            )
            header = sizes + bytes([rng.choice([1, 2, 4, 8, 16]), rng.choice([0, 2, 3, 4, 6]), 0, 0, rng.randrange(2)])
            chunks[0] = (b"IHDR", header)
        elif change == 1:
            chunks[place] = (kind, of_bytes(data, rng))
        elif change == 2:
            bomb = zlib.compress(bytes(rng.choice([1000, 3_000_000])))
            names = [
                (b"iCCP", b"x\0\0"),
                (b"zTXt", b"x\0\0"),
                (b"iTXt", b"x\0\1\0\0\0"),
                (b"IDAT", b""),
                (b"fdAT", b"\0\0\0\1"),
            ]
            name, before = rng.choice(names)
            chunks.insert(place, (name, before + bomb))
        elif change == 3:
            chunks.insert(place, rng.choice(chunks))
        elif len(chunks) > 1:
            del chunks[place]
    out = content[:8]
    for kind, data in chunks:
        checksum = zlib.crc32(kind + data) if rng.random() < 0.97 else rng.getrandbits(32)
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return out
