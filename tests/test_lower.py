"""The chooser: what it finds in a model, what it takes, what it refuses, and that it is never slower by its own measure."""

from __future__ import annotations

import copy
import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compressor
from compressor import NM, Backend, CompressorError, Plan, registry
from compressor.errors import UsageError
from compressor.lower import Unit, forms
from compressor.lower.chooser import deviation
from compressor.lower.dense import Eager
from compressor.lower.forms import dense_forms
from compressor.lower.units import find_units, pattern_of, put
from compressor.lower.vnm_kernels import kernels


class Mlp(nn.Module):
    def __init__(self, width: int = 16, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2, self.drop = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.drop(F.gelu(self.fc1(x), approximate="tanh")))
        return out


class Net(nn.Module):
    """A pair, a Linear and two convolutions, one of which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = Mlp(), nn.Linear(16, 8)
        self.conv, self.idle = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        tokens = self.head(x + self.mlp(x))
        out: Tensor = self.conv(tokens.transpose(1, 2).reshape(len(x), 8, 2, 2)) * scale
        return out


def sparsify(model: nn.Module, pattern: NM, *names: str) -> nn.Module:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in names or (not names and weight.dim() > 1 and pattern.misfit(tuple(weight.shape)) is None):
                weight.copy_(pattern.mask(weight.abs()).apply(weight))
    return model


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return sparsify(Net(), NM(2, 4, 4))


X = torch.zeros(3, 4, 16)


class Copy(nn.Module):
    """A layer's copy that takes its time, by the test's clock, and may answer wrongly."""

    clock: Any = None

    def __init__(self, module: nn.Module, seconds: float, factor: float = 1.0) -> None:
        super().__init__()
        self.module, self.seconds, self.factor = copy.deepcopy(module), seconds, factor

    def forward(self, x: Tensor) -> Tensor:
        Copy.clock.passes(self.seconds)
        return self.factor * self.module(x)


@pytest.fixture(autouse=True)
def _choices_depend_on_this_clock(clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Copy, "clock", clock)


@dataclass(frozen=True)
class Fake(Backend):
    name: str = "fake"
    seconds: float = 0.0
    factor: float = 1.0
    skips_zeros: bool = True
    reason: str | None = None
    fails: bool = False

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refusal(self, unit: Unit) -> str | None:
        return self.reason

    def build(self, unit: Unit) -> nn.Module:
        if self.fails:
            raise RuntimeError("no such instruction\nsecond line")
        return Copy(unit.module, self.seconds, self.factor)


def lowered(model: nn.Module, *backends: Backend | str, **options: Any) -> compressor.Lowered:
    return compressor.lower(model, X, backends, cache=False, **options)


# --- What is found. ---


@pytest.mark.parametrize("text", ["2:4", "4:2:4", "2:2:4", "8:2:4", "4:1:4", "4:4:8", "16:2:4", "2:1:2", "32:2:16"])
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_a_pattern_is_read_from_the_zeros(text: str, kernel: tuple[int, ...]) -> None:
    pattern = compressor.parse(text)
    weight = torch.randn(32, 32, *kernel, generator=torch.Generator().manual_seed(0))
    found = pattern_of(pattern.mask(weight.abs()).apply(weight))
    assert str(found) == text


def test_a_weight_without_a_pattern_has_none() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    assert pattern_of(weight) is None
    assert pattern_of(compressor.Unstructured(0.5).mask(weight.abs()).apply(weight)) is None
    assert pattern_of(torch.randn(8)) is None and pattern_of(torch.zeros(0, 4)) is None
    weight[0, 0] = 0
    assert pattern_of(weight) is None


def by_definition(weight: Tensor) -> str | None:
    """The N:M pattern of `weight` with neighbouring rows, by trying all."""
    rows, channels = weight.shape[:2]
    kept = (weight != 0).reshape(rows, channels, -1)
    found = []
    for m in (2, 4, 8, 16, 32):
        if channels % m == 0 and (n := max(1, int(kept.unflatten(1, (-1, m)).sum(2).max()))) <= 0.75 * m:
            shared = [
                v
                for v in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
                if rows % v == 0 and int(kept.reshape(-1, v, channels // m, m, kept.shape[2]).any(1).sum(2).max()) <= n
            ]
            found.append((n / m, m, str(NM(n, m, max(shared, default=1)))))
    return min(found)[2] if found else None


@pytest.mark.parametrize("seed", range(60))
def test_a_pattern_is_the_sparsest_with_the_most_rows(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)

    def one_of(*values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=rng))]

    pattern = compressor.parse(one_of("2:4", "4:2:4", "1:4", "8:1:8", "2:4:8", "2:3:4", "16:1:2", "64:4:32", "1:2"))
    shape = (one_of(64, 128), one_of(32, 96), *one_of((), (1, 1), (3, 3)))
    weight = torch.randn(shape, generator=rng)
    weight = pattern.mask(weight.abs()).apply(weight)
    weight[torch.rand(shape, generator=rng) < one_of(0.0, 0.05, 0.6)] = 0  # what is kept may be zero
    weight[: one_of(0, 0, 4, 64)] = 0
    weight[one_of(slice(0, 0), slice(1, 2))] = float("nan")
    found, wanted = pattern_of(weight), by_definition(weight)
    if wanted is not None and wanted.count(":") == 1 and not isinstance(found, NM):
        assert found is not None  # its rows share otherwise: clustered, or by columns
    else:
        assert (None if found is None else str(found)) == wanted


def test_units_are_layers_and_feed_forward_pairs(net: nn.Module) -> None:
    found, left = find_units(net.eval(), lambda: net(X))
    assert [(one.at, type(one.unit.module).__name__, one.unit.input_shape) for one in found] == [
        ("mlp", "Sequential", (3, 4, 16)),
        ("head", "Linear", (3, 4, 16)),
        ("conv", "Conv2d", (3, 8, 2, 2)),
    ]
    assert found[0].weights == ("mlp.fc1.weight", "mlp.fc2.weight")
    assert [str(p) for p in found[0].unit.patterns] == ["4:2:4", "4:2:4"]
    assert found[0].unit.module[1].approximate == "tanh"  # type: ignore[index]
    assert [(one.weight, "did not reach" in one.reason) for one in left] == [("idle.weight", True)]


class Doubled(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Residual(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Peeking(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x))
        hidden.mean()
        out: Tensor = self.fc2(hidden)
        return out


class Twice(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Relu(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.relu(self.fc1(x)))
        return out


class Scaled(Mlp):
    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [Doubled, Residual, Peeking, Twice, Relu])
def test_a_block_that_does_more_than_a_pair_is_none(kind: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(kind()).eval()
    found, _ = find_units(model, lambda: model(X))
    assert {one.at for one in found} == {"0.fc1", "0.fc2"}


def test_a_pair_with_another_argument_is_none() -> None:
    block = Scaled().eval()
    found, _ = find_units(block, lambda: block(X, torch.ones(1)))
    assert {one.at for one in found} == {"fc1", "fc2"}


def test_shared_and_parametrized_layers_stay_as_they_are() -> None:
    layer = nn.Linear(16, 16)
    odd = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    model = nn.Sequential(layer, layer, odd).eval()
    found, left = find_units(model, lambda: model(X))
    assert not found and len(left) == 2
    result = lowered(model, "eager", Fake())
    assert torch.equal(result.model(X), model(X))


def test_tied_weights_are_lowered_apart_and_the_model_keeps_its_own() -> None:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    model = sparsify(nn.Sequential(first, second), NM(2, 4, 4))
    result = lowered(model, "eager", "onednn")
    assert second.weight is first.weight
    x = torch.randn(3, 16)
    assert torch.allclose(result.model(x), model(x), atol=1e-6)


class Asks(nn.Module):
    """Casts to the dtype of a layer's weight and asks for sizes, as embedders of diffusers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.proj = nn.Conv2d(8, 16, 1), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.conv.weight.dtype.is_floating_point and self.conv.weight.shape[0] == self.conv.out_channels == 16
        x = self.conv(x.to(self.conv.weight.device)).flatten(2).transpose(1, 2)
        assert (self.conv.in_channels, self.conv.kernel_size, self.proj.in_features) == (8, (1, 1), 16)
        x = x.to(next(self.proj.parameters()).dtype)
        return self.proj(x.to(self.proj.weight.dtype))[..., : self.proj.out_features]


@pytest.mark.parametrize("backend", ["onednn", "vnm", "vnm-int8", "vnm-w7a8", "eager"])
@pytest.mark.skipif(kernels()[0] is None, reason="the compiled kernels are not installed")
def test_a_lowered_layer_answers_what_a_model_asks_of_its_weight(backend: str) -> None:
    torch.manual_seed(0)
    model = sparsify(Asks(), NM(2, 4, 4)).eval()
    x = torch.randn(2, 8, 4, 4)
    found, _ = find_units(model, lambda: model(x))
    assert {(one.at, str(one.unit.patterns[0])) for one in found} == {("conv", "4:2:4"), ("proj", "4:2:4")}
    made = copy.deepcopy(model)
    for one in found:
        put(made, one.at, registry.backend(backend).build(one.unit))
    with torch.no_grad():
        assert float((made(x) - model(x)).norm() / model(x).norm()) < 0.02
        assert torch.equal(copy.deepcopy(made)(x), made(x))
        assert torch.allclose(torch.export.export(made, (x,)).module()(x), made(x), atol=1e-6)
        compiled: Any = torch.compile(made, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), made(x), atol=1e-6)


@pytest.mark.parametrize("backend", ["onednn", "vnm", "vnm-int8"])
@pytest.mark.skipif(kernels()[0] is None, reason="the compiled kernels are not installed")
@torch.no_grad()
def test_encoders_of_torch_call_their_lowered_layers(backend: str) -> None:
    """Without gradients nn.TransformerEncoderLayer hands its weights to a kernel of torch's, where they are tensors."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
    model = sparsify(nn.TransformerEncoder(layer, 2), NM(2, 4, 4)).eval()
    x = torch.randn(2, 5, 16)
    made: Any = copy.deepcopy(model)
    for one in find_units(model, lambda: model(x))[0]:
        if one.weights:
            put(made, one.at, registry.backend(backend).build(one.unit))
    assert type(made.layers[1].linear2).__name__.startswith(("Prepacked", "VNM"))
    assert float((made(x) - model(x)).norm() / model(x).norm()) < 0.02
    with pytest.raises(CompressorError, match="linear of a lowered layer's weight"):
        F.linear(torch.randn(1, 16), made.layers[0].linear1.weight)


# --- What is chosen. ---


def test_a_faster_sparse_kernel_is_taken_and_the_dense_model_untouched() -> None:
    base = sparsify(nn.Sequential(Copy(nn.Linear(16, 16), 0.0)), NM(2, 4, 4))
    before = copy.deepcopy(base.state_dict())

    result = compressor.lower(
        base,
        X,
        [Fake("eager", seconds=2e-3, skips_zeros=False), Fake(seconds=2e-4)],
        cache=False,
    )
    (layer,) = result.plan.layers
    assert (layer.choice, layer.skips_zeros) == ("fake", True) and "x the speed of eager" in layer.reason
    assert layer.shapes == ((12, 16, 16),) and layer.gflop == pytest.approx(2e-9 * 12 * 16 * 16)
    assert set(base.state_dict()) == set(before)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert type(base[0].module) is nn.Linear  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("backend", "why"),
    [
        (Fake(factor=1.01), "its error is 1.0e-02"),
        (Fake(factor=float("nan")), "its error is nan"),
        (Fake(reason="not on a Tuesday"), "not on a Tuesday"),
        (Fake(fails=True), "RuntimeError: no such instruction"),
    ],
)
def test_a_backend_that_is_wrong_refuses_or_fails_is_not_taken_and_the_plan_says_why(
    net: nn.Module, backend: Backend, why: str
) -> None:
    result = lowered(net, "eager", backend)
    for layer in result.plan.layers:
        candidate = layer.candidate("fake")
        assert candidate is not None and candidate.refused is not None and why in candidate.refused
        assert candidate.median_ms is None and layer.choice == "eager"
    assert not result.plan.lowered and result.plan.skipping() == set()
    assert torch.equal(result.model(X), net(X))


def test_a_sparse_kernel_that_gains_nothing_is_not_taken(net: nn.Module) -> None:
    result = lowered(net, "eager", Fake(seconds=2e-3))
    assert {layer.choice for layer in result.plan.layers} == {"eager"}
    assert all("less than the 1.03x" in layer.reason for layer in result.plan.layers)
    assert result.plan.choice.startswith(("eager", "dense")) and "no layer gains" in result.plan.reason


def test_the_guard_goes_back_to_dense_where_the_whole_model_does_not_gain(net: nn.Module) -> None:
    """A kernel that is fast when it is timed alone, and slow in the model."""

    class Deceiving(Fake):
        wait = 0.0

        def build(self, unit: Unit) -> nn.Module:
            return Copy(unit.module, Deceiving.wait)

    class SlowAlone(Fake):
        def build(self, unit: Unit) -> nn.Module:
            return Copy(unit.module, 1e-3)

    model = sparsify(nn.Sequential(nn.Linear(16, 16)), NM(2, 4, 4))
    steps = compressor.lower.lowering(model, X, [SlowAlone("eager", skips_zeros=False), Deceiving()], cache=False)
    plan = None
    while plan is None:
        try:
            Deceiving.wait = 5e-3 if next(steps).note == "whole model" else 0.0
        except StopIteration as finished:
            plan = finished.value.plan
    assert plan.layers[0].choice == "fake"
    assert plan.choice.startswith(("eager", "dense")) and "not taken" in plan.reason
    assert not plan.lowered and plan.skipping() == set()
    form = plan.form("lowered")
    assert form is not None and form.speedup < 0.9


def test_a_model_that_answers_wrongly_when_whole_is_not_taken() -> None:
    """Small errors of every layer, each within its tolerance, that add up to a wrong answer."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(40))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = sparsify(Deep(), NM(2, 4, 4))
    slow = Fake("eager", seconds=1e-3, skips_zeros=False)
    result = compressor.lower(model, X, [slow, Fake(factor=1 + 9e-6)], cache=False)
    assert {layer.choice for layer in result.plan.layers} == {"fake"}
    assert result.plan.form("lowered") is None and any("differs" in note for note in result.plan.notes)
    assert torch.equal(result.model(X), model.eval()(X))


def test_a_layer_that_the_model_looks_into_does_not_break_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) + self.layer.weight.mean()
            return out

    model = sparsify(Peeks(), NM(2, 4, 4))

    slow = Fake("eager", seconds=2e-3, skips_zeros=False)
    result = compressor.lower(model, X, [slow, Fake()], cache=False)
    assert any("does not run" in note for note in result.plan.notes)
    assert torch.equal(result.model(X), model(X))

    result = lowered(model, "eager", "onednn")
    monkeypatch.setattr(forms, "_fastest_dense", lambda *given: {"layer": "onednn"})
    left: dict[str, str] = {}
    assert list(dense_forms(model, X, result.plan, left_out=left)) == ["eager"]
    assert list(left) == ["dense"] and "does not run" in left["dense"]
    with pytest.raises(CompressorError, match="dense does not run"):
        dense_forms(model, X, result.plan)


def test_the_ninth_form_of_a_class_is_compiled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Holds(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.inner(x) * 2
            return out

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compile_(model, backend=backend))
    for number in range(12):
        form = Holds(type(f"Layer{number}", (nn.Linear,), {})(16, 16))
        forms._compiled(form, torch.device("cpu"))(X)
    assert len(graphs) == 12


def test_lowering_for_real_keeps_the_numbers(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.cost.timing.time", time)  # whatever this machine chooses
    result = compressor.lower(net, X, cache=False)
    x = torch.randn(5, 4, 16)
    assert torch.allclose(result.model(x), net.eval()(x), atol=1e-5)
    assert torch.allclose(result.model(x, scale=2.0), net(x, scale=2.0), atol=1e-5)
    assert not any(p.requires_grad for p in result.model.parameters())
    assert result.plan.left_out == {"idle.weight": "the example did not reach it as an ordinary call with one tensor"}
    form = result.plan.form(result.plan.choice)
    assert form is not None and form.error is not None and form.error < 1e-5
    assert form.dense or form.speedup >= 1.0  # a dense form may be taken for want of certainty
    assert isinstance(copy.deepcopy(result.model)(x), Tensor)


def test_another_precision_takes_and_gives_the_first(net: nn.Module) -> None:
    result = compressor.lower(net, X, dtype=torch.bfloat16, cache=False)
    x = torch.randn(5, 4, 16)
    out = result.model(x)
    assert out.dtype == torch.float32 and torch.allclose(out, net(x), atol=0.05)
    assert {layer.dtype for layer in result.plan.layers} == {"bfloat16"}
    assert next(net.parameters()).dtype == torch.float32


def test_a_model_of_two_layers_takes_what_it_took_in_another_precision_and_is_pickled(tmp_path: Path) -> None:
    class Conditioned(Mlp):
        def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
            out = super().forward(x)
            return out if t is None else out * t[:, None, None]

    model, t = Conditioned(), torch.tensor([1.0, 2.0, 3.0])
    for example in ((X, t), {"x": X, "t": t}):
        result = compressor.lower(model, example, ["eager", "onednn"], dtype=torch.bfloat16, cache=False)
        with torch.no_grad():
            assert torch.allclose(result.model(X, t=t), model(X, t), atol=0.05)
    lowered_ = compressor.lower(Mlp(), X, ["eager", "onednn"], dtype=torch.bfloat16, cache=False).model
    torch.save(lowered_, tmp_path / "lowered.pt")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "lowered.pt", weights_only=False)(X), lowered_(X))


class Turned(nn.Module):
    """Turns pairs of channels by complex numbers in a buffer, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)
        self.register_buffer("turns", torch.polar(torch.ones(4, 8), torch.arange(32.0).view(4, 8)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.proj(x).float().unflatten(-1, (8, 2)))
        return torch.view_as_real(pairs * self.turns).flatten(-2).to(x.dtype)


@torch.no_grad()
def test_another_precision_keeps_complex_numbers_and_refuses_what_it_cannot_hold() -> None:
    model = Turned()
    result = compressor.lower(model, X, ["eager"], dtype=torch.bfloat16, cache=False)
    assert torch.allclose(result.model(X), model(X), atol=0.05)
    model.proj.weight[0, 0] = 1e6
    with pytest.raises(CompressorError, match=r"proj\.weight: 1e\+06 is too large for torch\.float16"):
        compressor.lower(model, X, ["eager"], dtype=torch.float16, cache=False)


class Imaginary(nn.Module):
    """Complex numbers whose real parts are nothing, one layer of complex weights, and a part that torch.jit compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16, dtype=torch.complex64)
        self.script = torch.jit.script(nn.ReLU())
        nn.init.eye_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(1j * self.script(self.first(x)))
        return out


@torch.no_grad()
def test_complex_layers_stay_and_errors_of_imaginary_parts_are_seen() -> None:
    """A complex layer ended in an error of torch, and an answer that is off in its imaginary part alone was no error at all."""
    model = Imaginary()
    result = lowered(model, "eager", Fake())
    assert result.plan.left_out == {"second.weight": "not a floating-point weight (torch.complex64)"}
    assert [layer.name for layer in result.plan.layers] == ["first"]
    assert torch.equal(result.model(X), model(X))
    assert deviation(1.5 * model(X), model(X)) == pytest.approx(0.5)


def test_inputs_may_be_a_tensor_a_tuple_or_a_dict(net: nn.Module) -> None:
    for example in (X, (X, 2.0), {"x": X, "scale": 2.0}):
        plan = compressor.lower(net, example, ["eager"], cache=False).plan
        assert plan.input_shapes == ((3, 4, 16),) and len(plan.layers) == 3
    with pytest.raises(CompressorError, match="the example inputs do not run: RuntimeError"):
        compressor.lower(net, torch.zeros(3, 5), ["eager"], cache=False)


def test_an_adapter_says_how_the_model_is_called() -> None:
    adapter = registry.adapter("uvit-digits")
    model = sparsify(adapter.load(None), NM(2, 4, 4), *[])
    result = compressor.lower(model, adapter.example_inputs(2), ["eager", "onednn"], adapter=adapter, cache=False)
    kinds = [layer.kind for layer in result.plan.layers]
    assert kinds.count("pair") == 5 and kinds.count("convolution") == 2
    inputs = (torch.randn(3, 1, 8, 8), torch.full((3,), 500.0), None)
    assert torch.allclose(adapter.predict(result.model, inputs), adapter.predict(model, inputs), atol=1e-5)


# --- Plans. ---


def test_a_plan_saved_with_the_model_is_applied_without_measuring(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lowered(net, "eager", "onednn", Fake(seconds=2e-3))
    first.plan.save(tmp_path / "lowering.json")
    read = Plan.read(tmp_path)
    assert read == first.plan

    def no_timing(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("compressor.lower.contest.timed", no_timing)
    again = lowered(net, "eager", "onednn", Fake(), plan=read)
    x = torch.randn(5, 4, 16)
    assert again.plan == read and torch.equal(again.model(x), first.model(x))
    gone = read.layers[0].model_copy(update={"choice": "gone"})
    chosen = read.model_copy(update={"layers": (gone, *read.layers[1:])})
    with pytest.raises(UsageError, match="backend"):
        lowered(net, "eager", "onednn", plan=chosen)


def test_a_plan_for_another_model_machine_or_pattern_is_refused(net: nn.Module, tmp_path: Path) -> None:
    plan = lowered(net, "eager").plan
    with pytest.raises(CompressorError, match="the plan was measured with threads 99"):
        lowered(net, "eager", plan=plan.model_copy(update={"setting": plan.setting.model_copy(update={"threads": 99})}))
    with pytest.raises(CompressorError, match="another model"):
        lowered(Mlp(), "eager", plan=plan)
    with pytest.raises(CompressorError, match="does not fit"):
        lowered(sparsify(Net(), NM(2, 4)), "eager", plan=plan)
    for text in ("{}", "[]", '{"schema_version": 2}', '{"layers": NaN}', plan.model_dump_json()[:-50], "\x00"):
        (tmp_path / "lowering.json").write_text(text)
        with pytest.raises(CompressorError):
            Plan.read(tmp_path)


def test_a_plan_that_was_edited_and_arguments_of_other_types_are_named(net: nn.Module, tmp_path: Path) -> None:
    plan = lowered(net, "eager", "onednn").plan
    (pair,) = (layer for layer in plan.layers if layer.kind == "pair")
    for update, words in (
        ({"candidates": ()}, "mlp: the plan has no time of the layer as it is"),
        ({"choice": "vnm-dense"}, "mlp: vnm-dense does not run it here: it takes no pair"),
        ({"choice": "attention"}, "mlp: attention does not run it here: it takes no pair"),
    ):
        layers = tuple(layer.model_copy(update=update) if layer is pair else layer for layer in plan.layers)
        edited = plan.model_copy(update={"layers": layers, "choice": "dense"})
        with pytest.raises(CompressorError, match=words):
            lowered(net, "eager", "onednn", "vnm-dense", "attention", plan=edited)
    wrong: Any
    for wrong, words in (
        ({"plan": "lowering.json"}, r"the plan is a str\nGive a compressor\.Plan: compressor\.Plan\.read\(path\)"),
        ({"max_error": "0.1"}, "max_error '0.1'"),
        ({"tolerance": [0.1]}, r"tolerance \[0\.1\]"),
        ({"backends": 5}, "backends: a int"),
    ):
        with pytest.raises(UsageError, match=words):
            compressor.lower(net, X, **wrong)
    (tmp_path / "lowering.json").write_text('{"choice": 1}')
    with pytest.raises(CompressorError, match=r"\nLower the model again"):
        Plan.read(tmp_path)


def test_times_are_cached_by_what_they_depend_on(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path))
    first = compressor.lower(net, X, ["eager", "onednn"])
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == 3  # a pair, a Linear, a convolution
    again = compressor.lower(net, X, ["eager", "onednn"])
    assert [layer.candidates for layer in again.plan.layers] == [layer.candidates for layer in first.plan.layers]
    assert sorted(tmp_path.rglob("*.json")) == files
    compressor.lower(net, torch.zeros(4, 4, 16), ["eager", "onednn"])
    assert len(list(tmp_path.rglob("*.json"))) == 6
    files[0].write_text('{"key": "other", "median_ms": {"eager": -1}}')
    compressor.lower(net, X, ["eager", "onednn"])
    assert "-1" not in files[0].read_text()


def test_dense_forms_are_of_the_weights_that_are_given(net: nn.Module) -> None:
    plan = lowered(net, "eager", "onednn").plan
    torch.manual_seed(5)
    other = Net().eval()
    forms = dense_forms(other, X, plan)
    x = torch.randn(3, 4, 16)
    assert set(forms) == {"eager", "dense"}
    with torch.no_grad():
        for form in forms.values():
            assert torch.allclose(form(x), other(x), atol=1e-5)


def test_forms_under_a_compiler_keep_what_was_fastest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model as it is, its best dense form and the lowered one; a plan that chose one of them is applied as it was timed."""
    seen: list[list[float]] = []

    def compiled(model: nn.Module, device: torch.device) -> nn.Module:
        seen.append([module.seconds for module in model.modules() if isinstance(module, Copy)])
        return forms.own(model)

    class Patterned(Fake):
        def refusal(self, unit: Unit) -> str | None:
            return None if unit.patterns[0] else "no pattern"

    monkeypatch.setattr(forms, "_compiled", compiled)
    model = nn.Sequential(sparsify(nn.Linear(16, 16), NM(2, 4, 4)), nn.Linear(16, 8))
    backends = [Fake("onednn", seconds=2e-3, skips_zeros=False), Patterned("vnm", seconds=1e-3)]
    monkeypatch.setattr(Eager, "build", lambda self, unit: Copy(unit.module, 4e-3))
    plan = compressor.lower(model, X, backends, compiled=True, cache=False).plan
    assert [layer.choice for layer in plan.layers] == ["vnm", "onednn"]
    assert seen == [[], [2e-3, 2e-3], [1e-3, 2e-3]]
    for name, wanted in (("dense, compiled", [2e-3, 2e-3]), ("lowered, compiled", [1e-3, 2e-3])):
        assert plan.form(name) is not None
        compressor.lower(model, X, backends, plan=plan.model_copy(update={"choice": name}))
        assert seen[-1] == wanted
    found = forms.dense_forms(model, X, plan)
    assert {"eager, compiled", "dense, compiled"} <= set(found)
    assert seen[-2:] == [[], []]  # by the real ones of these names


def test_a_dense_form_that_is_the_model_as_it_is_is_compiled_once(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "_compiled", lambda model, device: forms.own(model))
    names = {form.name for form in lowered(net, "eager", compiled=True).plan.forms}
    assert "eager, compiled" in names and "dense, compiled" not in names


# --- Backends from elsewhere. ---


def test_a_third_party_backend_is_found_by_its_entry_point(net: nn.Module, install: Callable[..., None]) -> None:
    source = (
        "from compressor import Backend\n"
        "class Third(Backend):\n"
        "    name = 'third'\n"
        "    def unavailable(self, device): return None\n"
        "    def refusal(self, unit): return 'shy'\n"
        "    def build(self, unit): return unit.module\n"
    )
    install("third_party", source, backends={"third": "Third"})
    plan = compressor.lower(net, X, cache=False).plan
    assert all(candidate.refused == "shy" for layer in plan.layers if (candidate := layer.candidate("third")))
    assert any(layer.candidate("third") for layer in plan.layers)


def test_a_broken_third_party_backend_is_a_note_and_an_error_where_it_is_asked_for(
    net: nn.Module, install: Callable[..., None]
) -> None:
    install("broken_party", "raise SystemExit(3)", backends={"broken": "Broken"})
    plan = compressor.lower(net, X, cache=False).plan
    assert any("broken_party" in note or "broken" in note for note in plan.notes)
    with pytest.raises(CompressorError, match="broken"):
        compressor.lower(net, X, ["broken"], cache=False)
    with pytest.raises(UsageError, match="unknown backend 'vmn'"):
        compressor.lower(net, X, ["vmn"], cache=False)


def test_without_the_compiled_kernels_the_gathered_form_is_left_and_the_plan_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    why = "the compiled CPU kernels are not installed (none); install GCC and reinstall"
    for place in ("vnm", "vnm_kernels"):
        monkeypatch.setattr(f"compressor.lower.{place}.kernels", lambda: (None, why))
    model = sparsify(nn.Sequential(nn.Linear(64, 128)), NM(2, 4, 64))
    plan = compressor.lower(model, torch.zeros(4, 64), cache=False).plan
    kernel, gathered = plan.layers[0].candidate("vnm"), plan.layers[0].candidate("gathered")
    assert kernel is not None and kernel.refused == why and why in plan.notes
    assert gathered is not None and gathered.refused is None and gathered.median_ms is not None


@pytest.mark.slow
def test_memory_stays_flat_over_many_lowerings(monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    import psutil

    for name in ("chooser._ROUNDS", "forms._ROUNDS", "contest._MOST"):  # more of them keep no more
        monkeypatch.setattr(f"compressor.lower.{name}", 2)
    model = sparsify(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), NM(2, 4, 4))
    x, process = torch.zeros(4, 256), psutil.Process()
    sizes = []
    for turn in range(30):
        compressor.lower(model, x, cache=False)
        if turn in (9, 29):
            gc.collect()
            sizes.append((process.memory_info().rss, process.num_fds()))
    assert sizes[1][1] <= sizes[0][1]
    assert sizes[1][0] - sizes[0][0] < 4e6, sizes  # a weight is 262 KB


def test_lower_is_a_verb_and_a_package() -> None:
    import importlib

    assert callable(compressor.lower) and compressor.lower is importlib.import_module("compressor.lower")
    assert compressor.lower.Plan is Plan


def test_a_plan_that_the_disk_does_not_take_is_an_error_with_its_name(tmp_path, monkeypatch):
    """And nothing is left beside it; so it is of every file that is written in one step."""
    plan = compressor.lower(nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)).plan
    with pytest.raises(CompressorError, match=r"nowhere/plan\.json: cannot be written: No such file or directory"):
        plan.save(tmp_path / "nowhere" / "plan.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CompressorError, match="pipe is there already, and is no file that can be replaced"):
        plan.save(tmp_path / "pipe")  # nor is /dev/null, which root could
    (tmp_path / "pipe").unlink()
    (tmp_path / "plan.json").write_text("before")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("compressor.files.sync", full)
    with pytest.raises(
        CompressorError, match=r"plan\.json: cannot be written: No space left on device \(.* bytes free\)"
    ):
        plan.save(tmp_path / "plan.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
