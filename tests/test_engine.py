"""Fine-tuning: what it leaves alone, what it repeats, what it refuses, and what comes out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import compressor
import compressor.registry
from compressor import NM, Adapter, CompressorError, FineTuning, Mask, Objective, Pruner, Training
from compressor.errors import UsageError
from compressor.plugins.dense import DenseContinued
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.sparsedm import SparseDM
from compressor.saving.state import load_state, save_state
from compressor.seeds import generator

Prune = Callable[..., compressor.Result]


@pytest.fixture
def prune(model: nn.Module, adapter: Adapter, samples: Tensor) -> Prune:
    """`compressor.prune` with small defaults."""

    def call(pruner: Pruner | None = None, **changes: Any) -> compressor.Result:
        settings = {
            "model": model,
            "adapter": adapter,
            "data": samples,
            "steps": 4,
            "batch_size": 8,
            "lr": 0.01,
            **changes,
        }
        return compressor.prune(settings.pop("model"), pruner or SparseDM(), **settings)

    return call


@pytest.fixture
def run(model: nn.Module, adapter: Adapter, samples: Tensor) -> Callable[..., FineTuning]:
    """A `FineTuning` with small defaults."""

    def start(pruner: Pruner | None = None, previous: Any = None, **changes: Any) -> FineTuning:
        student, data = changes.pop("model", model), changes.pop("data", samples)
        training = Training(**{"steps": 6, "batch_size": 8, "lr": 0.01, "warmup": 2, **changes})
        return FineTuning(
            student, pruner or SparseDM(), adapter=adapter, data=data, training=training, previous=previous
        )

    return start


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def finished(run: FineTuning) -> dict[str, Tensor]:
    list(compressor.steps(run))
    return weights(run.finish().model)


# What is left alone


def test_the_given_model_is_untouched(prune: Prune, model: nn.Module) -> None:
    model[0].bias.requires_grad_(False)
    model.train()
    before = weights(model)
    result = prune()
    assert same(weights(model), before) and model.training and not result.model.training
    assert all(p.grad is None for p in model.parameters())
    assert not {id(p) for p in model.parameters()} & {id(p) for p in result.model.parameters()}


def test_frozen_parameters_stay_as_they_are(prune: Prune, model: nn.Module) -> None:
    model[0].weight.requires_grad_(False)
    result = prune()
    assert torch.equal(result.model[0].weight, model[0].weight)
    assert not torch.equal(result.model[2].bias, model[2].bias)
    assert [(layer.name, layer.reason) for layer in result.layers] == [
        ("0.weight", "frozen (requires_grad is False)"),
        ("2.weight", None),
    ]


def test_tied_layers_stay_tied_and_both_are_sparse(prune: Prune) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    result = prune(model=model)
    assert result.model[2].weight is result.model[0].weight and list(result.masks) == ["0.weight"]
    NM(2, 4).verify(result.model[2].weight.detach())


def test_a_weight_tied_to_an_embedding_is_pruned_and_finishes(prune: Prune) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, 16)
            self.head = nn.Linear(16, 16)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x)
            return out

    result = prune(model=Tied())
    assert result.model.head.weight is result.model.embedding.weight
    NM(2, 4).verify(result.model.head.weight.detach())


# What comes out


def test_result_is_sparse_and_its_masks_are_its_zeros(prune: Prune) -> None:
    result = prune()
    assert set(result.masks) == {"0.weight", "2.weight"}
    for name, mask in result.masks.items():
        weight = dict(result.model.named_parameters())[name].detach()
        NM(2, 4).verify(weight)
        assert torch.equal(weight != 0, mask.keep)
    assert [record.step for record in result.steps] == [1, 2, 3, 4]


def test_no_steps_is_one_shot(prune: Prune, model: nn.Module) -> None:
    result = prune(SparseDM(NM(1, 4), progressive=True), steps=0)
    assert list(result.steps) == []
    for name, weight in model.named_parameters():
        expected = NM(1, 4).mask(weight.detach().abs()).apply(weight.detach()) if weight.dim() > 1 else weight
        assert torch.equal(dict(result.model.named_parameters())[name], expected)


def test_training_lowers_the_loss(prune: Prune) -> None:
    losses = [record.loss for record in prune(steps=60, batch_size=64).steps]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("accumulate", [3, 4, 8, 100])
def test_accumulation_changes_nothing_but_rounding(accumulate: int, prune: Prune) -> None:
    whole, split = prune(SparseDM(), accumulate=1, clip=0.5), prune(SparseDM(), accumulate=accumulate, clip=0.5)
    for a, b in zip(whole.steps, split.steps, strict=True):
        assert (a.loss, a.noise_loss, a.teacher_loss, a.grad_norm) == pytest.approx(
            (b.loss, b.noise_loss, b.teacher_loss, b.grad_norm), rel=1e-5
        )
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(value, weights(split.model)[name], rtol=1e-4, atol=1e-6)


def test_same_seed_gives_same_bytes_and_another_seed_others(prune: Prune) -> None:
    first, second, third = (weights(prune(seed=seed).model) for seed in (0, 0, 1))
    assert same(first, second)
    assert not same(first, third)


def test_dropout_is_seeded(prune: Prune) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16))
    found = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        found.append(weights(prune(model=model).model))
    assert same(*found)


def test_clipping_bounds_the_gradient(run: Callable[..., FineTuning]) -> None:
    clipped = run(clip=1e-3)
    record = clipped.advance()
    norm = torch.stack([p.grad.norm() for p in clipped.student.parameters()]).norm()
    assert record.grad_norm > 1e-2 and float(norm) <= 1.1e-3


# Interruption


@pytest.mark.parametrize("at", range(7))
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("through", ["memory", "files"])
def test_resumed_at_any_step_ends_in_the_same_bytes(
    at: int, ema: float, through: str, run: Callable[..., FineTuning], tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1), nn.Tanh(), nn.Linear(32, 16))
    half = run(ema=ema, model=model)
    for _ in range(at):
        half.advance()
    state = half.state()
    if through == "files":
        save_state(tmp_path, state)
        state = load_state(tmp_path)
    else:
        state = copy.deepcopy(state)
    torch.manual_seed(at)  # whatever else the process did
    resumed = run(ema=ema, model=model, previous=state)
    records = list(compressor.steps(resumed))
    whole = run(ema=ema, model=model)
    assert records == list(compressor.steps(whole))[at:]
    first, second = whole.finish(), resumed.finish()
    assert same(weights(first.model), weights(second.model))
    assert first.flipped == second.flipped


def test_two_runs_can_resume_from_one_state(run: Callable[..., FineTuning]) -> None:
    half = run()
    half.advance()
    state = copy.deepcopy(half.state())
    kept = copy.deepcopy(state)
    first, second = finished(run(previous=state)), finished(run(previous=state))
    assert same(first, second)
    assert same(state["shadow"]["flipped"], kept["shadow"]["flipped"])


def test_prepare_is_not_called_again(run: Callable[..., FineTuning]) -> None:
    class Calibrated(Pruner):
        calls = 0

        def __init__(self, scale: float = 0.0) -> None:
            self.scale = scale

        def prepare(self, model: nn.Module, adapter: Adapter, batches: Any) -> Calibrated:
            Calibrated.calls += 1
            return Calibrated(float(batches.batch(0).abs().mean()))

        def state(self) -> dict[str, Any]:
            return {"scale": self.scale}

        def restored(self, state: Mapping[str, Any]) -> Calibrated:
            return Calibrated(state["scale"])

        def masks(self, weights: Any, progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
            return previous or {name: NM(2, 4).mask(weight.abs() * self.scale) for name, weight in weights.items()}

    first = run(Calibrated())
    second = run(Calibrated(), previous=first.state())
    assert Calibrated.calls == 1
    assert first.pruner.scale == second.pruner.scale > 0


# The average


def test_the_average_is_of_dense_weights_and_is_masked_once(run: Callable[..., FineTuning]) -> None:
    tuning = run(ema=0.5)

    def dense() -> dict[str, Tensor]:
        return {
            name: tuning.shadow.dense.get(name, p).detach().clone() for name, p in tuning.student.named_parameters()
        }

    average = dense()
    for step, _ in enumerate(compressor.steps(tuning)):
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in dense().items():
            average[name] = decay * average[name] + (1 - decay) * value
    for name, value in tuning.finish().model.named_parameters():
        expected = average[name]
        if name in ("0.weight", "2.weight"):
            expected = NM(2, 4).mask(expected.abs()).apply(expected)
        torch.testing.assert_close(value.detach(), expected)


def test_without_an_average_the_last_weights_come_out(run: Callable[..., FineTuning]) -> None:
    tuning = run(ema=0.0)
    list(compressor.steps(tuning))
    last = weights(tuning.student)
    assert same(weights(tuning.finish().model), last)


# The teacher


class Spy(nn.Module):
    """A linear layer that records what it is given, teacher's and student's copies in one list."""

    seen: list[tuple[bool, Tensor]]

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        Spy.seen.append((self.linear.weight.requires_grad, x.clone()))
        out: Tensor = self.linear(x)
        return out


def test_teacher_and_student_see_the_same_inputs(prune: Prune) -> None:
    Spy.seen = []
    prune(SparseDM(teacher=0.5), model=Spy(), steps=3, accumulate=2)
    student = [x for trained, x in Spy.seen if trained]
    teacher = [x for trained, x in Spy.seen if not trained]
    student.pop()  # asks whether the result has an answer
    assert len(student) == 6
    assert all(torch.equal(a, b) for a, b in zip(student, teacher, strict=True))


def test_there_is_no_teacher_where_its_weight_is_zero(prune: Prune) -> None:
    Spy.seen = []
    result = prune(SparseDM(teacher=0.0), model=Spy(), steps=3)
    assert all(trained for trained, _ in Spy.seen)
    assert all(record.teacher_loss is None and record.loss == record.noise_loss for record in result.steps)


def test_the_objective_weighs_two_mean_squares(
    model: nn.Module, adapter: Adapter, run: Callable[..., FineTuning]
) -> None:
    tuning = run(SparseDM(teacher=0.3))
    sparse = copy.deepcopy(tuning.student)
    inputs, noise = adapter.noised(tuning.batches.batch(0), generator(0, "noise", 0))
    with torch.no_grad():
        found, expected = sparse(inputs), model(inputs)
    record = tuning.advance()
    assert record.noise_loss == pytest.approx(float((found - noise).square().mean()), rel=1e-5)
    assert record.teacher_loss == pytest.approx(float((found - expected).square().mean()), rel=1e-5)
    assert record.loss == pytest.approx(record.noise_loss + 0.3 * record.teacher_loss)


def test_teacher_only_learns_from_the_teacher_alone(prune: Prune, model: nn.Module) -> None:
    result = prune(SparseDM(teacher_only=True), steps=40, batch_size=64, ema=0.0)
    assert all(record.loss == record.teacher_loss for record in result.steps)
    assert result.steps[-1].loss < 0.7 * result.steps[0].loss


def test_the_teacher_stays_the_dense_model(run: Callable[..., FineTuning], model: nn.Module) -> None:
    tuning = run()
    list(compressor.steps(tuning))
    assert tuning.teacher is not None and same(weights(tuning.teacher), weights(model))


# Pruners


def test_settings_of_sparsedm_that_mean_nothing_are_refused() -> None:
    for settings in ({"progressive": True, "fixed": True}, {"start": "OBS"}, {"preset": "Best"}):
        with pytest.raises(CompressorError, match="sparsedm: "):
            SparseDM(**settings)  # type: ignore[arg-type]


def test_what_is_set_wins_over_a_preset_of_sparsedm() -> None:
    alone, both = Objective(noise=0.0, teacher=1.0), Objective(noise=1.0, teacher=0.1)
    for settings, starts_from, objective in (
        ({}, "pretrained", both),
        ({"preset": "best"}, "obs", alone),
        ({"preset": "best", "start": "pretrained"}, "pretrained", alone),
        ({"preset": "best", "teacher_only": False}, "obs", both),
        ({"preset": "best", "teacher_only": False, "teacher": 0.3}, "obs", Objective(teacher=0.3)),
        ({"start": "obs"}, "obs", both),
        ({"teacher_only": True}, "pretrained", alone),
    ):
        found = SparseDM(**settings)  # type: ignore[arg-type]
        assert (found.starts_from, found.objective) == (starts_from, objective), settings


def test_a_teacher_beside_the_noise_contradicts_the_preset_best() -> None:
    with pytest.raises(CompressorError, match="preset best learns from the teacher alone"):
        SparseDM(preset="best", teacher=0.3)


def test_progressive_schedule_reaches_every_pattern_in_equal_phases(run: Callable[..., FineTuning]) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    tuning = run(SparseDM(progressive=True), model=model, steps=20, warmup=0)
    wide, narrow = [], []
    while tuning.done < 20:
        wide.append(str(tuning.shadow.masks["1.weight"].pattern))
        narrow.append(str(tuning.shadow.masks["0.weight"].pattern))
        tuning.advance()
        for name, mask in tuning.shadow.masks.items():
            mask.pattern.verify(dict(tuning.student.named_parameters())[name].detach())
    assert wide == [p for p in ("31:32", "15:16", "7:8", "3:4", "2:4") for _ in range(4)]
    assert narrow == [p for p in ("15:16", "7:8", "3:4", "2:4") for _ in range(5)]
    assert {str(mask.pattern) for mask in tuning.finish().masks.values()} == {"2:4"}


def test_a_pruner_of_a_few_lines_prunes_any_module(adapter: Adapter, samples: Tensor) -> None:
    class FirstColumns(Pruner):
        def masks(self, weights: Any, progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
            return {n: self.pattern.mask(-torch.arange(w.shape[1]).expand(w.shape).float()) for n, w in weights.items()}

    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))
    result = compressor.prune(model, FirstColumns(), adapter=adapter, data=samples, steps=2, batch_size=8)
    assert torch.equal(result.masks["0.weight"].keep, (torch.arange(16) % 4 < 2).expand(8, 16))
    assert not result.model[0].weight[:, 2::4].any()


def test_progress_runs_from_nought_to_one(prune: Prune) -> None:
    told = []

    class Listening(Pruner):
        def masks(self, weights: Any, progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
            told.append(progress)
            return {}

    prune(Listening(), steps=4)
    assert told == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    told.clear()
    prune(Listening(), steps=0)
    assert told == [1.0]


def test_masks_that_break_their_pattern_are_refused_and_named(prune: Prune) -> None:
    class Cheating(Pruner):
        def masks(self, weights: Any, progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
            return {name: Mask(torch.ones_like(weight, dtype=torch.bool), NM(2, 4)) for name, weight in weights.items()}

    with pytest.raises(CompressorError, match=r"0\.weight: not 2:4: 128 group"):
        prune(Cheating())


def test_masks_that_break_their_pattern_later_are_refused_too(prune: Prune) -> None:
    class CheatingLater(Magnitude):
        def masks(self, weights: Any, progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
            if progress < 1:
                return super().masks(weights, progress, previous)
            return {name: Mask(torch.ones_like(weight, dtype=torch.bool), NM(2, 4)) for name, weight in weights.items()}

    with pytest.raises(CompressorError, match=r"0\.weight: not 2:4"):
        prune(CheatingLater())


def test_a_mapping_of_weights_is_the_methods_own(prune: Prune) -> None:
    class Popping(Magnitude):
        def masks(self, weights: Any, progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
            return {name: self.pattern.mask(weights.pop(name).abs()) for name in list(weights)}

    assert len(prune(Popping()).masks) == len(prune(Popping(), steps=0).masks) == 2


def _leaves_a_hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda module, args, out: 0 * out)


def _adds_a_layer(model: nn.Sequential) -> None:
    model.extra = nn.Linear(4, 4)


def _casts(model: nn.Sequential) -> None:
    model.double()


@pytest.mark.parametrize(
    ("change", "what"), [(_leaves_a_hook, "0._forward_hooks"), (_adds_a_layer, "extra.weight"), (_casts, "0.weight")]
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_preparation_that_leaves_more_than_weights_behind_is_refused(
    change: Callable[[nn.Sequential], None], what: str, steps: int, prune: Prune
) -> None:
    """A hook that was not taken off went on to change the answers of the pruned model."""

    class Careless(Magnitude):
        def prepare(self, model: Any, adapter: Adapter, batches: Any) -> Any:
            change(model)
            return self

    with pytest.raises(CompressorError, match=rf"prepare\(\) of Careless left {what} of the model other than it was"):
        prune(Careless(), steps=steps)


class Embedded(nn.Module):
    """A Linear, and an embedding that another Linear shares."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.last = nn.Embedding(16, 16, sparse=sparse), nn.Linear(16, 16), nn.Linear(16, 16)
        self.rows = nn.Embedding(8, 16, sparse=sparse)
        self.last.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x) + self.rows(torch.arange(len(x))) + self.table(torch.arange(len(x))))
        return out


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_sparse_gradients_are_what_dense_ones_are(clip: float, prune: Prune) -> None:
    """Of a model with nn.Embedding(sparse=True) there was an error of torch."""
    found = [weights(prune(model=Embedded(sparse), clip=clip, batch_size=8).model) for sparse in (False, True)]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


# Data


class Rows(Dataset[Tensor]):
    """A map-style dataset."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


def test_a_dataset_gives_what_its_tensor_gives(prune: Prune, samples: Tensor) -> None:
    assert same(weights(prune(data=samples).model), weights(prune(data=Rows(samples)).model))


def test_batches_are_the_same_from_a_list_a_loader_or_a_generator(prune: Prune, samples: Tensor) -> None:
    sources: list[Any] = [
        list(samples.split(16)),
        tuple(samples.split(16)),
        DataLoader(Rows(samples), batch_size=16),
        iter(samples.split(16)),
    ]
    found = [weights(prune(data=source, steps=4).model) for source in sources]
    assert all(same(found[0], other) for other in found[1:])


def test_a_list_and_a_loader_start_again_when_they_run_out(prune: Prune, samples: Tensor) -> None:
    found = [prune(data=d, steps=6) for d in (list(samples.split(16)), DataLoader(Rows(samples), batch_size=16))]
    assert same(weights(found[0].model), weights(found[1].model))


def test_a_generator_that_ends_is_an_error_that_says_what_to_give(prune: Prune, samples: Tensor) -> None:
    def three() -> Iterator[Tensor]:
        yield from samples[:24].split(8)

    with pytest.raises(CompressorError, match=r"ran out of batches\nGive a dataset"):
        prune(data=three(), steps=4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the data is empty"),
        (torch.zeros(0, 16), "the data is empty"),
        (Rows(torch.zeros(0, 16)), "the data is empty"),
        (DataLoader(TensorDataset(torch.zeros(0, 16))), "the data ran out of batches"),
        (iter(()), "the data ran out of batches"),
        (17, "data of type int cannot be used"),
    ],
    ids=["list", "tensor", "dataset", "loader", "generator", "int"],
)
def test_empty_or_unusable_data_is_refused(data: Any, message: str, prune: Prune) -> None:
    with pytest.raises(CompressorError, match=message):
        prune(data=data)


# What is refused


def test_a_loss_that_stays_nan_stops_the_run_with_step_and_layer(
    run: Callable[..., FineTuning], model: nn.Module, samples: Tensor
) -> None:
    samples = samples.clone()
    bad = [samples[:8], *[torch.full((8, 16), math.nan)] * 3]
    tuning = run(data=bad)
    with pytest.raises(
        CompressorError, match=r"step 4: the loss is nan, and the gradient of 0\.weight is not finite, 3 steps"
    ):
        list(compressor.steps(tuning))
    assert all(value.isfinite().all() for value in weights(tuning.student).values())
    tuning.state()


def test_one_nan_batch_is_passed_over(run: Callable[..., FineTuning], samples: Tensor) -> None:
    tuning = run(data=[samples[:8], torch.full((8, 16), math.nan), samples[8:16]], ema=0.5)
    tuning.advance()
    before = weights(tuning.student)
    record = tuning.advance()
    assert math.isnan(record.loss) and record.flip_rate == 0
    assert same(weights(tuning.student), before)
    assert all(value.isfinite().all() for value in finished(tuning).values())


def test_nan_weights_are_refused(prune: Prune, model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[3, 3] = math.nan
    with pytest.raises(CompressorError, match="NaN"):
        prune()


def test_weights_that_are_not_finite_are_never_a_checkpoint(run: Callable[..., FineTuning]) -> None:
    tuning = run()
    tuning.advance()
    with torch.no_grad():
        tuning.student[2].bias[0] = math.inf
    with pytest.raises(CompressorError, match=r"step 1: 2\.bias holds NaN or infinity"):
        tuning.state()


def test_a_model_without_trainable_parameters_is_refused(prune: Prune, model: nn.Module) -> None:
    model.requires_grad_(False)
    with pytest.raises(CompressorError, match="no parameter of the model is trainable"):
        prune(DenseContinued())
    with pytest.raises(UsageError, match=r"fits no layer of this model: 0\.weight \(frozen"):
        prune(SparseDM())
    with pytest.raises(CompressorError):
        prune(DenseContinued(), model=nn.Tanh())


def test_a_pattern_that_fits_no_layer_names_what_exists(prune: Prune) -> None:
    with pytest.raises(UsageError) as caught:
        prune(SparseDM(NM(2, 7)))
    assert "2:7 fits no layer of this model: 0.weight (2:7 needs dim 1 divisible by 7, got (32, 16)); 2.weight" in str(
        caught.value
    )
    with pytest.raises(UsageError, match="it has no Linear or convolution"):
        prune(model=nn.LayerNorm(16))


def test_targets_and_ignore_choose_layers(prune: Prune) -> None:
    assert set(prune(targets=["2"]).masks) == {"2.weight"}
    assert set(prune(ignore=["2"]).masks) == {"0.weight"}
    with pytest.raises(UsageError, match="fits no layer"):
        prune(ignore=["Linear"])


def test_a_meta_model_is_refused_with_a_reason(prune: Prune) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(CompressorError, match="meta"):
        prune(model=model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepz": 3}, "unknown setting 'stepz'\nDid you mean 'steps'"),
        ({"steps": -1}, "steps: .*found -1"),
        ({"lr": 0.0}, "lr: .*found 0.0"),
        ({"lr": math.nan}, "lr: .*found nan"),
        ({"ema": 1.0}, "ema: .*found 1.0"),
        ({"schedule": "stairs"}, "schedule: .*found 'stairs'"),
        ({"batch_size": True}, "batch_size: .*found True"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings: dict[str, Any], message: str, prune: Prune) -> None:
    with pytest.raises(CompressorError, match=message):
        prune(**settings)


# The learning rate


def lr_at(step: int, **settings: Any) -> float:
    return Training(lr=1.0, **settings).lr_at(step)


def test_warm_up_rises_linearly_to_the_full_rate() -> None:
    found = [lr_at(step, warmup=4, steps=100, schedule="constant") for step in (0, 1, 3, 4, 99)]
    assert found == pytest.approx([0.2, 0.4, 0.8, 1.0, 1.0])


def test_warm_up_takes_at_most_a_quarter_of_the_steps() -> None:
    found = [lr_at(step, warmup=2500, steps=8, schedule="constant") for step in range(3)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.0]),
        ("cosine", [1.0, (2 + 2**0.5) / 4, 0.5, 0.0]),
    ],
)
def test_schedules_at_start_quarter_half_and_end(schedule: str, expected: list[float]) -> None:
    found = [lr_at(step, warmup=20, steps=100, schedule=schedule) for step in (20, 40, 60, 100)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_optimizer_uses_the_scheduled_rate(prune: Prune) -> None:
    result = prune(lr=0.1, warmup=1, schedule="linear", steps=5)
    assert [record.lr for record in result.steps] == pytest.approx([0.05, 0.1, 0.075, 0.05, 0.025])


def test_the_average_forgets_its_start_in_a_short_run() -> None:
    assert [Training(ema=0.99).ema_at(step) for step in (0, 8, 10**6)] == pytest.approx([0.1, 0.5, 0.99])


def test_decoupled_decay_resumes_with_the_learning_rate_of_the_step(model, adapter, samples):
    pruner = SparseDM(decay=5.0, decoupled=True)
    training = Training(steps=8, batch_size=16, lr=1e-2)

    def started(previous=None):
        return FineTuning(model, pruner, adapter=adapter, data=samples, training=training, previous=previous)

    whole, half = started(), started()
    list(compressor.steps(whole))
    for _ in range(4):
        half.advance()
    resumed = started(half.state())
    list(compressor.steps(resumed))
    first, second = whole.finish().model.state_dict(), resumed.finish().model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_target_that_the_method_leaves_dense_is_listed_with_that_reason(model, adapter, samples):
    class FirstOnly(Pruner):
        def masks(self, weights, progress, previous):
            return {"0.weight": self.pattern.mask(weights["0.weight"].abs())}

    result = compressor.prune(model, FirstOnly(), adapter=adapter, data=samples, steps=1, batch_size=8)
    assert [layer.reason for layer in result.layers] == [None, "left dense by the method"]


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float8_e4m3fn, "only float32 is trained"),
        (torch.float64, "only float32 is trained"),
    ],
)
def test_weights_of_another_precision_are_refused_before_the_method_sees_them(model, adapter, samples, dtype, said):
    class Any24(Pruner):
        def prepare(self, model, adapter, batches):
            raise AssertionError

        def masks(self, weights, progress, previous):
            return {}

    with pytest.raises(CompressorError, match=said):
        compressor.prune(model.to(dtype), Any24(), adapter=adapter, data=samples, steps=1)


@pytest.mark.parametrize("prune", [partial(compressor.prune, steps=0), compressor.prune_])
def test_weights_in_8_bits_are_not_pruned_in_one_shot_either(model, adapter, samples, prune):
    with pytest.raises(CompressorError, match=r"0\.weight is torch\.float8_e4m3fn, in which weights are stored"):
        prune(model.to(torch.float8_e4m3fn), SparseDM(), adapter=adapter, data=samples)


def test_a_pruner_may_set_its_pattern_in_init(model, adapter, samples):
    class Plain(Pruner):
        def __init__(self, keep: int) -> None:
            self.pattern = compressor.NM(keep, 4)

        def masks(self, weights, progress, previous):
            return self.pattern.masks({name: weight.abs() for name, weight in weights.items()})

    result = compressor.prune(model, Plain(1), adapter=adapter, data=samples.numpy(), steps=1, batch_size=8)
    assert {str(mask.pattern) for mask in result.masks.values()} == {"1:4"}


# --- What the caller gives, and where it calls from. ---


class Narrow(compressor.Adapter):
    """What `target` and `answer` make of the noise and of the model's answer."""

    def __init__(self, target: Callable[[Tensor], Any] = lambda noise: noise, answer: Any = lambda out: out) -> None:
        self.target, self.answer = target, answer

    def noised(self, batch: Any, rng: torch.Generator) -> Any:
        noise = torch.randn(batch.shape, generator=rng)
        return batch + noise, self.target(noise)

    def predict(self, module: nn.Module, inputs: Any) -> Any:
        return self.answer(module(inputs))


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (
            Narrow(lambda noise: noise[:, :1]),
            r"Narrow.predict gave \(8, 16\), and the target of Narrow.noised is \(8, 1\)",
        ),
        (
            Narrow(lambda noise: noise[:, 0]),
            r"Narrow.predict gave \(8, 16\), and the target of Narrow.noised is \(8,\)",
        ),
        (Narrow(answer=lambda out: (out, None)), "Narrow.predict gave tuple of 2, not a tensor"),
        (Narrow(answer=lambda out: {"sample": out}), "Narrow.predict gave dict of 1, not a tensor"),
        (Narrow(lambda noise: noise[:4], lambda out: out[:4]), r"a target \(4, 16\) for 8 samples"),
        (Narrow(answer=lambda out: out + 1j), r"Narrow.predict gave a complex answer \(torch.complex64\)"),
        (Narrow(torch.fft.fft, torch.fft.fft), r"Narrow.noised gave a complex target \(torch.complex64\)"),
        (Narrow(lambda noise: noise.tolist()), r"Narrow.noised gave tuple of 2, not \(inputs, target\)"),
    ],
)
@pytest.mark.parametrize("pruner", [Magnitude(), SparseDM(teacher_only=True)])
def test_an_answer_that_is_not_like_its_target_is_refused(
    adapter: Adapter, said: str, pruner: Pruner, prune: Prune
) -> None:
    with pytest.raises(CompressorError, match=said):
        prune(pruner, adapter=adapter)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": "digits"}, "data is the name 'digits', not samples"),
        ({"data": Path("digits")}, "data is the name 'digits', not samples"),
        ({"data": [[0.5, 1.0], [1.5, 2.0]]}, "data is a list of numbers"),
        ({"data": (1.0, 2.0)}, "data is a tuple of numbers"),
        ({"data": {"images": torch.zeros(4, 16)}}, "data is a dict, not batches"),
        ({"adapter": Narrow}, "the adapter is the class Narrow"),
        ({"adapter": None}, "the adapter is NoneType|a module needs adapter="),
        ({"adapter": "tiny"}, "the adapter is str"),
        ({"pruner": Magnitude}, "the pruner is the class Magnitude"),
        ({"pruner": "magnitude"}, "the pruner is str"),
        ({"model": nn.Linear}, "the model is the class Linear"),
        ({"model": None}, "the model is NoneType"),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "prune_"])
def test_what_is_of_another_kind_is_named(given: dict[str, Any], said: str, verb: str, model: nn.Module) -> None:
    every = {"model": model, "pruner": Magnitude(), "adapter": Narrow(), "data": torch.zeros(8, 16), **given}
    with pytest.raises(UsageError, match=said):
        getattr(compressor, verb)(every.pop("model"), every.pop("pruner"), **every)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_is_the_same_where_its_caller_wants_no_gradients(mode: Any, prune: Prune, samples: Tensor) -> None:
    expected, shot = prune(), prune(steps=0)
    with mode():
        own = compressor.prune(
            copy.deepcopy(expected.model), Magnitude(), adapter=Narrow(), data=[samples * 1.0], steps=1, batch_size=8
        )
        found, untrained = prune(), prune(steps=0)
    for one, other in ((expected, found), (shot, untrained)):
        for name, value in one.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name]), name
    for made in (own, found, untrained):
        assert not any(value.is_inference() for value in made.model.parameters())
        made.model(torch.zeros(2, 16)).sum().backward()


@pytest.mark.parametrize("method", ["obs", "wanda", "sparsedm"])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_autocast_of_the_caller_changes_nothing(method: str, steps: int, prune: Prune) -> None:
    pruner = compressor.registry.build_pruner(compressor.registry.pruner_class(method), {})
    expected = prune(pruner, steps=steps)
    with torch.autocast("cpu", torch.bfloat16):
        found = prune(pruner, steps=steps)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name]), name


def test_an_autocast_of_the_caller_changes_nothing_in_place(
    model: nn.Module, adapter: Adapter, samples: Tensor
) -> None:
    pruner = compressor.registry.build_pruner(compressor.registry.pruner_class("obs"), {})
    other = copy.deepcopy(model)
    compressor.prune_(model, pruner, adapter=adapter, data=samples)
    with torch.autocast("cpu", torch.bfloat16):
        compressor.prune_(other, pruner, adapter=adapter, data=samples)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class Remembering(nn.Linear):
    """A layer with a state that is no tensor."""

    def get_extra_state(self) -> Any:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_what_a_module_keeps_beside_its_tensors_is_refused(prune: Prune) -> None:
    with pytest.raises(UsageError, match=r"0: Remembering keeps dict beside its tensors \(get_extra_state\)"):
        prune(model=nn.Sequential(Remembering(16, 16)))
