"""What `--model diffusers` tells a model, and wants of it, against diffusers' own pipelines and schedulers.

Every class of the table goes through its pipeline, with tiny random parts and prompts given as embeddings. The denoiser is
replaced by one that answers what our `noised_at` says is right; the pipeline must then hand it our noisy input and our time
at every step, and end at the clean sample.
"""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from tiny_denoisers import CASES
from torch import Tensor

from compressor import registry
from compressor.adapter import Shared
from compressor.errors import CompressorError, UsageError
from compressor.model_zoo.generic.arguments import noisy_name
from compressor.model_zoo.generic.conventions import CONVENTIONS
from compressor.model_zoo.generic.noise import Noise
from compressor.model_zoo.sampling import clean as clean_of

STEPS = 4  # DDIM goes to timesteps that its next call is told where they divide the 1000


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def saved(case, folder):
    """The folder of the pipeline's denoiser and scheduler, which is all that the adapter looks at."""
    pipeline, part = case.pipeline, getattr(case.pipeline, case.part)
    part.save_pretrained(folder / case.part)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": type(pipeline).__name__, case.part: ["diffusers", type(part).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def called(case, answer, start=None, seed=0):
    """Run the pipeline in a few steps with a denoiser that answers `answer(step, arguments)`; returns the last latents."""
    pipeline, part = case.pipeline, getattr(case.pipeline, case.part)
    pipeline.set_progress_bar_config(disable=True)
    parameters, steps, last = list(inspect.signature(part.forward).parameters), [], []
    own_step = type(pipeline.scheduler).step

    def hook(module, positional, named, output):
        arguments = {**dict(zip(parameters, positional, strict=False)), **named}
        steps.append(arguments)
        found = answer(len(steps) - 1, arguments)
        return (found,) if named.get("return_dict") is False else SimpleNamespace(sample=found)

    def step(*arguments, **named):
        found = own_step(pipeline.scheduler, *arguments, **named)
        last.append(found[0] if isinstance(found, tuple) else found.prev_sample)
        return found

    handle = part.register_forward_hook(hook, with_kwargs=True)
    pipeline.scheduler.step = step
    takes = inspect.signature(type(pipeline).__call__).parameters
    given = {"output_type": "latent"} if "latents" in takes else {}
    given |= {"latents": start} if start is not None and "latents" in takes else {}
    try:
        with torch.no_grad():
            pipeline(num_inference_steps=STEPS, generator=rng(seed), **given, **case.call)
    except _Enough:
        pass
    finally:
        handle.remove()
        del pipeline.scheduler.step
    return last[-1] if last else None


class _Enough(Exception):
    """The first step has been seen."""


def levels(scheduler, flow):
    """The time of `noised_at` of each step: sigma, or the middle of the timestep's share."""
    if flow:
        return [float(sigma) for sigma in scheduler.sigmas[:STEPS]]
    return [(float(t) + 0.5) / 1000 for t in scheduler.timesteps]


def start_of(scheduler, noisy, flow):
    """The latents to give the pipeline so that its model first sees `noisy`."""
    if flow or not hasattr(scheduler, "is_scale_input_called"):
        return noisy / float(getattr(scheduler, "init_noise_sigma", 1.0))
    return noisy * (float(scheduler.sigmas[0]) ** 2 + 1) ** 0.5 / float(scheduler.init_noise_sigma)


def as_the_model_answers(target, arguments, channels_out):
    if "x" in arguments:  # lists of samples with a frame
        return list(target.unsqueeze(2))
    learned = target.dim() == 4 and channels_out == 2 * target.shape[1]
    return torch.cat([target, target], 1) if learned else target


@pytest.mark.parametrize("name", CASES)
def test_input_time_and_target_are_those_of_the_pipeline(name, tmp_path):
    torch.manual_seed(0)
    case = CASES[name]()
    adapter = registry.adapter("diffusers").opened(saved(case, tmp_path))
    part, scheduler = getattr(case.pipeline, case.part), case.pipeline.scheduler
    told = CONVENTIONS[type(part).__name__]
    flow = Noise.of(adapter.scheduler).is_flow
    sample = torch.rand(case.shape, generator=rng(1)) * 2 - 1

    def stop(step, arguments):
        raise _Enough

    called(case, stop)  # so that the scheduler has its times
    times = levels(scheduler, flow)
    ours = [adapter.noised_at({told.noisy: sample}, time, rng(0)) for time in times]
    # a timestep that the scheduler rounds to a whole number may be one off
    rounds = not scheduler.timesteps.is_floating_point() or isinstance(scheduler, diffusers.EulerDiscreteScheduler)
    seen = []

    def answer(step, arguments):
        inputs, target = ours[step]
        noisy = arguments[told.noisy]
        noisy = torch.stack(noisy).squeeze(2) if isinstance(noisy, list) else noisy
        torch.testing.assert_close(noisy, inputs[told.noisy], rtol=1e-3, atol=2e-3)
        time = torch.as_tensor(arguments[told.time])
        if name != "sdxl":  # whose scheduler has times between the timesteps
            assert inputs[told.time].is_floating_point() or not time.is_floating_point()
        time = time.float().reshape(-1)
        unit = abs(told.scale) * (1 if told.scale_setting is None else part.config[told.scale_setting])
        torch.testing.assert_close(time, inputs[told.time].float(), rtol=1e-5, atol=unit * (1.0 if rounds else 1e-3))
        seen.append(step)
        out = getattr(part.config, "out_channels", None) or getattr(part, "out_channels", 0)
        return as_the_model_answers(target, arguments, out)

    last = called(case, answer, start_of(scheduler, ours[0][0][told.noisy], flow))
    assert seen == list(range(STEPS))
    torch.testing.assert_close(last.reshape(sample.shape), sample, rtol=1e-2, atol=2e-2)


def test_every_class_of_the_table_goes_through_its_pipeline():
    proved = {type(getattr(case.pipeline, case.part)).__name__ for case in (make() for make in CASES.values())}
    assert proved == set(CONVENTIONS)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_names_of_arguments_are_those_of_the_class(name):
    told = CONVENTIONS[name]
    parameters = inspect.signature(getattr(diffusers, name).forward).parameters
    assert noisy_name({"_class_name": name}) == told.noisy
    assert {told.noisy, told.time, *told.shared, *told.listed, *told.sizes} <= set(parameters)
    settings = inspect.signature(getattr(diffusers, name).__init__).parameters
    assert {
        *(setting.partition("=")[0] for setting in told.unless),
        *([told.scale_setting] if told.scale_setting else []),
    } <= set(settings)


# --- What is not known is refused. ---


def adapter_of(name, scheduler=None, **config):
    from compressor.model_zoo.generic import DiffusersAdapter

    return DiffusersAdapter(config={"_class_name": name, **config}, scheduler=scheduler or {})


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (adapter_of("HunyuanVideoTransformer3DModel", FLOW), "what time HunyuanVideoTransformer3DModel is told"),
        (
            adapter_of("SanaTransformer2DModel", FLOW, guidance_embeds=True),
            "SanaTransformer2DModel with guidance_embeds",
        ),
        (
            adapter_of("UNet2DConditionModel", {"_class_name": "LCMScheduler"}, time_cond_proj_dim=8),
            "time_cond_proj_dim",
        ),
        (adapter_of("UNet2DConditionModel", {"beta_end": 0.01}, time_embedding_type="fourier"), "fourier"),
        (adapter_of("SD3Transformer2DModel", {"_class_name": "DDPMScheduler"}), "DDPMScheduler is of another process"),
        (adapter_of("FluxTransformer2DModel", {**FLOW, "num_train_timesteps": 500}), "counts 1000"),
        (adapter_of("UNet2DConditionModel"), "without a scheduler"),
        (adapter_of("PixArtTransformer2DModel"), "without a scheduler"),
    ],
)
def test_a_time_or_noise_that_is_not_known_is_refused_with_a_hint(adapter, message):
    name = noisy_name(adapter.config)
    with pytest.raises(UsageError, match=message) as caught:
        adapter.noised({name: torch.zeros(2, 4, 8, 8)}, rng())
    assert caught.value.hint
    if "another process" not in message:
        assert "compressor record PIPELINE --prompts FILE" in caught.value.hint


def test_a_batch_with_its_target_is_passed_on_whatever_the_class():
    adapter = adapter_of("HunyuanVideoTransformer3DModel")
    batch = {"hidden_states": torch.randn(2, 4, 1, 8, 8), "timestep": torch.tensor([1, 2])}
    target = torch.randn(2, 4, 1, 8, 8)
    inputs, found = adapter.noised({**batch, "target": target}, rng())
    assert found is target and inputs.keys() == batch.keys()
    assert all(inputs[name] is value for name, value in batch.items())


def test_a_model_of_flow_needs_no_scheduler():
    inputs, target = adapter_of("SD3Transformer2DModel").noised_at(torch.zeros(2, 4, 8, 8), 0.25, rng())
    assert inputs["timestep"].tolist() == [250, 250]
    torch.testing.assert_close(inputs["hidden_states"], 0.25 * target)


def test_one_of_two_models_for_some_of_the_times_is_refused(tmp_path):
    folder = saved(CASES["wan"](), tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    with pytest.raises(UsageError, match="some of the times"):
        registry.adapter("diffusers").opened(folder).noised(torch.zeros(1, 4, 2, 2, 2), rng())


def test_places_are_shared_by_the_batch():
    adapter = adapter_of("FluxTransformer2DModel")
    batch = {"hidden_states": torch.zeros(16, 16, 16), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(16, 7, 3)}
    inputs, _ = adapter.noised(batch, rng())
    assert isinstance(inputs["img_ids"], Shared) and inputs["img_ids"].tensor is batch["img_ids"]
    assert isinstance(inputs["txt_ids"], Tensor)  # with a dim for the batch


# --- Noise, against every scheduler of diffusers. ---


def schedulers():
    for name in sorted(dir(diffusers)):
        made = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
        if inspect.isclass(made) and issubclass(made, diffusers.SchedulerMixin):
            try:
                scheduler = made()
            except Exception:  # some need arguments, none of which says how images are noised
                continue
            yield name, scheduler


WITH_BARS = {name: one for name, one in schedulers() if isinstance(getattr(one, "alphas_cumprod", None), Tensor)}
OTHERS = {name: one for name, one in schedulers() if name not in WITH_BARS}
KEYS = [
    {},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"snr_shift_scale": 1.0, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
]


PAIRS = [
    (name, keys)
    for name, one in WITH_BARS.items()
    for keys in KEYS
    if set(keys) <= set(inspect.signature(type(one).__init__).parameters)
]


@pytest.mark.parametrize(("name", "keys"), PAIRS)
def test_the_noise_is_that_of_the_scheduler(name, keys):
    made = getattr(diffusers, name)
    try:
        scheduler = made(**keys)
    except (NotImplementedError, ValueError):
        with pytest.raises(UsageError, match="cannot be built"):
            Noise.of({"_class_name": name, **keys})
        return
    bars = scheduler.alphas_cumprod.double()
    found = Noise.of(json.loads(scheduler.to_json_string())).log_alpha_bars.exp()
    assert len(WITH_BARS) > 15
    torch.testing.assert_close(found, bars, rtol=1e-4, atol=1e-6)
    if keys.get("rescale_betas_zero_snr") and name != "CogVideoXDPMScheduler":
        assert float(found[-1]) == 0.0


@pytest.mark.parametrize("name", OTHERS)
def test_other_schedulers_are_rectified_flow_or_refused(name):
    config = json.loads(OTHERS[name].to_json_string())
    if name.startswith("FlowMatch") or name == "LTXEulerAncestralRFScheduler":
        assert Noise.of(config).is_flow
    else:
        with pytest.raises(UsageError, match=name) as caught:
            Noise.of(config)
        assert "compressor record" in caught.value.hint


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "SASolverScheduler"])
def test_flow_prediction_of_solvers_is_rectified_flow(name):
    made = getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert Noise.of(json.loads(made.to_json_string())).is_flow


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "use_flow_sigmas False"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "'epsilon' with use_flow_sigmas True"),
        ({"_class_name": "DDIMScheduler", "snr_shift_scale": 3.0}, "snr_shift_scale 3.0 changes the noise"),
        ({"snr_shift_scale": 3.0}, "snr_shift_scale"),
        ({"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type 'continuous'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler: its noise process is not known"),
        ({"_class_name": "MyOwnScheduler"}, "'MyOwnScheduler': diffusers .* has none"),
        ({"_class_name": "UNet2DModel"}, "has none of that name"),
        ({"beta_schedule": "no such"}, "cannot be built"),
        ({"prediction_type": "score"}, "prediction_type 'score'"),
        ({"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ({"trained_betas": [0.1, 0.2]}, "2 betas for 1000 timesteps"),
    ],
)
def test_noise_that_is_not_known_is_refused_by_its_key(config, message):
    with pytest.raises(UsageError, match=message) as caught:
        Noise.of(config)
    assert caught.value.hint


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++", "unipc"])
def test_a_model_of_zero_terminal_snr_is_sampled_to_its_data(sampler):
    from compressor.adapter import Sampling
    from compressor.model_zoo.sampling import draw

    process = Noise.of({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}).process()
    assert process.alpha_bar(999) == 0
    data = torch.rand(2, 1, 4, 4, generator=rng(2)) * 2 - 1

    def predict(images, index):
        bar = process.alpha_bar(index)
        noise = (images - bar**0.5 * data) / (1 - bar) ** 0.5
        return bar**0.5 * noise - (1 - bar) ** 0.5 * data

    spacing = "trailing" if sampler == "ddim" else None
    found = draw(predict, torch.randn(2, 1, 4, 4, generator=rng(1)), process, Sampling(sampler, spacing), 10, rng())
    torch.testing.assert_close(found, data, rtol=1e-2, atol=2e-2)


def test_noise_predictions_are_not_sampled_from_where_nothing_is_left_of_the_image():
    adapter = adapter_of("UNet2DModel", {"rescale_betas_zero_snr": True}, in_channels=3, sample_size=8)
    assert "zero terminal SNR" in adapter.unsampled
    process = Noise.of({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}).process()
    found, _ = clean_of(torch.ones(1), torch.zeros(1), 0.0, process)
    assert found.isfinite().all()
    with pytest.raises(CompressorError, match="zero terminal SNR"):
        adapter.sample(torch.nn.Linear(1, 1), 1, rng(), 2)
