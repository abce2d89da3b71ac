"""What is compared: the entries, their recipes for each seed, and the settings that make their costs equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from compressor import recipe as recipes
from compressor import registry
from compressor.comparison.presets import compared_by_default, presets
from compressor.cost.macs import layer_macs
from compressor.errors import CompressorError, UsageError, did_you_mean
from compressor.quality.settings import MOST_STEPS
from compressor.recipe import Recipe
from compressor.report.words import file_name
from compressor.runs import inputs
from compressor.runs.inputs import Inputs
from compressor.runs.unread import refuse_unread
from compressor.training.engine import chosen
from compressor.training.pruner import Cost, Preset, Pruner, setting_names, settings_of

Match = Literal["macs", "density", "latency", "none"]
MATCHES: tuple[str, ...] = ("macs", "density", "latency", "none")
MOST_SEEDS = 1000
TUNING_SEEDS = 1_000_000
"""Added to a seed for the runs that choose a learning rate, which are not those that are reported."""


def _rate(rate: float) -> str:
    """What a folder calls a learning rate: two that are called alike are one."""
    return f"{rate:g}"


@dataclass(frozen=True)
class Cell:
    """One training: an entry with one seed (and, while the learning rate is chosen, one of the rates)."""

    label: str
    seed: int
    recipe: Recipe
    first: bool = False
    tuning: bool = False

    @property
    def name(self) -> str:
        """Its folder's."""
        rate = f"-lr-{_rate(self.recipe.train.lr)}" if self.tuning else ""
        return f"{file_name(self.label)}-seed-{self.seed}{rate}"


@dataclass(frozen=True, eq=False)
class Comparison:
    """A resolved comparison: for every label its recipe, with the first seed.

    `matched` has what was matched, by label: the setting and its value, and `mask` what to, where that was measured. `sampler_steps`
    are numbers of steps in which every model is sampled besides the recipe's. `max_error` is how far a lowered model's output may be
    from that of the weights judged.
    """

    recipes: Mapping[str, Recipe]
    seeds: Sequence[int]
    inputs: Inputs
    match: str = "macs"
    matched: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    mask: str = ""
    rates: Sequence[float] = ()
    sampler_steps: Sequence[int] = ()
    lower: bool = False
    max_error: float | None = None
    title: str = ""

    def cells(self, rates: Mapping[str, float]) -> list[Cell]:
        """Every training whose figures are reported, at the learning `rates` chosen."""
        return [
            Cell(label, seed, _with(recipe, seed, rates.get(label)), seed == self.seeds[0])
            for seed in self.seeds
            for label, recipe in self.recipes.items()
        ]

    def trials(self) -> list[Cell]:
        """Every training that is there to choose a learning rate: none without a grid."""
        seed = self.seeds[0] + TUNING_SEEDS
        return [
            Cell(label, seed, _with(recipe, seed, rate, recipe.evaluate.seed + 1), tuning=True)
            for label, recipe in self.recipes.items()
            for rate in self.rates
        ]


def planned(
    methods: Sequence[str],
    configs: Sequence[Path],
    preset: str | None,
    common: Mapping[str, Any],
    *,
    seeds: int = 3,
    match: str = "macs",
    rates: Sequence[float] = (),
    sampler_steps: Sequence[int] = (),
    lower: bool = False,
    max_error: float | None = None,
    known: Mapping[str, Mapping[str, Mapping[str, float]]] = MappingProxyType({}),
    before: Mapping[str, Any] = MappingProxyType({}),
) -> Comparison:
    """The comparison of `methods`, the recipes `configs`, and a `preset`; `common` settings hold for all of them.

    `known` is what earlier calls have measured for `match` latency, by what was matched (`Comparison.mask`) and by label; `before` has
    their settings, below all others.
    Loads what each entry needs, so that nothing is trained where one of them cannot be. Raises UsageError.
    """
    if match not in MATCHES:
        raise UsageError(f"--match {match!r}", did_you_mean(match, MATCHES))
    if max_error is not None and not lower:
        raise UsageError("--max-error is an error of lowered models", "Give --lower too.")
    chosen_preset = None if preset is None else _preset(preset)
    entries = _entries(methods, configs, chosen_preset, common)
    if sampler_steps == () and chosen_preset is not None:
        sampler_steps = chosen_preset.sampler_steps
    found = {
        label: inputs.resolve(_fitting(recipes.merged(before, settings)), label) for label, settings in entries.items()
    }
    _refuse_unread(found, configs, common, rates)
    for label, recipe in found.items():
        _refuse_own(label, recipe, lower, max_error)
    loaded = _loaded(found)
    found = {label: entry.recipe for label, entry in loaded.items()}  # with the number of samples that was chosen
    first = next(iter(loaded.values()))
    _refuse_unmeasured(first, chosen_preset, sampler_steps)
    own = {label: entries[label].get("settings", {}) for label in entries}
    matched, mask = _matched(loaded, own, match, known)
    for label, changes in matched.items():
        found[label] = found[label].model_copy(update={"settings": {**found[label].settings, **changes}})
    return Comparison(
        found,
        _seeds(first.recipe.train.seed, seeds, bool(rates)),
        first,
        match,
        matched,
        mask,
        tuple({_rate(rate): rate for rate in rates}.values()),
        tuple(step for step in dict.fromkeys(sampler_steps) if step != first.recipe.evaluate.sampler_steps),
        lower,
        max_error,
        preset or ", ".join(found),
    )


def _refuse_unread(
    found: Mapping[str, Recipe], configs: Sequence[Path], common: Mapping[str, Any], rates: Sequence[float]
) -> None:
    """Raise UsageError for settings in `common` that no entry reads, and for those of a recipe that its own entry does not read."""
    refuse_unread(found.values(), common)
    for path in configs:
        refuse_unread([found[path.stem]], recipes.read(path), common)
    if rates and not any(recipe.train.steps for recipe in found.values()):
        raise UsageError("--lr-grid is given, and 0 steps train nothing", "Leave it out, or give --steps.")


def _refuse_own(label: str, recipe: Recipe, lower: bool, max_error: float | None) -> None:
    """Raise UsageError where `recipe` begins with random weights, or would have its model lowered otherwise than all are here: by
    `lower`, with `max_error`."""
    if recipe.from_scratch:
        raise UsageError(
            f"{label}: from_scratch: methods are compared from one trained model, and each seed would begin with another random one",
            "Train a dense model first (compressor train), and give it with --weights.",
        )
    own = recipe.lowering.model_dump(exclude_defaults=True)
    given = {"lowering": own} if own not in ({}, {"max_error": max_error}) else {}
    if recipe.lower and not lower:
        given["lower"] = {}
    if given:
        raise UsageError(
            f"{label}: {min(given)} would not be asked for: the models of a comparison are lowered alike",
            "Leave it out, and give --lower, with --max-error, for all of them.",
        )


def _seeds(first: int, count: int, tuned: bool) -> range:
    """So many seeds from the `first` on. Raises UsageError where there are none, or one of them, or of those that choose a rate where
    it is `tuned`, would be too large."""
    if not 1 <= count <= MOST_SEEDS:
        raise UsageError(f"--seeds {count}", f"Give at least 1, at most {MOST_SEEDS:,}; intervals take 2.")
    after = max(count - 1, TUNING_SEEDS * tuned)
    if first + after >= 2**63:
        raise UsageError(f"--seed {first}", f"Give one up to {2**63 - 1 - after}: the others follow it.")
    return range(first, first + count)


def _refuse_unmeasured(first: Inputs, preset: Preset | None, steps: Sequence[int]) -> None:
    """Raise UsageError where no metric would tell what these sampler `steps` cost, which are not those of a preset, and for more than
    any sampler takes."""
    if (most := max(steps, default=1)) > MOST_STEPS:
        raise UsageError(f"--sampler-steps {most}", f"Allowed: 1 to {MOST_STEPS}.")
    if steps and first.metric is None and (preset is None or steps != preset.sampler_steps):
        raise UsageError(
            "--sampler-steps: what fewer steps cost is told by a metric, and none is measured here",
            "Leave it out, or choose one: --set evaluate.metric=NAME. Of a pipeline: compressor bench RUN --steps 14,7.",
        )


def _preset(name: str) -> Preset:
    known = presets()
    if name not in known:
        raise UsageError(f"--preset {name!r}", did_you_mean(name, list(known)))
    return known[name]


def _entries(
    methods: Sequence[str], configs: Sequence[Path], preset: Preset | None, common: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """The settings of every entry by its label; of all methods that are compared by default, where the user names none."""
    entries: dict[str, dict[str, Any]] = {}
    folders = {"dense": "dense, the given model"}
    for label, settings in _named(methods, configs, preset, common):
        if label in entries:
            raise UsageError(f"{label!r} is compared twice", "Give each method, and each recipe's file name, once.")
        other = folders.setdefault(file_name(label).casefold(), label)
        if other != label:
            raise UsageError(f"{label!r} cannot be told from {other!r}", "Rename the recipe's file.")
        entries[label] = settings
    return entries or dict(_named(compared_by_default(), (), None, common))


def _named(
    methods: Sequence[str], configs: Sequence[Path], preset: Preset | None, common: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for method in methods:
        if registry.is_file_reference(method):
            yield method.rpartition(":")[2], recipes.merged(common, {"pruner": method})
        else:
            yield method, recipes.merged(common, {"method": method})
    for path in configs:
        yield path.stem, recipes.merged(recipes.read(path), common)
    if preset is not None:
        for label, settings in preset.entries.items():
            yield label, recipes.merged(common, settings)


def _fitting(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without a pattern where the method has none."""
    method, file = settings.get("method", Recipe().method), settings.get("pruner")
    if "pattern" not in settings or not isinstance(method, str) or not isinstance(file, str | None):
        return dict(settings)
    cls = registry.pruner_class(method) if file is None else registry.pruner_class_from_file(file)
    names = setting_names(cls)
    return {key: value for key, value in settings.items() if key != "pattern" or "pattern" in names}


def _loaded(recipes: Mapping[str, Recipe]) -> dict[str, Inputs]:
    """What each recipe names. Model and data are loaded once, with the first; the others are held against them.

    Only methods that start from the same weights, on the same data, are compared.
    """
    first_label, first_recipe = next(iter(recipes.items()))
    first = _named_error(first_label, partial(inputs.load_inputs, first_recipe))
    loaded = {first_label: first}
    for label, recipe in list(recipes.items())[1:]:
        adapter = first.adapter
        if not inputs.same_source(recipe, first_recipe):  # they may still be alike: another file of the same weights
            other = _named_error(label, partial(inputs.load_inputs, recipe))
            _refuse_different(first_label, first, label, other)
            adapter = other.adapter
        loaded[label] = _named_error(label, partial(inputs.sharing, recipe, first, adapter))
    return loaded


def _named_error(label: str, load: Callable[[], Inputs]) -> Inputs:
    """`load()`, whose errors begin with `label`."""
    try:
        return load()
    except CompressorError as error:
        raise type(error)(f"{label}: {error.message}", error.hint) from error


def _refuse_different(first_label: str, first: Inputs, label: str, found: Inputs) -> None:
    """Raise UsageError where `found` has other weights or data than the `first`, or is evaluated differently."""
    identity, other = first.identity(), found.identity()
    for key in ("weights_sha256", "architecture_sha256", "data_sha256"):
        if other[key] != identity[key]:
            what = key.removesuffix("_sha256")
            raise UsageError(
                f"{first_label} and {label} have different {what}", "Give --model, --weights and --data once."
            )
    if found.recipe.evaluate != first.recipe.evaluate:
        raise UsageError(f"{first_label} and {label} are evaluated differently", "Give evaluate.… with --set, for all.")


def _matched(
    loaded: Mapping[str, Inputs],
    own: Mapping[str, Mapping[str, Any]],
    match: str,
    known: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> tuple[dict[str, dict[str, float]], str]:
    """For each method that can be told what to cost, and was not: the setting that makes it cost what the first mask does; and what
    that mask is, where its time was measured."""
    free = [
        label
        for label, found in loaded.items()
        if (settings := _told(found.pruner, 0.5, "macs").keys())
        and not (settings | _told(found.pruner, 0.5, "density").keys()) & own[label].keys()
    ]
    masked = next((found for found in loaded.values() if _layers(found)), None)
    if match == "none" or not free or masked is None:
        return {}, ""
    if match == "density":
        density = float(masked.pruner.pattern.density)
        pruners = {label: loaded[label].pruner for label in free}
        return {label: _told(p, density, "density") or _told(p, density, "macs") for label, p in pruners.items()}, ""
    if match == "macs":
        share = round(_effective(masked), 4)
        return {label: _told(loaded[label].pruner, share, "macs") for label in free}, ""
    from compressor.comparison.latency import macs_of_equal_latency

    layers = hashlib.sha256(json.dumps(_layers(masked)).encode()).hexdigest()[:16]
    mask = f"{masked.pruner.pattern} on the layers {layers}, batch {masked.recipe.evaluate.latency_batch}"
    measured = known.get(mask, {})
    return {
        label: dict(measured[label])
        if label in measured
        else _told(loaded[label].pruner, round(macs_of_equal_latency(masked, loaded[label]), 2), "macs")
        for label in free
    }, mask


def _told(pruner: Pruner, share: float, measure: Cost) -> dict[str, Any]:
    """The settings by which `pruner` is told to leave `share`; none where it cannot be told.

    They are found by telling it two shares: those that differ. Raises CompressorError where none does.
    """
    told, otherwise = pruner.with_cost(share, measure), pruner.with_cost(1.0 if share < 1 else 0.5, measure)
    if told is None or otherwise is None:
        return {}
    others = settings_of(otherwise)
    settings = {name: value for name, value in settings_of(told).items() if value != others[name]}
    if not settings:
        raise CompressorError(
            f"{type(pruner).__name__}: with_cost() changes no setting",
            "It gives a copy with other settings, or None; help(compressor.Pruner.with_cost) has it.",
        )
    return settings


def _layers(found: Inputs) -> list[str]:
    layers = chosen(found.model, found.pruner, found.adapter, found.recipe.targets, found.recipe.ignore)
    return [layer.name for layer in layers]


def _effective(found: Inputs) -> float:
    """The share of multiply-accumulates that a mask on every chosen layer leaves."""
    total, by_weight = layer_macs(found.model, found.adapter)
    gone = sum(by_weight.get(name, 0) for name in _layers(found)) * (1 - found.pruner.pattern.density)
    return 1 - gone / total


def _with(recipe: Recipe, seed: int, rate: float | None, evaluation_seed: int | None = None) -> Recipe:
    train = recipe.train.model_copy(update={"seed": seed, **({} if rate is None else {"lr": rate})})
    judged = recipe.evaluate.model_copy(update={} if evaluation_seed is None else {"seed": evaluation_seed})
    return recipe.model_copy(update={"train": train, "evaluate": judged})
