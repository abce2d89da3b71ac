"""Pictures as they are stored (PNG, JPEG, …) made into images of one shape: all at once, or batch by batch."""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Any
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE as _BITS
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION as _PHOTOMETRIC
from PIL.TiffImagePlugin import SAMPLEFORMAT as _SAMPLE_FORMAT
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from compressor.data.sets import Images, ImageSet, images_sha256
from compressor.errors import CompressorError, first_line

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow knows more, some of which run other programs
_LARGEST, _RATIO = 64 * 2**20, 1100
"""A picture may come to so many bytes, or to so many times those of its file: zlib, by which PNG is packed, reaches 1032."""
_GREY = 16  # levels of 255 by which the channels of a grey picture may differ, as JPEG makes them
_LOOKED_AT = 64  # pictures of a set, from its beginning to its end, that are asked whether they are in colour
_AT_ONCE = 64
_SMALL = 2000  # fewer pictures than these are decoded before workers would have started


class Pictures(ABC):
    """Encoded pictures in a fixed order; `labels` (n,) int64 or None."""

    name: str
    labels: Tensor | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def called(self, index: int) -> str:
        """What an error calls the picture at `index`."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """The bytes of the picture at `index`, as they are stored."""


def decode(content: bytes, shape: Sequence[int]) -> NDArray[np.uint8]:
    """The picture in `content` as (channels, height, width): its largest centred part of that form, resized by Lanczos.

    Turned as its EXIF orientation says; 16-bit greys become 8-bit ones, and what is transparent shows white. Raises whatever
    Pillow raises for damaged pictures, and ValueError for what has no clear meaning as 8-bit greys or colours.
    """
    channels, height, width = shape
    image = opened_picture(content, 4 * max(height, width)).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def opened_picture(content: bytes, side: int | None = None) -> Image.Image:
    """The picture in `content`, in 8 bits, as `decode` has it before it is resized. With `side`, it may be smaller, not below that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        if not content:
            raise ValueError("an empty file")
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            if side is not None:
                opened.draft(None, (side, side))  # a JPEG of ten megapixels need not be decoded in full
            # which packs plain areas to nothing
            most = math.inf if opened.format == "WEBP" else max(_LARGEST, _RATIO * len(content))
            if math.prod(opened.size) * len(opened.getbands()) > most:
                raise ValueError(f"{len(content)} bytes that claim to be {opened.width}x{opened.height} pixels")
            image = ImageOps.exif_transpose(_eight_bit(opened))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """`image`, or its 16-bit greys as 8-bit ones, which Pillow's own conversion would cut off instead of scaling."""
    if isinstance(image, TiffImageFile):
        _refuse_odd_greys(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older Pillows: I
        values = np.asarray(image).astype(np.uint32)
        scaled = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        if (clear := image.info.get("transparency")) is not None:
            scaled.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        scaled.getexif().update(image.getexif())
        return scaled
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits (mode {image.mode}), whose range is not known")
    return image


def _refuse_odd_greys(image: TiffImageFile) -> None:
    """Raise ValueError for TIFFs whose numbers Pillow gives as they are stored, though they mean other greys than usual."""
    bits, signed = image.tag_v2.get(_BITS, (1,)), 2 in image.tag_v2.get(_SAMPLE_FORMAT, (1,))
    if signed or any(8 < depth < 16 for depth in bits):
        raise ValueError(f"pixels of {bits[0]} bits{' with a sign' * signed}, whose range is not known")
    if image.mode.startswith("I;16") and image.tag_v2.get(_PHOTOMETRIC) == 0:
        raise ValueError("greys of 16 bits of which 0 is white")


@dataclass(frozen=True, eq=False)
class Decoder(Dataset[Any]):
    """Decodes batches of `pictures` to `shape`, here or in a worker process."""

    pictures: Pictures
    shape: tuple[int, int, int]

    def __getitems__(self, indices: list[int]) -> tuple[NDArray[np.uint8], dict[int, str]]:
        """Images (k, channels, height, width), and why some could not be made, by index; those are black.

        NumPy's arrays, because a worker sends torch's through shared memory, of which containers often have little.
        """
        pixels = np.zeros((len(indices), *self.shape), np.uint8)
        reasons: dict[int, str] = {}
        for place, index in enumerate(indices):
            try:
                pixels[place] = decode(self.pictures.content(index), self.shape)
            except UnidentifiedImageError:
                reasons[index] = f"not one of {', '.join(FORMATS)}"
            except Exception as error:  # Pillow raises a dozen types on damaged pictures
                reasons[index] = first_line(error)
        return pixels, reasons

    def over(self, order: Iterable[Tensor], workers: int) -> Generator[tuple[NDArray[np.uint8], dict[int, str]]]:
        """The decoded batch of each indices of `order`, in that order; `workers` processes work ahead of the caller."""
        batches = (indices.tolist() for indices in order)
        if not workers:
            yield from map(self.__getitems__, batches)
            return
        loader = DataLoader(
            self,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_started,
            generator=torch.Generator(),  # otherwise it draws from the global one, which is the caller's
        )
        try:
            yield from loader
        except RuntimeError as error:
            raise CompressorError(
                f"a process that decodes pictures ended: {first_line(error)}",
                "Memory may have run out: set loading.workers lower; 0 decodes in the main process.",
            ) from error


def _as_it_is(batch: Any) -> Any:
    return batch


def _started(worker: int) -> None:
    # Ctrl-C reaches the whole group of processes; the main one ends in its own time, and needs its workers until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclass(frozen=True, eq=False)
class Decoded(ImageSet):
    """Images that are decoded when they are taken, since all would not fit into memory: the pictures `rows` of `decoder`."""

    name: str
    decoder: Decoder
    rows: Tensor
    digest: str
    workers: int
    labels: Tensor | None = None
    skipped: int = 0
    greyed: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.decoder.shape

    @property
    def latent(self) -> bool:
        return False

    @property
    def sha256(self) -> str:
        return self.digest

    def stored(self, indices: Tensor) -> Tensor:
        return self._checked(*self.decoder.__getitems__(self.rows[indices].tolist()))

    def stream(self, order: Iterable[Tensor]) -> Iterator[Any]:
        order, ahead = tee(order)
        decoded = self.decoder.over((self.rows[indices] for indices in ahead), self.workers)
        batches = (self.batch(self._checked(*found), indices) for indices, found in zip(order, decoded, strict=False))
        # Workers that the collector of cycles finds are waited for in vain, for five seconds each: their queues go first.
        finalize(batches, decoded.close)
        return batches

    def _checked(self, pixels: NDArray[np.uint8], reasons: dict[int, str]) -> Tensor:
        if reasons:
            raise _damage(self.decoder.pictures, reasons, "They could be read when the run began.")
        return torch.from_numpy(pixels)


def read_pictures(
    pictures: Pictures, shape: Sequence[int] | None, workers: int | None, skip_damaged: bool, cache_mb: int
) -> ImageSet:
    """`pictures` as images of `shape`; see `compressor.read_data`. Each is decoded once here, whether it is kept or not."""
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        raise CompressorError(
            f"{pictures.name}: pictures cannot become images of shape {None if shape is None else tuple(shape)}",
            "Allowed: 1 or 3 channels, height and width. Set loading.size, or shape=(3, 32, 32) in Python; "
            "for a model of latents, give an .npz file of latents.",
        )
    if workers is None:
        workers = 0 if len(pictures) < _SMALL else _cores()
    decoder = Decoder(pictures, (shape[0], shape[1], shape[2]))
    damaged: dict[int, str] = {}

    def pieces(rows: Tensor) -> Iterator[Tensor]:
        for pixels, reasons in decoder.over(torch.split(rows, _AT_ONCE), workers):
            damaged.update(reasons)
            yield torch.from_numpy(pixels)

    rows, labels = torch.arange(len(pictures)), pictures.labels
    kept, digest = None, ""
    if len(rows) * math.prod(decoder.shape) <= cache_mb * 2**20:
        kept = torch.empty(len(rows), *decoder.shape, dtype=torch.uint8)
        for part, piece in zip(torch.split(kept, _AT_ONCE), pieces(rows), strict=True):
            part.copy_(piece)
    else:
        digest = images_sha256(torch.uint8, (len(rows), *decoder.shape), pieces(rows), labels)
    if damaged:
        if not skip_damaged or len(damaged) == len(rows):
            raise _damage(pictures, damaged, "Replace them, or leave them out with --set loading.skip_damaged=true")
        whole = torch.ones(len(rows), dtype=torch.bool)
        whole[list(damaged)] = False
        rows, labels = rows[whole], None if labels is None else labels[whole]
        if kept is not None:
            kept = kept[whole]
        else:
            digest = images_sha256(torch.uint8, (len(rows), *decoder.shape), pieces(rows), labels)
    spread = rows[:: max(1, len(rows) // _LOOKED_AT)].tolist()
    greyed = shape[0] == 1 and any(_coloured(pictures.content(row)) for row in spread)
    if kept is not None:
        return Images(pictures.name, kept, labels, len(damaged), greyed=greyed)
    return Decoded(pictures.name, decoder, rows, digest, workers, labels, len(damaged), greyed)


def _coloured(content: bytes) -> bool:
    """Whether the picture in `content` is one in colour, and not greys that are stored as one."""
    pixels = decode(content, (3, 64, 64)).astype(np.int16)
    return int(np.abs(pixels - pixels[:1]).max()) > _GREY


def _damage(pictures: Pictures, reasons: dict[int, str], hint: str) -> CompressorError:
    shown = "; ".join(f"{pictures.called(index)}: {reasons[index]}" for index in sorted(reasons)[:5])
    more = "; …" if len(reasons) > 5 else ""
    return CompressorError(
        f"{pictures.name}: {len(reasons)} of {len(pictures)} pictures cannot be read: {shown}{more}", hint
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
