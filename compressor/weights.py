"""Reading weight files: safetensors, and PyTorch files without running anything that is in them."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor.errors import CompressorError, UsageError, first_line, said_of
from compressor.foreign.bounded import check_regular, check_unpacked, check_zip, mapping
from compressor.foreign.pickles import check_keys
from compressor.foreign.sound import copied, refuse_empty, refuse_loss, refuse_unsound

FILE_METADATA = {"format": "pt"}
"""What saved weights say of themselves, as other libraries expect."""

_NOT_FINITE = "Whatever made it failed, or it is damaged."
_INNER = ("ema", "ema_state_dict", "model_ema", "nnet_ema", "state_dict", "model", "nnet")
_PREFIXES = ("_orig_mod.", "module.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a `.safetensors`, `.pth`, `.pt`, `.ckpt` or `.bin` file, by name.

    PyTorch files are read with `weights_only=True`: a file that holds anything but tensors and numbers is refused, and
    nothing in it runs. Of a training checkpoint with several states in it, the averaged one (`ema`) is taken, else
    the model's. A prefix on every key that DataParallel (`module.`) or torch.compile (`_orig_mod.`) left is dropped.
    """
    state = _tensors(Path(path), mapped=False)
    check_finite(state, path)
    return dict(state)


def check_finite(state: Mapping[str, Tensor], where: str | Path, hint: str = _NOT_FINITE) -> None:
    """Raise CompressorError where a tensor of `state` holds NaN or infinity, by its name. Tensors without values are passed over."""
    for name, value in state.items():
        if value.is_meta or not (value.is_floating_point() or value.is_complex()):
            continue
        try:
            # not every 8-bit float knows whether it is finite
            finite = torch.isfinite(value.float() if value.element_size() == 1 else value).all()
        except NotImplementedError as error:
            raise CompressorError(f"{where}: {name} is {value.dtype}", "Convert it to another dtype first.") from error
        if not bool(finite):
            raise CompressorError(f"{where}: {name} holds NaN or infinity", hint)


def read_outline(path: str | Path) -> dict[str, Tensor]:
    """What `read_weights` would give, without the values: tensors on the meta device, which have names, shapes and dtypes.

    For looking at what a file is of before it is read. Raises CompressorError as `read_weights` does.
    """
    return {name: value.to("meta") for name, value in _tensors(Path(path), mapped=True).items()}


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
    state: Any
    try:
        check_regular(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else ""
        raise CompressorError(
            f"{path}: {reason or 'no such file'}", "Give the path of a .safetensors or .pth file."
        ) from error
    try:
        if path.suffix == ".safetensors":
            with mapping():
                state = _header(path) if mapped else load_file(path)
        else:
            # the format before torch 1.6, which is no zip file, cannot be mapped
            zipped = zipfile.is_zipfile(path)
            mapped = mapped and zipped
            if zipped and not mapped:
                check_zip(path)
            _check_pickles(path, zipped)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise CompressorError(f"{path}: {error.strerror or error}", "The file is damaged; use another copy.") from error
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


def _check_pickles(path: Path, zipped: bool) -> None:
    """Raise ValueError where what a file says of its tensors would keep PyTorch's reader busy for ever."""
    if zipped:
        with zipfile.ZipFile(path) as archive:
            check_unpacked(archive, path.stat().st_size)
            for member in archive.infolist():
                if member.filename.endswith(".pkl"):
                    if not member.CRC:  # written without one: it is not asked
                        del member.CRC
                    check_keys(archive.read(member))
        return
    with path.open("rb") as file:  # two numbers, the machine, the state, the names of the storages
        for _ in range(5):
            check_keys(file)


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
    refuse_empty(model.state_dict(), f"{where}: the model's ")
    refuse_misfit(model, {name: tuple(value.shape) for name, value in state.items()}, where)
    for name, own in untied_state(model).items():
        # codes, without the scales that make weights of them
        if own.is_floating_point() and kind_of(state[name]) == "whole":
            raise CompressorError(
                f"{where}: {name} is {state[name].dtype}, the model's {own.dtype}",
                "Weights that were quantised are not read without their scales: save them as floating-point numbers.",
            )
        with said_of(where):
            refuse_loss(name, state[name], own.dtype)
    tied = ties(model)
    for name, first in tied.items():
        if name in state and not torch.equal(state[name], state[first]):
            raise CompressorError(
                f"{where}: {name} differs from {first}, and in {type(model).__name__} they are one tensor",
                "Load it into a model that does not share them.",
            )
    _spread(model)
    with torch.inference_mode(any(own.is_inference() for own in model.state_dict().values())):
        model.load_state_dict({**state, **{name: state[first] for name, first in tied.items()}}, strict=True)


def _spread(model: nn.Module) -> None:
    """Let every entry of each buffer have memory of its own: torch does not write to one that was made with `expand`."""
    own: dict[int, Tensor] = {}
    for module in model.modules():
        for name, value in module._buffers.items():
            if value is None or value.layout != torch.strided:
                continue
            if any(n > 1 and not step for n, step in zip(value.shape, value.stride(), strict=True)):
                module._buffers[name] = own.setdefault(id(value), value.contiguous())


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


def bare(model: nn.Module) -> nn.Module:
    """`model` as its class made it: without what torch.compile or DataParallel put around it, or around modules inside of it.

    Its parameters are those of `model`; where nothing is around anything, it is `model` itself. Every function that takes a
    model of the user's asks for it first, so that `_orig_mod.` and `module.` are in no name. Raises UsageError where the model
    holds adapters of peft, which hide the weights that they are added to, or is no module.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a {type(model).__name__} is no module",
            "Give a torch.nn.Module, as a Result has in `model`; of a pipeline one of its parts, such as pipe.unet.",
        )
    _refuse_adapters(model := unwrapped(model))
    refuse_unsound(model)
    wrapped = [module for module in model.modules() if isinstance(module, _wrappers())]
    if not wrapped:
        return model
    memo = _tensors_of(model)
    for wrapper in reversed(wrapped):  # inner ones come last
        inner = _inside(wrapper)
        memo[id(wrapper)] = memo[id(inner)] if id(inner) in memo else copied(inner, memo)
    return copied(model, memo)


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without what torch.compile or DataParallel put around it as a whole."""
    while isinstance(model, _wrappers()):
        model = _inside(model)
    return model


def bare_name(name: str) -> str:
    """`name` of a parameter or a module without what torch.compile and DataParallel add."""
    return ".".join(part for part in name.split(".") if f"{part}." not in _PREFIXES)


def _wrappers() -> tuple[type[nn.Module], ...]:
    """The classes of modules that only hold another; torch.compile's is known once it was used."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    plain = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return plain if dynamo is None else (*plain, dynamo.OptimizedModule)


def _inside(wrapper: nn.Module) -> nn.Module:
    return next(wrapper.children())


def _refuse_adapters(model: nn.Module) -> None:
    """Raise UsageError for adapters of peft: their matrices are no weights of the model, whose own lie under other names."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:  # without peft there are none
        return
    import peft
    from peft.utils import other

    beside = getattr(other, "AuxiliaryTrainingWrapper", other.ModulesToSaveWrapper)  # the first from peft 0.15 on
    kinds = (tuners.BaseTunerLayer, beside, peft.PeftModel)
    found = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        shown = ", ".join(name or type(model).__name__ for name in found[:3])
        raise UsageError(
            f"{type(model).__name__} holds adapters of peft: {shown}{more}",
            "Merge them into the weights (diffusers: model.fuse_lora(), then model.unload_lora(); peft: "
            "model = model.merge_and_unload()), or take them out (pipeline.unload_lora_weights(), model.unload()); then "
            "model.requires_grad_(True), as peft freezes the others.",
        )


def kind_of(tensor: Tensor) -> str:
    """What kind of numbers a tensor holds: loading may round them, but not drop a part of each."""
    return "floating-point" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "whole"


def _tensors_of(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy` by which a copy has the very tensors of `model`."""
    return {id(value): value for value in (*model.parameters(), *model.buffers())}


HALF = (torch.float16, torch.bfloat16)
"""What models are stored in to be small, and computed and trained in float32 behind it."""


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of every floating-point parameter and buffer, by its first name."""
    return {name: value.dtype for name, value in _named(model).items() if value.is_floating_point()}


def cast_(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> nn.Module:
    """`model` with its floating-point tensors in the `dtypes` of their names, in place; those of no name there stay as they are.

    Raises CompressorError where a number is too large for its new dtype.
    """
    for name, value in _named(model).items():
        dtype = dtypes.get(name, value.dtype)
        if dtype == value.dtype or not (value.is_floating_point() and dtype.is_floating_point):
            continue
        if not value.is_meta:
            refuse_loss(name, value.detach(), dtype)
        value.grad = None
        value.data = value.detach().to(dtype)
    return model


def float32_(model: nn.Module) -> nn.Module:
    """`model` with all that is in half precision in float32, in place. The numbers are the very same: float32 holds all of `HALF`."""
    return cast_(model, {name: torch.float32 for name, dtype in dtypes_of(model).items() if dtype in HALF})


def in_float32(model: nn.Module) -> nn.Module:
    """`model` itself; where some of it is in half precision, a copy in float32, which runs anywhere and on inputs in float32."""
    return float32_(copied(model)) if set(dtypes_of(model).values()) & set(HALF) else model


def as_stored_(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """`model` with all that `state`, of which only the dtypes are looked at, has in half precision in that, in place."""
    return cast_(model, {name: value.dtype for name, value in state.items() if value.dtype in HALF})


def _named(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def sketch(model: nn.Module) -> nn.Module:
    """A copy of `model` without values, on the meta device: what its shapes allow can be tried on it, for no memory."""
    memo: dict[int, Any] = {}
    for key, value in _tensors_of(model).items():
        empty = torch.empty_like(value, device="meta")
        memo[key] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    return copied(model, memo)


def twin(model: nn.Module) -> nn.Module:
    """A copy of `model` with the very same tensors: its structure can be changed, and the model's stays."""
    memo = _tensors_of(model)
    for module in model.modules():  # a module has ten dicts of hooks, nearly all empty, and deepcopy is slow at them
        memo.update(
            (id(held), OrderedDict()) for held in vars(module).values() if type(held) is OrderedDict and not held
        )
    return copied(model, memo)


def weights_sha256(model: nn.Module) -> str:
    """The `state_sha256` of the model's state, each tensor once."""
    return state_sha256(untied_state(model))


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """A hash of every tensor: names, dtypes, shapes and bytes, in the order of their names."""
    refuse_empty(state)
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def raw(tensor: Tensor) -> Any:
    """The bytes of `tensor`, row by row."""
    value = tensor.detach().cpu().contiguous()
    if not value.numel():
        return b""
    # a number that was expanded to one entry is contiguous with a stride of 0, which no view as bytes takes
    return value.as_strided((value.numel(),), (1,)).view(torch.uint8).numpy().data


def part_names(name: str) -> tuple[str, str]:
    """Under which names a file has the values and the index of the weight `name`."""
    return f"{name}.values", f"{name}.index"
