"""Every registered pruner keeps its promises on a tiny U-ViT, UNet and DiT. A new method is covered by registering it."""

from __future__ import annotations

import pytest
import torch

from compressor import registry
from compressor.testing import CHECKS, findings
from compressor.training.pruner import setting_names

FEWER = {"timesteps": 4}
"""For methods that look at so many times first: the promises are the same, and kept in a third of the time."""


QUICK = {"sparsedm", "magnitude"}
"""Those that are checked each time; all the others where the slow tests run."""
METHODS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in registry.names("pruners")
    if name != "nni"  # tests/test_nni.py
]


@pytest.mark.parametrize("method", METHODS)
def test_every_registered_pruner_keeps_its_promises(method):
    made = registry.pruner_class(method)
    found = list(findings(registry.build_pruner(made, FEWER) if "timesteps" in setting_names(made) else made))
    assert [finding for finding in found if finding.fault is not None] == []
    assert len(found) == 3 * len(CHECKS)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_magnitude_chooses_what_torch_does(n, m, model):
    import warnings

    from compressor import NM
    from compressor.plugins.magnitude import Magnitude

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
