"""Forwards to `compressor.training.calibration`."""

from compressor.training.calibration import *  # noqa: F403
