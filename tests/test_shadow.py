"""The Shadow, held against a ten-line autograd function: dense weights in the optimizer, masks in the forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor import NM, Average, CompressorError, Estimator, Exact, Mask, Pruner, Shadow, StraightThrough
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.sparsedm import SRSTE
from compressor.plugins.ste import STE
from compressor.plugins.structured import Structured
from compressor.plugins.wanda import Wanda

PATTERN = NM(2, 4)


@dataclass(frozen=True)
class Renewing(Pruner):
    """The largest |w| of every step, trained through any estimator."""

    estimator: Estimator = StraightThrough()  # type: ignore[assignment]

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        return {name: PATTERN.mask(weight.abs()) for name, weight in weights.items()}


@dataclass(frozen=True)
class Answering(Pruner):
    """Answers with whatever it is told to."""

    answer: Callable[[Mapping[str, Tensor]], Any]

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Any:
        return self.answer(weights)


class Masked(torch.autograd.Function):
    """The reference: `w * m` forward, the estimator's gradient backward."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, estimator: Estimator) -> Tensor:
        ctx.dense, ctx.mask, ctx.estimator = dense, PATTERN.mask(dense.abs()), estimator
        return dense * ctx.mask.keep

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.estimator.gradient(grad, ctx.dense.detach(), ctx.mask), None


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.03, betas=(0.9, 0.99), weight_decay=0.1)


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.dim() > 1}


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, samples: Tensor) -> float:
    """One step of learning the negated input."""
    optimizer.zero_grad()
    loss = F.mse_loss(model(samples), -samples)
    loss.backward()
    optimizer.step()
    return loss.item()


ESTIMATORS = [StraightThrough(), Exact(), SRSTE(decay=0.05)]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_training_equals_the_autograd_reference(estimator: Estimator, model: nn.Sequential, samples: Tensor) -> None:
    dense = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reference = adamw(dense.values())
    optimizer = adamw(model.parameters())
    shadow = Shadow(weights_of(model), Renewing(estimator), optimizer)
    for step in range(10):
        first, second = (Masked.apply(dense[name], estimator) for name in ("0.weight", "2.weight"))
        expected = F.mse_loss(
            F.linear(F.linear(samples, first, dense["0.bias"]).tanh(), second, dense["2.bias"]), -samples
        )
        reference.zero_grad()
        expected.backward()
        reference.step()
        torch.testing.assert_close(
            fit(model, optimizer, samples), expected.item(), rtol=1e-5, atol=0, msg=f"step {step}"
        )
        for name, weight in shadow.dense.items():
            torch.testing.assert_close(weight, dense[name].detach(), rtol=1e-4, atol=1e-6, msg=f"{name}, step {step}")
    assert sum(int(count) for count in shadow.flipped.values()) > 0 or isinstance(estimator, Exact)


def test_the_estimators_are_told_apart(
    model: nn.Sequential, samples: Tensor, tiny: Callable[..., nn.Sequential]
) -> None:
    found = []
    for estimator in ESTIMATORS:
        student = tiny()
        optimizer = adamw(student.parameters())
        shadow = Shadow(weights_of(student), Renewing(estimator), optimizer)
        for _ in range(3):
            fit(student, optimizer, samples)
        found.append(shadow.dense["0.weight"])
    assert not any(torch.equal(a, b) for a, b in [found[:2], found[1:], found[::2]])


@pytest.mark.parametrize("make", [adamw, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)], ids=["AdamW", "SGD"])
def test_model_is_2_4_after_every_step(make: Any, model: nn.Sequential, samples: Tensor) -> None:
    optimizer = make(model.parameters())
    shadow = Shadow(weights_of(model), Renewing(), optimizer)
    for _ in range(6):
        fit(model, optimizer, samples)
        for name, weight in weights_of(model).items():
            PATTERN.verify(weight.detach())
            assert torch.equal(weight.detach(), shadow.masks[name].apply(shadow.dense[name]))


def test_model_is_sparse_before_the_first_step_and_its_shadow_dense(model: nn.Sequential) -> None:
    before = model[0].weight.detach().clone()
    shadow = Shadow(weights_of(model), Renewing(), adamw(model.parameters()))
    PATTERN.verify(model[0].weight.detach())
    assert torch.equal(shadow.dense["0.weight"], before)


def test_masks_are_asked_for_once_per_step(model: nn.Sequential, samples: Tensor) -> None:
    asked = []

    def answer(weights: Mapping[str, Tensor]) -> dict[str, Mask]:
        asked.append(len(weights))
        return {name: PATTERN.mask(weight.abs()) for name, weight in weights.items()}

    optimizer = adamw(model.parameters())
    Shadow(weights_of(model), Answering(answer), optimizer)
    for _ in range(3):
        model(samples)
        fit(model, optimizer, samples)
    assert asked == [2] * 4


def test_the_pruner_is_told_the_progress_and_the_masks_in_force(model: nn.Sequential, samples: Tensor) -> None:
    told: list[tuple[float, Mapping[str, Mask]]] = []

    class Recording(Pruner):
        def masks(self, weights: Any, progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
            told.append((progress, previous))
            return {name: PATTERN.mask(weight.abs()) for name, weight in weights.items()}

    optimizer = adamw(model.parameters())
    shadow = Shadow(weights_of(model), Recording(), optimizer)
    first = dict(shadow.masks)
    shadow.progress = 0.25
    fit(model, optimizer, samples)
    assert told == [(0.0, {}), (0.25, first)]


def test_a_frozen_mask_stays_and_pruned_weights_only_decay(model: nn.Sequential, samples: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03, weight_decay=0.0)
    shadow = Shadow(weights_of(model), Magnitude(), optimizer)
    keep, before = shadow.masks["0.weight"].keep, shadow.dense["0.weight"].clone()
    for _ in range(5):
        fit(model, optimizer, samples)
    assert shadow.masks["0.weight"].keep is keep
    assert torch.equal(shadow.dense["0.weight"][~keep], before[~keep])
    assert not torch.equal(shadow.dense["0.weight"][keep], before[keep])


def test_flips_count_the_entries_whose_mask_changed(model: nn.Sequential, samples: Tensor) -> None:
    optimizer = adamw(model.parameters())
    shadow = Shadow(weights_of(model), Renewing(), optimizer)
    assert [int(count) for count in shadow.flips.values()] == [0, 0]
    total = 0
    for _ in range(8):
        old = shadow.masks["2.weight"].keep
        fit(model, optimizer, samples)
        changed = int((old != shadow.masks["2.weight"].keep).sum())
        assert int(shadow.flips["2.weight"]) == changed
        total += changed
    assert int(shadow.flipped["2.weight"]) == total > 0


def test_decoupled_decay_shrinks_pruned_weights_by_lr_times_decay(model: nn.Sequential, samples: Tensor) -> None:
    estimator = SRSTE(decay=0.5, decoupled=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shadow = Shadow(weights_of(model), Renewing(estimator), optimizer)
    before, keep = shadow.dense["0.weight"].clone(), shadow.masks["0.weight"].keep
    optimizer.zero_grad()
    F.mse_loss(model(samples), -samples).backward()
    stepped = before - 0.1 * model[0].weight.grad
    optimizer.step()
    torch.testing.assert_close(shadow.dense["0.weight"], torch.where(keep, stepped, stepped * (1 - 0.1 * 0.5)))


def test_accumulated_gradients_pass_the_estimator_once(model: nn.Sequential, samples: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    shadow = Shadow(weights_of(model), Renewing(SRSTE(decay=0.5)), optimizer)
    before, mask = shadow.dense["0.weight"].clone(), shadow.masks["0.weight"]
    for part in samples.chunk(4):
        (F.mse_loss(model(part), -part) / 4).backward()
    grad = model[0].weight.grad.clone()
    optimizer.step()
    expected = before - grad - 0.5 * torch.where(mask.keep, 0.0, before)
    torch.testing.assert_close(shadow.dense["0.weight"], expected)


@pytest.mark.parametrize("by_name", [True, False])
def test_closures_are_refused_before_anything_changes(by_name: bool, model: nn.Sequential, samples: Tensor) -> None:
    optimizer = torch.optim.LBFGS(model.parameters())
    Shadow(weights_of(model), Renewing(), optimizer)
    before = model[0].weight.detach().clone()

    def closure() -> Tensor:
        raise AssertionError("the closure was called")

    with pytest.raises(CompressorError, match="call a closure cannot train masked weights"):
        optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert torch.equal(model[0].weight.detach(), before)


@pytest.mark.parametrize("unscaled", [False, True])
def test_scaled_gradients_are_refused_unless_unscaled(unscaled: bool, model: nn.Sequential, samples: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    shadow = Shadow(weights_of(model), Renewing(), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = shadow.dense["0.weight"].clone()
    scaler.scale(F.mse_loss(model(samples), -samples)).backward()
    if unscaled:
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
    else:
        with pytest.raises(CompressorError, match=r"still scaled\n.*unscale_"):
            scaler.step(optimizer)
    assert torch.equal(shadow.dense["0.weight"], before) is not unscaled


def test_a_weight_without_gradient_keeps_its_dense_value(model: nn.Sequential, samples: Tensor) -> None:
    model[2].weight.requires_grad_(False)
    optimizer = adamw(model.parameters())
    shadow = Shadow(weights_of(model), Renewing(SRSTE(decay=0.5, decoupled=True)), optimizer)
    before = shadow.dense["2.weight"].clone()
    for _ in range(3):
        fit(model, optimizer, samples)
    assert torch.equal(shadow.dense["2.weight"], before)
    PATTERN.verify(model[2].weight.detach())


def test_tied_weights_stay_tied_and_sparse(samples: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    optimizer = adamw(model.parameters())
    shadow = Shadow(weights_of(model), Renewing(), optimizer)
    for _ in range(3):
        fit(model, optimizer, samples)
    assert list(shadow.dense) == ["0.weight"] and model[2].weight is model[0].weight
    PATTERN.verify(model[2].weight.detach())


def test_weights_left_out_by_the_pruner_stay_dense(model: nn.Sequential, samples: Tensor) -> None:
    optimizer = adamw(model.parameters())
    shadow = Shadow(weights_of(model), Answering(lambda w: {"0.weight": PATTERN.mask(w["0.weight"].abs())}), optimizer)
    fit(model, optimizer, samples)
    assert model[2].weight.detach().count_nonzero() == model[2].weight.numel()
    assert torch.equal(shadow.dense["2.weight"], model[2].weight.detach())


def test_targets_outside_the_optimizer_are_refused(model: nn.Sequential) -> None:
    with pytest.raises(CompressorError, match=r"2\.weight is pruned but not trained"):
        Shadow(weights_of(model), Renewing(), adamw(model[0].parameters()))


def full(weight: Tensor) -> Mask:
    return Mask(torch.ones_like(weight, dtype=torch.bool), NM(4, 4))


BAD_ANSWERS = {
    "shape": (
        lambda w: {"0.weight": full(w["0.weight"][:8])},
        r"0\.weight: the mask is \(8, 16\) on cpu, the weight \(32, 16\)",
    ),
    "device": (lambda w: {"0.weight": full(w["0.weight"].to("meta"))}, r"0\.weight: the mask is \(32, 16\) on meta"),
    "name": (lambda w: {"0.wieght": full(w["0.weight"])}, r"masks\(\) returned '0\.wieght', which is not a target"),
    "tensor": (lambda w: {"2.weight": full(w["2.weight"]).keep}, r"2\.weight: masks\(\) returned Tensor"),
    "list": (lambda w: [full(weight) for weight in w.values()], r"masks\(\) returned list"),
    "none": (lambda w: None, r"masks\(\) returned NoneType"),
}


@pytest.mark.parametrize(("answer", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_wrong_masks_are_refused_and_named(answer: Any, message: str, model: nn.Sequential) -> None:
    with pytest.raises(CompressorError, match=message):
        Shadow(weights_of(model), Answering(answer), adamw(model.parameters()))


MISPLACED = {
    "pairs": (lambda m: (m.named_parameters(), Renewing(), adamw(m.parameters())), "the weights are generator"),
    "class": (lambda m: (weights_of(m), Magnitude, adamw(m.parameters())), "the pruner is the class Magnitude"),
    "schedule": (lambda m: (weights_of(m), Renewing(), "adamw"), "the optimizer is str"),
    "vector": (
        lambda m: (dict(m.named_parameters()), Renewing(), adamw(m.parameters())),
        r"0\.bias: 2:4 needs a weight",
    ),
    "narrow": (
        lambda m: ({"a": m[2].weight}, Magnitude(NM(2, 5)), adamw(m.parameters())),
        "a: 2:5 needs dim 1 divisible",
    ),
    "unprepared": (lambda m: (weights_of(m), Wanda(), adamw(m.parameters())), "Wanda has looked at nothing yet"),
    "structure": (lambda m: (weights_of(m), Structured(), adamw(m.parameters())), "Structured removes structure"),
    "half": (
        lambda m: (weights_of(m.bfloat16()), STE(quantise="int8"), adamw(m.parameters())),
        "quantise int8: 0.weight",
    ),
}


@pytest.mark.parametrize(("make", "message"), MISPLACED.values(), ids=MISPLACED)
def test_what_a_shadow_cannot_keep_is_refused_and_leaves_the_optimizer_alone(
    make: Any, message: str, model: nn.Sequential
) -> None:
    weights, pruner, optimizer = make(model)
    with pytest.raises(CompressorError, match=message):
        Shadow(weights, pruner, optimizer)
    if isinstance(optimizer, torch.optim.Optimizer):
        assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
        Shadow(weights_of(model), Renewing(), optimizer)


def test_a_weight_that_is_no_number_any_more_is_named(model: nn.Sequential, samples: Tensor) -> None:
    optimizer = adamw(model.parameters())
    Shadow(weights_of(model), Renewing(), optimizer)
    with pytest.raises(CompressorError, match=r"0\.weight holds NaN"):
        fit(model, optimizer, samples * torch.nan)


def test_a_step_that_calls_the_step_of_the_class_below_is_one_step(
    samples: Tensor, tiny: Callable[..., nn.Sequential]
) -> None:
    """torch calls the hooks of both, where both classes were used."""

    class Mine(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    found = []
    for kind in (torch.optim.AdamW, Mine):
        model = tiny()
        optimizer = kind(model.parameters(), lr=0.03)
        shadow = Shadow(weights_of(model), Renewing(SRSTE(decay=0.5)), optimizer)
        for _ in range(4):
            fit(model, optimizer, samples)
        found.append(shadow.dense)
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def test_a_failed_step_that_is_repeated_gets_the_estimators_gradient_once(samples: Tensor, tiny: Any) -> None:
    found = []
    for fails in (False, True):
        model = tiny()
        optimizer = adamw(model.parameters())
        shadow = Shadow(weights_of(model), Renewing(SRSTE(decay=0.5)), optimizer)
        F.mse_loss(model(samples), -samples).backward()
        if fails:
            failing = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
            failing.remove()
        optimizer.step()
        found.append(shadow.dense)
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


def set_data(model: nn.Module) -> None:
    model[0].weight.data = model[0].weight.data + 5  # type: ignore[index, operator, union-attr]


def load_more(model: nn.Module) -> None:
    model.load_state_dict({name: value + 5 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("write", [load_more, set_data])
def test_weights_that_were_written_to_between_steps_are_not_undone(
    write: Callable[[nn.Module], None], model: nn.Sequential, samples: Tensor
) -> None:
    optimizer = adamw(model.parameters())
    shadow = Shadow(weights_of(model), Renewing(), optimizer)
    fit(model, optimizer, samples)
    state, weights = shadow.state(), copy.deepcopy(model.state_dict())
    write(model)
    written = copy.deepcopy(model.state_dict())
    with pytest.raises(CompressorError, match=r"0.weight was written to since the last step"):
        fit(model, optimizer, samples)
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())
    model.load_state_dict(weights)
    shadow.restore(state)
    fit(model, optimizer, samples)
    shadow.close()
    write(model)
    Shadow(weights_of(model), Renewing(), optimizer)
    fit(model, optimizer, samples)


@pytest.mark.parametrize(
    "write", [lambda weight: weight.data.clamp_(-0.05, 0.05), lambda weight: weight.detach().numpy().fill(0.5)]
)
def test_what_is_written_past_torch_in_every_step_is_seen(
    write: Callable[[Tensor], object], model: nn.Sequential, samples: Tensor
) -> None:
    optimizer = adamw(model.parameters())
    Shadow(weights_of(model), Renewing(), optimizer)
    fit(model, optimizer, samples)
    write(model[0].weight)
    with pytest.raises(CompressorError, match=r"0.weight was written to since the last step"):
        fit(model, optimizer, samples)


def test_weights_that_have_their_values_again_are_no_alarm(model: nn.Sequential, samples: Tensor) -> None:
    optimizer = adamw(model.parameters())
    shadow = Shadow(weights_of(model), Answering(lambda w: {"0.weight": PATTERN.mask(w["0.weight"].abs())}), optimizer)
    for _ in range(3):
        fit(model, optimizer, samples)
        own = copy.deepcopy(model.state_dict())
        load_more(model)
        model.load_state_dict(own)  # as a look at an average does
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    set_data(model)
    model[0].weight.data = own["0.weight"]
    fit(model, optimizer, samples)
    PATTERN.verify(model[0].weight.detach())
    assert shadow.masks


def test_a_model_that_is_cast_after_its_shadow_was_made_is_refused(model: nn.Sequential, samples: Tensor) -> None:
    optimizer = adamw(model.parameters())
    Shadow(weights_of(model), Renewing(), optimizer)
    model.bfloat16()
    with pytest.raises(CompressorError, match=r"0.weight is torch.bfloat16 on cpu, and was torch.float32 on cpu when"):
        fit(model, optimizer, samples.bfloat16())


def test_a_weight_has_one_shadow_and_one_name(model: nn.Sequential, samples: Tensor) -> None:
    optimizer = adamw(model.parameters())
    first = Shadow({"0.weight": model[0].weight}, Renewing(), optimizer)
    with pytest.raises(CompressorError, match=r"1.weight has a Shadow already"):
        Shadow({"1.weight": model[0].weight}, Renewing(), optimizer)
    with pytest.raises(CompressorError, match="a and b are one parameter"):
        Shadow({"a": model[2].weight, "b": model[2].weight}, Renewing(), optimizer)
    Shadow({"2.weight": model[2].weight}, Renewing(), optimizer)
    fit(model, optimizer, samples)
    first.close()
    Shadow({"0.weight": model[0].weight}, Renewing(), optimizer)
    fit(model, optimizer, samples)


def test_two_shadows_of_two_optimizers_do_not_undo_each_other(model: nn.Sequential, samples: Tensor) -> None:
    one, other = adamw(model.parameters()), adamw(model.parameters())
    Shadow(weights_of(model), Renewing(), one)
    Shadow(weights_of(model), Renewing(), other)
    fit(model, one, samples)
    with pytest.raises(CompressorError, match=r"0.weight was written to since the last step"):
        fit(model, other, samples)


@pytest.mark.parametrize("after", ["close", "restore", "step"])
def test_a_step_that_fails_leaves_nothing_dense_behind(after: str, model: nn.Sequential, samples: Tensor) -> None:
    optimizer = adamw(model.parameters())
    shadow = Shadow(weights_of(model), Renewing(), optimizer)
    fit(model, optimizer, samples)
    state, dense = copy.deepcopy(shadow.state()), {name: value.clone() for name, value in shadow.dense.items()}

    def failing(*_: Any) -> None:
        raise MemoryError("once")

    hook = optimizer.register_step_pre_hook(failing)  # after the Shadow's
    with pytest.raises(MemoryError):
        fit(model, optimizer, samples)
    hook.remove()
    assert torch.equal(model[0].weight.detach(), dense["0.weight"])
    if after == "step":
        fit(model, optimizer, samples)
    else:
        shadow.close() if after == "close" else shadow.restore(state)
        assert all(torch.equal(shadow.dense[name], value) for name, value in dense.items())
    for name, weight in weights_of(model).items():
        assert torch.equal(weight.detach(), shadow.masks[name].apply(shadow.dense[name]))
        assert weight.data_ptr() != shadow.dense[name].data_ptr()
        PATTERN.verify(weight.detach())


class Towards(Estimator):
    """The gradient of a pull towards zero; `own`: in memory of its own."""

    def __init__(self, own: bool) -> None:
        self.own = own

    def gradient(self, grad: Tensor, dense: Tensor, mask: Mask) -> Tensor:
        return dense.clone() if self.own else dense


def test_a_gradient_that_is_the_weight_itself_is_what_a_copy_is(samples: Tensor, tiny: Any) -> None:
    """Decay changed the weight, and with it the gradient, before the optimizer read that."""
    found = []
    for own in (True, False):
        model = tiny()
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5, eps=0.1, foreach=False)
        method = Magnitude(estimator=Towards(own))
        Shadow({"0.weight": model[0].weight}, method, optimizer)
        for _ in range(3):
            model(samples).square().mean().backward()
            optimizer.step()
        found.append(model[0].weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("method", [Magnitude(), STE(), Magnitude(estimator=SRSTE())])
def test_a_sparse_gradient_is_what_a_dense_one_is(method: Pruner) -> None:
    """SR-STE and exact masks ended in errors of torch."""
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(16, 16, sparse=sparse)
        optimizer = torch.optim.SGD(table.parameters(), 0.1)
        Shadow({"weight": table.weight}, method, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            table(torch.tensor([1, 3, 3])).square().sum().backward()
            optimizer.step()
        found.append(table.weight.detach())
    torch.testing.assert_close(*found)


def test_close_ends_masking(model: nn.Sequential, samples: Tensor) -> None:
    optimizer = adamw(model.parameters())
    Shadow(weights_of(model), Renewing(), optimizer).close()
    PATTERN.verify(model[0].weight.detach())
    fit(model, optimizer, samples)
    assert model[0].weight.detach().count_nonzero() > model[0].weight.numel() // 2


def test_a_restored_shadow_holds_the_same_weights_and_masks(
    model: nn.Sequential, samples: Tensor, tiny: Callable[..., nn.Sequential]
) -> None:
    optimizer = adamw(model.parameters())
    shadow = Shadow(weights_of(model), Renewing(), optimizer)
    for _ in range(4):
        fit(model, optimizer, samples)
    other = tiny(seed=7)
    copy = Shadow(weights_of(other), Renewing(), adamw(other.parameters()))
    copy.restore(shadow.state())
    for name, weight in weights_of(other).items():
        assert torch.equal(copy.dense[name], shadow.dense[name])
        assert torch.equal(copy.masks[name].keep, shadow.masks[name].keep)
        assert torch.equal(weight, weights_of(model)[name])
        assert int(copy.flipped[name]) == int(shadow.flipped[name])


# --- An average of the weights. ---


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


class Loop:
    """A training loop of a user's own, with an average beside it."""

    def __init__(self, decay: float = 0.9) -> None:
        self.model = small()
        self.optimizer = adamw(self.model.parameters())
        self.shadow = Shadow(weights_of(self.model), Renewing(), self.optimizer)
        self.average = Average(self.model, self.shadow, decay)

    def step(self, number: int) -> None:
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        self.model(batch).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_an_average_is_of_dense_weights_and_is_masked_once() -> None:
    loop = Loop()
    parameters = dict(loop.model.named_parameters())
    dense = {name: value.clone() for name, value in {**parameters, **loop.shadow.dense}.items()}
    usual = {name: value.detach().clone() for name, value in parameters.items()}
    for number in range(30):
        loop.step(number)
        loop.average.update()
        share = 1 - min(0.9, (1 + number) / (10 + number))
        for name, value in parameters.items():
            dense[name] = dense[name] + share * (loop.shadow.dense.get(name, value).detach() - dense[name])
            usual[name].lerp_(value.detach(), share)
    masks = loop.average.write_()
    assert masks.keys() == loop.shadow.weights.keys()
    for name, value in parameters.items():
        keep = PATTERN.mask(dense[name].abs()).keep if name in masks else torch.ones_like(value, dtype=torch.bool)
        torch.testing.assert_close(value.detach(), (dense[name] * keep).detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(CompressorError):  # what it is there for: an average of sparse weights
        PATTERN.verify(usual["0.weight"])


def test_an_average_is_looked_at_without_a_trace() -> None:
    loops = Loop(), Loop()
    for number in range(12):
        for loop in loops:
            loop.step(number)
            loop.average.update()
        with loops[0].average.applied() as masks:
            assert not torch.equal(loops[0].model[0].weight, loops[1].model[0].weight)
            for name, mask in masks.items():
                mask.pattern.verify(loops[0].model.get_parameter(name))
        with pytest.raises(KeyboardInterrupt), loops[0].average.applied():
            raise KeyboardInterrupt
    for one, other in zip(loops[0].model.parameters(), loops[1].model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_average_goes_on_where_it_was() -> None:
    first, second = Loop(), Loop()
    for number in range(9):
        for loop in (first, second):
            loop.step(number)
        first.average.update()
        if number == 4:
            second.average.restore(copy.deepcopy(first.average.state()))
        elif number > 4:
            second.average.update()
    assert first.average.updates == second.average.updates == 9
    for name, value in first.average.values.items():
        assert torch.equal(value, second.average.values[name])
    with pytest.raises(CompressorError, match="another model"):
        first.average.restore({"updates": 1, "values": {"0.weight": torch.zeros(1)}})


def test_what_no_average_can_be_made_of_is_refused() -> None:
    loop = Loop()
    with pytest.raises(CompressorError, match=r"decay 1\.0"):
        Average(loop.model, loop.shadow, 1.0)
    with pytest.raises(CompressorError, match="no parameter of this model"):
        Average(small(1), loop.shadow)


def test_an_average_of_half_precision_moves_on() -> None:
    model = small().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    shadow = Shadow(weights_of(model), Magnitude(PATTERN), optimizer)
    average = Average(model, shadow, 0.999)
    before = average.values["0.bias"].clone()
    with torch.no_grad():
        model[0].bias.add_(0.5)
    for _ in range(20_000 // 10):
        average.update()
    torch.testing.assert_close(average.values["0.bias"], before + 0.5, rtol=0, atol=0.08)
    average.write_()
    assert model[0].bias.dtype == torch.bfloat16 and not torch.equal(model[0].bias.float(), before)
