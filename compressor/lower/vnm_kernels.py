"""The compiled CPU kernels (`_vnm.c`): an optional extension, run on the threads that torch has already.

It is built at installation where there is a C compiler. Without it the backend `vnm` says so, and the gathered form remains.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch

from compressor.errors import CompressorError

_LEVEL_VARIABLE = "COMPRESSOR_CPU_LEVEL"
VNNI = ("avx512_bf16", "avx512_vnni", "avx_vnni")
"""The levels that sum products of bytes in 32 bits."""


_TORCH = (
    *("aoti_torch_get_data_ptr", "aoti_torch_get_dim", "aoti_torch_get_sizes", "aoti_torch_get_strides"),
    *("aoti_torch_get_dtype", "aoti_torch_get_device_type", "aoti_torch_delete_tensor_object", "torch_get_num_threads"),
    *("aoti_torch_empty_strided", "aoti_torch_library_init_impl", "aoti_torch_library_impl"),
    *("aoti_torch_dtype_float32", "aoti_torch_dtype_bfloat16", "aoti_torch_device_type_cpu"),
    "_ZSt21__throw_runtime_errorPKc",
)
"""torch's stable C functions that operators are made of, and how C++ raises; in the order of `_vnm_torch.h`."""


@cache
def kernels() -> tuple[ModuleType | None, str | None]:
    """The extension, ready to run on torch's own threads, and what there is to say about it: why it is missing, or slow."""
    return _ready()


def _ready() -> tuple[ModuleType | None, str | None]:
    try:
        _vnm = import_module("compressor.lower._vnm")
    except ImportError as error:
        return None, (
            f"the compiled CPU kernels are not installed ({error}); install GCC and reinstall with "
            "`pip install --force-reinstall --no-deps diffusion-compressor`"
        )
    if level := os.environ.get(_LEVEL_VARIABLE):
        try:
            _vnm.set_level(level)
        except ValueError as error:
            raise CompressorError(f"{_LEVEL_VARIABLE}: {error}", f"It has {', '.join(_vnm.levels())}.") from error
    runtime, note = _threads()
    _vnm.set_parallel(_address(runtime, "GOMP_parallel"), _address(runtime, "omp_get_thread_num"))
    return _vnm, note


def served() -> bool:
    """Gives torch the extension's own operators, and says whether it has them now: they run as `kernels` would have them, and nothing
    else need be called in a process that only runs what was compiled."""
    try:
        extension, _ = _ready()  # and again when `kernels` is asked: the level may be set until then
    except CompressorError:  # a level that there is not: the operators in Python say so when they run
        return False
    library = _torch_library()
    functions = [_address(library, name) for name in _TORCH]
    return extension is not None and all(functions) and bool(extension.serve(*functions))


def _torch_library() -> ctypes.CDLL | None:
    """torch's library on CPUs."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return ctypes.CDLL(str(library)) if library.is_file() else None


def _address(library: ctypes.CDLL | None, name: str) -> int:
    """The address of a function of `library`, or of one that it was linked with; 0 where there is none."""
    found = getattr(library, name, None)
    return 0 if found is None else ctypes.cast(found, ctypes.c_void_p).value or 0


def _threads() -> tuple[ctypes.CDLL | None, str | None]:
    """What torch's own GOMP_parallel is found in; None, and the reason, where it is not clear which that is.

    Another runtime, as tokenizers bring, would have threads of its own, and the two sets would fight for the cores.
    """
    if _address(own := _torch_library(), "GOMP_parallel"):  # no other runtime can be found so
        return own, None
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None, "the loaded OpenMP runtime cannot be found on this system: the kernels run on one thread"
    mapped = {line.split(maxsplit=5)[-1] for line in lines if ".so" in line}
    runtimes = sorted(p for p in mapped if Path(p).name.startswith(("libgomp", "libomp", "libiomp")))
    if len(runtimes) != 1:
        found = "none" if not runtimes else ", ".join(runtimes)
        return (
            None,
            f"torch's OpenMP runtime is not the only one in this process ({found}): the kernels run on one thread",
        )
    runtime = ctypes.CDLL(runtimes[0])
    if not _address(runtime, "GOMP_parallel"):
        return None, f"{runtimes[0]} has no GOMP_parallel: the kernels run on one thread"
    return runtime, None


def level() -> str:
    """The instruction set that the kernels use; `portable` where they are not installed."""
    extension, _ = kernels()
    return "portable" if extension is None else str(extension.level())


def version() -> str:
    """What the kernels' times depend on: the instruction set, the kernels themselves, and whether they run on one thread only."""
    extension, note = kernels()
    return level() if extension is None else f"{level()} {_digest()}{'' if note is None else ', one thread'}"


_SHAPING = ("vnm.py", "vnm_dense.py", "vnm_operators.py", "vnm_weight.py")
"""What decides in which blocks and tiles the kernels work."""


@cache
def _digest() -> str:
    """Of the compiled file as it is here, whoever compiled it, and of what shapes its work: no number has to be raised by hand."""
    extension, _ = kernels()
    found = hashlib.sha256()
    for file in (getattr(extension, "__file__", None), *(Path(__file__).parent / name for name in _SHAPING)):
        if file is not None and Path(file).is_file():
            found.update(hashlib.sha256(Path(file).read_bytes()).digest())
    return found.hexdigest()[:12]


def unavailable(device: torch.device) -> str | None:
    """Why the kernels do not run on `device` here; None where they do."""
    if device.type != "cpu":
        return f"the kernels run on CPUs, the model is on {device}"
    extension, why = kernels()
    return None if extension is not None else why


def unavailable_without_vnni(device: torch.device, instead: str) -> str | None:
    """The same of kernels that sum products of bytes in 32 bits; `instead`: the backend for processors that do not."""
    if (reason := unavailable(device)) is None and level() not in VNNI:
        return f"it needs VNNI (AVX-512's or AVX-VNNI), and the kernels use {level()}: {instead} is for that"
    return reason
