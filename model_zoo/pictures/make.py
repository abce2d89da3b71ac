"""How the bundled pictures were made: `python -m compressor.model_zoo.pictures.make --font FILE --list FILE`.

Takes the bitmaps of Noto Color Emoji (`NotoColorEmoji.ttf`, Debian's fonts-noto-color-emoji) and Unicode's `emoji-test.txt` (Debian's
unicode-data), which says which sequences there are and in which group each stands. Needs `fonttools`. The same files give the same
arrays.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from PIL import Image

from compressor.model_zoo.pictures.dataset import GROUPS, SIZE

_LINE = re.compile(r"([0-9A-F ]+);\s*fully-qualified\s*#\s*\S+\s+E[\d.]+\s+(.*)")
_AS_PICTURE = 0xFE0F
_TONES = range(0x1F3FB, 0x1F400)
_JOINER, _FEMALE, _MALE = 0x200D, 0x2640, 0x2642
_PERSON = {0x1F468: 0x1F9D1, 0x1F469: 0x1F9D1}  # man and woman, as person
_EVERY = 10  # one family in ten is held out


class Emoji(NamedTuple):
    """A sequence of code points, the number of its group, and its name."""

    code: tuple[int, ...]
    group: int
    name: str

    @property
    def family(self) -> tuple[int, ...]:
        """What it is a variant of: the sequence without skin tones and without who does it, as such pictures are nearly alike."""
        left = [_PERSON.get(point, point) for point in self.code if point not in _TONES]
        return tuple(point for point in left if point not in (_JOINER, _FEMALE, _MALE, _AS_PICTURE))

    @property
    def held_out(self) -> bool:
        digest = hashlib.sha256(repr(self.family).encode()).digest()
        return int.from_bytes(digest[:8], "big") % _EVERY == 0


def listed(path: Path) -> Iterator[Emoji]:
    """The fully qualified emoji of Unicode's list, in its order."""
    group = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif (found := _LINE.match(line)) is not None:
            yield Emoji(tuple(int(point, 16) for point in found[1].split()), GROUPS.index(group), found[2])


def bitmaps(font: Any, wanted: Sequence[Emoji]) -> Iterator[Image.Image]:
    """The colour bitmap of each of `wanted`, RGBA. Raises KeyError for one that `font` (a TTFont) does not draw."""
    glyphs, joined, strike = font.getBestCmap(), _ligatures(font), font["CBDT"].strikeData[0]
    for one in wanted:
        parts = tuple(glyphs[point] for point in one.code if point != _AS_PICTURE)
        name = parts[0] if len(parts) == 1 else joined[parts]
        yield Image.open(io.BytesIO(strike[name].imageData)).convert("RGBA")


def _ligatures(font: Any) -> Mapping[tuple[str, ...], str]:
    found = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            for first, joined in getattr(table, "ligatures", {}).items():
                found.update({(first, *one.Component): one.LigGlyph for one in joined})
    return found


def small(bitmap: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`bitmap` on white, in the middle of a square, as (SIZE, SIZE, 3): colours count by their opacity."""
    side = max(bitmap.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
    square = Image.alpha_composite(Image.new("RGBA", square.size, (255, 255, 255, 255)), square)
    return np.asarray(square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


@click.command()
@click.option("--font", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--list", "names", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("pictures.npz"), show_default=True)
def main(font: Path, names: Path, out: Path) -> None:
    """Make the bundled pictures again."""
    from fontTools.ttLib import TTFont

    emoji = list(listed(names))
    images = np.stack([small(bitmap) for bitmap in bitmaps(TTFont(font), emoji)])
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    kept = np.sort(first)  # some sequences are drawn alike
    labels = np.array([one.group for one in emoji], dtype=np.uint8)[kept]
    held_out = np.array([one.held_out for one in emoji])[kept]
    np.savez_compressed(out, images=images[kept], labels=labels, held_out=held_out)
    size = out.stat().st_size
    click.echo(f"{out}: {len(kept)} pictures of {len(emoji)} emoji, {int(held_out.sum())} held out, {size:,} bytes")


if __name__ == "__main__":
    main()
