"""From settings to things in hand: the resolved recipe, and the model, data, method and metric that it names."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from compressor import recipe as recipes
from compressor import registry, validation
from compressor.adapter import Adapter, Sampling, with_rules
from compressor.cost.macs import layer_macs
from compressor.data.batches import Samples
from compressor.data.latents import Autoencoder
from compressor.data.sets import ImageSet, SampleSet
from compressor.environment import resolve_device
from compressor.errors import CompressorError, UsageError, memory
from compressor.progress import Progress, result_of
from compressor.quality.evaluate import can_sample
from compressor.quality.metric import Metric
from compressor.quality.settings import Evaluation, of_budget, samples_for
from compressor.recipe import Recipe
from compressor.report.content import DENSE, ONE_SHOT
from compressor.runs import captioned as captioning
from compressor.runs import code, fits, start
from compressor.runs import piped as piping
from compressor.runs.piped import Piped
from compressor.sparsity.layers import select
from compressor.sparsity.notation import refuse_unreadable
from compressor.sparsity.pattern import Unstructured
from compressor.training.engine import FineTuning, Result, choose_layers
from compressor.training.forgetful import refuse_forgetful
from compressor.training.given import surveyed
from compressor.training.lora import refuse_unmasked
from compressor.training.optimizers import check_optimizer
from compressor.training.pruner import Pruner, chosen
from compressor.training.rounding import check_quantise
from compressor.weights import in_float32, weights_sha256

_MANY = 0.05  # of all weights: so many are not left dense without a word
_CONFIGURED = "architecture_sha256"
SHARED = (
    *("model", "weights", "architecture", "data", "vae", "loading", "evaluate"),
    *("pipeline", "part", "prompts", "records", "record"),
)
"""The settings that say what is fine-tuned, on what, and how it is judged: those of methods that are compared are the same."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a recipe names, found and loaded: model, data, method.

    `pictures` is what samples are compared with: the data, or the pictures that `autoencoder` made latents of. `piped` is the
    pipeline that the model is a part of, where the recipe names one.
    """

    recipe: Recipe
    adapter: Adapter
    model: nn.Module
    data: SampleSet
    batches: Samples
    pruner: Pruner
    metric: Metric | None
    pictures: SampleSet
    autoencoder: Autoencoder | None
    piped: Piped | None = None

    @property
    def method(self) -> str:
        return type(self.pruner).__name__ if self.recipe.pruner else self.recipe.method

    @property
    def model_name(self) -> str:
        """What a report calls the model: by its class where its registered name stands for all of diffusers."""
        if self.piped is not None:
            return f"{self.piped.opened.name}, {self.piped.opened.part}"
        return type(self.model).__name__ if self.recipe.model == registry.of_pipelines()[0] else self.recipe.model

    @cached_property
    def weights_sha256(self) -> str:
        """The hash of the model, computed once: nothing trains `model` itself."""
        return weights_sha256(self.model)

    @cached_property
    def working(self) -> nn.Module:
        """The model in float32: itself, or a copy where it is in half precision."""
        return in_float32(self.model)

    @cached_property
    def starts_dense(self) -> bool:
        """Whether fine-tuning begins with the dense model as it is: the method prunes nothing and changes no weight before."""
        unprepared = type(self.pruner).prepare is Pruner.prepare and self.pruner.surgery is None
        return unprepared and not chosen(self.model, self.pruner, self.adapter, self.recipe.targets, self.recipe.ignore)

    def check(self) -> None:
        """Raise UsageError where the method finds no layer, or a rule is wrong, before anything is written."""
        refuse_unreadable(self.pruner.pattern)
        check_optimizer(self.recipe.train)
        model = surveyed(self.model, self.recipe.train.steps)
        layers = choose_layers(model, self.pruner, self.adapter, self.recipe.targets, self.recipe.ignore)
        dtypes = {name: value.dtype for name, value in self.model.named_parameters()}
        masked = {layer.name: dtypes[layer.name] for layer in layers if layer.reason is None}
        check_quantise(self.pruner, masked, self.recipe.train.mode)
        if self.recipe.train.mode == "lora" and self.recipe.train.steps:
            refuse_unmasked(masked)

    def unfit(self) -> str:
        """A sentence on what the rules choose and the pattern does not fit, where that is a twentieth of the weights or more."""
        recipe, pattern = self.recipe, self.pruner.pattern
        if (recipe.targets or recipe.ignore) and self.starts_dense:
            return f"targets and ignore say what is pruned, and {self.method} prunes nothing: every weight is trained"
        rules = with_rules(self.adapter, recipe.targets, recipe.ignore)
        every = {name for name, _ in self.model.named_parameters()} if self.pruner.targets(self.model) else set()
        wanted = select(self.model, Unstructured(1.0), every, rules.targets, rules.ignore)
        sizes = {one.name: one.weight.numel() for one in wanted if one.reason is None}
        left = {one.name: pattern.misfit(tuple(one.weight.shape)) for one in wanted if one.name in sizes}
        left = {name: reason for name, reason in left.items() if reason}
        if sum(sizes[name] for name in left) < _MANY * sum(sizes.values()) or not left:
            return ""
        name, reason = next(iter(left.items()))
        return f"{len(left)} of {len(sizes)} layers stay dense, as {pattern} does not fit them ({name}: {reason})"

    def fine_tuning(self, previous: Mapping[str, Any] | None = None) -> FineTuning:
        """The recipe's method on the recipe's data, not yet trained; or as it was when `previous` was its state."""
        return FineTuning(
            self.model,
            self.pruner,
            adapter=self.adapter,
            data=self.batches,
            training=self.recipe.train,
            targets=self.recipe.targets,
            ignore=self.recipe.ignore,
            previous=previous,
        )

    def refuse_forgetful(self, run: FineTuning) -> None:
        """Raise CompressorError where `run`, which was prepared here, would be another one after a checkpoint: the method as the
        recipe alone makes it, in a process of its own, lacks what this one found."""
        if type(self.pruner).prepare is not Pruner.prepare and self.recipe.train.steps:
            refuse_forgetful(run, _pruner(self.recipe))

    def one_shot(self) -> Result:
        """What the recipe's method gives without fine-tuning."""
        untrained = self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update={"steps": 0})})
        return replace(self, recipe=untrained).fine_tuning().finish()

    def identity(self, evaluated: bool = False) -> dict[str, str]:
        """The hashes that a resumed run must find again; `evaluated`: those that earlier versions made, as they made them."""
        text = json.dumps(recipes.identity(self.recipe, evaluated), sort_keys=True)
        source = code.own_source(self.recipe.pruner) + code.own_source(self.recipe.model)
        found = {"recipe_sha256": hashlib.sha256(text.encode() + source).hexdigest(), **self.sources}
        later = {_CONFIGURED: found.pop(_CONFIGURED), **code.trained_by(self.recipe)}
        return found if evaluated else {**found, **later}

    @cached_property
    def sources(self) -> dict[str, str]:
        """The hashes of the model, its configuration (with that of its noise), the pipeline that it is a part of, where it is of one,
        and the data."""
        piped = {} if self.piped is None else {"pipeline_sha256": self.piped.records.index.pipeline_sha256}
        text = json.dumps(_meant(self.adapter.architecture), sort_keys=True)
        configured = {_CONFIGURED: hashlib.sha256(text.encode()).hexdigest()}
        return {"weights_sha256": self.weights_sha256, **configured, **piped, "data_sha256": self.data.sha256}

    @cached_property
    def judges(self) -> dict[str, str]:
        """The hashes of what samples are judged by: the extractor of the metric, and the autoencoder that decodes them."""
        measures = self.metric is not None and self.recipe.evaluate.samples  # where nothing is, it may lack its weights
        metric = {"metric_sha256": self.metric.sha256} if self.metric is not None and measures else {}
        vae = {} if self.autoencoder is None else {"vae_sha256": self.autoencoder.sha256}
        return {**metric, **vae}


def _meant(value: Any) -> Any:
    """A configuration as JSON, without what only says from which file it was read, and by which version it was written."""
    if isinstance(value, Mapping):
        kept = {str(key): one for key, one in value.items() if not str(key).startswith("_") or key == "_class_name"}
        return {key: _meant(one) for key, one in kept.items()}
    if isinstance(value, (list, tuple)):
        return [_meant(one) for one in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__


def resolve(settings: Mapping[str, Any], where: str) -> Recipe:
    """The validated recipe: the metric of a registered data set, and the model's own defaults, below `settings`; file names absolute.

    Who gives a metric's weights means that metric, where none is named. Raises UsageError for anything unknown.
    """
    settings = {**start.model_of(recipes.merged(settings).get("weights")), **settings}
    early = validation.validated(Recipe, recipes.merged(settings), where)
    start.refuse_unasked(early, "model" in settings)
    weights = None if early.weights is None or _on_the_hub(early.weights) else early.weights
    paths = {"weights": weights, "pruner": early.pruner, "vae": early.vae}
    paths["inception_weights"] = early.evaluate.inception_weights
    if early.data is not None and not early.data.startswith("hf:") and early.data not in registry.names("data"):
        paths["data"] = early.data
    if registry.is_file_reference(early.model):
        paths["model"] = early.model
    for key in ("pipeline", "prompts", "records"):
        given = getattr(early, key)
        paths[key] = None if given is None or (key == "pipeline" and _on_the_hub(given)) else given
    captioning.refuse_mixed(early)
    absolute: dict[str, Any] = {key: os.path.abspath(path) for key, path in paths.items() if path is not None}
    scores = {name: None if path is None else os.path.abspath(path) for name, path in early.evaluate.scores.items()}
    absolute["evaluate"] = {"scores": scores} if scores else {}
    of_pipeline = captioning.DEFAULTS if captioning.is_captioned(early) else piping.DEFAULTS
    defaults = [registry.adapter(early.model).defaults if early.pipeline is None else of_pipeline]
    own = defaults[0].get("evaluate", {})
    defaults.append({"evaluate": of_budget(early.evaluate.budget, own)})
    defaults.insert(0, {"evaluate": {"metric": _usual_metric(early.data)}})
    if takers := _taking(early.evaluate):
        defaults.append({"evaluate": {"metric": takers[0]}})
    return validation.validated(Recipe, recipes.merged(*defaults, settings, absolute), where)


def adapter_of(recipe: Recipe) -> Adapter:
    """The adapter of the very model that `recipe` names, with the sampler that it names."""
    recipe = captioning.as_model(recipe) if captioning.is_captioned(recipe) else recipe
    settings = recipe.evaluate
    wanted = Sampling(settings.sampler, settings.spacing, settings.guidance)
    return start.opened(recipe).sampling(wanted)


def prepared(recipe: Recipe, before: Mapping[str, Any] | None = None) -> Generator[Progress, None, Inputs]:
    """As `load_inputs`, with its progress: the calls of a pipeline may have to be recorded first."""
    if recipe.pipeline is None:
        return load_inputs(recipe)
    pruner = _pruner(recipe)
    start.refuse_scratch(recipe, pruner)
    if (unread := captioning.overruled(recipe)) is not None:
        yield Progress("open", 0, 1, unread)
    if captioning.is_captioned(recipe):
        adapter, model, told = yield from captioning.captioned(recipe, adapter_of(recipe))
        recipe = recipe.model_copy(update={"model": adapter.name})
        inputs = Inputs(recipe, adapter, model, told, _batches(recipe, told), pruner, None, told, None)
        inputs.check()
        return inputs
    if recipe.evaluate.latency_batch != 1:
        raise UsageError("evaluate.latency_batch: a pipeline's model is timed on a call as recorded", "Leave it out.")
    found = yield from piping.piped(recipe, before)
    data = found.records
    settings = recipe.evaluate.model_copy(update={"samples": recipe.record.unseen})
    recipe = recipe.model_copy(update={"model": found.adapter.name, "evaluate": settings})
    inputs = Inputs(recipe, found.adapter, found.module, data, _batches(recipe, data), pruner, None, data, None, found)
    inputs.check()
    return inputs


@memory("loading")
def load_inputs(recipe: Recipe, before: Mapping[str, Any] | None = None) -> Inputs:
    """Find and load what `recipe` names. The cheap checks come first.

    `before` are the facts of the run that is gone on with: nothing is recorded of a pipeline that has changed since.
    """
    if recipe.pipeline is not None:
        return result_of(prepared(recipe, before))
    pruner = _pruner(recipe)
    start.refuse_scratch(recipe, pruner)
    if recipe.data is None:
        raise UsageError(
            f"{recipe.model} has no default data",
            "Give --data FOLDER or FILE, or a bundled set's name (`compressor list data`).",
        )
    metric = _metric(recipe.evaluate)
    resolve_device(recipe.train.device)
    adapter = adapter_of(start.guessed(recipe))
    model = None if recipe.from_scratch else start.started(recipe, adapter)
    autoencoder = Autoencoder(recipe.vae, resolve_device(recipe.train.device)) if recipe.vae is not None else None
    data = pictures = start.pictures(recipe, recipe.data, adapter, autoencoder)
    if autoencoder is not None and isinstance(pictures, ImageSet) and not pictures.latent:
        data = autoencoder.encoded(pictures)
    if model is None:
        recipe = start.fitted(recipe, data)
        adapter = adapter_of(recipe)
        model = start.started(recipe, adapter)
    fits.check_shapes(adapter, data, recipe.loading.size)
    if not registry.is_file_reference(recipe.model):  # an adapter of the user's knows what its numbers mean
        fits.refuse_unsigned(data)
    adapter = fits.asked(adapter, in_float32(model), data, not recipe.from_scratch)
    if recipe.evaluate.samples and adapter.unsampled:
        raise UsageError(
            adapter.unsampled,
            "Sample with the pipeline that the run writes, and draw nothing here: --set evaluate.samples=0",
        )
    recipe = _proportioned(recipe, adapter, model, pictures)
    if metric is not None and recipe.evaluate.samples:
        fits.check_metric(metric, recipe, pictures, len(data))
    found = Inputs(recipe, adapter, model, data, _batches(recipe, data), pruner, metric, pictures, autoencoder)
    found.check()
    return found


def same_source(recipe: Recipe, other: Recipe) -> bool:
    """Whether both name the same model, weights and data, and are judged alike."""
    return all(getattr(recipe, name) == getattr(other, name) for name in SHARED)


def sharing(recipe: Recipe, loaded: Inputs, adapter: Adapter) -> Inputs:
    """What `recipe` names, with the model and the data of `loaded`: nothing of either is loaded again."""
    resolve_device(recipe.train.device)
    if recipe.evaluate.samples is None:
        recipe = recipe.model_copy(update={"evaluate": loaded.recipe.evaluate})
    found = replace(
        loaded, recipe=recipe, adapter=adapter, pruner=_pruner(recipe), batches=_batches(recipe, loaded.data)
    )
    found.check()
    return found


def _pruner(recipe: Recipe) -> Pruner:
    cls = registry.pruner_class_from_file(recipe.pruner) if recipe.pruner else registry.pruner_class(recipe.method)
    if (cls.__name__ if recipe.pruner else recipe.method) in (DENSE, ONE_SHOT):
        raise UsageError(
            f"a method cannot be called {DENSE!r} or {ONE_SHOT!r}: reports have rows of that name", "Rename it."
        )
    own = {**recipe.settings, **({"pattern": recipe.pattern} if recipe.pattern is not None else {})}
    return registry.build_pruner(cls, own)


def _batches(recipe: Recipe, data: SampleSet) -> Samples:
    return Samples(data, recipe.train.batch_size, recipe.train.seed, recipe.loading.flip)


def _proportioned(recipe: Recipe, adapter: Adapter, model: nn.Module, real: SampleSet) -> Recipe:
    """`recipe` with a number of samples that suits the data and what a sample costs, where it gives none."""
    settings = recipe.evaluate
    if settings.samples is not None:
        return recipe
    macs = 0.0
    if can_sample(adapter):
        with suppress(CompressorError):  # no example inputs: the cost is not known
            macs = layer_macs(model, adapter)[0] * settings.sampler_steps
    on_gpu = resolve_device(recipe.train.device).type == "cuda"
    count = samples_for(settings.budget, len(real), macs, on_gpu)
    return recipe.model_copy(update={"evaluate": settings.model_copy(update={"samples": count})})


def _metric(settings: Evaluation) -> Metric | None:
    if settings.metric is None:
        return None
    metric = registry.metric(settings.metric)
    if settings.inception_weights is None or settings.samples == 0:
        return metric
    if metric.weights_setting is None:
        other = "".join(f", or measure {name}: --set evaluate.metric={name}" for name in _taking(settings)[:1])
        raise UsageError(
            f"{metric.name} takes no weights, got {settings.inception_weights}",
            f"Leave evaluate.inception_weights out{other}",
        )
    return metric.with_weights(Path(getattr(settings, metric.weights_setting)))


def _usual_metric(data: str | None) -> str | None:
    """The registered metric that models of the registered set `data` are judged by, where there is one."""
    for name in registry.names("metrics") if data in registry.names("data") else ():
        with suppress(CompressorError):  # one that cannot be loaded is nobody's usual metric
            if registry.metric(name).data == data:
                return name
    return None


def _taking(settings: Evaluation) -> list[str]:
    """The registered metrics that take the file of weights which `settings` name."""
    if settings.inception_weights is None:
        return []
    return [
        name
        for name in registry.names("metrics")
        if (setting := registry.metric(name).weights_setting) and getattr(settings, setting, None) is not None
    ]


def _on_the_hub(name: str) -> bool:
    """Whether `name` can only be one of the Hugging Face hub: owner/name, and no file or folder."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not os.path.exists(name)
