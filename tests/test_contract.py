"""Every registered pruner goes through one suite, on a tiny model. A new method is covered by registering it."""

from __future__ import annotations

import pytest
import torch

import compressor
from compressor import registry

PRUNERS = [name for name in registry.names("pruners") if name != "nni"]  # tests/test_nni.py


@pytest.fixture(params=PRUNERS)
def pruner(request):
    return registry.build_pruner(registry.pruner_class(request.param), {})


def test_masks_are_legal_and_pure(pruner, model):
    targets = {name: weight.detach().clone() for name, weight in pruner.targets(model).items()}
    before = {name: weight.clone() for name, weight in targets.items()}
    first = pruner.masks(targets, 0.5, {})
    again = pruner.masks(targets, 0.5, {})
    for name, mask in first.items():
        mask.verify()
        assert torch.equal(mask.keep, again[name].keep)
    assert all(torch.equal(targets[name], before[name]) for name in targets)


def test_result_obeys_its_masks_and_leaves_the_model_alone(pruner, model, adapter, samples):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compressor.prune(model, pruner, adapter=adapter, data=samples, steps=5, batch_size=16)
    weights = dict(result.model.named_parameters())
    for name, mask in result.masks.items():
        assert str(mask.pattern) == str(pruner.pattern)
        mask.pattern.verify(weights[name].detach())
        assert not weights[name][~mask.keep].any()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in result.model.state_dict().items())


def test_same_seed_gives_same_bytes(pruner, model, adapter, samples):
    runs = [compressor.prune(model, pruner, adapter=adapter, data=samples, steps=4, batch_size=16) for _ in range(2)]
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resumes_to_the_same_bytes(pruner, model, adapter, samples, tmp_path):
    from compressor.artifact import load_state, save_state

    training = compressor.Training(steps=6, batch_size=16)

    def started(previous=None):
        return compressor.FineTuning(model, pruner, adapter=adapter, data=samples, training=training, previous=previous)

    whole, half = started(), started()
    list(compressor.steps(whole))
    for _ in range(3):
        half.advance()
    save_state(tmp_path, half.state())
    resumed = started(load_state(tmp_path))
    list(compressor.steps(resumed))
    first, second = whole.finish().model.state_dict(), resumed.finish().model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saves_and_loads(pruner, model, adapter, samples, tmp_path):
    result = compressor.prune(model, pruner, adapter=adapter, data=samples, steps=2, batch_size=16)
    compressor.save(tmp_path / "saved", result.model, result.masks)
    loaded = compressor.load(tmp_path / "saved", model=model)
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_magnitude_chooses_what_torch_does(n, m, model):
    import warnings

    from compressor.plugins.magnitude import Magnitude

    from compressor import NM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out
        from torch.ao.pruning import WeightNormSparsifier

        sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n)
        weights = {name: value.detach().clone() for name, value in model.named_parameters() if value.dim() == 2}
        sparsifier.prepare(model, [{"tensor_fqn": name} for name in weights])
        sparsifier.step()
    masks = Magnitude(NM(n, m)).masks(weights, 0.0, {})
    for name, mask in masks.items():
        theirs = model[int(name[0])].parametrizations.weight[0].mask
        assert torch.equal(mask.keep, theirs.bool())
