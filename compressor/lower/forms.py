"""The forms of the whole model: built from a plan's choices, timed side by side, and the fastest taken.

A layer that is fast alone may not be in its model. So the lowered model is timed against the best dense form of the whole,
and falls back to it where it does not pay.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from compressor.adapter import Adapter, tensors_of
from compressor.cost.contention import Cores
from compressor.cost.timing import iqr_ms
from compressor.errors import CompressorError, first_line
from compressor.lower import contest
from compressor.lower.chooser import deviation, held, refusal_of, seeded
from compressor.lower.contest import BASE, Contest
from compressor.lower.graphs import Graphed
from compressor.lower.job import Job, built, prepared
from compressor.lower.plan import Form, LayerPlan, Plan, Search

_ROUNDS = 11
_COMPILED = 64  # forms of models of one class, of all lowerings of a process
_UNCACHED = "dense, packed"


class _Bound(NamedTuple):
    """What the dense form of the whole model may not have: anything that quantises in the layers `exact`, and, where `alike`, in any
    layer a form that is less exact than the layer's choice."""

    exact: tuple[str, ...] = ()
    alike: bool = False


_SLACK = 1.05
"""The error that a form may have of that of another which counts as no more exact."""


def _fastest_dense(job: Job, layers: Sequence[LayerPlan], bound: _Bound) -> dict[str, str]:
    """Every layer's fastest dense form by its times, doubtful or not: sparse ones are held against it, and it against the model as it
    is."""

    def out(layer: LayerPlan) -> set[str]:
        if layer.name in bound.exact:
            return job.skipping | job.quantising
        errors = {
            one.backend: one.error
            for one in layer.candidates
            if one.error is not None and one.backend in job.quantising
        }
        most = _SLACK * errors.get(layer.choice, 0.0) if bound.alike else math.inf
        return job.skipping | {name for name, error in errors.items() if error > most}

    return {layer.name: held(layer, job.skipping, without=out(layer)).verdict(sure=False).choice for layer in layers}


def _bound(job: Job, layers: Sequence[LayerPlan], allowed: float) -> _Bound:
    """What the dense form has to do without, so that its whole error is `allowed`: nothing, what is less exact than the lowered model
    layer by layer, or all that quantises."""
    if not job.quantising & set(_fastest_dense(job, layers, _Bound()).values()):
        return _Bound()
    expected = seeded(job.forward, job.base)
    in_none = tuple(layer.name for layer in layers if layer.choice not in job.quantising)
    for bound in (_Bound(), _Bound(in_none, alike=True)):
        try:
            if deviation(seeded(job.forward, built(job, _fastest_dense(job, layers, bound))), expected) <= allowed:
                return bound
        except Exception:  # one that does not run is found and told later
            continue
    return _Bound(tuple(layer.name for layer in layers))


def _bound_of(plan: Plan) -> _Bound:
    return _Bound(plan.exact, plan.alike)


def _packed(job: Job, layers: Sequence[LayerPlan]) -> dict[str, str]:
    """Every layer in the first dense form that it has besides its own, whatever times say; quantised ones are none."""
    dense = [b.name for b in job.backends if not b.skips_zeros and not b.quantises and b.name != BASE]
    choices = {}
    for layer in layers:
        able = {c.backend for c in layer.candidates if c.refused is None}
        choices[layer.name] = next((name for name in dense if name in able), BASE)
    return choices


def _choices(job: Job, form: str, layers: Sequence[LayerPlan], bound: _Bound) -> dict[str, str]:
    """The backend of each layer in the `form` of that name; none in the model as it is."""
    if form == _UNCACHED:
        return _packed(job, layers)
    name = form.partition(", ")[0]
    if name == "lowered":
        return {layer.name: layer.choice for layer in layers}
    return _fastest_dense(job, layers, bound) if name == "dense" else {}


def _forms(
    job: Job, layers: Sequence[LayerPlan], compiled: bool, cached: bool, dense: Mapping[str, str]
) -> dict[str, nn.Module]:
    """The model as it is, in the best `dense` form, and lowered; on a GPU also as CUDA graphs, and all that torch.compile makes. Where
    times were `cached`, also a dense form that they have no say in: they may be false."""
    forms: dict[str, nn.Module] = {"eager": job.base, "dense": built(job, dense)}
    if any(layer.skips_zeros for layer in layers):
        forms["lowered"] = built(job, {layer.name: layer.choice for layer in layers})
    if job.device.type == "cuda" and any(
        isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in job.base.modules()
    ):
        # tensor cores take pixels with their channels side by side; a compiler lays them out so by itself
        forms |= {f"{name}, channels last": channels_last(form) for name, form in forms.items()}
    if job.device.type == "cuda" and not job.forward.changed:  # a replay runs none of the model's code
        forms |= {f"{name}, graph": Graphed(form) for name, form in forms.items()}
    if cached and (packed := _packed(job, layers)) != dense:
        forms[_UNCACHED] = built(job, packed)
    if compiled:
        # A compiler packs dense layers itself, and is not always as fast with its own as with those that were packed before.
        as_it_is = set(dense.values()) <= {"eager"} and not any(one.fused for one in job.found)
        for name in _PLAIN:
            if name in forms and not (name == "dense" and as_it_is):
                forms[f"{name}, compiled"] = _compiled(forms[name], job.device)
    return forms


def channels_last(form: nn.Module) -> nn.Module:
    """A copy whose weights of four dims lie with their channels last; activations follow them."""
    laid: nn.Module = own(form).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return laid


def guarded(
    job: Job,
    layers: Sequence[LayerPlan],
    compiled: bool,
    allowed: float,
    weights: str,
    search: Search | None = None,
    cached: bool = False,
) -> tuple[nn.Module, Plan]:
    """Time the forms of the whole model side by side, always anew, and take the fastest: a sparse one only where it clearly gains.

    `cached`: whether layers were chosen by times that were not measured now.
    """
    forward, base, device = job.forward, job.base, job.device
    bound = _bound(job, layers, allowed)
    dense = _fastest_dense(job, layers, bound)
    forms = _forms(job, layers, compiled, cached, dense)
    errors, refused = _right(job, forms, allowed)
    forms = {name: form for name, form in forms.items() if name in errors}
    calls: dict[str, Callable[[], object]] = {name: partial(forward, form) for name, form in forms.items()}
    sparse = {name for name in forms if name.startswith("lowered")}
    began = Cores.now()
    rounds = contest.timed(calls, _ROUNDS, device, sparse)
    held = Contest.of(rounds, sparse, contest.taken_since(began, device))
    products = {name: _products(job, _choices(job, name, layers, bound)) for name in forms}
    choice, reason = _chosen(held, products)
    opponent = min(held.dense, key=held.medians.__getitem__)
    notes = [*job.notes, *refused, *([] if search is None else [search.remark])]
    if cached and choice not in sparse:
        notes.append("layers were chosen by times from the cache; `cache=False` (`--fresh`) measures them again")
    plan = Plan(
        weights_sha256=weights,
        dtype=layers[0].dtype if layers else _dtype_of(base),
        input_shapes=tuple(tuple(leaf.shape) for leaf in tensors_of(job.forward.inputs)),
        setting=job.setting,
        layers=tuple(layers),
        left_out={one.weight: one.reason for one in job.left},
        forms=tuple(
            Form(
                name=name,
                dense=name not in sparse,
                median_ms=held.medians[name],
                iqr_ms=iqr_ms([ms / 1000 for ms in rounds[name]]),
                speedup=held.ratio(name, opponent),
                error=errors[name],
                against=dict(held.against[name]),
                products=products[name],
            )
            for name in forms
        ),
        choice=choice,
        reason=reason,
        **bound._asdict(),
        notes=tuple(notes),
        search=search,
        backends=_versions(job, layers),
        taken=held.taken,
    )
    chosen, forms, calls = forms[choice], {}, {}  # the others take as much memory as the model, each
    return chosen if "compiled" in choice else own(chosen), plan


def _right(job: Job, forms: Mapping[str, nn.Module], allowed: float) -> tuple[dict[str, float], list[str]]:
    """The errors of the `forms` that run and differ from the model's output by at most `allowed`; why the others are not taken.

    Raises what the model itself does, and CompressorError where it does not give the same output twice.
    """
    expected = seeded(job.forward, job.base)
    errors: dict[str, float] = {}
    refused: list[str] = []
    for name, form in forms.items():
        try:
            error = deviation(seeded(job.forward, form), expected)
        except Exception as failure:  # a model may look into its layers, or a compiler fail
            if name == "eager":
                raise
            refused.append(f"{name} does not run: {type(failure).__name__}: {first_line(failure)}")
            continue
        if error <= allowed:
            errors[name] = error
        elif name == "eager":
            raise CompressorError(
                f"the model does not give the same output twice: it differs by {error:.1e}",
                "A form of it can only be checked where the same inputs give the same output.",
            )
        else:
            refused.append(f"{name}: its output differs by {error:.1e}, above {allowed:.0e}: not taken")
    return errors, refused


def _products(job: Job, choices: Mapping[str, str]) -> tuple[str, ...]:
    """What a form multiplies in besides the model's own dtype."""
    return tuple(sorted({made for name in choices.values() if (made := job.backend(name).products) is not None}))


def _chosen(held: Contest, products: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """The form to take and why. What forms multiply in besides the model's dtype is named: of both sides of a comparison, and of a
    dense form that is taken."""
    verdict = held.verdict()
    reason = verdict.reason("the lowered model", "no layer gains from a sparse kernel here")
    named = (verdict.best or "", verdict.opponent, verdict.choice)
    ours, theirs, taken = (" and ".join(products.get(name, ())) for name in named)
    if verdict.best is not None and (ours or theirs):
        reason += f" ({ours or 'none in few bits'} against {theirs or 'none in few bits'})"
    if verdict.best not in (verdict.choice, None):
        reason += ": not taken"
    if taken and verdict.choice != verdict.best:
        reason += f"; {verdict.choice}, in {taken}, has {held.ratio(verdict.choice, BASE):.2f}x the speed of {BASE}"
    return verdict.choice, reason


def _versions(job: Job, layers: Sequence[LayerPlan]) -> dict[str, str]:
    """The versions of the backends that were timed, where they have one."""
    timed = {c.backend for layer in layers for c in layer.candidates if c.median_ms is not None}
    return {backend.name: backend.version for backend in job.backends if backend.name in timed and backend.version}


def _dtype_of(model: nn.Module) -> str:
    return str(next((p.dtype for p in model.parameters()), torch.get_default_dtype())).removeprefix("torch.")


def own(model: nn.Module) -> nn.Module:
    """A copy whose parameters are its own, and take no gradients."""
    return copy.deepcopy(model).requires_grad_(False)


def _compiled(model: nn.Module, device: torch.device) -> nn.Module:
    # Forms of one class share its code, and torch would run the ninth as it is, with no more than a warning.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED)
    # Checks of every tensor's sizes in every call would take a twentieth of the time of a UNet of some hundred layers. What a form
    # gives is looked at as a whole, see `_right`.
    on_cpu: Any = {"options": {"freezing": True, "size_asserts": False}}
    how: Any = on_cpu if device.type == "cpu" else {"mode": "max-autotune"}  # with CUDA graphs
    compiled: nn.Module = torch.compile(own(model), **how)  # type: ignore[assignment]
    return compiled


@torch.no_grad()
def dense_forms(
    model: nn.Module,
    example_inputs: Any,
    plan: Plan,
    *,
    dtype: torch.dtype | None = None,
    adapter: Adapter | None = None,
    left_out: dict[str, str] | None = None,
    few_bits: bool = True,
) -> dict[str, nn.Module]:
    """The dense forms that `plan` timed, by name, of another model of the same layers: of the one before pruning. Without `few_bits`
    each layer is in its fastest form that does not quantise.

    Those that do not run or give no numbers are told in `left_out`; without it they are a CompressorError."""
    names = list(dict.fromkeys(c.backend for layer in plan.layers for c in layer.candidates)) or "auto"
    job = prepared(model, example_inputs, names, dtype, adapter, fuse=plan.fused)
    bound = _bound_of(plan) if few_bits else _Bound(tuple(layer.name for layer in plan.layers))
    forms = {
        "eager": job.base,
        "dense": built(job, _fastest_dense(job, _checked(job, plan, weights=False), bound)),
    }
    for form in plan.forms:
        name, *how = form.name.split(", ")
        if form.dense and name in forms and how and how != ["compiled"] and form.name != _UNCACHED:
            forms[form.name] = _in_way(forms[name], how)
    if plan.form(_UNCACHED) is not None:
        forms[_UNCACHED] = built(job, _packed(job, plan.layers))
    for name in ("eager", "dense"):
        if plan.form(f"{name}, compiled") is not None:
            forms[f"{name}, compiled"] = _compiled(forms[name], job.device)
    errors, refused = _right(job, forms, sys.float_info.max)
    if refused and left_out is None:
        raise CompressorError(refused[0], "Without this form it is not known what the best dense one would take.")
    if left_out is not None:
        left_out.update(zip((name for name in forms if name not in errors), refused, strict=True))
    for made in forms.values():
        job.forward.rest(made)
    return {name: form for name, form in forms.items() if name in errors}


def planned(job: Job, plan: Plan, allowed: float) -> nn.Module:
    """The form that `plan` chose, of the job's weights; its output is compared with theirs once."""
    layers = _checked(job, plan)
    form = _planned(job, plan, layers)
    error = deviation(seeded(job.forward, form), seeded(job.forward, job.base))
    if not error <= allowed:
        raise CompressorError(
            f"the planned form {plan.choice!r} differs by {error:.1e}, above {allowed:.0e}",
            "Lower without the plan, to measure again.",
        )
    return form


def _planned(job: Job, plan: Plan, layers: Sequence[LayerPlan]) -> nn.Module:
    name, *how = plan.choice.split(", ")
    if plan.choice != _UNCACHED and (name not in _PLAIN or how not in _WAYS):
        raise CompressorError(f"the plan's choice is {plan.choice!r}", "Lower without it, to measure again.")
    form = job.base if name == "eager" else built(job, _choices(job, plan.choice, layers, _bound_of(plan)))
    return _compiled(form, job.device) if how == ["compiled"] else _in_way(own(form), how)


_PLAIN = ("eager", "dense", "lowered")
_WAYS: tuple[list[str], ...] = ([], ["compiled"], ["graph"], ["channels last"], ["channels last", "graph"])
"""How a form is run, as its name says after its first part."""


def _in_way(form: nn.Module, how: Sequence[str]) -> nn.Module:
    form = channels_last(form) if "channels last" in how else form
    return Graphed(form) if "graph" in how else form


def _checked(job: Job, plan: Plan, weights: bool = True) -> list[LayerPlan]:
    """The plan's layers in the order of the units, or an error that says what differs; the patterns too where `weights`."""
    again = "Lower without it, to measure again."
    if differing := plan.setting.other_than(job.setting):
        raise CompressorError("the plan was measured with {} {}, this is {}".format(*differing), again)
    layers = {layer.name: layer for layer in plan.layers}
    # a plan from before attention was lowered leaves it as it is
    units = {one.at: one for one in job.found if one.weights or one.at in layers}
    if strange := sorted(set(layers) ^ set(units)):
        raise CompressorError(f"the plan is for another model: {strange[0]}", again)
    for name, layer in layers.items():
        backend, unit = job.backend(layer.choice), units[name].unit
        if weights and (reason := refusal_of(backend, unit, job.device)):
            raise CompressorError(f"{name}: {layer.choice} does not run it here: {reason}", again)
        if (timed := layer.candidate(BASE)) is None or timed.median_ms is None:
            raise CompressorError(f"{name}: the plan has no time of the layer as it is", again)
        if layer.dtype != (found := str(unit.dtype).removeprefix("torch.")):
            raise CompressorError(f"{name}: the plan was measured in {layer.dtype}, this is {found}", again)
        patterns = tuple(None if p is None else str(p) for p in units[name].patterns)
        sizes = tuple((w.weight.shape[0], w.weight[0].numel()) for w in unit.layers)
        planned_sizes = tuple((n, k) for _, n, k in layer.shapes) if sizes else ()  # attention's are those of its input
        if (weights and patterns != layer.patterns) or sizes != planned_sizes:
            raise CompressorError(
                f"the plan does not fit {name}: it was {layer.patterns} {layer.shapes}, and is {patterns} {sizes}",
                again,
            )
    if weights:
        _same_versions(job, plan)
    return [layers[one.at] for one in job.found if one.at in layers]


def _same_versions(job: Job, plan: Plan) -> None:
    """Raise CompressorError where a backend that the plan's choice runs is not what was timed.

    Those that it does not run may be anything: a dense model stays as fast as it was."""
    used = set(_choices(job, plan.choice, plan.layers, _bound_of(plan)).values())
    for backend in map(job.backend, sorted(used)):
        if (before := plan.backends.get(backend.name, "")) != backend.version:
            was = repr(before) if before else "an unknown version"
            raise CompressorError(
                f"the plan was measured with {was} of the kernels of {backend.name}, this is {backend.version!r}",
                "Lower without it, to measure again.",
            )
