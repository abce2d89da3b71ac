"""The Pruner interface: a method, as data. One required method; everything else has a default that does the usual."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from compressor.adapter import Adapter, with_rules
from compressor.data.batches import Batches
from compressor.errors import UsageError
from compressor.sparsity.codes import Quantise
from compressor.sparsity.estimator import Estimator, StraightThrough
from compressor.sparsity.layers import Layer, fitting, idle, select, shown, survey
from compressor.sparsity.pattern import NM, Mask, Pattern
from compressor.sparsity.surgery import Surgery
from compressor.weights import bare

Cost = Literal["macs", "density"]
"""What a share of a model may be of: its multiply-accumulates, or its weights."""

_MARK = "compressor"


def found(factory: Callable[[], Any] | None = None) -> Any:
    """A field of a dataclass pruner that holds what `prepare` found. It is no setting: recipes cannot give it, reports leave it out.

    It is None at first, or what `factory` makes: `norms: Mapping[str, Tensor] = found(dict)`.
    """
    mark = {_MARK: "found"}
    if factory is None:
        return field(default=None, repr=False, metadata=mark)
    return field(default_factory=factory, repr=False, metadata=mark)


@dataclass(frozen=True)
class Preset:
    """A comparison that can be asked for by name: `entries` by label, as recipe settings, and the numbers of sampler steps
    that they are judged at besides the recipe's."""

    about: str
    entries: Mapping[str, Mapping[str, Any]]
    sampler_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Objective:
    """Weights of the two losses: `noise * |target - student|^2 + teacher * |teacher - student|^2` (means of squares).

    The teacher, a frozen copy of the model from before pruning, exists only where `teacher` is above zero.
    Raises UsageError for weights below 0, and where both are 0.
    """

    noise: float = 1.0
    teacher: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("noise", self.noise), ("teacher", self.teacher)):
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise UsageError(f"objective: {name} must be a number of at least 0, got {value!r}")
        if not self.noise and not self.teacher:
            raise UsageError(
                "objective: both weights are 0", "Give noise or teacher a weight: nothing is learned without."
            )

    @classmethod
    def taught(cls, teacher: float, alone: bool) -> Objective:
        """With that weight of the teacher beside the noise, or with the teacher `alone`."""
        return cls(noise=0.0, teacher=1.0) if alone else cls(teacher=teacher)


class Pruner(ABC):
    """A compression method. Subclasses are frozen dataclasses (their fields are the method's settings) or plain classes.

    A subclass may give `pattern`, `estimator` and `objective` as fields, class attributes or properties. Fields that hold what
    `prepare` found are declared with `compressor.found()`.
    """

    pattern: Pattern = NM(2, 4)
    """The pattern of the finished weights."""
    estimator: Estimator = StraightThrough()
    """How pruned weights are trained."""
    objective: Objective = Objective()
    """What fine-tuning minimises."""
    quantise: Quantise = "none"
    """What is left under masks is rounded to: with `int8`, it is trained and saved as 8-bit codes times a scale per output row."""
    surgery: Surgery | None = None
    """What `prepare` found that can be removed of the model's structure. The engine removes it, before training."""
    separable: ClassVar[bool] = False
    """Whether `masks` decides on each weight by itself, so that one-shot pruning in place may ask for one after another."""
    compared: ClassVar[bool] = False
    """Whether `compressor compare` has this method as an entry where the user names none."""
    presets: ClassVar[Mapping[str, Preset]] = {}
    """Comparisons that show what this method's parts do, by the name that `compressor compare --preset` takes."""

    @abstractmethod
    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        """The masks that hold now. Pure: called before training, after every optimizer step, and once on the average.

        `weights`: the dense target weights by parameter name; `progress`: the share of the steps that is done, 0 to 1
        (1 where there are none); `previous`: the masks now in force, {} at first. Weights left out stay dense.
        """

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """Which weights of Linear and convolution layers may get a mask, by parameter name. Default: those that the pattern fits.

        Raises UsageError where it fits none.
        """
        return fitting(model, self.pattern)

    @property
    def unprepared(self) -> bool:
        """Whether training without `prepare` would not be this method. Default: fields that `found` declares hold nothing yet."""
        held = [getattr(self, one) for one in found_names(type(self))]
        return bool(held) and all(one is None or (isinstance(one, Mapping) and not one) for one in held)

    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        """Called once, before training: calibrate scores, or update weights in place. Default: self.

        What it learns goes into the copy that it returns, and into that copy's `state`. Structure that it wants removed
        goes into the copy's `surgery`, which checkpoints hold anyway; `masks` then gets the weights that are left.
        `adapter.targets` and `adapter.ignore` are the rules of this run (`compressor.choose_layers` applies them).
        """
        return self

    def with_cost(self, share: float, measure: Cost = "macs") -> Self | None:
        """This method with settings that leave the `share`, above 0 and up to 1, of a model's `measure`. Default: None.

        None says that this method cannot be told: one with masks, whose pattern says it. Comparisons make costs equal by it.
        `share` must reach at least one setting, and change nothing but settings.
        """
        return None

    def state(self) -> Mapping[str, Any]:
        """What `prepare` found, as nested dicts of tensors, numbers and strings, for checkpoints. Default: nothing."""
        return {}

    def restored(self, state: Mapping[str, Any]) -> Self:
        """This pruner with the `state` (on the CPU) of a prepared one. A resumed run calls it instead of `prepare`."""
        return self


def setting_names(cls: type[Pruner]) -> tuple[str, ...]:
    """The names of a method's settings: what its constructor takes, but for fields that `found` declares."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p.name for p in inspect.signature(cls).parameters.values() if p.kind in kinds]
    return tuple(name for name in parameters if name not in found_names(cls))


def found_names(cls: type[Pruner]) -> tuple[str, ...]:
    """The names of the fields that `found` declares."""
    fields: Mapping[str, Any] = getattr(cls, "__dataclass_fields__", {})
    return tuple(name for name, one in fields.items() if one.metadata.get(_MARK) == "found")


def settings_of(pruner: Pruner) -> dict[str, Any]:
    """The settings of a dataclass pruner by name, with their values; empty for other classes, which do not say what they keep."""
    fields: Mapping[str, Any] = getattr(type(pruner), "__dataclass_fields__", {})
    return {name: getattr(pruner, name) for name in setting_names(type(pruner)) if name in fields}


def refuse_unread(pruner: Pruner, why: str, *names: str) -> None:
    """Raise UsageError where one of these settings is not what it is by default: nothing reads it, and `why` says why."""
    fields: Mapping[str, Any] = getattr(type(pruner), "__dataclass_fields__", {})
    for name in names:
        if getattr(pruner, name) != fields[name].default:
            raise UsageError(f"{type(pruner).__name__}: {name} has no effect, as {why}", f"Leave {name} out.")


def refuse_text(pruner: Pruner) -> None:
    """Raise UsageError for a pattern that is written, not read: `"2:4"` in the place of `parse("2:4")`; and for no objective."""
    if not isinstance(pattern := pruner.pattern, Pattern):
        how = (
            f"compressor.parse({pattern!r})"
            if isinstance(pattern, str)
            else 'a compressor.Pattern: compressor.parse("2:4")'
        )
        raise UsageError(f"the pattern of {type(pruner).__name__} is {type(pattern).__name__}", f"Give {how}.")
    refuse_other(pruner, "objective", Objective, pruner.objective)


def refuse_other(pruner: Pruner, name: str, kind: type, found: Any) -> None:
    """Raise UsageError unless what `pruner` has as its `name` is an instance of `kind`."""
    if not isinstance(found, kind):
        what = f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__
        raise UsageError(f"the {name} of {type(pruner).__name__} is {what}", f"Give a compressor.{kind.__name__}.")


def refuse_misplaced(model: Any, pruner: Any, adapter: Any) -> None:
    """Raise UsageError for what is no model, pruner or adapter, such as the class of one, and as `refuse_text` does."""
    for name, found, kind in (("model", model, nn.Module), ("pruner", pruner, Pruner), ("adapter", adapter, Adapter)):
        if isinstance(found, type):
            raise UsageError(f"the {name} is the class {found.__name__}", f"Give an instance: {found.__name__}().")
        if not isinstance(found, kind):
            home = "torch.nn.Module" if kind is nn.Module else f"compressor.{kind.__name__}"
            raise UsageError(f"the {name} is {type(found).__name__}", f"Give an instance of {home}.")
    refuse_text(pruner)


def choose_layers(
    model: nn.Module,
    pruner: Pruner,
    adapter: Adapter,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> list[Layer]:
    """Every layer, with the reason where it gets no mask; `targets` and `ignore` are the adapter's where None.

    Raises UsageError for rules that are no sequence of texts, for `targets` of the pruner that are no weights of layers, and for what
    `compressor.sparsity.layers.select` refuses.
    """
    refuse_misplaced(model, pruner, adapter)
    model, rules = bare(model), with_rules(adapter, targets, ignore)
    return select(model, pruner.pattern, _targeted(model, pruner), rules.targets, rules.ignore)


def _targeted(model: nn.Module, pruner: Pruner) -> set[str]:
    """The names that the `targets` of `pruner` gives. Raises UsageError where that is no mapping, or one is no layer's weight."""
    found: Any = pruner.targets(model)
    what = f"targets() of {type(pruner).__name__}"
    if not isinstance(found, Mapping):
        raise UsageError(f"{what} returned {type(found).__name__}", "Return parameters by name.")
    if strange := sorted(set(found) - {layer.name for layer in survey(model, pruner.pattern)}):
        raise UsageError(
            f"{what} names {strange[0]!r}, which is no weight of a Linear or a convolution",
            "No others are pruned: name some of those that compressor.choose_layers lists. A Shadow takes any parameter that the "
            "pattern fits.",
        )
    return set(found)


def chosen(
    model: nn.Module,
    pruner: Pruner,
    adapter: Adapter,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
) -> list[Layer]:
    """The layers that get a mask: `choose_layers` without those that have a reason for none."""
    return [layer for layer in choose_layers(model, pruner, adapter, targets, ignore) if layer.reason is None]


def warn_of_idle(model: nn.Module, ignore: Sequence[str] | None) -> None:
    """Warn of each rule of the caller's that leaves nothing out: it is likely a mistake. Raises UsageError as `texts` does."""
    for rule in idle(bare(model), ignore) if ignore is not None else ():
        warnings.warn(f"ignore: {shown(rule)} matches no layer", stacklevel=3)
