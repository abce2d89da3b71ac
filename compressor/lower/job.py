"""A lowering in hand: the model in its precision, what one forward of it showed, and the backends to try on it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from compressor import discovery
from compressor.adapter import Adapter, as_dtype, cloned, take_as, tensors_of
from compressor.environment import environment, usable_cores
from compressor.errors import CompressorError, UsageError
from compressor.foreign.kept import Kept, Place, same
from compressor.foreign.sound import copied, is_lowered
from compressor.lower import cusparselt_library
from compressor.lower.backend import Backend, Kind
from compressor.lower.held import refuse_methods
from compressor.lower.plan import Setting
from compressor.lower.units import Found, LeftOut, find_units, is_unit, put_unit
from compressor.weights import cast_, dtypes_of, unwrapped

SEED = 0
"""Of the random data that layers and models are timed on."""


class Forward:
    """One call of a form of `model` on the example. Each begins alike: with inputs as they were given, and with what the model kept
    before any call (`changed`: what calls change of it)."""

    def __init__(self, model: nn.Module, adapter: Adapter | None) -> None:
        self._adapter, self._kept = adapter, Kept(model)
        self.inputs: Any = None
        self.changed: set[Place] = set()
        self._written = False

    def __call__(self, form: nn.Module) -> Any:
        self.rest(form)
        return _call(self._adapter, cloned(self.inputs) if self._written else self.inputs, form)

    def watched(self, model: nn.Module, inputs: Any) -> Any:
        """What `model` answers on a copy of `inputs`, and what that changes; the model is then as it was."""
        given = cloned(inputs)
        out = _call(self._adapter, given, model)
        self._written |= not same(given, inputs)
        self.changed |= self._kept.changed(model)
        self.rest(model)
        return out

    def rest(self, form: nn.Module) -> None:
        """Let `form` keep what the model kept before any call."""
        if self.changed:
            self._kept.put_back(unwrapped(form), self.changed)


@dataclass(frozen=True, eq=False)
class Job:
    """A model to be lowered: in eval mode and in its precision, with what one forward of it showed."""

    base: nn.Module
    forward: Forward
    device: torch.device
    setting: Setting
    found: list[Found]
    left: list[LeftOut]
    backends: list[Backend]
    notes: list[str]

    @property
    def skipping(self) -> set[str]:
        """The backends that skip zeros, by name."""
        return {backend.name for backend in self.backends if backend.skips_zeros}

    @property
    def quantising(self) -> set[str]:
        """The backends that quantise, by name."""
        return {backend.name for backend in self.backends if backend.quantises}

    def backend(self, name: str) -> Backend:
        """The backend of that name."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise UsageError(
            f"the plan uses the backend {name!r}",
            "Add it to `backends`, or install it; those of few bits want the `tolerance` or `max_error` that they were chosen by.",
        )


def prepared(
    model: nn.Module,
    example_inputs: Any,
    backends: str | Sequence[str | Backend],
    dtype: torch.dtype | None,
    adapter: Adapter | None,
    quantising: bool = False,
    fuse: bool | Collection[Sequence[str]] | None = False,
) -> Job:
    """Run the example once, and look at what the model does with it. Raises where it does not run.

    `fuse` as in `find_units`; None does so on a GPU.
    """
    chosen, notes = _backends(backends, quantising)
    base = in_dtype(model, dtype)
    try:
        forward = Forward(base, adapter)
        inputs = forward.inputs = lively(example_inputs, partial(forward.watched, base))
        device = _device(base, inputs)
        fuse = device.type == "cuda" if fuse is None else fuse
        found, left = find_units(base, partial(forward.watched, base, inputs), fuse)
        out = forward.watched(base, inputs)
    except Exception as error:
        whose = "" if dtype is None else f", in {dtype}; where they do in the model's own dtype, lower it in that one"
        raise CompressorError(
            f"the example inputs do not run: {type(error).__name__}: {error}",
            f"Give what the model is called with{whose}.",
        ) from error
    if not _finite(out):
        raise CompressorError(
            "the model gives numbers that are not finite on the example, so no form of it can be checked",
            "Give inputs as the model is used with, and a dtype that holds its values.",
        )
    if forward.changed:
        notes.append(f"a call changes {min(forward.changed)}: forms are compared, and given back, as the model came")
    kinds = frozenset[Kind]().union(*(backend.takes for backend in chosen if backend.name != "eager"))
    found = [one for one in found if one.weights or one.unit.kind in kinds]
    for backend in chosen:
        try:
            remark = backend.remark(device)
            notes += [remark] if remark and remark not in notes else []  # several are of one library
        except Exception as failure:  # a plugin may raise anything
            notes.append(f"{backend.name}: {type(failure).__name__}: {failure}")
    return Job(base, forward, device, _setting(device), found, left, chosen, notes)


def built(
    job: Job,
    choices: Mapping[str, str],
    found: Sequence[Found] | None = None,
    made: dict[tuple[str, str], nn.Module] | None = None,
) -> nn.Module:
    """The model with the chosen modules in place, of all units or of those `found`; tensors that stay are shared with it. Modules that
    are `made` already, by place and backend, are taken, and new ones are kept there."""
    made = {} if made is None else made
    form = copy.deepcopy(job.base, {id(p): p for p in job.base.parameters()})
    for one in job.found if found is None else found:
        if (choice := choices.get(one.at, "eager")) != "eager" or one.fused:
            if (one.at, choice) not in made:
                made[one.at, choice] = job.backend(choice).build(one.unit)
            form = put_unit(form, one, made[one.at, choice])
    if set(choices.values()) - {"eager"}:
        take_as(form, job.base)
    if any(map(is_lowered, form.modules())):
        refuse_methods(form)
    return form


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in an output: in tuples, lists, dicts and dataclasses."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf):
            found += tensors_in([getattr(leaf, one.name) for one in fields(leaf)])
        elif isinstance(leaf, Mapping):
            found += tensors_in(list(leaf.values()))
    return found


def _backends(asked: str | Sequence[str | Backend], quantising: bool) -> tuple[list[Backend], list[str]]:
    """The backends that are asked for, dense ones first, and what there is to say about those that are broken.

    "auto" leaves out those that give other numbers, unless they are `quantising`: where the caller says how much that may be.
    """
    auto = asked == "auto"
    if not isinstance(asked, (str, Iterable)):
        raise UsageError(f"backends: a {type(asked).__name__}", "Give a list of names, or of instances of Backend.")
    names = discovery.names("backends") if auto else [asked] if isinstance(asked, str) else list(asked)
    made: list[Backend] = []
    notes: list[str] = []
    for name in names:
        try:
            backend = name if isinstance(name, Backend) else discovery.made("backends", _named(name), Backend)
            if not isinstance(getattr(backend, "name", None), str) or backend.name in [one.name for one in made]:
                raise CompressorError(
                    f"{type(backend).__name__}: a backend needs a name of its own", "Set `name`; each may stand once."
                )
            if not (auto and backend.quantises and not quantising):
                made.append(backend)
        except CompressorError as error:
            if not auto:
                raise
            notes.append(error.message)  # one broken plugin shall not take the others with it
    if not any(backend.name == "eager" for backend in made):
        made.append(discovery.made("backends", "eager", Backend))
    return sorted(made, key=lambda backend: (backend.name != "eager", backend.skips_zeros, backend.name)), notes


def _named(name: object) -> str:
    if not isinstance(name, str):
        raise UsageError(f"{name!r} is not a backend", "Give names, or instances of Backend.")
    return name


def lively(example: Any, run: Callable[[Any], Any]) -> Any:
    """The example with random numbers in place of what is constant, as pictures of zeros: some kernels are faster on those, and all
    are exact. What is not constant stays: errors are of what the caller gives, with its outliers and masks.

    The example itself where what `run` gives for those is not finite: they may be out of a model's range, as noise levels are; the
    caller's own should not be.
    """
    rng = torch.Generator().manual_seed(SEED)

    def noise(tensor: Tensor) -> Tensor:
        if (
            not tensor.is_floating_point()
            or tensor.dim() < 2
            or not tensor.numel()
            or bool((tensor != tensor.flatten()[0]).any())
        ):
            return tensor
        return torch.randn(tensor.shape, generator=rng).to(tensor)

    inputs = tree_map_only(Tensor, noise, example)
    return inputs if _finite(run(inputs)) else example


def _finite(out: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors_in(out))


def _call(adapter: Adapter | None, inputs: Any, model: nn.Module) -> Any:
    if adapter is not None:
        return adapter.predict(model, inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def in_dtype(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model in eval mode and in `dtype`; its parameters are the given model's own where nothing is cast."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UsageError(f"dtype {dtype!r}", "Give torch.float32, torch.bfloat16 or torch.float16.")
    # buffers are the copy's own: a forward may write to them
    base = copied(model, {} if dtype is not None else {id(p): p for p in model.parameters()}).eval()
    if dtype is None:
        return base
    if is_unit(base):
        base = _Held(base)  # casts go around a module, and must stay where it is replaced
    before = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    # not to(dtype), which would take the imaginary parts from complex tensors
    cast_(base, dict.fromkeys(dtypes_of(base), dtype))
    base.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True)
    base.register_forward_hook(partial(_cast_output, before))
    return base


class _Held(nn.Sequential):
    """One module, called with whatever it takes."""

    def forward(self, *args: Any, **named: Any) -> Any:
        return self[0](*args, **named)


def _cast_inputs(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return as_dtype(dtype, (args, kwargs))


def _cast_output(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return as_dtype(dtype, output)


def _device(model: nn.Module, inputs: Any) -> torch.device:
    tensors = [*model.parameters(), *tensors_of(inputs)]
    return tensors[0].device if tensors else torch.device("cpu")


def _setting(device: torch.device) -> Setting:
    about = environment(device)
    packages = ("torch", "diffusion-compressor")
    versions = {name: text for name, text in about["versions"].items() if name in packages}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        if torch.backends.cusparselt.is_available():
            versions["cusparselt"] = cusparselt_library.described()
    versions |= _restrictions()
    hardware = about["hardware"].rpartition(", ")[0]
    threads, cores = torch.get_num_threads(), usable_cores() if device.type == "cpu" else None
    return Setting(device=device.type, hardware=hardware, threads=threads, versions=versions, cores=cores)


def _restrictions() -> dict[str, str]:
    """What users restrict torch's own kernels by, the same on every run or not."""
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "any"
    return {
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "instruction set of oneDNN": onednn.lower() if torch.backends.mkldnn.enabled else "off",
        "float32 products": torch.get_float32_matmul_precision(),
    }
