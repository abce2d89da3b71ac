"""The Shadow on optimizers of many kinds, each held against itself on a loss with masks inside; and those that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_shadow import Masked, Renewing, weights_of
from torch import Tensor, nn

from compressor import CompressorError, Shadow, parse, prune
from compressor.errors import UsageError
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.sparsedm import SRSTE, SparseDM

ESTIMATOR = SRSTE(decay=0.05)
KINDS: dict[str, Any] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"lr": 0.02, "weight_decay": 0.1},
    "AdamW": {"lr": 0.02, "amsgrad": True},
    "NAdam": {"lr": 0.02, "decoupled_weight_decay": True, "weight_decay": 0.1},
    "RAdam": {"lr": 0.02},
    "Adadelta": {"lr": 1.0},
    "Adagrad": {"lr": 0.02},
    "Adamax": {"lr": 0.02},
    "ASGD": {"lr": 0.02},
    "RMSprop": {"lr": 0.01},
    "Rprop": {"lr": 0.01},
    "Adafactor": {"lr": 0.02, "weight_decay": 0.1},
}


def loss_of(weights: Any, samples: Tensor) -> Tensor:
    first, second, third, fourth = weights
    return F.mse_loss(F.linear(F.linear(samples, first, second).tanh(), third, fourth), -samples)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_steps_as_it_does_without_a_shadow(
    kind: str, maximize: bool, model: nn.Sequential, samples: Tensor
) -> None:
    dense = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    make: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, kind)
    plain = make(dense.values(), **KINDS[kind])
    optimizer = make(model.parameters(), **KINDS[kind], maximize=maximize)
    shadow = Shadow(weights_of(model), Renewing(ESTIMATOR), optimizer)
    for _ in range(5):
        plain.zero_grad(set_to_none=False)
        optimizer.zero_grad(set_to_none=False)
        loss_of([Masked.apply(w, ESTIMATOR) if w.dim() > 1 else w for w in dense.values()], samples).backward()
        loss = loss_of(model.parameters(), samples)
        (-loss if maximize else loss).backward()
        plain.step()
        optimizer.step()
    for name, weight in shadow.dense.items():
        torch.testing.assert_close(weight, dense[name].detach(), rtol=1e-4, atol=1e-6)


def test_a_step_that_a_scaler_skips_shrinks_nothing(model: nn.Sequential, samples: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    shadow = Shadow(weights_of(model), Renewing(SRSTE(decay=0.5, decoupled=True)), optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = shadow.dense["0.weight"].clone()
    for skipped in (True, False):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(samples), -samples)).backward()
        if skipped:
            model[2].bias.grad.fill_(torch.inf)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(shadow.dense["0.weight"], before) is skipped


class TwoCalls(torch.optim.Optimizer):
    """The form of SAM's usual code: a step up, whose gradients another optimizer then steps by."""

    def __init__(self, parameters: Any, inner: torch.optim.Optimizer) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.inner, self.kept = inner, []

    @torch.no_grad()
    def first_step(self) -> None:
        self.kept = [(p, p.detach().clone()) for group in self.param_groups for p in group["params"]]
        for weight, _ in self.kept:
            weight.add_(weight.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for weight, before in self.kept:
            weight.data = before
        self.inner.step()


class ScheduleFree(torch.optim.SGD):
    """The form of schedule-free optimizers: other weights are evaluated than those that are trained."""

    def eval(self) -> None:
        raise AssertionError("not called")


def inner(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


REFUSED: dict[str, Any] = {
    "two calls": (lambda m: TwoCalls(m.parameters(), inner(m)), {}, "TwoCalls steps in two calls"),
    "other weights": (lambda m: ScheduleFree(m.parameters(), lr=0.1), {}, "ScheduleFree writes other weights"),
    "no rate": (lambda m: torch.optim.Optimizer(m.parameters(), {"lr": None}), {}, "has no learning rate"),
    "start": (inner, {"start": "obs"}, "SparseDM has looked at nothing yet"),
    "best": (inner, {"preset": "best"}, "SparseDM has looked at nothing yet"),
    "text": (inner, {"pattern": "2:4"}, r"pattern of SparseDM is str\nGive compressor.parse\('2:4'\)"),
}


@pytest.mark.parametrize(("make", "settings", "said"), REFUSED.values(), ids=REFUSED)
def test_what_a_shadow_would_do_wrong_is_refused(make: Any, settings: Any, said: str, model: nn.Sequential) -> None:
    optimizer = make(model)
    with pytest.raises(UsageError, match=said):
        Shadow(weights_of(model), SparseDM(**settings), optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_the_optimizer_inside_one_of_two_calls_is_taken(model: nn.Sequential, samples: Tensor) -> None:
    base = inner(model)
    two, shadow = TwoCalls(model.parameters(), base), Shadow(weights_of(model), Renewing(ESTIMATOR), base)
    losses = []
    for _ in range(10):
        for step in (two.first_step, two.second_step):
            two.zero_grad()
            losses.append(F.mse_loss(model(samples), -samples))
            losses[-1].backward()
            step()
    assert losses[-2] < losses[0]
    for name, weight in weights_of(model).items():
        assert torch.equal(weight.detach(), shadow.masks[name].apply(shadow.dense[name]))


def test_a_method_that_was_prepared_by_hand_is_taken(model: nn.Sequential, samples: Tensor, adapter: Any) -> None:
    from compressor.data.batches import as_batches

    before = model[0].weight.detach().clone()
    pruner = SparseDM(start="obs").prepare(model, adapter, as_batches(samples, 8, 0))
    Shadow(weights_of(model), pruner, inner(model)).close()
    assert not torch.equal(model[0].weight.detach(), before) and pruner == SparseDM(start="obs", updated=True)


def test_a_weight_that_left_the_optimizer_is_named(model: nn.Sequential) -> None:
    optimizer = inner(model)
    Shadow(weights_of(model), Renewing(ESTIMATOR), optimizer)
    optimizer.param_groups[0]["params"].pop(0)
    with pytest.raises(CompressorError, match=r"0\.weight is no longer trained by the optimizer"):
        optimizer.step()


def test_a_schedule_that_was_never_told_the_progress_is_said(model: nn.Sequential) -> None:
    optimizer, pruner = inner(model), SparseDM(parse("2:4"), progressive=True)
    shadow = Shadow(weights_of(model), pruner, optimizer)
    with pytest.warns(UserWarning, match=r"2 weights are .*, not yet 2:4: set shadow.progress"):
        shadow.close()
    shadow = Shadow(weights_of(model), pruner, optimizer, progress=1.0)
    shadow.close()


def test_a_pattern_that_is_a_text_is_refused(model: nn.Sequential, samples: Tensor, adapter: Any) -> None:
    with pytest.raises(UsageError, match=r"the pattern of Magnitude is str\nGive compressor.parse\('2:4'\)"):
        prune(model, Magnitude(pattern="2:4"), adapter=adapter, data=samples, steps=0)  # type: ignore[arg-type]
