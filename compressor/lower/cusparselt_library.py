"""Which cuSPARSELt this process has: the version of the file that is loaded, and what that version can do on which GPU.

`torch.backends.cusparselt.version()` is that of the header that torch was compiled with. The file beside it may be another one, and
the two behave differently: 0.8.0 is slow on GPUs on which 0.8.1 is not.
"""

from __future__ import annotations

import ctypes
import os

import torch

_FILE = "libcusparseLt.so.0"
_NEEDS = {8: 400, 9: 600}
"""The first cuSPARSELt for a GPU generation: 0.4.0 is 400. NVIDIA's release notes."""
_NEEDS_LATER = 700
_SLOW, _MENDED = 800, 801
_SLOW_ON = ((8, 9), (9, 0))
"""Where 0.8.0 is slower than the versions before and after it: the L4 and the H100, by the release notes of 0.8.1."""
_FIRST_TORCH = (2, 10)


def _loaded() -> int | None:
    """The version that the loaded file says it has, 801 for 0.8.1, 1000 for 0.10.0; None where none is loaded."""
    try:
        library = ctypes.CDLL(_FILE, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        parts = []
        for part in range(3):  # major, minor, patch
            value = ctypes.c_int()
            if library.cusparseLtGetProperty(part, ctypes.byref(value)):
                return None
            parts.append(value.value)
    except (OSError, AttributeError):
        return None
    return numbered(*parts)


def numbered(major: int, minor: int, patch: int) -> int:
    """A version as its header counts it: 0.8.1 is 801, 0.10.0 is 1000, 1.0.0 would be 1000000."""
    return 1_000_000 * major + 100 * minor + patch


def version() -> int | None:
    """The version of cuSPARSELt here, 801 for 0.8.1: the loaded file's, or, where that cannot be asked, that of torch's header. None
    without the library."""
    if not torch.backends.cusparselt.is_available():
        return None
    found: int | None = _loaded() or torch.backends.cusparselt.version()
    return found


def described() -> str:
    """The version for plans and keys of caches: "0.8.1"; "0.8.0 (header)" where the file could not be asked; "" without one."""
    found = version()
    return "" if found is None else dotted(found) + ("" if _loaded() else " (header)")


def dotted(version: int) -> str:
    """801 as 0.8.1, 1000 as 0.10.0."""
    return f"{version // 1_000_000}.{version // 100 % 10_000}.{version % 100}"


def missing(device: torch.device) -> str | None:
    """Why there are no 2:4 products on `device`, a CUDA device; None where there are."""
    if torch.version.hip is not None:
        return "this torch is for AMD GPUs, where these kernels were never tried"
    if tuple(map(int, torch.__version__.split(".")[:2])) < _FIRST_TORCH:
        return f"torch {torch.__version__} packs small weights past the end of their memory: install 2.10 or later"
    found = version()
    if found is None:
        return (
            "this torch has no cuSPARSELt: install a build for CUDA 12 or later, as `pip install torch` does on Linux"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} has no sparse tensor cores: 8.0 (A100, RTX 30) and later have"
    if found < (needed := _NEEDS.get(major, _NEEDS_LATER)):
        return (
            f"compute capability {major}.{minor} needs cuSPARSELt {dotted(needed)} or later, this process has "
            f"{dotted(found)}: install a later one"
        )
    if device.index is not None and device.index != torch.cuda.current_device():
        return f"cuSPARSELt works on the current GPU of a process: call torch.cuda.set_device({device.index}) first"
    return None


def missing_8_bits(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why 2:4 products of `dtype` (int8 or float8_e4m3fn) are not on `device`, which has others; None where they are."""
    capability, found = torch.cuda.get_device_capability(device), version() or 0
    here = f"compute capability {capability[0]}.{capability[1]}"
    if dtype == torch.int8:
        return f"{here}: cuSPARSELt lists no int8 for it" if capability == (10, 3) else None
    if capability < (8, 9):
        return f"{here} has no fp8: 8.9 (RTX 40) and later have"
    needed = 800 if capability == (8, 9) else 602
    if found < needed:
        return f"fp8 needs cuSPARSELt {dotted(needed)} or later here, this process has {dotted(found)}"
    return None


def remark(device: torch.device) -> str | None:
    """What slows the library down on `device`, and what would help."""
    if device.type != "cuda" or missing(device) is not None:
        return None
    if version() == _SLOW and torch.cuda.get_device_capability(device) in _SLOW_ON:
        return (
            f"cuSPARSELt {dotted(_SLOW)} is slower on this GPU than {dotted(_MENDED)}: "
            f"pip install 'nvidia-cusparselt-cu13>={dotted(_MENDED)}' (cu12 for CUDA 12)"
        )
    return None
