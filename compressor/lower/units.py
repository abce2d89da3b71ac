"""What of a model can be lowered: its layers, and the feed-forward pairs among them, as one example forward shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compressor.errors import CompressorError
from compressor.lower import attention
from compressor.lower.attention import CrossAttention, SelfAttention
from compressor.lower.backend import Unit
from compressor.lower.held import answer
from compressor.lower.pairs import chain_of, is_chain
from compressor.lower.projections import FusedProjections, Sharers, joined
from compressor.sparsity.clustered import Clustered
from compressor.sparsity.pattern import NM
from compressor.sparsity.venom import Venom

_LAYERS = (nn.Linear, nn.Conv2d)
_GROUPS = (2, 4, 8, 16, 32)
_ROWS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
_DENSEST = 0.75


def pattern_of(weight: Tensor) -> NM | Clustered | Venom | None:
    """The N:M pattern that the zeros of `weight` (out, in, *kernel) obey: the sparsest, in the smallest groups, with the most
    rows (a power of two) that share a choice, be they neighbours or not, or that share columns (`venom`). None where less than
    a quarter of it is zero in this way."""
    if weight.dim() < 2 or not weight.numel():
        return None
    rows, channels = weight.shape[:2]
    kept = (weight != 0).view(torch.uint8).reshape(rows, channels, -1)
    share = int(kept.count_nonzero()) / weight.numel()
    if share > _DENSEST:
        return None
    best: tuple[int, int] | None = None
    counts = kept
    for m in _GROUPS:
        if channels % m:
            break
        counts = _in_groups(counts, 2)
        n = max(1, int(counts.max()))
        if n / m <= _DENSEST and (best is None or n / m < best[0] / best[1]):
            best = n, m
        if n / m == share:  # which none is below
            break
    if best is None:
        return None
    n, m = best
    most, shared = 1, kept
    for v in _ROWS:
        if rows % v:
            break
        shared = shared.reshape(-1, 2, *shared.shape[1:]).amax(1)  # any() takes 75 times as long
        if int(_in_groups(shared, m).max()) > n:
            break
        most = v
    if most > 1:
        return NM(n, m, most)
    for v in (8, 4, 2):
        if rows % v == 0 and not (clustered := Clustered(n, m, v)).violations(weight != 0):
            return clustered
    for v in _ROWS[::-1] if n <= 4 < m else ():  # four columns of four are all: that is plain N:4
        # so few rows use four columns at most whatever they choose
        if rows % v == 0 and v * n > 4 and not (venom := Venom(n, m, v)).violations(weight != 0):
            return venom
    return NM(n, m)


def _in_groups(counts: Tensor, m: int) -> Tensor:
    """The sums of every `m` of `counts` (rows, channels, taps) that follow each other: faster than torch's sum of so few."""
    found: Tensor = reduce(torch.add, counts.reshape(len(counts), -1, m, counts.shape[2]).unbind(2))
    return found


@dataclass(frozen=True, eq=False)
class Found:
    """A unit, the module that its dense form stands for (`at`, a path in the model), and the names of its weights.

    `fused` are the paths of the layers that it stands for side by side, `at` first; empty where it stands for one module."""

    unit: Unit
    at: str
    weights: tuple[str, ...]
    fused: tuple[str, ...] = ()

    @property
    def patterns(self) -> tuple[NM | Clustered | Venom | None, ...]:
        """The pattern of each of its weights."""
        return self.unit.patterns * max(1, len(self.fused))


@dataclass(frozen=True, eq=False)
class LeftOut:
    """A layer that is not lowered, and why."""

    weight: str
    reason: str


@torch.no_grad()
def find_units(
    model: nn.Module, forward: Callable[[], Any], fuse: bool | Collection[Sequence[str]] = False
) -> tuple[list[Found], list[LeftOut]]:
    """The units of `model`, in the order in which `forward` (one example forward of it) reaches them.

    A layer that several names share, that is not reached, or whose weight is no plain parameter stays as it is. With `fuse`, Linears
    of one pattern that a module calls on one tensor are one unit: all such, or those groups of names that it holds.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules(remove_duplicate=False))
    counts = Counter(map(id, modules.values()))
    layers = {name: module for name, module in modules.items() if isinstance(module, _LAYERS)}
    blocks = {name: module for name, module in modules.items() if _two_linears(module)}
    watch = _Watch()
    with watch, _hooked(watch, model, {*layers.values(), *blocks.values()}):
        forward()
    once = {name: layer for name, layer in layers.items() if counts[id(layer)] == 1}
    found = _pairs(blocks, once, watch, names)
    taken = {id(layer) for one in found for layer in one.unit.layers}
    for one in _side_by_side(once, watch, names, None if fuse is True else fuse or ()):
        taken |= {id(layers[path]) for path in one.fused}
        found.append(one)
    left: list[LeftOut] = []
    for name, layer in layers.items():
        if id(layer) in taken:
            continue
        taken.add(id(layer))
        if id(layer) not in watch.shapes:
            reason: str | None = "the example did not reach it as an ordinary call with one tensor"
        elif counts[id(layer)] > 1:
            reason = "several modules of the model are this one layer"
        else:
            reason = _irreplaceable(layer, names)
        if reason is None:
            found.append(_found(name, layer, watch.shapes[id(layer)], names, (layer,)))
        else:
            weight = names.get(id(layer.weight), f"{name}.weight" if name else "weight")
            left.append(LeftOut(weight, reason))
    order = {identity: place for place, identity in enumerate(watch.shapes)}
    found.sort(key=lambda f: order[id(modules[f.at])])
    calls = {name: watch.attention.get(id(module), []) for name, module in modules.items()}
    return found + [
        one
        for name, module in modules.items()
        if calls[name] and counts[id(module)] == 1 and not any(calls[inner] for inner in _within(name, modules))
        for one in _attentions(name, calls[name])
    ], left


def _within(name: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """The names of the `modules` inside of the one called `name`: what replaces its attention would replace theirs too."""
    return (inner for inner in modules if inner != name and (not name or inner.startswith(f"{name}.")))


def _attentions(name: str, calls: list[tuple[tuple[int, ...], float | None]]) -> list[Found]:
    """The attention of the module `name`, as one unit, where all `calls` are alike."""
    if not calls or len(set(calls)) != 1 or not calls[0][0]:
        return []
    (images, heads, queries, channels, keys), scale = calls[0]
    alike = queries == keys
    unit = Unit(
        name=name,
        module=SelfAttention(scale) if alike else CrossAttention(queries, scale),
        input_shape=(images, queries, 3, heads, channels) if alike else (images, queries + 2 * keys, heads, channels),
        dtype=torch.float32,
        device=torch.device("cpu"),
        patterns=(),
    )
    return [Found(unit, name, ())]


def _found(
    name: str,
    module: nn.Module,
    shape: tuple[int, ...],
    names: dict[int, str],
    layers: Sequence[nn.Module],
    fused: tuple[str, ...] = (),
) -> Found:
    """`module` as a unit that stands for `layers` of the model."""
    weights = [one.weight for one in module.modules() if isinstance(one, _LAYERS)]
    patterns = tuple(pattern_of(weight) for weight in weights)
    unit = Unit(name, module, shape, weights[0].dtype, weights[0].device, patterns)
    return Found(unit, name, tuple(names[id(layer.weight)] for layer in layers), fused)


def _pairs(
    blocks: Mapping[str, nn.Module], layers: Mapping[str, nn.Module], watch: _Watch, names: dict[int, str]
) -> list[Found]:
    """The feed-forward pairs of `layers` that make up a whole block, each layer in one of them."""
    free = {id(layer) for layer in layers.values()}
    found = []
    for name, block in blocks.items():
        chain, shape = watch.chains.get(id(block)), watch.shapes.get(id(block))
        if chain is None or shape is None:
            continue
        first, _, second = chain
        if not {id(first), id(second)} <= free or any(_irreplaceable(layer, names) for layer in (first, second)):
            continue
        if any(map(_observed, block.modules())) or not is_chain(block, chain, shape):
            continue
        free -= {id(first), id(second)}
        found.append(_found(name, chain, shape, names, (first, second)))
    return found


def _side_by_side(
    layers: Mapping[str, Any], watch: _Watch, names: dict[int, str], wanted: Collection[Sequence[str]] | None
) -> list[Found]:
    """The units of several of `layers` that take the same tensor: the groups of names in `wanted`; None: all of one pattern."""
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    paths = {id(layer): name for name, layer in linears.items() if _irreplaceable(layer, names) is None}
    found = []
    for group in watch.sharers.groups():
        own = [paths[layer] for layer in group if layer in paths and layer in watch.shapes]
        for fused in alike(layers, own) if wanted is None else [tuple(one) for one in wanted if {*one} <= {*own}]:
            parts = [layers[path] for path in fused]
            found.append(_found(fused[0], joined(parts), watch.shapes[id(parts[0])], names, parts, fused))
    return found


def alike(layers: Mapping[str, Any], paths: Sequence[str]) -> list[tuple[str, ...]]:
    """Those of `paths` whose weights have one pattern, dtype and device, where they are several."""
    groups: dict[Any, list[str]] = {}
    for path in paths:
        weight = layers[path].weight
        groups.setdefault((pattern_of(weight), weight.dtype, weight.device), []).append(path)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _irreplaceable(layer: nn.Module, names: dict[int, str]) -> str | None:
    """Why no other module can stand for `layer`; None where one can."""
    weight = layer.weight
    if type(layer) not in _LAYERS or not isinstance(weight, nn.Parameter) or id(weight) not in names:
        return "its weight is no plain parameter of a plain layer"
    if not weight.numel():
        return "its weight is empty"
    if not weight.is_floating_point():
        return f"not a floating-point weight ({weight.dtype})"
    return "it has forward hooks, or another forward, which would be lost" if _observed(layer) else None


def is_unit(module: nn.Module) -> bool:
    """Whether `module` itself may be lowered as one."""
    return isinstance(module, _LAYERS) or _two_linears(module)


def _observed(layer: nn.Module) -> bool:
    """Whether calling `layer` does more than its class: by hooks, or by a forward of its own, as adapters and offloading set it."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def _two_linears(module: nn.Module) -> bool:
    return not isinstance(module, _LAYERS) and sum(isinstance(m, nn.Linear) for m in module.modules()) == 2


class _Watch(TorchFunctionMode):
    """Records what one forward does: the shape of the one tensor that each module takes, and which blocks do nothing but
    Linear, GELU, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.chains: dict[int, nn.Sequential | None] = {}
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._open: dict[int, int] = {}
        self._inside: list[int] = []
        self.attention: dict[int, list[tuple[tuple[int, ...], float | None]]] = {}
        self.sharers = Sharers()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is attention.function and self._inside:
            self.attention.setdefault(self._inside[-1], []).append(_attention_of(*args, **kwargs))
        result = func(*args, **kwargs)
        if self._open and getattr(func, "__name__", "") not in ("__get__", "size", "dim", "stride", "is_inference"):
            self._calls.append((func, args, kwargs, result))
        return result

    def inside(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside.append(id(module))
        self.sharers.enter()

    def outside(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        self._inside.pop()
        self.sharers.leave()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if value is not None]
        self.shapes.pop(id(module), None)
        if len(args) >= 1 and isinstance(args[0], Tensor) and len(tensors) == 1:
            self.shapes[id(module)] = tuple(args[0].shape)
            if isinstance(module, nn.Linear):
                self.sharers.takes(module, args[0])
        if _two_linears(module):
            self._open[id(module)] = len(self._calls)

    def leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        start = self._open.pop(id(module), None)
        if start is None:
            return
        chain = chain_of(module, self._calls[start:], args[0], result) if id(module) in self.shapes else None
        if chain is not None and self.chains.get(id(module), chain) is not None:
            self.chains[id(module)] = chain
        else:
            self.chains[id(module)] = None  # what is no such pair once is none
        if not self._open:
            self._calls.clear()  # they hold every value in between


def _attention_of(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
) -> tuple[tuple[int, ...], float | None]:
    """The shape of the queries of an attention that kernels take, and how many keys there are; and its scale. An empty shape of any
    other, and of one whose values have other channels than its keys."""
    if not attention.fits(query, key, value, *rest, **named) or key.shape != value.shape:
        return (), None
    return (*query.shape, key.shape[2]), named.get("scale")


@contextmanager
def _hooked(watch: _Watch, model: nn.Module, shown: Collection[nn.Module]) -> Iterator[None]:
    """`watch` hears when a module of `model` begins and ends, and what those that are `shown` take and give."""
    handles = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # which has no hooks, and here no weights
            continue
        handles.append(module.register_forward_pre_hook(watch.inside))
        handles.append(module.register_forward_hook(watch.outside, always_call=True))
    for module in shown:
        handles.append(module.register_forward_pre_hook(watch.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(watch.leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def put(model: nn.Module, at: str, module: nn.Module) -> nn.Module:
    """`model` with `module` in the place `at`; the new model itself where the place is the whole. An attention has no place of its
    own: the module that calls it stays. So does a block, with `module` for all that was in it. What is asked of a layer beside being
    called, `module` answers as that layer."""
    if isinstance(module, attention.FusedAttention):
        attention.attach(model, at, module)
        return model
    if not at:
        answer(module, model)
        return module
    parent, _, name = at.rpartition(".")
    holder = model.get_submodule(parent)
    if name not in holder._modules:
        raise CompressorError(f"{at}: no such module", "The plan belongs to another model.")
    if (dense := holder._modules[name]) is not None:
        answer(module, dense)
        if not isinstance(dense, _LAYERS):  # diffusers looks for blocks by their class
            dense._modules.clear()
            dense.lowered, dense.forward = module, module.forward
            return model
    holder._modules[name] = module
    return model


def put_unit(model: nn.Module, one: Found, module: nn.Module) -> nn.Module:
    """As `put`, in the place of the unit `one`: of all the layers that it stands for."""
    if not one.fused:
        return put(model, one.at, module)
    sizes = [len(model.get_parameter(f"{path}.weight")) for path in one.fused]
    first = FusedProjections(module, sizes, one.unit.input_shape[:-1])
    for path, part in zip(one.fused, [first, *first.others()], strict=True):
        put(model, path, part)
    return model
