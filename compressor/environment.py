"""What a number depends on besides its recipe: versions and hardware; and other libraries, kept quiet."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from compressor.errors import CompressorError, first_line

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


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        told = ""
    return processor_in(told) or platform.processor() or platform.machine()


def processor_in(told: str) -> str:
    """The processor that Linux's `/proc/cpuinfo` tells of: by its name or, as Arm's have none there, by its numbers. Of several kinds
    of cores, every one. Empty where there is neither."""
    kinds: list[str] = []
    for one in told.split("\n\n"):
        lines = (line.partition(":") for line in one.splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        numbers = [
            f"{name} {facts[f'CPU {name}']}" for name in ("implementer", "part", "variant") if f"CPU {name}" in facts
        ]
        kind = facts.get("model name") or ", ".join([platform.machine(), *numbers] if numbers else [])
        kinds += [kind] if kind and kind not in kinds else []
    return " + ".join(kinds)


def resolve_device(name: str) -> torch.device:
    """The torch device called `name`; `auto` is what accelerate finds (a GPU of its rank, else the CPU)."""
    from accelerate import PartialState

    try:
        device = PartialState().default_device if name == "auto" else torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise CompressorError(f"device {name!r} cannot be used: {reason}", "Use auto, cpu, cuda or cuda:0.") from error
    return device


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the bars and the remarks of diffusers and transformers while they load; what fails raises anyway."""
    from diffusers.utils import logging as own

    others: list[Any] = [own]
    with suppress(ImportError):
        from transformers.utils import logging as theirs

        others.append(theirs)
    before = [(one, one.get_verbosity(), one.is_progress_bar_enabled()) for one in others]
    for one in others:
        one.set_verbosity_error()
        one.disable_progress_bar()
    try:
        yield
    finally:
        for one, verbosity, bars in before:
            one.set_verbosity(verbosity)
            if bars:
                one.enable_progress_bar()
