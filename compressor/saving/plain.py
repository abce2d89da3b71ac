"""What safetensors writes: tensors on the CPU, row by row, each in memory of its own; and how large the file is."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError
from compressor.weights import FILE_METADATA, untied_state

_METADATA = "__metadata__"
"""What a header has beside the tensors."""

_TYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What a header calls the dtypes, in the order in which their tensors lie in a file."""


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The `untied_state`, `apart`."""
    return apart(untied_state(model))


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` as safetensors takes them. Only what is not so yet is copied; the others are the very memory that was given.

    Raises CompressorError, by its name, for one that no such file can hold, or under whose name it could not be read.
    """
    found, taken = {}, set[int]()
    for name, tensor in tensors.items():
        _refuse_unwritable(name, tensor)
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage()
        if memory.nbytes() != value.nbytes or memory.data_ptr() in taken:
            value = value.clone()
        taken.add(memory.data_ptr())
        found[name] = value
    return found


def _refuse_unwritable(name: str, tensor: Tensor) -> None:
    if name == _METADATA or name != name.encode(errors="replace").decode():
        raise CompressorError(f"a tensor is called {name!r}, which no safetensors file can hold", "Rename it.")
    if tensor.layout != torch.strided or tensor.dtype not in _TYPES:
        what = tensor.dtype if tensor.layout == torch.strided else tensor.layout
        raise CompressorError(
            f"{name} is {what}, which no safetensors file can hold",
            "Allowed: dense tensors of whole, floating-point (8 to 64 bits) and complex64 numbers. Convert it first.",
        )


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of a safetensors file of `tensors` with `FILE_METADATA`, without writing it; they may be on the meta device."""
    order = list(_TYPES)
    header: dict[str, object] = {_METADATA: FILE_METADATA}
    end = 0
    for name, value in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0].encode())):
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": _TYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return 8 + -(-len(text) // 8) * 8 + end
