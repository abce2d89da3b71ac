"""A lowering in hand: the model in its precision, what one forward of it showed, and the backends to try on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from compressor import registry
from compressor.adapter import Adapter
from compressor.environment import environment
from compressor.errors import CompressorError, UsageError
from compressor.lower.backend import Backend
from compressor.lower.plan import Setting
from compressor.lower.units import Found, LeftOut, find_units

SEED = 0
"""Of the random data that layers and models are timed on."""


@dataclass(frozen=True, eq=False)
class Job:
    """A model to be lowered: in eval mode and in its precision, with what one forward of it showed."""

    base: nn.Module
    forward: Callable[[nn.Module], Any]
    inputs: Any
    device: torch.device
    setting: Setting
    found: list[Found]
    left: list[LeftOut]
    backends: list[Backend]
    notes: list[str]

    def backend(self, name: str) -> Backend:
        """The backend of that name."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        raise UsageError(f"the plan uses the backend {name!r}", "Add it to `backends`, or install it.")


def prepared(
    model: nn.Module,
    example_inputs: Any,
    backends: str | Sequence[str | Backend],
    dtype: torch.dtype | None,
    adapter: Adapter | None,
    tolerance: float | None = None,
) -> Job:
    """Run the example once, and look at what the model does with it. Raises where it does not run."""
    chosen, notes = _backends(backends, tolerance)
    inputs = _lively(example_inputs)
    base = in_dtype(model, dtype)

    def forward(some: nn.Module) -> Any:
        return _call(some, inputs, adapter)

    try:
        found, left = find_units(base, lambda: forward(base))
    except Exception as error:
        raise CompressorError(
            f"the example inputs do not run: {type(error).__name__}: {error}", "Give what the model is called with."
        ) from error
    device = _device(base, inputs)
    notes += [remark for backend in chosen if (remark := backend.remark(device))]
    return Job(base, forward, inputs, device, _setting(device), found, left, chosen, notes)


def _backends(asked: str | Sequence[str | Backend], tolerance: float | None) -> tuple[list[Backend], list[str]]:
    """The backends that are asked for, dense ones first, and what there is to say about those that are broken.

    "auto" leaves out those that give other numbers, unless the caller says how much that may be.
    """
    auto = asked == "auto"
    names = registry.names("backends") if auto else [asked] if isinstance(asked, str) else list(asked)
    made, notes = [], []
    for name in names:
        try:
            backend = name if isinstance(name, Backend) else registry.backend(name)
            if not (auto and backend.quantises and tolerance is None):
                made.append(backend)
        except CompressorError as error:
            if not auto:
                raise
            notes.append(error.message)  # one broken plugin shall not take the others with it
    if not any(backend.name == "eager" for backend in made):
        made.append(registry.backend("eager"))
    return sorted(made, key=lambda backend: (backend.name != "eager", backend.skips_zeros, backend.name)), notes


def _lively(inputs: Any) -> Any:
    """The example with random numbers in place of its pictures: some kernels are faster on zeros."""
    rng = torch.Generator().manual_seed(SEED)

    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dim() < 2:
            return tensor
        return torch.randn(tensor.shape, generator=rng).to(tensor)

    return tree_map_only(Tensor, noise, inputs)


def _call(model: nn.Module, inputs: Any, adapter: Adapter | None) -> Any:
    if adapter is not None:
        return adapter.predict(model, inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def in_dtype(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model in eval mode and in `dtype`; its tensors are the given model's own where nothing is cast."""
    same = {id(t): t for t in (*model.parameters(), *model.buffers())}
    base = copy.deepcopy(model, {} if dtype is not None else same).eval()
    if dtype is None:
        return base
    before = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def cast(value: Tensor, to: torch.dtype) -> Tensor:
        return value.to(to) if value.is_floating_point() and value.dim() > 1 else value

    def cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda t: cast(t, dtype), (args, kwargs))

    def cast_output(module: nn.Module, args: Any, output: Any) -> Any:
        return tree_map_only(Tensor, lambda t: cast(t, before), output)

    base.to(dtype)
    base.register_forward_pre_hook(cast_inputs, with_kwargs=True)
    base.register_forward_hook(cast_output)
    return base


def _device(model: nn.Module, inputs: Any) -> torch.device:
    tensors = [*model.parameters(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
    return tensors[0].device if tensors else torch.device("cpu")


def _setting(device: torch.device) -> Setting:
    about = environment(device)
    packages = ("torch", "diffusion-compressor")
    versions = {name: text for name, text in about["versions"].items() if name in packages}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        if torch.backends.cusparselt.is_available():
            versions["cusparselt"] = str(torch.backends.cusparselt.version())
    hardware = about["hardware"].rpartition(", ")[0]
    return Setting(device=device.type, hardware=hardware, threads=torch.get_num_threads(), versions=versions)
