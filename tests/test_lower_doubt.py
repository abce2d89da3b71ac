"""Lowering doubts itself: what could hide a wrong result, and models and plugins that misbehave."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import NM, Backend, CompressorError, registry
from compressor.environment import cache_folder
from compressor.errors import UsageError
from compressor.lower import Unit, chooser
from compressor.lower.chooser import _few_rows, deviation, relative
from compressor.lower.dense import PrepackedLinear
from compressor.lower.job import lively
from compressor.lower.plan import Cache, Setting
from compressor.lower.units import find_units, put
from compressor.runs.latency import _error

WIDTH = 32


class Changed(nn.Module):
    """A layer's copy whose result `change` bends."""

    def __init__(self, module: nn.Module, change: Any) -> None:
        super().__init__()
        self.module, self.change = copy.deepcopy(module), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.module(x))


@dataclass(frozen=True)
class Plugin(Backend):
    """A backend that says it is fast, and whose layers answer as `change` makes them."""

    change: Any = None
    name: str = "plugin"
    skips_zeros: bool = True

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refusal(self, unit: Unit) -> str | None:
        return None

    def build(self, unit: Unit) -> nn.Module:
        return Changed(unit.module, self.change)


def layer(rows: int = WIDTH) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, rows)
    with torch.no_grad():
        linear.weight.copy_(NM(2, 4, 4).mask(linear.weight.abs()).apply(linear.weight))
    return linear


def net() -> nn.Module:
    return nn.Sequential(layer(), nn.Tanh(), layer()).eval()


X = torch.randn(4, WIDTH)


@pytest.mark.parametrize(
    "change", [lambda y: y[None], lambda y: y.double(), lambda y: y[:1], lambda y: y * math.nan, lambda y: y + 1]
)
def test_a_layer_that_answers_otherwise_is_refused(change: Any) -> None:
    plan = compressor.lower(net(), X, ["eager", Plugin(change)], cache=False).plan
    for one in plan.layers:
        found = one.candidate("plugin")
        assert found is not None and found.refused and one.choice == "eager"


def test_errors_are_infinite_where_shapes_kinds_or_numbers_differ() -> None:
    ones, nan = torch.ones(2, 3), torch.full((2, 3), math.nan)
    assert relative(ones[None], ones.double()) == math.inf
    assert deviation((ones, nan), (ones, ones)) == math.inf
    assert deviation((nan, ones), (ones, ones)) == math.inf
    assert deviation(ones.double(), ones) == math.inf
    assert deviation((ones,), (ones, ones)) == math.inf
    assert deviation({"a": ones, "b": 2}, {"a": ones, "b": 2}) == 0


@pytest.mark.parametrize(
    ("shape", "channels_dim", "samples"),
    [
        ((100, 64), -1, 40),  # a Linear on vectors: 1 row each
        ((10, 16, 64), -1, 3),  # on tokens: 16 rows each
        ((2, 16, 64), -1, 2),
        ((9, 3, 32, 32), -3, 1),  # a convolution: 1024 pixels each, whatever its channels and its width
        ((9, 3, 4, 5), -3, 2),
        ((9, 640, 4, 5), -3, 2),
        ((3, 32, 32), -3, 3),  # a picture without a batch
        ((64,), -1, 64),
        ((0, 64), -1, 0),
    ],
)
def test_errors_are_measured_on_forty_rows_or_just_more(
    shape: tuple[int, ...], channels_dim: int, samples: int
) -> None:
    x = torch.randn(shape)
    assert torch.equal(_few_rows(x, channels_dim, 40), x[:samples])


@dataclass
class Out:
    sample: Tensor


def test_outputs_in_a_dataclass_are_compared() -> None:
    assert deviation(Out(torch.zeros(2)), Out(torch.ones(2))) == 1
    assert deviation({"out": Out(torch.ones(2))}, {"out": Out(torch.ones(2))}) == 0


def test_an_output_without_a_tensor_is_refused() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor) -> str:
            self.layer(x)
            return "done"

    with pytest.raises(CompressorError, match="holds no tensor"):
        compressor.lower(Silent(), X, cache=False)


def test_noise_levels_that_random_numbers_cannot_stand_for_are_kept() -> None:
    class Preconditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            out: Tensor = self.layer(x) * sigma.log()
            return out

    lowered = compressor.lower(Preconditioned(), (X, torch.full((4, 1), 2.0)), cache=False)
    assert all(form.error is not None and form.error < 1e-4 for form in lowered.plan.forms)


def test_a_model_that_draws_at_random_is_compared_by_the_same_draws() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x + torch.randn_like(x))
            return out

    before = torch.get_rng_state()
    plan = compressor.lower(Noisy(), X, cache=False).plan
    assert {form.name for form in plan.forms} >= {"eager", "dense"}
    assert torch.equal(torch.get_rng_state()[:0], before[:0])


def test_a_model_that_never_answers_alike_or_not_in_numbers_is_refused() -> None:
    class Counting(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            out: Tensor = self.layer(x) + Counting.calls
            return out

    class Broken(Counting):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) * math.nan
            return out

    with pytest.raises(CompressorError, match="same output twice"):
        compressor.lower(Counting(), X, cache=False)
    with pytest.raises(CompressorError, match="not finite"):
        compressor.lower(Broken(), X, cache=False)


def test_examples_of_zeros_hide_no_error() -> None:
    zeros = {"x": torch.zeros(2, 8, WIDTH), "time": torch.zeros(2), "name": "kept"}
    inputs = lively(zeros, lambda given: given["x"])
    assert inputs["x"].std() > 0.9 and inputs["name"] == "kept" and not inputs["time"].any() and not zeros["x"].any()
    assert lively(zeros, lambda given: given["x"].sqrt()) is zeros  # out of the model's range
    given = {"x": torch.randn(2, 8, WIDTH), "mask": torch.tensor([[1.0, 0.0]]), "none": torch.zeros(0, 2)}
    # its own numbers, and its mask
    assert all(one is given[name] for name, one in lively(given, lambda given: given["x"]).items())

    class Scaled(compressor.Adapter):
        def predict(self, module: nn.Module, inputs: Any) -> Tensor:
            out: Tensor = module(inputs["x"])
            return out

        def noised(self, *_: Any, **__: Any) -> Any:
            raise AssertionError

    model = nn.Linear(WIDTH, WIDTH, bias=False)
    form = Changed(model, lambda out: 1.25 * out)
    assert _error(Scaled(), form, model, zeros) == pytest.approx(0.25, rel=0.05)  # it was 0


@pytest.mark.parametrize("tolerance", [1e-9, 1e-12])
def test_the_layer_as_it_is_stands_at_any_tolerance(tolerance: float) -> None:
    plan = compressor.lower(net(), X, cache=False, tolerance=tolerance).plan
    assert all(one.choice == "eager" for one in plan.layers)


@pytest.mark.parametrize("module", [layer(), nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(layer(), nn.GELU(), layer())])
def test_a_model_that_is_one_layer_is_lowered_in_another_precision(module: nn.Module) -> None:
    x = torch.randn(2, 8, 6, 6) if isinstance(module, nn.Conv2d) else X
    found = compressor.lower(module.eval(), x, dtype=torch.bfloat16, cache=False).model
    with torch.no_grad():
        out = found(x)
        torch.testing.assert_close(out, module(x), rtol=0.1, atol=0.1)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_a_precision_that_is_none_is_refused(dtype: Any) -> None:
    with pytest.raises(CompressorError, match="dtype"):
        compressor.lower(net(), X, dtype=dtype, cache=False)


@pytest.mark.parametrize("backend", ["vnm", "onednn"])
def test_gradients_are_refused_instead_of_wrong(backend: str) -> None:
    chosen = registry.backend(backend)
    (found, *_), _ = find_units(module := net(), lambda: module(X))
    if reason := chosen.unavailable(torch.device("cpu")) or chosen.refusal(found.unit):
        pytest.skip(reason)
    built = chosen.build(found.unit)
    with torch.no_grad():
        built(X.clone().requires_grad_())
    with pytest.raises(CompressorError, match="no gradients"):
        built(X.clone().requires_grad_())
    with pytest.raises(CompressorError, match="no gradients"):  # torch's operators would drop the tangent
        torch.func.jvp(built, (X,), (torch.ones_like(X),))


@pytest.mark.parametrize("backend", ["vnm", "onednn"])
def test_a_lowered_model_is_not_taken_for_the_model_that_was_lowered(backend: str, tmp_path: Path) -> None:
    chosen = registry.backend(backend)
    (found, *_), _ = find_units(module := net(), lambda: module(X))
    if reason := chosen.unavailable(torch.device("cpu")) or chosen.refusal(found.unit):
        pytest.skip(reason)
    form = put(module, found.at, chosen.build(found.unit))
    for use in (lambda: compressor.save(tmp_path / "saved", form, {}), lambda: compressor.lower(form, X, cache=False)):
        with pytest.raises(UsageError, match="0: lowered"):
            use()
    assert not (tmp_path / "saved").exists()


def test_a_copy_of_a_lowered_model_has_tensors_of_its_own() -> None:
    (found, *_), _ = find_units(module := net(), lambda: module(X))
    first = registry.backend("onednn").build(found.unit)
    second = copy.deepcopy(first)
    assert first.bias.data_ptr() != second.bias.data_ptr()
    with torch.no_grad():
        assert torch.equal(first(X), second(X))
    with pytest.raises(CompressorError, match="cast or moved"):
        second.to(torch.bfloat16)
    with torch.no_grad():
        first(X)


@pytest.mark.parametrize("bias", [True, False])
def test_a_prepacked_layer_is_not_cast_or_moved_with_or_without_a_bias(bias: bool) -> None:
    layer = PrepackedLinear(nn.Linear(16, 8, bias), 4)
    for change in (layer.half, lambda: layer.to(torch.bfloat16), lambda: layer.to("meta")):
        with pytest.raises(CompressorError, match="cast or moved"):
            change()
    with torch.no_grad():
        expected = layer(torch.ones(2, 16))
        assert torch.equal(layer.float().to("cpu")(torch.ones(2, 16)), expected)


def test_the_compiler_goes_around_prepacked_layers() -> None:
    (found, *_), _ = find_units(module := net(), lambda: module(X))
    form = nn.Sequential(registry.backend("onednn").build(found.unit), nn.Tanh())
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(form, backend="eager")(X), form(X))


def test_finding_units_keeps_no_activations() -> None:
    import weakref

    seen: list[Any] = []

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layer() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            for one in self.layers:
                x = torch.tanh(one(x))
                seen.append(weakref.ref(x))
            assert sum(ref() is not None for ref in seen) <= 2
            return x

    model = Chain()
    find_units(model, lambda: model(X))


def test_buffers_that_a_forward_writes_to_are_not_the_given_models() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            out: Tensor = self.layer(x)
            return out

    model = Counter()
    compressor.lower(model, X, cache=False)
    assert float(model.calls) == 0


def test_layers_with_hooks_stay_as_they_are() -> None:
    model, seen = net(), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    lowered = compressor.lower(model, X, cache=False)
    assert "forward hooks" in lowered.plan.left_out["0.weight"]
    seen.clear()
    lowered.model(X)
    assert seen == [1]


def test_a_model_without_parameters_is_lowered_to_itself() -> None:
    plan = compressor.lower(nn.Identity(), X, cache=False).plan
    assert plan.layers == () and plan.dtype == "float32"


def test_an_unbatched_picture_is_lowered() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 64, 3, padding=1).eval()
    plan = compressor.lower(nn.Sequential(conv), torch.randn(64, 16, 16), cache=False).plan
    assert len(plan.layers) == 1


# --- Plans of before. ---


def test_a_plan_of_another_precision_or_of_nonsense_is_refused() -> None:
    model = net()
    plan = compressor.lower(model, X, ["eager", "onednn"], cache=False).plan
    with pytest.raises(CompressorError, match="measured in float32, this is float64"):
        compressor.lower(net().double(), X.double(), ["eager", "onednn"], plan=_all_eager(plan))
    with pytest.raises(CompressorError, match="'nonsense'"):
        compressor.lower(model, X, ["eager", "onednn"], plan=plan.model_copy(update={"choice": "nonsense"}))


def test_a_planned_form_that_is_wrong_is_refused() -> None:
    wrong = Plugin(lambda y: y + 1)
    plan = compressor.lower(net(), X, ["eager", Plugin(lambda y: y)], cache=False).plan
    layers = tuple(one.model_copy(update={"choice": "plugin", "skips_zeros": True}) for one in plan.layers)
    plan = plan.model_copy(update={"choice": "lowered", "layers": layers})
    compressor.lower(net(), X, ["eager", Plugin(lambda y: y)], plan=plan)
    with pytest.raises(CompressorError, match="differs by"):
        compressor.lower(net(), X, ["eager", wrong], plan=plan)


def _all_eager(plan: compressor.Plan) -> compressor.Plan:
    return plan.model_copy(update={"layers": tuple(one.model_copy(update={"choice": "eager"}) for one in plan.layers)})


# --- Plugins and the cache. ---


@dataclass(frozen=True)
class Raises(Plugin):
    name: str = "raises"

    def refusal(self, unit: Unit) -> str | None:
        raise ZeroDivisionError("oops")

    def remark(self, device: torch.device) -> str | None:
        raise ZeroDivisionError("ouch")


def test_a_plugin_that_raises_is_refused_and_named() -> None:
    plan = compressor.lower(net(), X, ["eager", Raises()], cache=False).plan
    assert "oops" in str(plan.layers[0].candidate("raises"))
    assert any("raises" in note and "ouch" in note for note in plan.notes)


@dataclass(frozen=True)
class Remarks(Plugin):
    def remark(self, device: torch.device) -> str | None:
        return "the library is slow"


def test_what_backends_of_one_library_remark_is_told_once() -> None:
    plan = compressor.lower(net(), X, ["eager", Remarks(name="first"), Remarks(name="second")], cache=False).plan
    assert plan.notes.count("the library is slow") == 1


@pytest.mark.parametrize("backends", [[Plugin], [Plugin(), Plugin()], [Plugin(name=None)], [3]])  # type: ignore[arg-type]
def test_what_is_no_backend_is_refused(backends: list[Any]) -> None:
    with pytest.raises(CompressorError, match="backend"):
        compressor.lower(net(), X, backends, cache=False)


SETTING = Setting(device="cpu", hardware="none", threads=1, versions={})


@pytest.mark.parametrize("value", [1e300, 1e999, -1.0, 0.0, True, "3"])
def test_times_that_cannot_be_are_not_read(value: Any, tmp_path: Any) -> None:
    cache = Cache(SETTING, tmp_path)
    cache.put("key", {"eager": (1.0, 2.0)})
    assert cache.get("key") == {"eager": (1.0, 2.0)}
    (file,) = tmp_path.iterdir()
    text = file.read_text().replace("1.0", {1e999: "1e999"}.get(value, repr(value).replace("True", "true")))
    file.write_text(text)
    assert cache.get("key") is None


def test_without_reading_times_are_written_still(tmp_path: Any) -> None:
    fresh = Cache(SETTING, tmp_path, read=False)
    fresh.put("key", {"eager": (2.0,)})
    assert fresh.get("key") is None
    assert Cache(SETTING, tmp_path).get("key") == {"eager": (2.0,)}


@pytest.mark.parametrize(
    "text", ["{}", '{"eager": 1.0}', '{"eager": []}', '{"eager": [1.0], "other": [1.0, 2.0]}', "[[1.0]]"]
)
def test_rounds_that_are_none_are_not_read(text: str, tmp_path: Any) -> None:
    cache = Cache(SETTING, tmp_path)
    cache.put("key", {"eager": (1.0,)})
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "rounds_ms": json.loads(text)}))
    assert cache.get("key") is None


def test_a_user_without_a_home_has_a_cache_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMPRESSOR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cache_folder("timings").is_absolute()


def test_times_of_another_version_of_a_backend_are_not_used(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, clock: Any
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))

    @dataclass(frozen=True)
    class Versioned(Plugin):
        version: str = "1"

    files = []
    for version in ("1", "1", "2"):
        compressor.lower(net(), X, ["eager", Versioned(lambda y: y, version=version)])
        files.append(len(list((tmp_path / "compressor" / "timings").iterdir())))
    assert files[0] == files[1] < files[2]


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 1])
def test_a_kernel_is_checked_with_all_rows_of_the_example(place):
    """For fewer rows a backend may take another kernel, which is then not the one that was checked."""
    layer = nn.Linear(8, 8)
    unit = SimpleNamespace(module=layer, dtype=torch.float32)

    def right_for_few(layer):
        return lambda x: layer(x) * (1 if len(x) < 6 else 2)

    backend = SimpleNamespace(build=lambda unit: right_for_few(unit.module))
    entry = chooser._Entry(backend, 1.0, modules=[right_for_few(layer)])
    x = torch.randn(6, 8)
    wanted = copy.deepcopy(layer).double()(x[:2].double())
    assert chooser._measured(entry, place, unit, x, wanted).errors == pytest.approx([1], abs=1e-3)


class Gated(nn.Module):
    """A feed-forward pair, but for few tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(nn.functional.gelu(self.first(x)))
        return out * 2 if x.shape[0] < 8 else out


def test_a_block_that_does_otherwise_with_few_tokens_is_no_pair() -> None:
    model = nn.Sequential(Gated(), nn.Linear(WIDTH, WIDTH)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(NM(2, 4, 4).mask(weight.abs()).apply(weight))
    x = torch.randn(64, WIDTH)
    assert [one.unit.kind for one in find_units(model, lambda: model(x))[0]] == ["linear", "linear", "linear"]
    lowered = compressor.lower(model, x, backends="vnm", cache=False).model
    with torch.no_grad():
        assert deviation(lowered(x[:4]), model(x[:4])) < 1e-5
