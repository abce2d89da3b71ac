"""Which layers get a mask: every layer with a prunable weight, and for each one that does not fit, the reason.

A rule names layers: a module's name or that of a module around it (`in_blocks.0`), a class (`Linear`), a shell pattern
(`*.mlp.fc1`), or, with `re:` before it, a regular expression that is searched for in the name (`re:attn|mlp`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from compressor.errors import UsageError, did_you_mean, texts
from compressor.sparsity.pattern import Pattern, Unstructured

PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The classes of layers that methods prune. All of their weights are (out, in, *kernel)."""
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PACKED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
"""Classes that multiply by weights of their own, of other shapes or names than a layer has."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer and its weight (out, in, *kernel): the weight's parameter name, the layer's module name, and why it gets no mask (None:
    nothing keeps it from having one).

    A weight that a parametrization computes, which is no parameter, has the name that it would have. `shared_by` has the names of
    all modules that have the weight, where there are several.
    """

    name: str
    module_name: str
    module: nn.Module
    weight: Tensor
    reason: str | None = None
    shared_by: tuple[str, ...] = ()


def weighted(model: nn.Module, kinds: tuple[type[nn.Module], ...] = PRUNABLE) -> Iterator[Layer]:
    """Every layer of `model` of one of the `kinds`, in the order of the model, each module once.

    Two layers that share a weight both come, with the same name: the first that the parameter has.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for module_name, module in model.named_modules():
        if isinstance(module, kinds):
            weight: Any = _weight(module)
            unnamed = f"{module_name}.weight" if module_name else "weight"
            yield Layer(names.get(id(weight), unnamed), module_name, module, weight)


def _multiplying(model: nn.Module) -> Iterator[Layer]:
    """Every weight that a module of torch's own multiplies by, in the order of the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = {id(layer.module): layer for layer in weighted(model, PRUNABLE + _TRANSPOSED)}
    for module_name, module in model.named_modules():
        if isinstance(module, _PACKED):
            for weight in module.parameters(recurse=False):
                if weight.dim() > 1:
                    yield Layer(names[id(weight)], module_name, module, weight)
        elif (layer := layers.get(id(module))) is not None:
            yield layer


def _weight(layer: nn.Module) -> Any:
    """The weight of `layer`. Where a parametrization computes it, that is done in eval mode: in training, spectral norm's would change
    its own buffers at every look."""
    computing = getattr(layer, "parametrizations", {})
    modes = [(part, part.training) for part in computing["weight"].modules()] if "weight" in computing else []
    for part, _ in modes:
        part.training = False
    try:
        return layer.weight
    finally:
        for part, training in modes:
            part.training = training


def survey(model: nn.Module, pattern: Pattern) -> list[Layer]:
    """Every Linear and convolution of `model`, each weight once (ties and shared modules under their first name), and, with the reason
    why it is not pruned, whatever else of torch's own multiplies by weights."""
    layers: list[Layer] = []
    seen, named = set[str](), {name for name, _ in model.named_parameters()}
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        for own in {id(parameter) for parameter in module.parameters(recurse=False)}:
            owners[own].append(name)
    for layer in _multiplying(model):
        weight = layer.weight
        if layer.name in seen:
            continue
        seen.add(layer.name)
        if isinstance(layer.module, _PACKED):
            reason: str | None = f"a weight of {type(layer.module).__name__}, not of a Linear or convolution"
        elif isinstance(layer.module, _TRANSPOSED):
            reason = "transposed convolution: dim 1 of its weight is the output"
        elif not isinstance(weight, nn.Parameter):
            made = "a buffer" if "weight" in layer.module._buffers else "computed by a parametrization"
            reason = f"its weight is {made}"
        elif layer.name not in named:
            reason = "the model's named_parameters() leave it out"
        elif not weight.requires_grad:
            reason = "frozen (requires_grad is False)"
        elif not weight.is_floating_point():
            reason = f"not a floating-point weight ({weight.dtype})"
        else:
            misfit = pattern.misfit(tuple(weight.shape))
            reason = f"{pattern} {misfit}" if misfit else None
        names = owners[id(weight)]
        layers.append(replace(layer, reason=reason, shared_by=tuple(names) if len(names) > 1 else ()))
    return layers


def select(
    model: nn.Module, pattern: Pattern, allowed: set[str], targets: Sequence[str], ignore: Sequence[str]
) -> list[Layer]:
    """The survey with the rules applied: layers outside `targets` (where given), inside `ignore`, or not among the
    `allowed` parameter names get a reason.

    Raises UsageError where one of both is no sequence of texts, where a rule in `targets` matches no layer, where it names one
    by its full name that the pattern does not fit, and where nothing at all is left. A rule in `ignore` that matches nothing is
    the caller's to warn of (`idle`).
    """
    targets, ignore = texts("targets", targets), texts("ignore", ignore)
    layers = survey(model, pattern)
    if lost := unmatched(layers, targets):
        raise UsageError(
            f"target {shown(lost[0])} matches no layer", did_you_mean(lost[0], [layer.module_name for layer in layers])
        )
    chosen = []
    for layer in layers:
        if any(matches(rule, layer) for rule in ignore):
            layer = replace(layer, reason="ignored by a rule")
        elif layer.reason is not None:
            named = layer.name if isinstance(layer.module, _PACKED) else layer.module_name
            if layer.name in targets or named in targets:
                raise UsageError(f"{layer.name}: {layer.reason}", f"Leave it out with --ignore {named}")
        elif targets and not any(matches(rule, layer) for rule in targets):
            layer = replace(layer, reason="not among the targets")
        elif layer.name not in allowed:
            layer = replace(layer, reason="left out by the method")
        chosen.append(layer)
    if allowed:
        _some_fit(chosen, pattern)
    return chosen


def fitting(model: nn.Module, pattern: Pattern) -> dict[str, nn.Parameter]:
    """The weights that `pattern` fits, by parameter name. Raises UsageError, with the reasons, where there are none."""
    layers = survey(model, pattern)
    _some_fit(layers, pattern)
    parameters = dict(model.named_parameters())
    return {layer.name: parameters[layer.name] for layer in layers if layer.reason is None}


def shown(rule: str) -> str:
    """A rule in quotes, as much of it as a line takes."""
    return repr(rule if len(rule) <= 80 else f"{rule[:60]}…")


def unmatched(layers: Sequence[Layer], rules: Sequence[str]) -> list[str]:
    """The rules that match none of `layers`."""
    return [rule for rule in texts("rules", rules) if not any(matches(rule, layer) for layer in layers)]


def idle(model: nn.Module, rules: Sequence[str] | None) -> list[str]:
    """The rules that match no layer of `model`, whatever a pattern fits. In `ignore`, such a one is likely a mistake."""
    return unmatched(survey(model, Unstructured(1.0)), texts("ignore", rules or ()))


def matches(rule: str, layer: Layer) -> bool:
    """Whether `rule` names `layer`, or another module with its weight. Raises UsageError for a malformed regular expression."""
    return any(_names(rule, name, layer) for name in (layer.module_name, *layer.shared_by))


def _names(rule: str, name: str, layer: Layer) -> bool:
    if rule.startswith("re:"):
        try:
            return re.search(rule[3:], name) is not None
        except re.error as error:
            raise UsageError(f"rule {rule!r}: not a regular expression: {error}", "See Python's re module.") from error
    return (
        rule in (name, layer.name, f"{name}.weight")
        or name.startswith(f"{rule}.")
        or type(layer.module).__name__ == rule
        or fnmatchcase(name, rule)
    )


def reached(layer: Layer, targets: Sequence[str], ignore: Sequence[str]) -> bool:
    """Whether the rules leave `layer` to the method: among the `targets`, where there are any, and not in `ignore`."""
    targets, ignore = texts("targets", targets), texts("ignore", ignore)
    targeted = not targets or any(matches(rule, layer) for rule in targets)
    return targeted and not any(matches(rule, layer) for rule in ignore)


def _some_fit(layers: Sequence[Layer], pattern: Pattern) -> None:
    if any(layer.reason is None for layer in layers):
        return
    shown = [f"{layer.name} ({layer.reason})" for layer in layers[:3]]
    more = f"; and {len(layers) - 3} more" if len(layers) > 3 else ""
    found = "; ".join(shown) + more if layers else "it has no Linear or convolution"
    raise UsageError(f"{pattern} fits no layer of this model: {found}", "Choose another pattern or other targets.")
