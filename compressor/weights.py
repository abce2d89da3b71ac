"""Reading weight files: safetensors, and PyTorch files without running anything that is in them."""

from __future__ import annotations

import copy
import hashlib
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor.errors import CompressorError, first_line

FILE_METADATA = {"format": "pt"}
"""What saved weights say of themselves, as other libraries expect."""

_INNER = ("ema", "ema_state_dict", "model_ema", "nnet_ema", "state_dict", "model", "nnet")
_PREFIXES = ("_orig_mod.", "module.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a `.safetensors`, `.pth`, `.pt`, `.ckpt` or `.bin` file, by name.

    PyTorch files are read with `weights_only=True`: a file that holds anything but tensors and numbers is refused, and
    nothing in it runs. Of a training checkpoint with several states in it, the averaged one (`ema`) is taken, else
    the model's. A prefix on every key that DataParallel (`module.`) or torch.compile (`_orig_mod.`) left is dropped.
    """
    path = Path(path)
    state = _tensors(path, mapped=False)
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CompressorError(
                f"{path}: {name} holds NaN or infinity", "The file is damaged, or its training failed."
            )
    return dict(state)


def read_outline(path: str | Path) -> dict[str, Tensor]:
    """What `read_weights` would give, without the values: tensors on the meta device, which have names, shapes and dtypes.

    For looking at what a file is of before it is read. Raises CompressorError as `read_weights` does.
    """
    return {name: value.to("meta") for name, value in _tensors(Path(path), mapped=True).items()}


_DIFFUSERS = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.(?:safetensors|bin)$")


def variant_of(folder: Path) -> str | None:
    """The variant (`fp16`) of the weights in a folder of diffusers, where they are there as that alone; else None."""
    found = {match[1] for path in folder.glob("diffusion_pytorch_model*") if (match := _DIFFUSERS.match(path.name))}
    return found.pop() if len(found) == 1 else None  # beside plain ones, those are taken, as others do


_HEADER_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _header(path: Path) -> dict[str, Tensor]:
    """What a safetensors file says it holds: tensors on the meta device. Names of numbers that torch lacks are read as uint8."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: torch.empty(part.get_shape(), dtype=_HEADER_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")
            for name, part in slices.items()
        }


def _tensors(path: Path, mapped: bool) -> dict[str, Tensor]:
    """The tensors in a file by their names without prefixes; `mapped`: their values stay on the disk where that can be."""
    if not path.is_file():
        raise CompressorError(f"{path}: no such file", "Give the path of a .safetensors or .pth file.")
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = _header(path) if mapped else load_file(path)
        else:
            # the format before torch 1.6, which is no zip file, cannot be mapped
            mapped = mapped and zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except SafetensorError as error:
        raise CompressorError(
            f"{path}: not a valid safetensors file: {error}", "The file is damaged or incomplete."
        ) from error
    except Exception as error:  # torch.load raises a dozen types on files that are damaged or hostile
        reason = first_line(error)
        raise CompressorError(
            f"{path}: refused: not a plain PyTorch state dict ({reason})",
            "Nothing in it was run. Where you trust its source, load it there and save model.state_dict() as safetensors.",
        ) from error
    if isinstance(state, Mapping):
        inner = [key for key in _INNER if isinstance(state.get(key), Mapping)]
        state = state[inner[0]] if inner else state
    _refuse_expansion(path, state)
    plain = isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not plain or not state:
        found = f"keys {list(state)[:4]}" if isinstance(state, Mapping) else type(state).__name__
        raise CompressorError(f"{path}: not a state dict of tensors, found {found}", "Save model.state_dict() alone.")
    while prefix := next((p for p in _PREFIXES if all(name.startswith(p) for name in state)), ""):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def _refuse_expansion(path: Path, state: Any) -> None:
    """Raise CompressorError for tensors that hold more than the file does: small files shall not fill the memory."""
    tensors = [value for value in state.values() if isinstance(value, Tensor)] if isinstance(state, Mapping) else []
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    expanded = [value for value in tensors if value.nbytes > value.untyped_storage().nbytes()]
    if expanded or sum(storages.values()) > path.stat().st_size:
        raise CompressorError(
            f"{path}: its tensors are larger than the file", "Save contiguous tensors, uncompressed, with torch.save."
        )


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], where: str | Path) -> None:
    """Load `state` into `model`, or leave the model untouched and raise a CompressorError with the first differences."""
    refuse_misfit(model, {name: tuple(value.shape) for name, value in state.items()}, where)
    tied = ties(model)
    for name, first in tied.items():
        if name in state and not torch.equal(state[name], state[first]):
            raise CompressorError(
                f"{where}: {name} differs from {first}, and in {type(model).__name__} they are one tensor",
                "Load it into a model that does not share them.",
            )
    model.load_state_dict({**state, **{name: state[first] for name, first in tied.items()}}, strict=True)


def refuse_misfit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], where: str | Path) -> None:
    """Raise a CompressorError with the first differences unless a state of such `shapes` fits `model`."""
    own, tied = untied_state(model), ties(model)
    wrong = [f"missing {name}" for name in own if name not in shapes]
    wrong += [f"unexpected {name}" for name in shapes if name not in own and name not in tied]
    wrong += [
        f"{name}: file has {shapes[name]}, model has {tuple(value.shape)}"
        for name, value in model.state_dict().items()
        if name in shapes and shapes[name] != tuple(value.shape)
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        hint = "Choose the model of this checkpoint with --model; `compressor list models` shows all."
        if any(name not in shapes and set(part_names(name)) <= shapes.keys() for name in own):
            hint = "Its weights are packed: give the folder to compressor.load, or save it with packed=False."
        raise CompressorError(f"{where} does not fit {type(model).__name__}: {'; '.join(wrong[:4])}{more}", hint)


def ties(model: nn.Module) -> dict[str, str]:
    """The names of the model's state that are another name's tensor, with the first name of it."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: known for name, value in state.items() if (known := first.setdefault(id(value), name)) != name}


def untied_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state, each tensor once, under its first name."""
    tied = ties(model)
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def sketch(model: nn.Module) -> nn.Module:
    """A copy of `model` without values, on the meta device: what its shapes allow can be tried on it, for no memory."""
    held = {id(value): value for value in (*model.parameters(), *model.buffers())}
    empty = {key: torch.empty_like(value, device="meta") for key, value in held.items()}
    memo = {
        k: nn.Parameter(e, held[k].requires_grad) if isinstance(held[k], nn.Parameter) else e for k, e in empty.items()
    }
    return copy.deepcopy(model, memo)


def twin(model: nn.Module) -> nn.Module:
    """A copy of `model` with the very same tensors: its structure can be changed, and the model's stays."""
    memo: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    for module in model.modules():  # a module has ten dicts of hooks, nearly all empty, and deepcopy is slow at them
        memo.update(
            (id(held), OrderedDict()) for held in vars(module).values() if type(held) is OrderedDict and not held
        )
    return copy.deepcopy(model, memo)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The `untied_state` as tensors of their own on the CPU."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in untied_state(model).items()}


def weights_sha256(model: nn.Module) -> str:
    """The `state_sha256` of the model's state, each tensor once."""
    return state_sha256(untied_state(model))


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """A hash of every tensor: names, dtypes, shapes and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def part_names(name: str) -> tuple[str, str]:
    """Under which names a file has the values and the index of the weight `name`."""
    return f"{name}.values", f"{name}.index"
