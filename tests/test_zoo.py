"""Every registered model: built without memory, its size and cost against what its authors published."""

from __future__ import annotations

import pytest
import torch

from compressor import registry
from compressor.cost.macs import layer_macs
from compressor.errors import CompressorError
from compressor.sparsity.layers import select, survey
from compressor.sparsity.notation import parse
from compressor.weights import in_float32

# Parameters in millions and multiply-accumulates in billions, as published: U-ViT (Bao et al. 2023, table 1, and its
# repository), DDPM (Fang et al. 2023, table 1), DiT (Peebles & Xie 2023, table 4). None: not published.
PUBLISHED = {
    "uvit-cifar10": (44, 12.2),
    "uvit-celeba64": (44, None),
    "uvit-imagenet64-m": (131, None),
    "uvit-imagenet64-l": (287, None),
    "uvit-imagenet256-l": (287, 77),
    "uvit-imagenet256-h": (501, 133),
    "uvit-imagenet512-l": (287, 77),
    "uvit-imagenet512-h": (501, 133),
    "ddpm-cifar10": (35.7, 6.1),
    "dit-xl-2-256": (675, 118.6),
    "dit-xl-2-512": (675, 524.6),
}
BUNDLED = ("uvit-digits", "uvit-pictures", "ddpm-digits")
FROM_WEIGHTS = ("ddpm", "diffusers", "dit", "uvit")


def sketch(name):
    adapter = registry.adapter(name)
    with torch.device("meta"):
        return adapter, adapter.build()


def test_every_registered_model_is_checked_here():
    assert set(registry.names("models")) == {*PUBLISHED, *BUNDLED, *FROM_WEIGHTS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name):
    adapter, model = sketch(name)
    millions, billions = PUBLISHED[name]
    rounding = 0.5 if isinstance(millions, int) else 0.05
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=rounding)
    assert adapter.about["size"] == f"{millions}M"
    if billions is not None:  # counters differ in what they leave out: norms, attention, the last convolution
        assert layer_macs(model, adapter)[0] / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("name", [*PUBLISHED, *BUNDLED])
def test_the_pattern_fits_the_layers_that_matter(name):
    adapter, model = sketch(name)
    rule = parse("2:4")
    _, by_weight = layer_macs(model, adapter)
    chosen = select(model, rule, {one.name for one in survey(model, rule)}, adapter.targets, adapter.ignore)
    pruned = sum(by_weight.get(one.name, 0) for one in chosen if one.reason is None)
    assert pruned > 0.85 * sum(by_weight.values())


@pytest.mark.parametrize("name", [*PUBLISHED, *FROM_WEIGHTS])
def test_a_model_without_weights_says_where_to_get_them(name):
    adapter = registry.adapter(name)
    assert all(adapter.about[key] for key in ("size", "source", "data", "weights", "licence"))
    with pytest.raises(CompressorError) as caught:
        adapter.load(None)
    assert adapter.about["weights"] in str(caught.value)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_weights_are_small_and_load(name):
    adapter = registry.adapter(name)
    assert adapter.weights.stat().st_size <= (9_000_000 if name == "uvit-pictures" else 3_000_000)
    model = in_float32(adapter.load(None))
    images = adapter.sample(model, 2, torch.Generator().manual_seed(0), 2)
    assert images.shape == (2, *((3, 32, 32) if name == "uvit-pictures" else (1, 8, 8)))
    assert images.abs().max() <= 1
