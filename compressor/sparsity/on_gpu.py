"""Which kernels of Triton's are used: those that work on this GPU, tried before their first use (`checked`). Where they do not, torch
does the same in more passes.

Masks of tensors on a GPU are made by them (`kernels_for`), to the same bits.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from compressor.errors import first_line

LARGEST = 2**31 - 1
"""The most entries of a tensor: the kernels count them in 32 bits."""


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """`compressor.sparsity.triton_kernels` where it takes `tensors`; None where torch has to do it: on a CPU, without Triton."""
    first = tensors[0]
    if any(one.device != first.device or not one.is_contiguous() for one in tensors) or first.numel() > LARGEST:
        return None
    return _tried(first.get_device()) if first.device.type == "cuda" else None


def _tried(index: int) -> ModuleType | None:
    return checked("compressor.sparsity.triton_kernels", index, "masks are made by torch")


@cache
def checked(name: str, index: int, otherwise: str) -> ModuleType | None:
    """The module `name` of kernels, once they gave on GPU `index` what torch gives; Triton needs a C compiler and a GPU that it knows.

    None, and a warning that says `otherwise`, where they do not; None without one where there is no Triton.
    """
    try:
        kernels = import_module(name)
    except ImportError:  # torch without CUDA, or for a system that has no Triton, comes without
        return None
    try:
        with torch.device("cpu"):  # whatever a program has as its default
            wrong = kernels.differences(torch.device("cuda", index))
    except Exception as failure:  # a compiler's, a driver's: whatever it is, torch can do it
        wrong = f"{type(failure).__name__}: {first_line(failure)}"
    if wrong is not None:
        warnings.warn(f"{otherwise}, which is slower: Triton's kernels fail ({wrong})", stacklevel=2)
        return None
    return kernels
