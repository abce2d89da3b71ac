"""The chooser: times every backend on every layer, takes a sparse kernel only where it pays, and then doubts itself.

A layer's candidates take turns on random data of the example's shape, with weights of the model that follow each other as
they do in it. At the end the whole lowered model is timed against the best dense form, and falls back to it where it does
not pay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from compressor import registry
from compressor.adapter import Adapter
from compressor.environment import environment
from compressor.errors import CompressorError, UsageError
from compressor.lower.backend import Backend, Unit
from compressor.lower.plan import Cache, Candidate, Form, LayerPlan, Plan, Setting
from compressor.lower.units import Found, LeftOut, find_units, put
from compressor.progress import Progress
from compressor.timing import interleaved, iqr_ms, median_ms
from compressor.weights import weights_sha256

MARGIN = 0.97
"""A candidate is taken in place of a dense one only where it needs at most this share of its time."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
"""The largest relative error of a layer: rounding, in the order in which a kernel adds."""

_WHOLE = 20.0  # the error of a whole model may be this many times that of a layer
_ROUNDS = 25
_GUARD_ROUNDS = 11
_MEMBERS = 4  # layers of one shape that take turns, so that weights come from memory as they do in the model
_SEED = 0


@dataclass(frozen=True, eq=False)
class Lowered:
    """`model` runs like the dense one, faster or at least not slower; `plan` says how it was made and measured.

    The model is for inference: it takes inputs of other batch sizes too, but its weights are packed, so save the sparse
    model and lower it again where it is used.
    """

    model: nn.Module
    plan: Plan


def lower(
    model: nn.Module,
    example_inputs: Any,
    backends: str | Sequence[str | Backend] = "auto",
    dtype: torch.dtype | None = None,
    *,
    adapter: Adapter | None = None,
    plan: Plan | None = None,
    compiled: bool = False,
    tolerance: float | None = None,
    cache: bool = True,
) -> Lowered:
    """The sparse `model` with each layer on the fastest kernel of this machine. `model` itself is left as it is.

    `example_inputs` is what the model is called with (a tensor, a tuple of positional or a dict of named arguments; what
    `adapter.predict` takes where an adapter is given), in the size and on the device of its later use. `backends` names the
    ones to try, besides the dense layer itself; "auto" is all that are installed. `dtype` runs the model in another precision: its
    weights and its inputs of two or more dims are cast, its outputs cast back. `plan` applies the choices of an earlier
    lowering without measuring. With `compiled`, forms under torch.compile are timed too, which takes minutes. `tolerance` is
    the largest relative error of a layer; by default that of rounding. `cache` keeps measured times on disk.

    Raises UsageError for unknown backends, CompressorError where the example does not run or a plan does not fit.
    """
    steps = lowering(
        model,
        example_inputs,
        backends,
        dtype,
        adapter=adapter,
        plan=plan,
        compiled=compiled,
        tolerance=tolerance,
        cache=cache,
    )
    while True:
        try:
            next(steps)
        except StopIteration as finished:
            result: Lowered = finished.value
            return result


@torch.no_grad()
def lowering(
    model: nn.Module,
    example_inputs: Any,
    backends: str | Sequence[str | Backend] = "auto",
    dtype: torch.dtype | None = None,
    *,
    adapter: Adapter | None = None,
    plan: Plan | None = None,
    compiled: bool = False,
    tolerance: float | None = None,
    cache: bool = True,
) -> Generator[Progress, None, Lowered]:
    """`lower` as a generator: yields its progress, and returns the `Lowered`."""
    job = _prepared(model, example_inputs, backends, dtype, adapter)
    if plan is not None:
        return Lowered(_planned(job, plan), plan)
    store = Cache(job.setting) if cache else None
    layers: list[LayerPlan] = []
    for done, group in enumerate(groups := _groups(job.found)):
        yield Progress("lower", done, len(groups), group[0].at)
        layers += _choose(group, job, tolerance, store)
    places = {one.at: place for place, one in enumerate(job.found)}
    layers.sort(key=lambda layer: places[layer.name])
    yield Progress("lower", len(groups), len(groups), "whole model")
    loosest = max((TOLERANCE.get(one.unit.dtype, 1e-5) for one in job.found), default=1e-5)
    return _guarded(job, layers, compiled, _WHOLE * (tolerance or loosest), weights_sha256(model))


# --- Preparation. ---


@dataclass(frozen=True, eq=False)
class _Job:
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


def _prepared(
    model: nn.Module,
    example_inputs: Any,
    backends: str | Sequence[str | Backend],
    dtype: torch.dtype | None,
    adapter: Adapter | None,
) -> _Job:
    chosen, notes = _backends(backends)
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
    return _Job(base, forward, inputs, device, _setting(device), found, left, chosen, notes)


def _backends(asked: str | Sequence[str | Backend]) -> tuple[list[Backend], list[str]]:
    """The backends that are asked for, dense ones first, and what there is to say about those that are broken."""
    auto = asked == "auto"
    names = registry.names("backends") if auto else [asked] if isinstance(asked, str) else list(asked)
    made, notes = [], []
    for name in names:
        try:
            made.append(name if isinstance(name, Backend) else registry.backend(name))
        except CompressorError as error:
            if not auto:
                raise
            notes.append(error.message)  # one broken plugin shall not take the others with it
    if not any(backend.name == "eager" for backend in made):
        made.append(registry.backend("eager"))
    return sorted(made, key=lambda backend: (backend.name != "eager", backend.skips_zeros, backend.name)), notes


def _lively(inputs: Any) -> Any:
    """The example with random numbers in place of its pictures: some kernels are faster on zeros."""
    rng = torch.Generator().manual_seed(_SEED)

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


def _own(model: nn.Module) -> nn.Module:
    """A copy whose parameters are its own, and take no gradients."""
    return copy.deepcopy(model).requires_grad_(False)


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


# --- One layer. ---


def _groups(found: Sequence[Found]) -> list[list[Found]]:
    """Units that run alike: the same shapes, patterns and kind. They are timed together."""
    groups: dict[str, list[Found]] = {}
    for one in found:
        groups.setdefault(_key(one.unit), []).append(one)
    return list(groups.values())


def _key(unit: Unit) -> str:
    return f"{unit.module!r} {unit.input_shape} {unit.dtype} {[str(p) for p in unit.patterns]}"


def _choose(group: Sequence[Found], job: _Job, tolerance: float | None, store: Cache | None) -> list[LayerPlan]:
    """Time the backends on the group, and choose for each of its layers."""
    backends, device = job.backends, job.device
    unit = group[0].unit
    allowed = TOLERANCE.get(unit.dtype, 1e-5) if tolerance is None else tolerance
    refused = {b.name: reason for b in backends if (reason := b.unavailable(device) or b.refusal(unit))}
    able = [backend for backend in backends if backend.name not in refused]
    rng = torch.Generator().manual_seed(_SEED)
    x = torch.randn(unit.input_shape, generator=rng).to(device, unit.dtype)
    built: dict[str, list[nn.Module]] = {}
    errors: dict[str, float] = {}
    sample = x[: max(1, min(len(x), -(-4096 * len(x) // max(1, x.numel() // x.shape[-1]))))]
    wanted = _reference(unit, sample)
    for backend in able:
        try:
            modules = [backend.build(one.unit) for one in group[:_MEMBERS]]
            error = _relative(modules[0](sample), wanted)
        except Exception as failure:  # a kernel may refuse a shape only when it runs
            refused[backend.name] = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
            continue
        errors[backend.name] = error
        if not error <= allowed:
            refused[backend.name] = f"its error is {error:.1e}, above {allowed:.0e}"
            continue
        built[backend.name] = modules
    key = f"{_key(unit)} {sorted(built)}"
    times = store.get(key) if store is not None else None
    if times is None or set(times) != set(built):
        measured = interleaved([_in_turn(modules, x) for modules in built.values()], _ROUNDS, device)
        times = {name: median_ms(seconds) for name, seconds in zip(built, measured, strict=True)}
        if store is not None:
            store.put(key, times)
    candidates = tuple(
        Candidate(
            backend=b.name, median_ms=times.get(b.name), error=_finite(errors.get(b.name)), refused=refused.get(b.name)
        )
        for b in backends
    )
    skipping = {backend.name for backend in backends if backend.skips_zeros}
    choice, reason = _best(times, skipping)
    return [_layer_plan(one, candidates, choice, reason, choice in skipping) for one in group]


def _in_turn(modules: Sequence[nn.Module], x: Tensor) -> Callable[[], object]:
    turn = iter(range(1_000_000_000))
    return lambda: modules[next(turn) % len(modules)](x)


def _finite(error: float | None) -> float | None:
    return error if error is not None and math.isfinite(error) else None


def _best(times: dict[str, float], skipping: set[str]) -> tuple[str, str]:
    """The backend to take, and why: the fastest dense one, or a sparse one that is clearly faster than it."""
    dense = {name: time for name, time in times.items() if name not in skipping}
    base = "eager"
    fastest = min(dense, key=dense.__getitem__)
    if dense[fastest] <= MARGIN * dense[base]:
        base = fastest
    sparse = {name: time for name, time in times.items() if name in skipping}
    if not sparse:
        return base, "no sparse kernel takes this layer"
    best = min(sparse, key=sparse.__getitem__)
    ratio = dense[base] / sparse[best]
    if sparse[best] <= MARGIN * dense[base]:
        return best, f"{ratio:.2f}x the speed of {base}, the best dense form"
    return base, f"{best} has {ratio:.2f}x the speed of {base}, less than the {1 / MARGIN:.2f}x that are asked"


def _reference(unit: Unit, x: Tensor) -> Tensor:
    out: Tensor = copy.deepcopy(unit.module).double()(x.double())
    return out


def _relative(out: Tensor, wanted: Tensor) -> float:
    """The root mean square difference, relative to the wanted values."""
    difference = (out.double() - wanted).norm()
    return float(difference / wanted.norm()) if wanted.any() else float(difference)


def _layer_plan(
    one: Found, candidates: tuple[Candidate, ...], choice: str, reason: str, skips_zeros: bool
) -> LayerPlan:
    unit = one.unit
    positions = torch.Size(unit.input_shape).numel() // unit.input_shape[-1]
    shapes = []
    for layer in unit.layers:
        if isinstance(layer, nn.Conv2d):
            with torch.device("meta"):
                out = copy.deepcopy(layer).to("meta")(torch.empty(unit.input_shape, dtype=unit.dtype))
            positions = out.numel() // out.shape[1]
        shapes.append((positions, layer.weight.shape[0], layer.weight[0].numel()))
    kind = "pair" if len(shapes) == 2 else "convolution" if isinstance(unit.module, nn.Conv2d) else "linear"
    return LayerPlan.model_validate(
        {
            "name": one.at,
            "kind": kind,
            "weights": one.weights,
            "shapes": shapes,
            "patterns": [None if p is None else str(p) for p in unit.patterns],
            "dtype": str(unit.dtype).removeprefix("torch."),
            "gflop": sum(2e-9 * m * n * k for m, n, k in shapes),
            "candidates": candidates,
            "choice": choice,
            "reason": reason,
            "skips_zeros": skips_zeros,
        }
    )


# --- The whole model. ---


def _built(job: _Job, choices: dict[str, str]) -> nn.Module:
    """The model with the chosen modules in place; tensors that stay are shared with it."""
    form = copy.deepcopy(job.base, {id(t): t for t in (*job.base.parameters(), *job.base.buffers())})
    for one in job.found:
        if choices[one.at] != "eager":
            form = put(form, one.at, job.backend(choices[one.at]).build(one.unit))
    return form


def _fastest_dense(layer: LayerPlan, skipping: set[str]) -> str:
    times = {c.backend: c.median_ms for c in layer.candidates if c.median_ms is not None}
    return _best({name: time for name, time in times.items() if name not in skipping}, skipping)[0]


def _dense(job: _Job, layers: Sequence[LayerPlan]) -> nn.Module:
    """Every layer in its fastest dense form."""
    skipping = {backend.name for backend in job.backends if backend.skips_zeros}
    return _built(job, {layer.name: _fastest_dense(layer, skipping) for layer in layers})


def _guarded(job: _Job, layers: Sequence[LayerPlan], compiled: bool, allowed: float, weights: str) -> Lowered:
    """Time the forms of the whole model side by side, and take the fastest: a sparse one only where it wins."""
    forward, base, device = job.forward, job.base, job.device
    notes = list(job.notes)
    forms: dict[str, nn.Module] = {"eager": base, "dense": _dense(job, layers)}
    if any(layer.skips_zeros for layer in layers):
        forms["lowered"] = _built(job, {layer.name: layer.choice for layer in layers})
    if compiled:
        forms["eager, compiled"] = _compiled(base, device)
        if "lowered" in forms:  # dense layers are left to the compiler, which packs them itself
            sparse_only = {layer.name: layer.choice if layer.skips_zeros else "eager" for layer in layers}
            forms["lowered, compiled"] = _compiled(_built(job, sparse_only), device)
    wanted = forward(base)
    errors: dict[str, float] = {}
    for name, form in list(forms.items()):
        try:
            errors[name] = _deviation(forward(form), wanted)
            if not errors[name] <= allowed:
                notes.append(f"{name}: its output differs by {errors[name]:.1e}, above {allowed:.0e}: not taken")
                del forms[name]
        except Exception as failure:  # a model may look into its layers, or a compiler fail
            if name == "eager":
                raise
            notes.append(f"{name} does not run: {type(failure).__name__}: {str(failure).splitlines()[0][:200]}")
            del forms[name]
    times = interleaved([lambda f=form: forward(f) for form in forms.values()], _GUARD_ROUNDS, device)  # type: ignore[misc]
    medians = {name: median_ms(seconds) for name, seconds in zip(forms, times, strict=True)}
    spread = {name: iqr_ms(seconds) for name, seconds in zip(forms, times, strict=True)}
    dense = {name: time for name, time in medians.items() if not name.startswith("lowered")}
    opponent = min(dense, key=dense.__getitem__)
    sparse = {name: time for name, time in medians.items() if name.startswith("lowered")}
    best = min(sparse, key=sparse.__getitem__) if sparse else None
    if best is not None and sparse[best] < dense[opponent]:
        choice = best
        reason = f"{dense[opponent] / sparse[best]:.2f}x the speed of {opponent}, the best dense form"
    else:
        choice = opponent
        if best is None:
            reason = "no layer gains from a sparse kernel here"
        else:
            reason = f"the lowered model has {dense[opponent] / sparse[best]:.2f}x the speed of {opponent}: not taken"
    plan = Plan(
        weights_sha256=weights,
        dtype=layers[0].dtype if layers else str(next(base.parameters()).dtype).removeprefix("torch."),
        input_shapes=tuple(tuple(leaf.shape) for leaf in tree_leaves(job.inputs) if isinstance(leaf, Tensor)),
        setting=job.setting,
        layers=tuple(layers),
        left_out={one.weight: one.reason for one in job.left},
        forms=tuple(
            Form(
                name=name,
                dense=name in dense,
                median_ms=medians[name],
                iqr_ms=spread[name],
                speedup=dense[opponent] / medians[name],
                error=errors[name],
            )
            for name in forms
        ),
        choice=choice,
        reason=reason,
        notes=tuple(notes),
    )
    chosen = forms[choice]
    return Lowered(chosen if "compiled" in choice else _own(chosen), plan)


def _compiled(model: nn.Module, device: torch.device) -> nn.Module:
    options: Any = {"freezing": True} if device.type == "cpu" else {"triton.cudagraphs": True}
    compiled: nn.Module = torch.compile(_own(model), options=options)  # type: ignore[assignment]
    return compiled


def dense_forms(
    model: nn.Module,
    example_inputs: Any,
    plan: Plan,
    *,
    dtype: torch.dtype | None = None,
    adapter: Adapter | None = None,
) -> dict[str, nn.Module]:
    """The dense forms that `plan` timed, by name, of another model of the same layers: of the one before pruning."""
    names = [c.backend for c in plan.layers[0].candidates] if plan.layers else "auto"
    job = _prepared(model, example_inputs, names, dtype, adapter)
    forms = {"eager": job.base, "dense": _dense(job, _checked(job, plan, weights=False))}
    if plan.form("eager, compiled") is not None:
        forms["eager, compiled"] = _compiled(job.base, job.device)
    return forms


def _deviation(out: Any, wanted: Any) -> float:
    """The largest relative error among the tensors of two outputs."""
    pairs = zip(tree_leaves(out), tree_leaves(wanted), strict=True)
    return max((_relative(a, b.double()) for a, b in pairs if isinstance(a, Tensor)), default=0.0)


# --- A plan from before. ---


def _planned(job: _Job, plan: Plan) -> nn.Module:
    """The form that `plan` chose, of the job's weights."""
    layers = _checked(job, plan)
    name, _, compiled = plan.choice.partition(", ")
    if name == "lowered":
        sparse = {layer.name: layer.choice if layer.skips_zeros or not compiled else "eager" for layer in layers}
        form = _built(job, sparse)
    else:
        form = job.base if name == "eager" else _dense(job, layers)
    return _compiled(form, job.device) if compiled else _own(form)


def _checked(job: _Job, plan: Plan, weights: bool = True) -> list[LayerPlan]:
    """The plan's layers in the order of the units, or an error that says what differs; the patterns too where `weights`."""
    again = "Lower without it, to measure again."
    if plan.setting != job.setting:
        before, now = plan.setting.model_dump(), job.setting.model_dump()
        field = next(name for name in before if before[name] != now[name])
        raise CompressorError(f"the plan was measured with {field} {before[field]}, this is {now[field]}", again)
    layers = {layer.name: layer for layer in plan.layers}
    units = {one.at: one.unit for one in job.found}
    if differing := sorted(set(layers) ^ set(units)):
        raise CompressorError(f"the plan is for another model: {differing[0]}", again)
    for name, layer in layers.items():
        job.backend(layer.choice)
        patterns = tuple(None if p is None else str(p) for p in units[name].patterns)
        sizes = tuple((w.weight.shape[0], w.weight[0].numel()) for w in units[name].layers)
        if (weights and patterns != layer.patterns) or sizes != tuple((n, k) for _, n, k in layer.shapes):
            raise CompressorError(
                f"the plan does not fit {name}: it was {layer.patterns} {layer.shapes}, and is {patterns} {sizes}",
                again,
            )
    return [layers[one.at] for one in job.found]
