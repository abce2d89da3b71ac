"""What a number depends on besides its recipe: versions and hardware; other libraries, kept quiet, and the C library's memory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compressor.errors import CompressorError, first_line

_PACKAGES = ("diffusion-compressor", "torch", "diffusers", "accelerate", "numpy", "pillow", "safetensors", "torchao")

CODE = "code of diffusion-compressor"
"""What the hash of this toolkit's source is called among versions: one version may be edited."""


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Versions of Python and the packages that touch the numbers, the processor (or the GPU of `device`), the platform."""
    versions = {"python": platform.python_version(), **versions_of(_PACKAGES), CODE: _own_code()}
    hardware = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else _processor()
    return {
        "versions": versions,
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "platform": platform.platform(),
    }


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed; torch's with its build (`2.14.1+cu130`), which its package may leave out."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = str(torch.__version__) if package == "torch" else version(package)
    return found


@cache
def _own_code() -> str:
    """The first digits of a hash of this toolkit's modules, bundled methods and models among them."""
    root, kinds = Path(__file__).parent, (".py", ".c", ".h")
    specs = {
        name: find_spec(f"compressor.{name}") for name in ("plugins", "model_zoo")
    }  # a checkout has them beside the package
    folders = {
        "": root,
        **{name: Path(next(iter(one.submodule_search_locations or ()))) for name, one in specs.items() if one},
    }
    every = {
        Path(name, path.relative_to(folder)).as_posix(): path
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.suffix in kinds
    }
    found = hashlib.sha256()
    for name in sorted(every):
        found.update(name.encode() + b"\0" + every[name].read_bytes())
    return found.hexdigest()[:12]


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        told = ""
    return processor_in(told) or platform.processor() or platform.machine()


def processor_in(told: str) -> str:
    """The processor that Linux's `/proc/cpuinfo` tells of: by its name with its family and model, as virtual machines call several
    generations by one name, or, as Arm's have none there, by its numbers. Of several kinds of cores, every one. Empty where there is
    neither."""
    kinds: list[str] = []
    for one in told.split("\n\n"):
        lines = (line.partition(":") for line in one.splitlines())
        facts = {name.strip(): value.strip() for name, _, value in lines}
        numbers = [
            f"{name} {facts[f'CPU {name}']}" for name in ("implementer", "part", "variant") if f"CPU {name}" in facts
        ]
        kind = facts.get("model name") or ", ".join([platform.machine(), *numbers] if numbers else [])
        if kind and {"cpu family", "model"} <= facts.keys():
            kind += f" (family {facts['cpu family']}, model {facts['model']})"
        kinds += [kind] if kind and kind not in kinds else []
    return " + ".join(kinds)


def give_back() -> None:
    """Return freed memory to the system where the C library has a call for it (glibc), which else keeps much of it for itself."""
    with suppress(OSError, AttributeError, TypeError):  # elsewhere there is none, or no library without a name
        ctypes.CDLL(None).malloc_trim(0)


def usable_cores(root: Path = Path("/")) -> float:
    """How many cores this process may use: those that it is bound to, or less where a container's share of time is.

    `root` has `proc` and `sys`, as on Linux; elsewhere every core counts.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(bound), *_shares(root)])


def _shares(root: Path) -> Iterator[float]:
    """The limits on this process's time, in cores: of its control group and those around it, version 2 and 1."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / place.lstrip("/")
        for folder in (one for one in (group, *group.parents) if one.is_relative_to(top)):
            with suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    limits = [
                        (folder / f"cpu.cfs_{what}_us").read_text(encoding="utf-8") for what in ("quota", "period")
                    ]
                else:
                    limits = (folder / "cpu.max").read_text(encoding="utf-8").split()
                quota, period = (float(limit) for limit in limits)  # no limit is "max", or below 0
                if quota > 0:
                    yield quota / period


def cache_folder(kind: str) -> Path:
    """Where numbers of a `kind` are kept: in `COMPRESSOR_CACHE`, else `compressor` in the user's cache folder."""
    base = os.environ.get("COMPRESSOR_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if base is None:
        home = os.path.expanduser("~")
        base = os.path.join(home if home != "~" else tempfile.gettempdir(), ".cache")
    return Path(base) / "compressor" / kind


def resolve_device(name: str) -> torch.device:
    """The torch device called `name`; `auto` is what accelerate finds (a GPU of its rank, else the CPU)."""
    from accelerate import PartialState

    try:
        device = PartialState().default_device if name == "auto" else torch.device(name)
        torch.zeros(1, device=device).item()  # which the device `meta` has not
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise CompressorError(f"device {name!r} cannot be used: {reason}", "Use auto, cpu, cuda or cuda:0.") from error
    return device


@contextmanager
def usual_torch() -> Iterator[None]:
    """torch as it starts: new tensors are float32, and can be trained, whatever default dtype or inference mode is around the block.

    For all that builds a network: what it is must not hang on what else the process does.
    """
    before = torch.get_default_dtype()
    with torch.inference_mode(False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


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
