"""What a method of one's own answers is looked at before it is used: what is wrong is named, not stretched, dropped or taken."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import compressor
from compressor import NM, Estimator, Mask, Objective, Pattern, Pruner, Unstructured
from compressor.errors import CompressorError, UsageError
from compressor.plugins.magnitude import Magnitude
from compressor.training.calibration import columns, matrix
from compressor.training.settings import Lora, Training


class Denoiser(compressor.Adapter):
    def noised(self, batch, rng):
        noise = torch.randn(batch.shape, generator=rng)
        return batch + noise, noise

    def predict(self, module, inputs):
        return module(inputs)


@dataclass(frozen=True)
class Mine(Pruner):
    """A method, one of whose answers is `wrong`, a function."""

    wrong: Any = None
    pattern: Pattern = NM(2, 4)

    def masks(self, weights, progress, previous):
        return self.pattern.magnitude_masks(weights)


class Masks(Mine):
    def masks(self, weights, progress, previous):
        return self.wrong(weights, previous) or self.pattern.magnitude_masks(weights)


class Prepares(Mine):
    def prepare(self, model, adapter, batches):
        return self.wrong(self, model)


class Targets(Mine):
    def targets(self, model):
        return self.wrong(model)


@dataclass(frozen=True)
class Told(Estimator):
    """An estimator that answers what it is told, a function, for a gradient or for a weight after a step."""

    for_gradient: Any = None
    for_weight: Any = None

    def gradient(self, grad, dense, mask):
        return self.for_gradient(grad, dense) if self.for_gradient else grad

    def shrink(self, dense, mask, lr):
        return self.for_weight(dense) if self.for_weight else dense


class Estimates(Mine):
    @property
    def estimator(self):
        return self.wrong


class Aims(Mine):
    @property
    def objective(self):
        return self.wrong


class Removes(Mine):
    @property
    def surgery(self):
        return self.wrong


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8))


def pruned(pruner, steps=2):
    return compressor.prune(
        model(), pruner, adapter=Denoiser(), data=torch.randn(16, 8), steps=steps, batch_size=8, device="cpu"
    )


def halved(weights, previous):
    for weight in weights.values():
        weight.mul_(0.5)


def made_positive(weights, previous):
    for weight in weights.values():
        weight.data.abs_()


def halved_by_numpy(weights, previous):
    for weight in weights.values():
        weight.numpy()[0, 0] += 1


def loosened(weights, previous):
    for mask in previous.values():
        mask.keep.fill_(True)


@pytest.mark.parametrize(
    ("pruner", "said"),
    [
        (Masks(halved), r"masks\(\) of Masks changed 0.weight"),
        (Masks(made_positive), r"masks\(\) of Masks changed 0.weight"),
        (Masks(halved_by_numpy), r"masks\(\) of Masks changed 0.weight"),
        (Masks(loosened), r"masks\(\) of Masks changed the previous mask of 0.weight"),
        (Masks(lambda weights, _: {n: Mask(w > 0, "2:4") for n, w in weights.items()}), "a mask's pattern is str"),
        (Prepares(lambda pruner, model: None), r"prepare\(\) of Prepares returned NoneType"),
        (Removes({}), "the surgery of Removes is dict"),
        (Targets(lambda model: None), r"targets\(\) of Targets returned NoneType"),
        (
            Targets(lambda model: dict(model.named_parameters())),
            r"targets\(\) of Targets names '0.bias', which is no weight",
        ),
        (Estimates(Told), "the estimator of Estimates is the class Told"),
        (Aims({"noise": 1.0}), "the objective of Aims is dict"),
        (Aims(Objective), "the objective of Aims is the class Objective"),
        (Estimates(Told(lambda grad, dense: None)), r"0.weight: gradient\(\) of Told returned NoneType"),
        (Estimates(Told(lambda grad, dense: grad.sum())), r"gradient\(\) of Told returned \(\) float32 on cpu"),
        (Estimates(Told(lambda grad, dense: grad.double())), r"gradient\(\) of Told returned \(16, 8\) float64 on cpu"),
        (Estimates(Told(lambda grad, dense: dense.mul_(0.5))), r"0.weight: gradient\(\) of Told changed the weight"),
        (Estimates(Told(None, lambda dense: None)), r"0.weight: shrink\(\) of Told returned NoneType"),
        (Estimates(Told(None, lambda dense: dense.mean())), r"shrink\(\) of Told returned \(\) float32 on cpu"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_wrong_answer_of_a_method_is_named(pruner, said):
    with pytest.raises(CompressorError, match=said):
        pruned(pruner)


@pytest.mark.parametrize("weights", [(-1.0, 0.0), (float("nan"), 0.0), (1.0, -0.1), (0.0, 0.0)])
def test_an_objective_that_minimises_nothing_is_refused(weights):
    with pytest.raises(UsageError, match="objective: "):
        Objective(*weights)


def test_prune_in_place_names_wrong_answers_and_leaves_the_model():
    given = model()
    before = {name: value.clone() for name, value in given.state_dict().items()}
    for pruner in (Prepares(lambda pruner, model: None), Targets(lambda model: {"0.bias": model[0].bias})):
        with pytest.raises(CompressorError, match=r"of (Prepares|Targets)"):
            compressor.prune_(given, pruner, adapter=Denoiser(), data=torch.randn(16, 8))
    assert all(torch.equal(value, before[name]) for name, value in given.state_dict().items())


def test_a_prepare_that_leaves_the_model_in_eval_mode_turns_no_dropout_off():
    seen = []

    class Seen(nn.Dropout):
        def forward(self, x):
            seen.append(self.training)
            return super().forward(x)

    def looked(pruner, model):
        model.eval()
        return pruner

    dropping = nn.Sequential(nn.Linear(8, 16), Seen(0.5), nn.Linear(16, 8))
    compressor.prune(dropping, Prepares(looked), adapter=Denoiser(), data=torch.randn(16, 8), steps=2, batch_size=8)
    assert seen[:2] == [True, True]


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2, padding=1)])
def test_a_convolution_of_one_sample_without_a_batch_is_seen_as_one_of_a_batch(layer):
    sample = torch.randn(3, *[7] * (layer.weight.dim() - 2))
    answer = columns(layer, sample) @ matrix(layer.weight).T + layer.bias
    torch.testing.assert_close(answer.T, layer(sample).flatten(1))


@pytest.mark.parametrize("steps", [0, 2])
def test_finished_masks_that_keep_more_than_the_pattern_says_are_warned_of(steps):
    loose = Masks(lambda weights, _: NM(3, 4).magnitude_masks(weights))
    said = r"2 of 2 finished masks keep more than the method's pattern 2:4 says: 0\.weight is 3:4"
    with pytest.warns(UserWarning, match=said):
        pruned(loose, steps=steps)
    with pytest.warns(UserWarning, match="1 of 1 finished masks keep more"):
        compressor.prune_(model(), loose, adapter=Denoiser(), data=torch.randn(16, 8))
    pruned(Masks(lambda weights, _: NM(1, 4).magnitude_masks(weights)), steps=steps)


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_finished_masks_that_keep_nothing_of_a_weight_are_warned_of(pattern, steps):
    def masks(weights, _):
        found = {name: pattern.mask(weight.abs()) for name, weight in weights.items()}
        return found | {"2.weight": Mask(torch.zeros_like(found["2.weight"].keep), pattern)}

    said = r"1 of [12] finished masks keep nothing: 2\.weight is all zeros"
    with pytest.warns(UserWarning, match=said):
        pruned(Masks(masks, pattern=pattern), steps=steps)
    with pytest.warns(UserWarning, match=said):
        compressor.prune_(model(), Masks(masks, pattern=pattern), adapter=Denoiser(), data=torch.randn(16, 8))


def test_in_place_a_mask_that_breaks_its_pattern_is_named():
    whole = Masks(
        lambda weights, _: {n: Mask(torch.ones_like(w, dtype=torch.bool), NM(2, 4)) for n, w in weights.items()}
    )
    with pytest.raises(CompressorError, match=r"0\.weight: not 2:4"):
        compressor.prune_(model(), whole, adapter=Denoiser(), data=torch.randn(16, 8))


# --- What a Shadow is told. ---


def shadowed(**settings):
    given = model()
    weights = {name: weight for name, weight in given.named_parameters() if weight.dim() > 1}
    optimizer = torch.optim.AdamW(given.parameters(), lr=1e-3)
    return compressor.Shadow(weights, Mine(), optimizer, **settings), given, optimizer


@pytest.mark.parametrize("progress", [3, -0.1, float("nan"), "half"])
def test_a_progress_that_is_no_share_is_refused(progress):
    with pytest.raises(CompressorError, match=r"the progress is .*, and it is a share of the steps"):
        shadowed(progress=progress)
    shadow, given, optimizer = shadowed()
    shadow.progress = progress
    given(torch.randn(4, 8)).sum().backward()
    with pytest.raises(CompressorError, match="the progress is"):
        optimizer.step()


def test_a_checkpoint_of_other_weights_is_refused_and_torch_stretches_none():
    shadow, given, _ = shadowed()
    before = given[0].weight.detach().clone()
    row, lost, loose = (copy.deepcopy(shadow.state()) for _ in range(3))
    row["dense"]["0.weight"] = torch.ones(8)
    del lost["dense"]["2.weight"]
    loose["masks"]["0.weight"]["keep"].fill_(True)
    with pytest.raises(CompressorError, match=r"0\.weight is \(8,\) in the checkpoint, and \(16, 8\) here"):
        shadow.restore(row)
    with pytest.raises(CompressorError, match=r"of other weights: 2\.weight"):
        shadow.restore(lost)
    assert torch.equal(given[0].weight, before)
    with pytest.raises(CompressorError, match=r"0\.weight: not 2:4"):
        shadow.restore(loose)


def started(previous=None, pruner=Magnitude(), **training):  # noqa: B008  # it is frozen
    settings = Training(**{"steps": 2, "batch_size": 8, "device": "cpu"} | training)
    return compressor.FineTuning(
        model(), pruner, adapter=Denoiser(), data=torch.randn(16, 8), training=settings, previous=previous
    )


def test_adapters_go_on_with_the_rank_that_they_were_saved_with():
    state = started(mode="lora", lora=Lora(rank=1)).state()
    with pytest.raises(CompressorError, match=r"train\.lora was .'rank': 1, .*, and is .'rank': 4"):
        started(state, mode="lora", lora=Lora(rank=4))
    del state["of"]  # as earlier versions wrote it
    with pytest.raises(CompressorError, match=r"0\.weight\.A is \(1, 8\) in the checkpoint, and \(4, 8\) here"):
        started(state, mode="lora", lora=Lora(rank=4))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state["model"].pop("0.weight"), "RuntimeError: .*0.weight"),
        (lambda state: state["average"].clear(), "KeyError: '0.weight'"),
        (lambda state: state["shadow"].pop("dense"), "KeyError: 'dense'"),
        (lambda state: state.pop("pruner"), "KeyError: 'pruner'"),
    ],
)
def test_a_state_that_is_not_of_the_run_is_said_to_be_none(change, said):
    state = copy.deepcopy(started().state())
    change(state)
    with pytest.raises(CompressorError, match=f"the state is not of this run: {said}"):
        started(state)


def test_a_run_that_is_over_takes_no_step():
    """Its masks are no longer kept: a step after `finish` would make the model dense again."""

    whole, early = started(), started()
    for _ in range(2):
        whole.advance()
    with pytest.raises(CompressorError, match="2 of 2 steps are done, and that is all"):
        whole.advance()
    early.advance()
    result = early.finish()
    with pytest.raises(CompressorError, match=r"1 of 2 steps are done, and finish\(\) has ended the run"):
        list(compressor.steps(early))
    result.masks["0.weight"].pattern.verify(result.model[0].weight)
