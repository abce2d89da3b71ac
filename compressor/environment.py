"""What a number depends on besides its recipe: versions and hardware; and where numbers are kept between runs."""

from __future__ import annotations

import os
import platform
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("diffusion-compressor", "torch", "diffusers", "accelerate", "numpy", "pillow", "safetensors")


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions of Python and the packages that touch the numbers, the processor (or the GPU of `device`), the platform."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    hardware = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else _processor()
    return {
        "versions": versions,
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
    }


def cache_folder(kind: str) -> Path:
    """Where numbers of a `kind` are kept: in `COMPRESSOR_CACHE`, else `compressor` in the user's cache folder."""
    base = os.environ.get("COMPRESSOR_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if base is None:
        home = os.path.expanduser("~")
        base = os.path.join(home if home != "~" else tempfile.gettempdir(), ".cache")
    return Path(base) / "compressor" / kind


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
