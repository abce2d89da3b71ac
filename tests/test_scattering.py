"""The metric without a network: what its features hold, and that they see what eyes see; and so do those of the bundled pictures."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from compressor.errors import CompressorError
from compressor.model_zoo.generic.scattering import _GRID, FDScattering, _moduli, _wavelets
from compressor.model_zoo.pictures import images
from compressor.model_zoo.pictures.classifier import WEIGHTS, PicturesClassifier
from compressor.quality.frechet import frechet_distance, gaussian
from compressor.registry import metric
from compressor.weights import load_strictly, read_weights

PLACES = _GRID * _GRID


@pytest.fixture(scope="module")
def pictures():
    data = images()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data.images(order[:480]), data.images(order[480:960])


def test_it_is_found_by_its_name():
    assert isinstance(metric("fd-scattering"), FDScattering)


def test_waves_have_no_mean_and_are_where_they_should_be():
    bank = _wavelets(32, 32, 3)
    assert bank.shape == (12, 32, 32) and bank[:, 0, 0].abs().max() < 1e-6
    # the wave that varies along x alone at the finest scale peaks near 3/4 pi, a frequency of 12 of 32, and not along y
    assert abs(int(bank[0, 0].argmax()) - 12) <= 1 and bank[0, :, 0].max() < 0.1 * bank[0, 0].max()


def test_a_convolution_is_the_one_that_its_transform_says():
    plane, bank = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)), _wavelets(8, 8, 1)
    kernel = torch.fft.ifft2(bank[0])
    there = sum(kernel[y, x] * plane[0, 0].roll((y, x), (0, 1)) for y in range(8) for x in range(8))
    assert torch.allclose(_moduli(plane, bank)[0, 0], there.abs(), atol=1e-5)


def test_waves_do_not_know_where_they_are_and_averages_do(pictures):
    one, _ = pictures
    some, moved = one[:6], one[:6].roll((4, 8), (-2, -1))
    before, after = (FDScattering().features(x).reshape(6, 3, -1) for x in (some, moved))
    assert torch.allclose(before[..., PLACES:], after[..., PLACES:], atol=2e-3)
    assert (before[..., :PLACES] - after[..., :PLACES]).abs().max() > 0.1


def blurred(x, sigma):
    kernel = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate").flatten(0, 1)[:, None]
    return F.conv2d(padded, kernel[None, None]).reshape(x.shape)


DAMAGES = {
    "noise": lambda x, much: (x + 0.1 * much * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).clamp(
        -1, 1
    ),
    "blur": lambda x, much: blurred(x, 0.3 + 0.3 * much),
    "less colour": lambda x, much: torch.lerp(x, x.mean(1, keepdim=True).expand_as(x), 0.3 * much),
    "copies": lambda x, much: torch.cat([x[: len(x) - 60 * much], x[:1].expand(60 * much, -1, -1, -1)]),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [pytest.param("fd-scattering", marks=pytest.mark.slow), "fd-pictures"])
def test_more_damage_is_further_away(pictures, damage, name):
    real, other = pictures
    extract = metric(name).features
    reference = gaussian(extract(real).double())
    away = [frechet_distance(reference, gaussian(extract(DAMAGES[damage](other, much)).double())) for much in (1, 2, 3)]
    alike = frechet_distance(reference, gaussian(extract(other).double()))
    assert alike < away[0] < away[1] < away[2]


@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (2, 3, 7, 32)])
def test_what_it_does_not_take_is_refused(shape):
    with pytest.raises(CompressorError, match="fd-scattering takes images"):
        FDScattering().features(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 13, 40), (1, 3, 300, 200)])
def test_sizes_of_any_kind_give_finite_features(shape):
    found = FDScattering().features(torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert len(found) == shape[0] and bool(found.isfinite().all())


def test_the_network_of_the_pictures_knows_held_out_ones(pictures):
    data, network = images().unseen, PicturesClassifier()
    load_strictly(network, read_weights(WEIGHTS), WEIGHTS)
    pixels, labels = data.take(torch.arange(len(data)))
    with torch.no_grad():
        right = float((network(pixels).argmax(1) == labels).float().mean())
    facts = json.loads(WEIGHTS.with_suffix(".json").read_text(encoding="utf-8"))
    assert right == pytest.approx(facts["held_out_accuracy"], abs=0.005) and right > 0.75
    assert facts["weights_sha256"] == metric("fd-pictures").sha256 and facts["data_sha256"] == images().sha256


def test_the_metric_of_the_pictures_takes_nothing_else():
    with pytest.raises(CompressorError, match=r"fd-pictures takes images \(n, 3, 32, 32\), got \(2, 1, 32, 32\)"):
        metric("fd-pictures").features(torch.zeros(2, 1, 32, 32))
