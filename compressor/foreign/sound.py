"""Modules whose weights are not what they seem, found when a model is taken, and numbers that another dtype does not hold."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from compressor.errors import CompressorError, UsageError, first_line, memory_behind

_CLONE = "module.weight = torch.nn.Parameter(module.weight.detach().clone())"
_UNQUANTISED = (
    "Load it without quantisation (no quantization_config, no GGUF), prune it in floating-point numbers, and quantise what comes "
    "out of it."
)
_QUANTISED = ("torchao", "bitsandbytes", "optimum", "quanto")
"""Packages whose tensors are quantised."""
_ROUNDING = ("optimum.quanto.nn.", "quanto.nn.")
"""Homes of modules that may hold a plain weight, and multiply another that they make of it."""
_CUT = "cut, so that each process has a part of it"
_WHOLE = (
    "Give the model as it was before FSDP: under torchrun, train.parallel=fsdp cuts it. A Shadow in a loop of your own takes cut "
    "weights."
)
_COMPUTING: dict[type, str] = {
    WeightNorm: "Take it off: torch.nn.utils.remove_weight_norm(module).",
    SpectralNorm: "Take it off: torch.nn.utils.remove_spectral_norm(module).",
    BasePruningMethod: "Make it permanent: torch.nn.utils.prune.remove(module, name).",
}
"""The classes of torch's older hooks that keep a weight under another name, with what takes them off."""

_EMPTY = CellType()
_MOST_HELD = 10_000
"""As many objects as are looked at, of those that an attribute holds."""
_ATOMS = (type, ModuleType, str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)
"""What leads to no model."""
_TENSORS = ("_parameters", "_buffers", "_modules")
"""Where a module has what is copied as such."""


def is_lowered(module: nn.Module) -> bool:
    """Whether `module` is one that `compressor.lower` puts into the place of a layer."""
    return type(module).__module__.startswith("compressor.lower.")


def refuse_unsound(model: nn.Module) -> None:
    """Raise UsageError for weights that cannot be pruned, copied or saved as what they are, by their names.

    Those without a shape yet, those that torch or another library quantised, those of a lowered model, those that a hook computes
    anew at every call, those that torch.jit hides or FSDP has cut, and parameters that share memory without being one: views of each
    other come back from a file as tensors of their own. What modules keep beside their tensors (`get_extra_state`) is refused too.
    """
    for name, module in model.named_modules():
        home = type(module).__module__
        if ("quantized" in home and home.startswith("torch.ao.nn.")) or home.startswith(_ROUNDING):
            raise UsageError(f"{name}: a {type(module).__name__} is quantised", _UNQUANTISED)
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise UsageError(
                f"{name or 'the model'}: compiled by torch.jit ({type(module).__name__}), which hides its layers",
                "Give the module that it was made of; script or trace what comes out.",
            )
        if home == "torch.distributed.fsdp.fully_sharded_data_parallel":
            raise UsageError(f"{name or 'the model'}: {_CUT} ({type(module).__name__})", _WHOLE)
        if is_lowered(module):
            raise UsageError(
                f"{name or 'the model'}: lowered ({type(module).__name__}), its weights packed for this machine",
                "Give the model that was lowered, which is as it was; what compressor.lower gives is for inference alone.",
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            _refuse_extra_state(name, module)
        _refuse_buffers(name, module)
        for hook in module._forward_pre_hooks.values():
            kind = next((kind for kind in type(hook).__mro__ if kind in _COMPUTING), None)
            if kind is not None:
                what = f"{name}.{getattr(hook, 'name', getattr(hook, '_tensor_name', 'weight'))}".lstrip(".")
                raise UsageError(f"{what}: computed at every call by {type(hook).__name__}", _COMPUTING[kind])
    for name, value in model.named_parameters():
        if is_lazy(value):
            raise UsageError(f"{name}: a lazy weight, without a shape", "Call the model once, model(example), before.")
        if type(value).__module__.startswith("torch.distributed.tensor"):
            raise UsageError(f"{name}: {_CUT} ({type(value).__name__})", _WHOLE)
        if value.layout != torch.strided:
            raise UsageError(f"{name}: stored as {value.layout}", "Store it as a dense tensor: value.to_dense().")
        refuse_quantised(name, value)
    _refuse_shared_memory(model)


def _refuse_buffers(name: str, module: nn.Module) -> None:
    for own, value in module._buffers.items():
        at = f"{name}.{own}".lstrip(".")
        if value is not None and is_lazy(value):
            raise UsageError(f"{at}: a lazy buffer, without a shape", "Call the model once, model(example), before.")
        if value is not None and value.layout != torch.strided and own not in module._non_persistent_buffers_set:
            raise UsageError(
                f"{at}: stored as {value.layout}",
                "Store it as a dense tensor: value.to_dense(); or leave it out of the state: register_buffer(..., persistent=False).",
            )


def refuse_quantised(name: str, value: Tensor) -> None:
    """Raise UsageError for a weight that holds codes, or is made of them and their scales: one of another class than PyTorch's own,
    unless that only adds to a plain floating-point parameter."""
    kind = type(value)
    package = kind.__module__.partition(".")[0]
    adds = value.is_floating_point() and issubclass(kind, nn.Parameter)
    if value.is_quantized or package in _QUANTISED or not (package == "torch" or adds):
        raise UsageError(f"{name}: quantised ({kind.__name__}, {value.dtype})", _UNQUANTISED)
    if kind.__module__.startswith("torch.sparse."):
        raise UsageError(f"{name}: stored as {kind.__name__}", "Store it as a dense tensor: value.to_dense().")


def refuse_quantised_config(config: Mapping[str, Any], where: object) -> None:
    """Raise UsageError where the configuration `config`, which lies at `where`, says that the weights beside it are quantised."""
    told = config.get("quantization_config")
    if told:
        method = told.get("quant_method", "quantization_config") if isinstance(told, Mapping) else "quantization_config"
        raise UsageError(f"{where}: quantised weights ({method})", _UNQUANTISED)


def hooks_of_diffusers(model: nn.Module) -> dict[str, list[str]]:
    """The names of the hooks that diffusers has on modules of `model` (caches, weights in another dtype, offloading in groups), by the
    module's name."""
    found = {name: getattr(vars(one).get("_diffusers_hook"), "hooks", None) for name, one in model.named_modules()}
    return {name: list(hooks) for name, hooks in found.items() if hooks}


def refuse_hooks(model: nn.Module, where: str = "", allowed: Sequence[str] = ()) -> None:
    """Raise UsageError for hooks of diffusers on `model`, but those with one of the texts `allowed` in their names: caches, with which
    what one call shows is not what the next one does; weights in another dtype, or elsewhere. `where`: what the model is a part of."""
    for name, hooks in hooks_of_diffusers(model).items():
        if refused := [hook for hook in hooks if not any(one in hook for one in allowed)]:
            raise UsageError(
                f"{'.'.join(part for part in (where, name) if part) or type(model).__name__} has a hook of diffusers: {refused[0]}",
                "Take it off (caches: disable_cache()), or load the model anew without it; enable_model_cpu_offload() is fine. "
                "Caches, skipped layers and group offloading go on a lowered model.",
            )


def refuse_empty(state: Mapping[str, Tensor], whose: str = "") -> None:
    """Raise UsageError where a tensor of the `state` of a model has no values; `whose` is put before its name."""
    if (
        empty := next((name for name, value in state.items() if isinstance(value, Tensor) and value.is_meta), None)
    ) is not None:
        raise UsageError(
            f"{whose}{empty} has no values (it is on the meta device)",
            "Load weights into the model; of a pipeline, move it there: pipe.to(device), without "
            "enable_sequential_cpu_offload() (enable_model_cpu_offload() is fine).",
        )


def refuse_kept(model: nn.Module) -> None:
    """Raise UsageError for a tensor of a forward pass that a module has kept with what gradients need: torch does not copy such."""
    for name, module in model.named_modules():
        for attribute, value in {**vars(module), **module._buffers}.items():
            if attribute in _TENSORS:
                continue
            held = [value] if isinstance(value, Tensor) else []
            if isinstance(value, (list, tuple, dict)) and value:
                held = [one for one in tree_leaves(value) if isinstance(one, Tensor)]
            if not all(one.is_leaf for one in held):
                raise UsageError(
                    f"{name}.{attribute}: kept from a forward pass, with what gradients need".lstrip("."),
                    "torch does not copy such a tensor. Keep it without (x.detach()), or let go of it: "
                    f"module.{attribute} = None.",
                )


_Module = TypeVar("_Module", bound=nn.Module)


def copied(model: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """A copy of `model`, as `copy.deepcopy` makes it with this `memo`. Raises UsageError, by its name, for what cannot be copied: a
    lock, a generator, an open file, whatever has one; and a method set on a module that would go on to use the weights of `model`."""
    own = {id(value) for value in model.parameters()} if isinstance(model, nn.Module) else set()
    own -= (memo or {}).keys()
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:  # Python's own, torch's, and what a `__deepcopy__` of the user's raises
        if memory_behind(error) is not None:
            raise
        refuse_kept(model)
        what = _uncopied(model) or type(model).__name__
        raise UsageError(
            f"{what}: cannot be copied: {first_line(error)}",
            "Take it out of the model (module.NAME = None), or load the model without it (hooks, such as those of offloading).",
        ) from error
    if own:
        _refuse_bound(made, own)
    return made


def _refuse_bound(made: nn.Module, own: Collection[int]) -> None:
    """Raise UsageError where what a module of `made`, a copy, holds reaches the original's `own` parameters: Python copies no
    functions and no weak references, so that the copy would be computed with weights that are not its own. So it would be where a
    module's `__deepcopy__` gives what is there."""
    for name, value in made.named_parameters():
        if id(value) in own:
            raise UsageError(
                f"{name}: in a copy of the model it is the given model's own, which would be pruned with it",
                "Let __deepcopy__ of its module, or of one around it, make a copy; or prune the model itself: compressor.prune_.",
            )
    seen = set[int]()
    for name, module in made.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in _TENSORS and _reaches(value, own, seen):
                raise UsageError(
                    f"{name}.{attribute}".lstrip(".")
                    + ": set on the module, and bound to its weights: a copy would go on to use those",
                    "Take it off (hooks: handle.remove(); hooks and caches of diffusers: load the model anew, or disable_cache(); "
                    f"else del module.{attribute}), and put it on what comes out.",
                )


def _reaches(value: Any, own: Collection[int], seen: set[int]) -> bool:
    """Whether `value`, by what functions and objects in it hold, leads to a parameter of the ids `own`. What was `seen` is passed
    over."""
    waiting, looked = [value], 0
    while waiting and looked < _MOST_HELD:
        one = waiting.pop()
        if isinstance(one, _ATOMS) or id(one) in seen:
            continue
        seen.add(id(one))
        looked += 1
        if isinstance(one, nn.Module):
            if any(id(parameter) in own for parameter in one.parameters()):
                return True
        elif isinstance(one, Tensor):
            if id(one) in own:
                return True
        else:
            waiting += _held_by(one)
    return False


def _held_by(one: Any) -> Iterable[Any]:
    """What `one` holds, as far as it may lead to a model."""
    if isinstance(one, FunctionType):
        cells = [cell.cell_contents for cell in one.__closure__ or () if cell != _EMPTY]
        named = (one.__globals__.get(name) for name in one.__code__.co_names)  # a notebook's own model, for one
        models = [value for value in named if isinstance(value, (nn.Module, nn.Parameter))]
        return [*cells, *models, *(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()]
    if isinstance(one, MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, BuiltinMethodType):
        return [one.__self__]
    if isinstance(one, partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, weakref.ref):
        return [one()]
    if isinstance(one, Mapping):
        return one.values()
    if isinstance(one, (list, tuple, set, frozenset)):
        return one
    return vars(one).values() if hasattr(one, "__dict__") else ()


def _uncopied(model: nn.Module) -> str | None:
    """The first attribute of a module of `model` that cannot be copied."""
    held = {id(value): value for value in (*model.modules(), *model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(held))
            except Exception:
                return f"{name}.{attribute} (a {type(value).__name__})".lstrip(".")
    return None


def _refuse_extra_state(name: str, module: nn.Module) -> None:
    if not isinstance(state := module.get_extra_state(), Tensor):
        raise UsageError(
            f"{name or 'the model'}: {type(module).__name__} keeps {type(state).__name__} beside its tensors (get_extra_state)",
            "A saved model holds tensors alone: let get_extra_state give a tensor, or make it a buffer.",
        )


def _refuse_shared_memory(model: nn.Module) -> None:
    held: dict[int, list[tuple[int, int, str, Tensor]]] = {}
    for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        if value.is_meta or value.layout != torch.strided or not value.numel() or type(value.data) is not Tensor:
            continue
        span = 1 + sum((int(size) - 1) * int(step) for size, step in zip(value.shape, value.stride(), strict=True))
        if span < value.numel() and isinstance(value, nn.Parameter):
            raise UsageError(f"{name}: its entries share memory with each other", f"Own memory for each: {_CLONE}")
        first = int(value.storage_offset()) * value.element_size()
        storage = int(value.untyped_storage().data_ptr())
        held.setdefault(storage, []).append((first, first + span * value.element_size(), name, value))
    for sharing in held.values():
        end, last, owner = -1, "", False
        for start, stop, name, value in sorted(sharing, key=lambda one: (one[0], -one[1], one[2])):
            is_weight = isinstance(value, nn.Parameter)
            if start < end and (is_weight or owner):
                raise UsageError(
                    f"{name} shares memory with {last}, and is another tensor (a view or a transpose of it)",
                    f"A saved model would lose that. Make them one parameter, or give each its own memory: {_CLONE}",
                )
            if stop > end:
                end, last, owner = stop, name, is_weight


def refuse_loss(name: str, value: Tensor, dtype: torch.dtype) -> None:
    """Raise CompressorError where `value` in `dtype` would be another number, but for the rounding of floating-point ones."""
    if value.dtype == dtype:
        return
    new = value.to(dtype)
    if value.is_floating_point() and dtype.is_floating_point:
        largest = float(value.double().abs().max()) if value.numel() else 0.0
        # 8-bit floats have no infinity, or take their largest number in its place
        lost = largest > torch.finfo(dtype).max if dtype.itemsize == 1 else not bool(new.isfinite().all())
        if lost and math.isfinite(largest):
            raise CompressorError(
                f"{name}: {largest:.6g} is too large for {dtype}",
                "bfloat16 and float32 hold it: load, prune or lower the model in one of them.",
            )
    elif not (value.is_complex() and dtype.is_complex) and not torch.equal(new.to(value.dtype), value):
        raise CompressorError(
            f"{name}: its numbers are {value.dtype}, and not all of them are numbers of {dtype}",
            "Give a model in the dtypes of the file.",
        )
