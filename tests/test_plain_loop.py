"""Fine-tuning held, number by number, against a loop of plain torch; and what would make two equal runs differ in silence."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import compressor
from compressor import NM, Adapter, CompressorError, FineTuning, Pruner, Training
from compressor.data.batches import Samples
from compressor.errors import UsageError
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.sparsedm import SparseDM
from compressor.saving.state import load_state, save_state
from compressor.seeds import generator

TARGETS = ("conv.weight", "first.weight", "idle.weight", "last.weight")


class Net(nn.Module):
    """Two Linears share a weight, one is frozen, one is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.frozen, self.idle = nn.Linear(32, 32).requires_grad_(False), nn.Linear(8, 8)
        self.norm, self.last = nn.LayerNorm(32), nn.Linear(32, 16)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        hidden = self.conv(images).flatten(1) + times[:, None]
        hidden = hidden + self.frozen(self.second(self.first(hidden).tanh()).tanh())
        return self.last(self.norm(hidden)).view_as(images)


class Noise(Adapter):
    """Rectified flow."""

    def noised(self, batch: Tensor, rng: torch.Generator) -> tuple[Any, Tensor]:
        times, noise = torch.rand(len(batch), generator=rng), torch.randn(batch.shape, generator=rng)
        share = times[:, None, None, None]
        return (batch * (1 - share) + noise * share, times), noise - batch

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        answer: Tensor = module(*inputs)
        return answer


def images(count: int = 11) -> Tensor:
    return torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(5))


def net(kind: type[nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return kind()


def largest(weight: Tensor, n: int, m: int) -> Tensor:
    """Where the N largest of every M input channels are, ties to the first."""
    groups = weight.movedim(1, -1).unflatten(-1, (-1, m)).abs()
    order = groups.argsort(dim=-1, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return keep.flatten(-2).movedim(-1, 1)


@dataclass(frozen=True)
class Plain:
    """A loop of nothing but torch: masks renewed at every step, SR-STE, the teacher, the average, AdamW."""

    training: Training
    noise: float = 1.0
    teacher: float = 0.1
    decay: float = 2e-4
    decoupled: bool = False
    fixed: bool = False
    exact: bool = False

    def lr(self, step: int) -> float:
        peak, steps = self.training.lr, self.training.steps
        warm = min(self.training.warmup, steps // 4)
        if step < warm:
            return peak * (step + 1) / (warm + 1)
        done = (step - warm) / (steps - warm)
        falls = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
        return peak * falls[self.training.schedule]

    def gradients(self, model: nn.Module, teacher: nn.Module, leaves: Mapping[str, Tensor], batch: Any) -> list[float]:
        """Add up those of `leaves`, piece by piece, each sample counting the same; the two losses."""
        (noisy, times), target = batch
        sums = [0.0, 0.0]
        for rows in torch.arange(len(target)).tensor_split(min(self.training.accumulate, len(target))):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.training.dtype == "bfloat16"):
                answer = functional_call(model, dict(leaves), (noisy[rows], times[rows])).float()
                with torch.no_grad():
                    taught = teacher(noisy[rows], times[rows]).float()
            losses = [(answer - wanted).square().flatten(1).mean(1).sum() for wanted in (target[rows], taught)]
            ((self.noise * losses[0] + self.teacher * losses[1]) / len(target)).backward()
            sums = [total + float(loss.detach()) / len(target) for total, loss in zip(sums, losses, strict=True)]
        return sums

    def train(self, model: nn.Module, data: Tensor) -> tuple[dict[str, Tensor], list[list[float]]]:
        """The finished weights by name, and [noise loss, teacher loss, norm, lr] of every step."""
        told, own, teacher = self.training, copy.deepcopy(model), copy.deepcopy(model).eval()
        dense = {name: value for name, value in own.named_parameters() if value.requires_grad}
        optimizer = torch.optim.AdamW(
            [*dense.values()], lr=told.lr, betas=told.betas, weight_decay=told.weight_decay, foreach=False
        )
        average = {name: value.detach().clone() for name, value in dense.items()}
        masks, records = {name: largest(dense[name].detach(), 2, 4) for name in TARGETS}, []
        indices: list[int] = []
        for epoch in range(told.steps * told.batch_size // len(data) + 1):
            indices += torch.randperm(len(data), generator=generator(told.seed, "order", epoch)).tolist()
        for step in range(told.steps):
            chosen = indices[step * told.batch_size : (step + 1) * told.batch_size]
            batch = Noise().noised(data[chosen], generator(told.seed, "noise", step))
            leaves = {name: value.detach().clone() for name, value in dense.items()}
            leaves = {name: (v * masks[name] if name in masks else v).requires_grad_() for name, v in leaves.items()}
            losses = self.gradients(own, teacher, leaves, batch)
            grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
            norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
            for name, value in dense.items():
                value.grad = grads.get(name)
                if value.grad is None:
                    continue
                if told.clip and norm > told.clip:
                    value.grad *= told.clip / (norm + 1e-6)
                if name in masks and self.exact:
                    value.grad *= masks[name]
                elif name in masks and not self.decoupled:
                    value.grad += self.decay * ~masks[name] * value.detach()
            optimizer.param_groups[0]["lr"] = self.lr(step)
            optimizer.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    if self.decoupled and name in grads:
                        dense[name] -= self.lr(step) * self.decay * ~mask * dense[name]
                    masks[name] = mask if self.fixed else largest(dense[name], 2, 4)
                kept = min(told.ema, (1 + step) / (10 + step))
                for name, value in dense.items():
                    average[name] = kept * average[name] + (1 - kept) * value
            records.append([*losses, float(norm), self.lr(step)])
        final = average if told.ema else {name: value.detach() for name, value in dense.items()}
        last = masks if self.fixed else {name: largest(final[name], 2, 4) for name in masks}
        return {name: value * last[name] if name in last else value for name, value in final.items()}, records


@pytest.mark.parametrize(
    ("method", "plain", "training"),
    [
        (SparseDM(), {}, {}),
        (SparseDM(), {}, {"schedule": "linear", "warmup": 3}),
        (SparseDM(), {}, {"schedule": "constant", "warmup": 99}),
        (SparseDM(), {}, {"accumulate": 3, "clip": 0.05}),
        (SparseDM(), {}, {"accumulate": 99, "ema": 0.0}),
        (SparseDM(), {}, {"dtype": "bfloat16", "clip": 0.05, "accumulate": 2}),
        (SparseDM(), {}, {"batch_size": 30, "accumulate": 7, "weight_decay": 3.0}),
        (SparseDM(), {}, {"steps": 1}),
        (SparseDM(decay=0.5, teacher=2.0), {"decay": 0.5, "teacher": 2.0}, {"clip": 0.05}),
        (SparseDM(decay=5.0, decoupled=True), {"decay": 5.0, "decoupled": True}, {}),
        (SparseDM(teacher_only=True), {"noise": 0.0, "teacher": 1.0}, {}),
        (SparseDM(fixed=True), {"fixed": True}, {}),
        (Magnitude(), {"fixed": True, "exact": True, "teacher": 0.0}, {}),
    ],
)
def test_fine_tuning_is_a_plain_loop(method: Pruner, plain: dict[str, Any], training: dict[str, Any]) -> None:
    told = Training(**{"steps": 9, "batch_size": 7, "lr": 3e-3, "ema": 0.9, "seed": 4, "device": "cpu", **training})
    given = {"adapter": Noise(), "data": images(), **told.model_dump()}
    result = compressor.prune(net(), method, **given)
    expected, records = Plain(told, **plain).train(net(), images())
    assert set(result.masks) == set(TARGETS)
    for name, value in expected.items():
        torch.testing.assert_close(result.model.get_parameter(name).detach(), value, rtol=1e-4, atol=2e-6)
    for step, (noise, teacher, norm, lr) in zip(result.steps, records, strict=True):
        assert (step.noise_loss, step.grad_norm, step.lr) == pytest.approx((noise, norm, lr), rel=1e-4)
        assert step.teacher_loss is None or step.teacher_loss == pytest.approx(teacher, rel=1e-4)


# What needs the whole batch


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        answer: Tensor = self.last(self.norm(self.first(images)))
        return answer


def pruned(model: nn.Module, method: Pruner | None = None, data: Any = None, **training: Any) -> compressor.Result:
    settings = {"steps": 3, "batch_size": 6, "lr": 3e-3, "device": "cpu", **training}
    given = images() if data is None else data
    return compressor.prune(model, method or Magnitude(), adapter=Noise(), data=given, **settings)


def test_batch_statistics_of_a_split_batch_are_refused() -> None:
    with pytest.raises(UsageError, match=r"norm \(BatchNorm2d\) needs the whole batch, and train\.accumulate 2 splits"):
        pruned(net(Normed), accumulate=2)
    assert pruned(net(Normed), accumulate=2, steps=0).masks  # nothing is split where nothing is trained


def test_a_batchnorm_in_eval_mode_keeps_its_statistics() -> None:
    model = net(Normed)
    model.norm.eval()
    whole, split = pruned(model), pruned(model, accumulate=3)
    assert torch.equal(whole.model.norm.running_mean, torch.zeros(8))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(split.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    whole = pruned(model.eval())  # as models come that were loaded: all of it is trained
    assert not torch.equal(whole.model.norm.running_mean, torch.zeros(8))


# Equal runs are equal


class Chancy(Net):
    """Draws from every global generator."""

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        return super().forward(images, times) * (1 + random.random() + np.random.rand() + torch.rand(()))


class Guessing(Magnitude):
    """Its preparation draws, as a method that looks at some of the data by chance."""

    def prepare(self, model: nn.Module, adapter: Adapter, batches: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).add_(torch.rand(()) + np.random.rand())
        return self


class ByChance(Magnitude):
    """Masks by chance, other ones in every step: what methods are held against."""

    def masks(self, weights: Any, progress: float, previous: Any) -> Any:
        chance = random.random() + np.random.rand()
        return {n: self.pattern.mask((torch.rand_like(w) * 7 + chance) % 1) for n, w in weights.items()}


@pytest.mark.parametrize(("kind", "method"), [(Chancy, Magnitude()), (Net, Guessing()), (Net, ByChance())])
def test_what_a_model_or_a_method_draws_the_seed_gives(kind: type[nn.Module], method: Pruner) -> None:
    found = []
    for disturbance in (1, 2):
        random.seed(disturbance)
        np.random.seed(disturbance)
        torch.manual_seed(disturbance)
        found.append(pruned(net(kind), method).model.state_dict())
        assert random.random() == random.Random(disturbance).random()  # the caller's are as they were
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


class InPlace(Noise):
    def noised(self, batch: Tensor, rng: torch.Generator) -> tuple[Any, Tensor]:
        return super().noised(batch.mul_(2.0), rng)


class Loader(Sequence[Tensor]):
    """Gives its own tensors, again and again."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self.batches[index]


@pytest.mark.parametrize("kind", [list, Loader])
def test_an_adapter_that_writes_to_its_batch_does_not_change_the_data(kind: Any) -> None:
    data = [images(), images(7)]
    compressor.prune(net(), Magnitude(), adapter=InPlace(), data=kind(data), steps=5, device="cpu")
    assert torch.equal(data[0], images()) and torch.equal(data[1], images(7))


@pytest.mark.parametrize("data", [[images()[:0]], [images(), images()[:0]]])
def test_a_batch_without_samples_is_refused(data: list[Tensor]) -> None:
    with pytest.raises(CompressorError, match="for 0 samples"):
        pruned(net(), data=data)


def test_settings_of_adapters_that_nobody_trains_are_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.lora\.rank is of adapters"):
        pruned(net(), lora={"rank": 2})


# Going on


def started(previous: Any = None, method: Pruner | None = None, data: Any = None, **training: Any) -> FineTuning:
    told = Training(**{"steps": 4, "batch_size": 6, "seed": 1, "device": "cpu", **training})
    given = images() if data is None else data
    return FineTuning(net(), method or SparseDM(), adapter=Noise(), data=given, training=told, previous=previous)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": Magnitude()}, "method was SparseDM, and is Magnitude"),
        ({"method": SparseDM(NM(1, 4))}, "pattern was 2:4, and is 1:4"),
        ({"method": SparseDM(decay=0.5)}, "settings.decay was 0.0002, and is 0.5"),
        ({"seed": 2}, "train.seed was 1, and is 2"),
        ({"steps": 1}, "train.steps was 4, and is 1"),
        ({"mode": "lora"}, "train.mode was full, and is lora"),
        ({"batch_size": 5}, "train.batch_size was 6, and is 5"),
        ({"data": images() + 1}, "data was 11 samples"),
        ({"data": images(8)}, "data was 11 samples"),
        ({"data": Samples(images(), 3, 1)}, "data was 11 samples"),
        ({"data": [images()]}, "and is 1 batches"),
    ],
)
def test_a_state_of_another_run_is_refused_by_what_differs(changes: dict[str, Any], said: str) -> None:
    run = started()
    run.advance()
    run.advance()
    with pytest.raises(CompressorError) as caught:
        started(copy.deepcopy(run.state()), **changes)
    assert said in caught.value.message


def test_a_run_goes_on_in_other_pieces_and_from_states_of_earlier_versions() -> None:
    run = started()
    run.advance()
    state = copy.deepcopy(run.state())
    assert started(state, accumulate=2).done == 1
    del state["of"]
    assert started(state, seed=2).done == 1


class Keeping(Net):
    """Keeps what no state of torch holds: a number of calls, and a mean in a buffer that is not saved; and from its first call on its
    own weight, and what no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: Tensor | None = None
        self.odd: Tensor | None = None
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.mean: Tensor

    def forward(self, images: Tensor, times: Tensor) -> Tensor:
        if self.seen is None:
            self.seen, self.odd = self.last.weight.detach(), torch.zeros(2, dtype=torch.complex128)
        answer = super().forward(images, times) * (1 + self.calls) - self.mean + self.seen.mean()
        self.calls += 1
        self.mean = 0.5 * self.mean + answer.detach().mean()
        return answer


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        (Keeping, {}, {}),
        (Net, {"offload": ["optimizer", "ema", "shadow"]}, {"offload": []}),
        (Net, {"offload": []}, {"offload": ["optimizer", "ema", "shadow"]}),
    ],
)
def test_a_run_that_goes_on_ends_as_it_would_have(kind: Any, before: Any, after: Any, tmp_path: Path) -> None:
    def tuned(previous: Any = None, **changes: Any) -> FineTuning:
        told = Training(**{"steps": 5, "batch_size": 6, "lr": 3e-3, "device": "cpu", **changes})
        return FineTuning(net(kind), SparseDM(), adapter=Noise(), data=images(), training=told, previous=previous)

    whole, half = tuned(**before), tuned(**before)
    list(compressor.steps(whole))
    for _ in range(3):
        half.advance()
    save_state(tmp_path, half.state())
    again = tuned(load_state(tmp_path), **after)
    list(compressor.steps(again))
    expected, found = whole.finish().model.state_dict(), again.finish().model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
