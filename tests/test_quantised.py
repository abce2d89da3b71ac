"""Weights that are trained in 8 bits: what is trained, what is saved, and that kernels find the same codes in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import compressor
from compressor import NM, Adapter, Estimator, Exact, FineTuning, Mask, Pruner, Shadow, StraightThrough, Training
from compressor.errors import UsageError
from compressor.lower import Unit
from compressor.lower.vnm import VNM, VNMInt8
from compressor.plugins.sparsedm import SRSTE, SparseDM
from compressor.plugins.ste import STE
from compressor.saving.state import load_state, save_state
from compressor.sparsity.codes import fake_quantised, quantised

PATTERN = NM(2, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes(weight: Tensor) -> Tensor:
    return quantised(weight.flatten(1), torch.int8)[0]


# --- The arithmetic. ---


def test_a_row_is_rounded_by_hand() -> None:
    row = torch.tensor([[127.0, 2.5, 1.5, -0.5, 0.4, -126.6], [0.0] * 6])
    expected = torch.tensor([[127.0, 2.0, 2.0, 0.0, 0.0, -127.0], [0.0] * 6])  # half to even
    assert torch.equal(fake_quantised(row), expected) and not fake_quantised(row).signbit()[0, 3]


def test_a_convolution_has_a_scale_for_each_output_channel() -> None:
    weight = normal(4, 8, 3, 3) * torch.tensor([1.0, 1e-3, 10.0, 0.0]).view(4, 1, 1, 1)
    by_row = torch.stack([fake_quantised(one.reshape(1, -1)).view(8, 3, 3) for one in weight])
    assert torch.equal(fake_quantised(weight), by_row) and fake_quantised(weight).shape == weight.shape


@given(st.floats(2.0**-66, 2.0**66, width=32), st.integers(0, 2**31))
def test_what_is_quantised_stays_as_it_is(size: float, seed: int) -> None:
    weight = normal(3, 16, seed=seed) * torch.tensor([[size], [0.0], [1.0]])
    once = fake_quantised(weight)
    assert torch.equal(fake_quantised(once), once)
    assert torch.equal(codes(once), codes(weight))


def test_every_scale_comes_back() -> None:
    """127 * (m / 127) / 127 is m / 127 for every float32 m: all mantissas of one binade, which others only shift."""
    for first in range(2**23, 2**24, 2**20):
        largest = torch.arange(first, first + 2**20, dtype=torch.int32).float()
        scale = largest / 127
        assert torch.equal(127 * scale / 127, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_would_change_codes(dtype: torch.dtype) -> None:
    """Why it is refused: of all codes beside the largest, some are others after a cast (in float16 where weights are small)."""
    scale = torch.arange(2**16, 2**17, 7).float()[:, None] / 2**16 / 127 * 2**-20
    rows = torch.arange(-127, 128)[None].float() * scale
    assert torch.equal(codes(fake_quantised(rows)), codes(rows))
    assert not torch.equal(codes(rows.to(dtype)), codes(rows))


# --- Training, against autograd. ---


@dataclass(frozen=True)
class Coarse(Pruner):
    """The largest |w| of every step, in 8 bits, trained through any estimator."""

    estimator: Estimator = StraightThrough()  # type: ignore[assignment]
    quantise: Any = "int8"

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        return {name: PATTERN.mask(weight.abs()) for name, weight in weights.items()}


class Rounded(torch.autograd.Function):
    """The reference: round(w * m / s) * s forward, the estimator's gradient backward."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, estimator: Estimator) -> Tensor:
        ctx.dense, ctx.mask, ctx.estimator = dense, PATTERN.mask(dense.abs()), estimator
        masked = dense * ctx.mask.keep
        scale = masked.flatten(1).abs().amax(1).view(-1, *[1] * (dense.dim() - 1)) / 127
        return torch.round(masked / scale) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.estimator.gradient(grad, ctx.dense.detach(), ctx.mask), None


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.03, betas=(0.9, 0.99), weight_decay=0.1)


@pytest.mark.parametrize("estimator", [StraightThrough(), SRSTE(0.01), Exact()], ids=str)
def test_training_is_that_of_fake_quantisation_in_the_forward(estimator: Estimator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 4))
    dense = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    optimizer, reference = adamw(model.parameters()), adamw(dense.values())
    weights = {name: value for name, value in model.named_parameters() if value.dim() > 1}
    shadow = Shadow(weights, Coarse(estimator), optimizer)
    for step in range(12):
        x = normal(16, 4, 4, 4, seed=step)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        reference.zero_grad()
        held = {name: Rounded.apply(v, estimator) if v.dim() > 1 else v for name, v in dense.items()}
        torch.func.functional_call(model, held, x).square().mean().backward()
        reference.step()
        for name, value in shadow.dense.items():
            assert torch.equal(value, dense[name].detach()), (step, name)
    assert all(torch.equal(v, Rounded.apply(dense[n].detach(), estimator)) for n, v in weights.items())


# --- Whole runs. ---


@pytest.fixture
def run(model: nn.Module, adapter: Adapter, samples: Tensor) -> Callable[..., FineTuning]:
    def start(pruner: Pruner, previous: Any = None, **changes: Any) -> FineTuning:
        training = Training(**{"steps": 6, "batch_size": 8, "lr": 0.01, "warmup": 2, **changes})
        return FineTuning(model, pruner, adapter=adapter, data=samples, training=training, previous=previous)

    return start


METHODS = [SparseDM(NM(2, 4, 4), quantise="int8"), STE(NM(2, 4, 4), quantise="int8"), Coarse()]


@pytest.mark.parametrize("pruner", METHODS, ids=lambda pruner: type(pruner).__name__)
def test_the_weights_that_are_saved_are_those_of_the_last_forward(
    pruner: Pruner, run: Callable[..., FineTuning], tmp_path: Path
) -> None:
    tuning = run(pruner, ema=0.0)
    while tuning.done < 6:
        tuning.advance()
    last = {name: value.detach().clone() for name, value in tuning.student.named_parameters()}
    result = tuning.finish()
    compressor.save(tmp_path / "model", result.model, result.masks)
    saved = dict(compressor.load(tmp_path / "model", model=result.model).named_parameters())
    assert result.masks
    for name, mask in result.masks.items():
        assert torch.equal(saved[name], last[name]) and torch.equal(codes(saved[name]), codes(last[name]))
        assert torch.equal(fake_quantised(saved[name]), saved[name])
        assert not saved[name][~mask.keep].any() and bool(saved[name].any())
        dense = tuning.shadow.dense[name]
        assert torch.equal(codes(saved[name]), codes(mask.apply(dense))) and not torch.equal(
            saved[name], mask.apply(dense)
        )


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_lowering_finds_the_codes_that_were_trained(ema: float, run: Callable[..., FineTuning]) -> None:
    tuning = run(METHODS[0], ema=ema)
    while tuning.done < 6:
        tuning.advance()
    result = tuning.finish()
    layer = result.model[0]  # type: ignore[index]
    assert isinstance(layer, nn.Linear)
    unit = Unit("0", layer, (5, 16), torch.float32, torch.device("cpu"), (NM(2, 4, 4),))
    if VNM().unavailable(torch.device("cpu")) is not None:
        pytest.skip("no compiled kernels")
    weight: Any = VNMInt8().build(unit).packed  # type: ignore[union-attr]
    found, scale = quantised(layer.weight.detach(), torch.int8)
    assert torch.equal(weight.parts.scale, scale.flatten())
    assert torch.equal(found.float() * scale, layer.weight.detach())


def test_one_shot_and_unmasked_layers(
    run: Callable[..., FineTuning], model: nn.Module, adapter: Adapter, samples: Tensor
) -> None:
    result = run(METHODS[0]).one_shot()
    for name, mask in result.masks.items():
        own = dict(result.model.named_parameters())[name]
        assert torch.equal(own, fake_quantised(mask.apply(dict(model.named_parameters())[name].detach())))
    some = compressor.prune(
        model, METHODS[0], adapter=adapter, data=samples, steps=2, batch_size=8, ignore=["2"], ema=0.0
    )
    free = some.model.get_parameter("2.weight")
    assert "2.weight" not in some.masks and not torch.equal(fake_quantised(free), free)


def test_a_resumed_run_ends_as_if_it_had_not_been(run: Callable[..., FineTuning], tmp_path: Path) -> None:
    def finished(tuning: FineTuning) -> dict[str, Tensor]:
        while tuning.done < 6:
            tuning.advance()
        return dict(tuning.finish().model.state_dict())

    whole = finished(run(METHODS[0]))
    first = run(METHODS[0])
    for _ in range(3):
        first.advance()
    tmp_path.joinpath("state").mkdir()
    save_state(tmp_path / "state", first.state())
    again = run(METHODS[0], previous=load_state(tmp_path / "state"))
    for name, value in first.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value)
    assert all(torch.equal(value, whole[name]) for name, value in finished(again).items())


def test_in_place_too(model: nn.Module, adapter: Adapter, samples: Tensor) -> None:
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    result = compressor.prune_(model, METHODS[0], adapter=adapter, data=samples, batch_size=8)
    for name, mask in result.masks.items():
        assert torch.equal(model.get_parameter(name), fake_quantised(mask.apply(before[name])))


# --- What is refused. ---


def test_what_cannot_be_is_refused_before_training(
    model: nn.Module, adapter: Adapter, samples: Tensor, cli: Any, tmp_path: Path
) -> None:
    def prune(pruner: Pruner, given: nn.Module = model, **more: Any) -> Any:
        return compressor.prune(given, pruner, adapter=adapter, data=samples, steps=2, batch_size=8, **more)

    for method in (SparseDM, STE):
        with pytest.raises(UsageError, match="quantise: there is no 'int4'"):
            method(quantise="int4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no 'yes'"):
        prune(Coarse(quantise="yes"))
    with pytest.raises(UsageError, match="lora"):
        prune(METHODS[0], mode="lora")
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(UsageError, match=r"0.weight is b?float16"):
            prune(METHODS[0], model.to(dtype))
        with pytest.raises(UsageError, match=r"0.weight is b?float16"):
            compressor.prune_(model, METHODS[0], adapter=adapter, data=samples, batch_size=8)
    for wrong in (("settings.quantise=int4",), ("settings.quantise=int8", "train.mode=lora")):
        flags = [part for setting in wrong for part in ("--set", setting)]
        outcome = cli("run", "--out", tmp_path / "run", *flags)
        assert outcome.code == 2 and "quantise" in outcome.err and not (tmp_path / "run").exists()


def test_a_run_says_so(cli: Any, tmp_path: Path) -> None:
    settings = "settings.quantise=int8", "evaluate.samples=0", "evaluate.latency_rounds=0"
    flags = ["--steps", "2", *(part for setting in settings for part in ("--set", setting))]
    outcome = cli("run", "--out", tmp_path / "run", *flags)
    assert outcome.code == 0, outcome.err
    report = compressor.files.read_json(tmp_path / "run" / "report.json")  # type: ignore[attr-defined]
    assert report["settings"]["quantise"] == report["recipe"]["settings"]["quantise"] == "int8"


def test_the_loss_sees_the_rounded_weights(run: Callable[..., FineTuning], adapter: Adapter) -> None:
    tuning = run(METHODS[0])
    x = normal(4, 16)
    first: Any = tuning.student[0]  # type: ignore[index]
    dense = tuning.shadow.dense["0.weight"]
    rounded = fake_quantised(tuning.shadow.masks["0.weight"].apply(dense))
    assert torch.equal(first(x), F.linear(x, rounded, first.bias))
