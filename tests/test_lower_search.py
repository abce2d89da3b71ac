"""The search for the fastest plan under an error of the whole model. Times are given: nothing here depends on the machine's."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import Backend, CompressorError, Plan, registry
from compressor.errors import UsageError
from compressor.lower import Unit, forms
from compressor.lower.search import _Trial, within
from compressor.sparsity.codes import fake_quantised


@dataclass(frozen=True)
class Sparse(Backend):
    """The layer itself, as a kernel that skips zeros would give it."""

    name: str = "sparse"

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refusal(self, unit: Unit) -> str | None:
        return None

    def build(self, unit: Unit) -> nn.Module:
        return copy.deepcopy(unit.module)


@dataclass(frozen=True)
class Coarse(Sparse):
    """The layer with weights in 8 bits, or scaled by (1 + `off`) where that is given."""

    name: str = "coarse"
    quantises: bool = True
    off: Callable[[Unit], float] | None = None

    def build(self, unit: Unit) -> nn.Module:
        module = copy.deepcopy(unit.module)
        with torch.no_grad():
            for layer in module.modules():
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    new = fake_quantised(layer.weight) if self.off is None else layer.weight * (1 + self.off(unit))
                    layer.weight.copy_(new)
        return module


class Parallel(nn.Module):
    """Layers side by side, so that each has its own part of the output."""

    def __init__(self, count: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(count))
        for layer in self.layers:
            layer.weight.data = torch.linalg.qr(torch.randn(8, 8))[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], 1)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
TIMES = {"eager": 3.0, "onednn": 2.9, "sparse": 2.0, "coarse": 1.0, "coarser": 0.8, "dense": 3.0, "lowered": 1.0}


@pytest.fixture(autouse=True)
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The milliseconds of each backend and form."""
    times = dict(TIMES)

    def given(calls: Mapping[str, Any], rounds: int, *_: Any) -> dict[str, tuple[float, ...]]:
        return {name: (times[name.removesuffix(", compiled")],) * rounds for name in calls}

    monkeypatch.setattr("compressor.lower.contest.timed", given)
    return times


def plan_of(model: nn.Module, inputs: Any, *backends: Backend, **options: Any) -> Plan:
    return compressor.lower(model, inputs, backends, cache=False, **options).plan


def choices(plan: Plan) -> dict[str, str]:
    return {layer.name: layer.choice for layer in plan.layers}


def predicted_ms(plan: Plan) -> float:
    """What the layers of a plan take, as they were timed."""
    return sum(c.median_ms or 0.0 for layer in plan.layers for c in layer.candidates if c.backend == layer.choice)


def shares(model: Parallel, errors: list[float], name: str = "coarse") -> Coarse:
    """A backend by which each layer of `model` alone puts the whole output off by this much."""
    names = {f"layers.{at}": error * len(errors) ** 0.5 for at, error in enumerate(errors)}
    return Coarse(name, off=lambda unit: names[unit.name])


# --- On a model that is. ---


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Any, compressor.Adapter]:
    adapter = registry.adapter("uvit-digits")
    return adapter.load(None), adapter.example_inputs(4), adapter


def test_the_one_product_that_makes_the_error_stays_in_float(digits: Any) -> None:
    """8 bits of weights put uvit-digits off by 1.1%, of which 1.0% come from its last product alone."""
    model, inputs, adapter = digits
    plan = plan_of(model, inputs, Sparse(), Coarse(), adapter=adapter, max_error=0.008)
    back = {name for name, choice in choices(plan).items() if choice != "coarse"}
    assert back == {"decoder_pred"} and choices(plan)["decoder_pred"] == "sparse"
    search = plan.search
    assert search is not None and search.error is not None and search.free is not None
    assert search.error <= 0.008 < search.free
    assert max(search.alone, key=lambda name: search.alone[name] or 0.0) == "decoder_pred"
    assert plan.choice == "lowered" and plan.form("lowered").error == search.error  # type: ignore[union-attr]


def test_the_plan_is_no_slower_than_one_that_bounds_each_layer(digits: Any) -> None:
    model, inputs, adapter = digits
    for tolerance in (0.005, 0.0058, 0.0065):
        each = plan_of(model, inputs, Sparse(), Coarse(), adapter=adapter, tolerance=tolerance)
        form = each.form("lowered")
        assert form is not None and form.error is not None
        assert any(choice == "coarse" for choice in choices(each).values())
        whole = plan_of(model, inputs, Sparse(), Coarse(), adapter=adapter, max_error=form.error)
        assert predicted_ms(whole) <= predicted_ms(each)
        assert whole.search is not None and (whole.search.error or 0) <= form.error


def test_what_layers_should_give_is_computed_once_for_all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    chooser = import_module("compressor.lower.chooser")
    asked: list[str] = []
    reference = chooser._reference
    monkeypatch.setattr(chooser, "_reference", lambda unit, x: (asked.append(unit.name), reference(unit, x))[1])
    model = Parallel(6)
    backends = Sparse(), shares(model, [0.01] * 6), shares(model, [0.02, 0.01, 0.03, 0.01, 0.04, 0.05], "coarser")
    plan = plan_of(model, X, *backends, tolerance=1.0)
    assert asked == [f"layers.{at}" for at in range(6)]
    errors = [layer.candidate("coarser").error for layer in plan.layers]  # type: ignore[union-attr]
    assert errors == pytest.approx([own * 6**0.5 for own in (0.02, 0.01, 0.03, 0.01, 0.04, 0.05)], rel=1e-3)
    asked.clear()
    plan_of(model, X, Sparse())
    assert asked == ["layers.0"]  # rounding is alike in all of them


@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_backend_that_fails_on_one_of_many_layers_is_for_none_of_them(place: int) -> None:
    class Fussy(Coarse):
        def build(self, unit: Unit) -> nn.Module:
            if unit.name == f"layers.{place}":
                raise RuntimeError("not this one")
            return super().build(unit)

    plan = plan_of(Parallel(6), X, Sparse(), Fussy(), tolerance=1.0)
    found = [layer.candidate("coarse") for layer in plan.layers]
    assert all(one is not None and one.refused == "RuntimeError: not this one" and one.error is None for one in found)
    assert set(choices(plan).values()) == {"sparse"}


# --- Which layers go back. ---


def test_those_that_cost_most_error_for_their_time_go_back() -> None:
    model = Parallel()
    plan = plan_of(model, X, Sparse(), shares(model, [0.01, 0.03, 0.02, 0.04, 0.01]), max_error=0.026)
    assert choices(plan) == {f"layers.{at}": "sparse" if at in (1, 3) else "coarse" for at in range(5)}
    search = plan.search
    assert search is not None and search.alone == pytest.approx(
        {f"layers.{n}": e for n, e in enumerate([0.01, 0.03, 0.02, 0.04, 0.01])}, rel=1e-3
    )
    assert search.free == pytest.approx(31e-4**0.5, rel=1e-3) and search.error == pytest.approx(6e-4**0.5, rel=1e-3)
    assert [note for note in plan.notes if "error of the whole model: 2.4e-02" in note]


def test_of_two_alike_the_one_that_saves_less_goes_back(
    timed: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer is of another kind of work, which 8 bits make much faster."""
    model = Parallel(3)
    model.layers[0] = nn.Linear(8, 8)  # a bias makes it a group of its own
    nn.init.zeros_(model.layers[0].bias)
    model.layers[0].weight.data = model.layers[1].weight.data.clone()
    turns = iter([{"eager": 9.0, "sparse": 9.0, "coarse": 1.0}, {"eager": 3.0, "sparse": 2.0, "coarse": 1.0}])
    monkeypatch.setattr(
        "compressor.lower.contest.timed",
        lambda calls, rounds, *_: {
            name: (time,) * rounds for name, time in next(turns, timed).items() if name in calls
        },
    )
    plan = plan_of(model, X, Sparse(), shares(model, [0.03, 0.03, 0.03]), max_error=0.031)
    assert choices(plan) == {"layers.0": "coarse", "layers.1": "sparse", "layers.2": "sparse"}


def test_of_equal_ones_the_ends_of_the_model_go_back_first() -> None:
    model = Parallel()
    plan = plan_of(model, X, Sparse(), shares(model, [0.01] * 5), max_error=0.018)
    assert list(choices(plan).values()) == ["sparse", "coarse", "coarse", "coarse", "sparse"]


@pytest.mark.parametrize(
    ("fine", "coarse", "max_error", "wanted", "asked"),
    [
        # one goes back by one step, where 1.2 ms would buy hardly more
        ([0.001] * 3, [0.03, 0.01, 0.01], 0.02, ["coarse", "coarser", "coarser"], {0}),
        # all do, and the worst of them all the way
        ([0.02, 0.002, 0.002], [0.04, 0.01, 0.01], 0.004, ["sparse", "coarse", "coarse"], {0, 1, 2}),
        # a slower form that is no more exact is passed over
        ([0.03, 0.001, 0.001], [0.03, 0.001, 0.001], 0.02, ["sparse", "coarser", "coarser"], set()),
        ([0.001] * 3, [0.01] * 3, 1e-4, ["sparse"] * 3, {0, 1, 2}),
    ],
)
def test_a_layer_goes_back_as_far_as_it_has_to(
    fine: list[float], coarse: list[float], max_error: float, wanted: list[str], asked: set[int]
) -> None:
    """Slower forms are `asked` for where they come into question alone."""
    model = Parallel(3)
    backends = Sparse(), shares(model, fine), shares(model, coarse, "coarser")
    plan = plan_of(model, X, *backends, max_error=max_error)
    assert list(choices(plan).values()) == wanted
    search = plan.search
    assert search is not None and search.error is not None and search.error <= max_error
    assert search.alone == pytest.approx({f"layers.{n}": e for n, e in enumerate(coarse)}, rel=1e-3)
    assert {name: own["coarse"] for name, own in search.slower.items()} == pytest.approx(
        {f"layers.{n}": fine[n] for n in asked}, rel=1e-3
    )
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    back = [layer for layer in plan.layers if layer.choice != "coarser"]
    assert all(layer.reason.startswith(f"coarser would be {TIMES[layer.choice] / 0.8:.2f}x as fast") for layer in back)


@dataclass(frozen=True)
class CoarseDense(Coarse):
    """The same numbers without skipping zeros."""

    skips_zeros: bool = False


def test_a_dense_form_of_the_same_numbers_is_no_step_back(timed: dict[str, float]) -> None:
    """What is between it and the next finer one is found all the same, though no faster than it."""
    timed |= {"coarser": 0.8, "coarser, dense": 1.0, "coarse": 1.0}
    model = Parallel(3)
    fine, coarse = [0.001] * 3, [0.03, 0.01, 0.01]
    dense = CoarseDense("coarser, dense", off=shares(model, coarse).off)
    plan = plan_of(model, X, Sparse(), dense, shares(model, fine), shares(model, coarse, "coarser"), max_error=0.02)
    assert list(choices(plan).values()) == ["coarse", "coarser", "coarser"]
    assert plan.search is not None and {name: set(own) for name, own in plan.search.slower.items()} == {
        "layers.0": {"coarse"}
    }


class Chain(nn.Module):
    """Scaled layers one after another: errors add up with their signs."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(count))
        for layer in self.layers:
            layer.weight.data = torch.eye(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("errors", "max_error", "back"),
    [
        (
            [0.02, 0.02, 0.02],
            0.03,
            [0, 2],
        ),  # they add up to more than squares say: one more goes back than is predicted
        ([0.03, 0.012, -0.012, 0.001], 0.0115, [0]),  # two make up for each other, which squares do not know
        ([0.02, -0.02, 0.001], 0.01, []),
    ],
)
def test_what_was_predicted_is_measured(errors: list[float], max_error: float, back: list[int]) -> None:
    plan = plan_of(
        Chain(len(errors)), X, Sparse(), Coarse(off=lambda unit: errors[int(unit.name[-1])]), max_error=max_error
    )
    assert [at for at, choice in enumerate(choices(plan).values()) if choice != "coarse"] == back
    assert plan.search is not None and plan.search.error is not None and plan.search.error <= max_error


def test_a_layer_comes_forward_again_as_far_as_it_can() -> None:
    """It skipped a form that was worth less for its time; the error, it turned out, leaves room for it."""
    off = {"coarse": [0.0028, -0.0004], "coarser": [0.003, -0.0005]}
    backends = [Coarse(name, off=lambda unit, own=own: own[int(unit.name[-1])]) for name, own in off.items()]  # type: ignore[misc]
    plan = plan_of(Chain(2), X, Sparse(), *backends, max_error=0.00245)
    assert list(choices(plan).values()) == ["coarse", "coarser"]
    assert plan.search is not None and plan.search.error == pytest.approx(0.0023, rel=1e-2)


def test_a_layer_that_went_on_does_not_come_back_halfway() -> None:
    """Signs are alike in the slower form: squares predict that it fits, and one layer has to go on from there."""
    off = {"coarse": [0.002, 0.002, 0.002], "coarser": [0.03, -0.03, 0.01]}
    backends = [Coarse(name, off=lambda unit, own=own: own[int(unit.name[-1])]) for name, own in off.items()]  # type: ignore[misc]
    plan = plan_of(Chain(3), X, Sparse(), *backends, max_error=0.005)
    assert list(choices(plan).values()) == ["sparse", "coarse", "coarse"]
    assert plan.search is not None and plan.search.error == pytest.approx(0.004, rel=1e-2)


def test_nothing_more_is_measured_where_all_fits() -> None:
    model = Parallel()
    plan = plan_of(model, X, Sparse(), shares(model, [0.001] * 5), max_error=0.05)
    assert set(choices(plan).values()) == {"coarse"} and plan.search is not None and plan.search.alone == {}


def test_an_error_that_no_8_bits_meet_leaves_none() -> None:
    model = Parallel()
    plan = plan_of(model, X, Sparse(), shares(model, [0.01] * 5), max_error=1e-4)
    assert set(choices(plan).values()) == {"sparse"} and plan.choice == "lowered"
    assert plan.search is not None and plan.search.error is not None and plan.search.error < 1e-6


def test_with_a_tolerance_both_hold() -> None:
    model = Parallel()
    coarse = shares(model, [0.01, 0.04, 0.01, 0.01, 0.02])  # of the model's; a layer's own is sqrt(5) of it
    for max_error, back in ((0.5, [1]), (0.02, [1, 4])):
        plan = plan_of(model, X, Sparse(), coarse, tolerance=0.05, max_error=max_error)
        assert [at for at, choice in enumerate(choices(plan).values()) if choice != "coarse"] == back
        assert "above 5e-02" in str(plan.layers[1].candidate("coarse").refused)  # type: ignore[union-attr]


def test_a_kernel_that_answers_nonsense_is_no_matter_of_error() -> None:
    model = Parallel()
    plan = plan_of(model, X, Sparse(), Coarse(off=lambda unit: -2.0 if unit.name == "layers.0" else 0.0), max_error=1.0)
    found = [layer.candidate("coarse") for layer in plan.layers]
    assert "above 1e+00" in str(found[0].refused)  # type: ignore[union-attr]
    assert all(one is not None and one.refused is None for one in found[1:])


def test_8_bits_are_not_tried_without_an_error() -> None:
    job = compressor.lower.job.prepared(Parallel(), X, "auto", None, None)  # type: ignore[attr-defined]
    freed = compressor.lower.job.prepared(Parallel(), X, "auto", None, None, quantising=True)  # type: ignore[attr-defined]
    assert "vnm-int8" not in [b.name for b in job.backends] and "vnm-int8" in [b.name for b in freed.backends]


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["max_error", "tolerance"])
def test_errors_that_mean_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} .*"):
        plan_of(Parallel(), X, Sparse(), **{name: value})


@pytest.mark.parametrize("seed", range(8))
def test_what_is_asked_late_changes_no_choice(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a search that knows what every form is off by before anything goes back."""
    rng = torch.Generator().manual_seed(seed)
    coarse = (0.03 * torch.rand(6, generator=rng)).tolist()
    fine = [own * share for own, share in zip(coarse, torch.rand(6, generator=rng).tolist(), strict=True)]
    model = Parallel(6)
    backends = Sparse(), shares(model, fine), shares(model, coarse, "coarser")
    wanted = [0.2, 0.5, 0.9]
    lazy = [plan_of(model, X, *backends, max_error=share * sum(e * e for e in coarse) ** 0.5) for share in wanted]
    watch = _Trial.watch

    def all_at_once(trial: _Trial) -> None:
        watch(trial)
        for ladder in trial.ladders:
            for place in range(len(ladder.forms) - 1):
                trial.measure(ladder, place)

    monkeypatch.setattr(_Trial, "watch", all_at_once)
    for share, before in zip(wanted, lazy, strict=True):
        plan = plan_of(model, X, *backends, max_error=share * sum(e * e for e in coarse) ** 0.5)
        assert choices(plan) == choices(before)
        assert plan.search is not None and before.search is not None
        assert plan.search.error == pytest.approx(before.search.error)
        assert set(before.search.slower) <= set(plan.search.slower)


class Once(nn.Module):
    """Layers one after another, some called twice, one whose answer is written to, and a branch that joins at the end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.written, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.first(x))
        y = self.written(x)
        y += 1
        return self.last(self.twice(y) + x)


@pytest.mark.parametrize("fuse", [False, True])
def test_what_is_not_computed_again_is_as_if_it_were(fuse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = registry.adapter("uvit-digits")
    for model, inputs, how in ((Once(), X, {}), (adapter.load(None), adapter.example_inputs(2), {"adapter": adapter})):
        first = next(module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
        calls: dict[bool, int] = {}
        found = {}
        for replays in (True, False):
            counted: list[None] = []
            forward = type(first).forward
            monkeypatch.setattr(
                type(first), "forward", lambda own, x, f=forward, c=counted: (c.append(None), f(own, x))[1]
            )
            monkeypatch.setattr(_Trial, "can_replay", replays)
            options = {**how, "max_error": 0.002, "fuse_projections": fuse}
            found[replays] = plan_of(model, inputs, Sparse(), Coarse(), **options).search
            monkeypatch.setattr(type(first), "forward", forward)
            calls[replays] = len(counted)
        assert found[True] is not None and found[False] is not None and found[True].alone
        assert found[True].alone == pytest.approx(found[False].alone, rel=1e-4)
        assert calls[True] < 0.9 * calls[False] or isinstance(model, Once)


def test_a_layers_error_is_found_beside_the_fastest_exact_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not beside eager layers, which take longer."""
    used: list[str] = []

    class Told(Sparse):
        def build(self, unit: Unit) -> nn.Module:
            module = super().build(unit)
            module.register_forward_hook(lambda *_: used.append(unit.name))
            return module

    while_measured: dict[str, list[str]] = {}
    measure = _Trial.measure

    def told(trial: _Trial, ladder: Any, place: int) -> None:
        used.clear()
        measure(trial, ladder, place)
        while_measured[ladder.name] = list(used)

    monkeypatch.setattr(_Trial, "measure", told)
    model = Parallel()
    errors = [0.01, 0.03, 0.02, 0.04, 0.01]
    search = plan_of(model, X, Told(), shares(model, errors), max_error=0.026).search
    names = [f"layers.{at}" for at in range(5)]
    assert search is not None and search.alone == pytest.approx(dict(zip(names, errors, strict=True)), rel=1e-4)
    assert while_measured == {
        name: names[at + 1 :] for at, name in enumerate(names)
    }  # those before give their answers again


class Again(nn.Module):
    """Calls its first layer once more where the second one's answer is not what it is in the dense model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        with torch.no_grad():
            self.known = self.second(self.first(X))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        if x.shape == self.known.shape and not torch.allclose(x, self.known, rtol=1e-4):
            x = x + 1e-3 * self.first(x)
        return self.third(x)


def test_a_model_that_takes_another_way_is_computed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for replays in (True, False):
        monkeypatch.setattr(_Trial, "can_replay", replays)
        found[replays] = plan_of(Again(), X, Sparse(), Coarse(), max_error=0.002).search
    assert found[True] is not None and found[False] is not None and None not in found[True].alone.values()
    assert len(found[True].alone) == 3 and found[True].alone == pytest.approx(found[False].alone, rel=1e-4)


# --- How it is told. ---


def test_each_forward_is_a_step_of_progress() -> None:
    class Counting(Parallel):
        forwards = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.forwards += 1
            return super().forward(x)

    model = Counting()
    job = compressor.lower.job.prepared(model, X, [Sparse(), shares(model, [0.01, 0.03, 0.02, 0.04, 0.01])], None, None)  # type: ignore[attr-defined]
    layers = list(plan_of(model, X, *job.backends, tolerance=1.0).layers)
    assert {layer.choice for layer in layers} == {"coarse"}
    search = within(job, layers, 0.026)
    Counting.forwards = 0
    steps = 0
    try:
        while True:
            next(search)
            steps += 1
            assert Counting.forwards == steps  # that of the dense model, and one for each step that is over
    except StopIteration:
        assert Counting.forwards == steps + 1 == 11


def test_a_compilers_rounding_is_left_some_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that is at the very bound in eager would be refused as soon as a compiler rounds it otherwise."""
    asked: list[tuple[float, float]] = []

    def told(job: Any, layers: Any, max_error: float, share: float) -> Any:
        asked.append((max_error, share))
        return within(job, layers, max_error, share)

    monkeypatch.setattr(import_module("compressor.lower.lowering"), "within", told)
    monkeypatch.setattr(forms, "_compiled", lambda model, device: model)
    model, found = Parallel(), []
    backends = Sparse(), shares(model, [0.01, 0.012, 0.01, 0.01, 0.014])
    for compiled in (False, True):
        search = compressor.lower(model, X, backends, cache=False, max_error=0.0255, compiled=compiled).plan.search
        assert search is not None and search.max_error == 0.0255
        found.append(search.error)
    assert asked == [(0.0255, 1.0), (0.0255, 0.97)]
    assert found[1] is not None and found[0] is not None and found[1] < 0.97 * 0.0255 < found[0] < 0.0255


def test_the_plan_says_why() -> None:
    model = Parallel()
    plan = plan_of(model, X, Sparse(), shares(model, [0.01, 0.03, 0.01, 0.01, 0.01]), max_error=0.025)
    (layer,) = [layer for layer in plan.layers if layer.choice == "sparse"]
    assert layer.name == "layers.1" and layer.skips_zeros
    assert layer.reason.startswith(
        "coarse would be 2.00x as fast; left in sparse for the error of the whole model: 3.0e-02 alone"
    )
    assert "1.50x the speed of eager" in layer.reason


# --- Plans. ---


def test_a_plan_is_read_and_applied_and_held_against_its_own_error(tmp_path: Path) -> None:
    model = Parallel()
    backends = Sparse(), shares(model, [0.01, 0.03, 0.01, 0.01, 0.01])
    first = compressor.lower(model, X, backends, cache=False, max_error=0.025)
    first.plan.save(tmp_path / "lowering.json")
    plan = Plan.read(tmp_path)
    assert plan == first.plan
    again = compressor.lower(model, X, backends, plan=plan)
    assert torch.equal(again.model(X), first.model(X))
    worse = Sparse(), shares(model, [0.02, 0.03, 0.02, 0.02, 0.02])
    with pytest.raises(CompressorError, match=r"differs by 4.0e-02, above 3e-02"):
        compressor.lower(model, X, worse, plan=plan)
    compressor.lower(model, X, worse, plan=plan, max_error=0.05)


def test_a_plan_has_the_tolerance_that_it_was_made_with(tmp_path: Path) -> None:
    model = Parallel()
    backends = Sparse(), shares(model, [0.01, 0.01, 0.01, 0.01, 0.01])
    first = compressor.lower(model, X, backends, cache=False, tolerance=0.05)
    assert {layer.choice for layer in first.plan.layers} == {"coarse"}
    first.plan.save(tmp_path / "lowering.json")
    again = compressor.lower(model, X, backends, plan=Plan.read(tmp_path))
    assert torch.equal(again.model(X), first.model(X))
    with pytest.raises(CompressorError, match="differs by"):
        compressor.lower(model, X, backends, plan=first.plan, tolerance=1e-5)


def test_a_plan_from_before_there_was_a_search_is_read(tmp_path: Path) -> None:
    plan = plan_of(Parallel(), X, Sparse())
    before = json.loads(plan.model_dump_json())
    assert before.pop("search") is None
    (tmp_path / "lowering.json").write_text(json.dumps(before))
    assert Plan.read(tmp_path) == plan


def test_an_output_that_is_not_finite_counts_as_any_error() -> None:
    inside: list[bool] = []

    class Telling(Parallel):
        def forward(self, x: Tensor) -> Tensor:
            inside.append(True)
            try:
                return super().forward(x)
            finally:
                inside.pop()

    model = Telling()
    names = {f"layers.{at}": float("nan") if at == 2 else 0.001 for at in range(5)}

    class Late(Coarse):
        """Right when it is held against its layer, and not in the model."""

        def build(self, unit: Unit) -> nn.Module:
            inner = super().build(unit)

            class Run(nn.Module):
                def forward(self, x: Tensor) -> Tensor:
                    return inner(x) * (names[unit.name] if inside else 1.0)

            return Run()

    plan = plan_of(model, X, Sparse(), Late(off=lambda _: 0.001), max_error=0.5)
    assert choices(plan)["layers.2"] == "sparse" and plan.search is not None
    assert plan.search.alone["layers.2"] is None and plan.search.free is None
    assert json.loads(plan.model_dump_json())["search"]["free"] is None
