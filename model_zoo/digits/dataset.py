"""The bundled digits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compressor.data.reading import read_data
from compressor.data.sets import Images


def images() -> Images:
    """The 1,797 digits, pixels (1797, 1, 8, 8) uint8 (sixteenths of ink, scaled to 255), labels 0 to 9."""
    found = read_data(Path(__file__).with_name("digits.npz"))
    assert isinstance(found, Images)
    return replace(found, name="digits")
