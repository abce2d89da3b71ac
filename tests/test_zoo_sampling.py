"""Samplers: against diffusers' own, against a model that knows the truth, and their refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.adapter import Sampling
from compressor.errors import UsageError
from compressor.model_zoo.generic.noise import Noise
from compressor.model_zoo.sampling import SAMPLERS, Process, check, draw, dropped, guided, merged, spaced
from compressor.model_zoo.uvit.noise import ContinuousTimes

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
DISCRETE = Process(torch.log1p(-BETAS).cumsum(0), clip=False)
CONTINUOUS = ContinuousTimes().process(clip=False)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def bent(images, index):
    """A made-up model: any function of the images and the time will do for comparing samplers."""
    return torch.tanh(images * (1 + index / 1000))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 10, 50])
@pytest.mark.parametrize(("spacing", "called"), [("uniform", "leading"), ("trailing", "trailing")])
def test_ddim_is_that_of_diffusers(prediction, clip, steps, spacing, called):
    process = Process(DISCRETE.log_alpha_bars, prediction, clip)
    theirs = diffusers.DDIMScheduler(
        trained_betas=BETAS.tolist(),
        prediction_type=prediction,
        clip_sample=clip,
        set_alpha_to_one=True,
        timestep_spacing=called,
    )
    theirs.set_timesteps(steps)
    noise = torch.randn(2, 1, 4, 4, generator=rng(), dtype=torch.float64)
    expected = noise
    for t in theirs.timesteps:
        expected = theirs.step(bent(expected, int(t)), t, expected, use_clipped_model_output=True).prev_sample
    found = draw(bent, noise, process, Sampling("ddim", spacing), steps, rng())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddpm", "dpm-solver++", "unipc"])
def test_the_others_are_those_of_diffusers(name):
    made = {
        "ddpm": lambda: diffusers.DDPMScheduler(
            trained_betas=BETAS.tolist(), variance_type="fixed_large", clip_sample=False
        ),
        "dpm-solver++": lambda: diffusers.DPMSolverMultistepScheduler(trained_betas=BETAS.tolist()),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(trained_betas=BETAS.tolist()),
    }[name]()
    made.set_timesteps(10)
    noise, generator = torch.randn(2, 1, 4, 4, generator=rng()), rng(1)
    own = {"generator": generator} if name == "ddpm" else {}
    expected = noise
    for t in made.timesteps:
        expected = made.step(bent(expected, int(t)), t, expected, **own).prev_sample
    found = draw(bent, noise, DISCRETE, Sampling(name), 10, rng(1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_model_that_knows_the_truth_samples_it(name):
    truth = torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)

    def knows(images, index):
        kept = CONTINUOUS.alpha_bar(index)
        return (images - math.sqrt(kept) * truth) / math.sqrt(1 - kept)

    images = draw(knows, torch.randn(3, 1, 4, 4, generator=rng()), CONTINUOUS, Sampling(name), 200, rng(2))
    assert float((images - truth).abs().max()) < 0.02


def test_quadratic_spacing_is_the_formula_of_the_paper():
    expected = [int(x) for x in (torch.linspace(0, math.sqrt(800), 100, dtype=torch.float64) ** 2).tolist()]
    found = spaced(1000, 100, "quadratic")[::-1]
    assert [a for a, b in zip(found, expected, strict=True) if abs(a - b) > 5] == []
    assert found[0] == 0 and found[-1] in (799, 800)


@given(st.integers(1, 1000), st.sampled_from(["uniform", "trailing", "quadratic"]))
def test_timesteps_fall_and_are_on_the_grid(steps, spacing):
    grid = spaced(1000, steps, spacing)
    assert len(grid) == steps
    assert all(a > b for a, b in pairwise(grid))
    assert grid[-1] >= 0 and grid[0] < 1000


def test_guidance_mixes_the_two_predictions():
    labels = torch.tensor([0, 1])

    def module(images, time, classes):
        return classes.view(-1, 1, 1, 1).float() + 0 * images

    images, time = torch.zeros(2, 1, 2, 2), torch.zeros(2)
    for scale in (0.0, 1.0, 3.0):
        found = guided(module, images, time, labels, 5, scale)[:, 0, 0, 0]
        assert found.tolist() == [5 + scale * (0 - 5), 5 + scale * (1 - 5)]


def test_labels_are_dropped_at_the_given_share_and_by_the_generator_alone():
    labels = torch.arange(10_000) % 7
    first, again = dropped(labels, 7, 0.1, rng()), dropped(labels, 7, 0.1, rng())
    assert torch.equal(first, again)
    gone = first != labels
    assert set(first[gone].tolist()) == {7}
    assert 0.08 < float(gone.float().mean()) < 0.12
    assert torch.equal(dropped(labels, None, 0.1, rng()), labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Sampling("dpm"), "no sampler 'dpm'"),
        (Sampling("ddim", "cubic"), "no spacing 'cubic'"),
        (Sampling("unipc", "quadratic"), "unipc takes no spacing"),
        (Sampling("euler-maruyama"), "continuous time"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        check(settings, DISCRETE)


def test_own_settings_stay_where_others_are_not_wanted():
    own = Sampling("ddim", "quadratic", 1.5)
    assert merged(own, Sampling(), True) == own
    assert merged(own, Sampling(guidance=3.0), True) == Sampling("ddim", "quadratic", 3.0)
    assert merged(own, Sampling("unipc"), True) == Sampling("unipc", None, 1.5)
    with pytest.raises(UsageError, match="no guidance"):
        merged(Sampling("ddim"), Sampling(guidance=2.0), False)


def test_more_steps_than_timesteps_are_refused():
    with pytest.raises(UsageError, match="1000 timesteps"):
        draw(bent, torch.zeros(1, 1, 2, 2), DISCRETE, Sampling("ddim"), 1001, rng())


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm-solver++", "unipc"])
def test_as_many_steps_as_timesteps_give_numbers_or_are_refused(name):
    """diffusers' solvers would come to one timestep twice, and give NaN."""
    few = Process(torch.log1p(-BETAS[::50]).cumsum(0), clip=False)
    images = [draw(bent, torch.ones(1, 1, 2, 2), few, Sampling(name), steps, rng()) for steps in (1, 7, 19)]
    if name in ("ddim", "ddpm"):
        images.append(draw(bent, torch.ones(1, 1, 2, 2), few, Sampling(name), 20, rng()))
    else:
        with pytest.raises(UsageError, match=r"20 sampler steps of .* twice\nThis model has 20 timesteps: .* 19 steps"):
            draw(bent, torch.ones(1, 1, 2, 2), few, Sampling(name), 20, rng())
    assert all(image.isfinite().all() for image in images)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
    ],
)
def test_noising_is_that_of_diffusers(config):
    theirs = diffusers.DDPMScheduler(**config)
    noise = Noise.of(config)
    clean = torch.randn(5, 2, 4, 4, generator=rng())
    time, noised, target = noise.noised(clean, rng(3))
    drawn = torch.randn(clean.shape, generator=_after_times(len(clean), noise.timesteps))
    torch.testing.assert_close(noised, theirs.add_noise(clean, drawn, time), rtol=1e-4, atol=1e-5)
    expected = {
        "epsilon": drawn,
        "sample": clean,
        "v_prediction": theirs.get_velocity(clean, drawn, time),
    }[config.get("prediction_type", "epsilon")]
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)


def _after_times(n, timesteps):
    generator = rng(3)
    torch.randint(timesteps, (n,), generator=generator)
    return generator


def test_rectified_flow_goes_from_the_image_to_the_noise():
    clean = torch.randn(6, 3, 2, 2, generator=rng())
    time, mixed, velocity = Noise.of({"_class_name": "FlowMatchEulerDiscreteScheduler"}).noised(clean, rng(1))
    share = (time / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed - share * velocity, clean, rtol=1e-5, atol=1e-5)
    assert float(time.min()) >= 0 and float(time.max()) < 1000
