"""Models of diffusers whose structure was made smaller, as the configuration of diffusers that gives the very same network.

Blocks that went are fewer layers. Whether a configuration is the right one is tried: it must give every tensor its shape, and
the network it builds must answer the same. Channels and heads that went have no such one: in diffusers, streams, heads and
the waves of the time follow from the same numbers, and `structured` leaves the first and the last as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compressor.adapter import Adapter
from compressor.errors import CompressorError, ReshapedError
from compressor.model_zoo.generic import pretrained
from compressor.model_zoo.generic.arguments import defaults
from compressor.seeds import generator
from compressor.sparsity.surgery import Surgery, surgery_of
from compressor.weights import as_stored_, in_float32

_HINT = "Load it with compressor.load, which removes the same of the model's original structure."


def as_configured(model: nn.Module, config: Mapping[str, Any], adapter: Adapter) -> nn.Module:
    """A model of diffusers' own making, of another configuration than `config`, with the weights of `model`, of which some
    structure was removed.

    Raises ReshapedError where there is no such configuration.
    """
    surgery = surgery_of(model)
    assert surgery is not None
    name = config.get("_class_name")
    if surgery.kept or surgery.numbers:
        raise ReshapedError(f"diffusers has no setting for the inner widths that this {name} has now", _HINT)
    state = _renumbered(model, surgery)
    full = {**defaults(pretrained.model_class(config)), **config}
    for changed in _candidates(model, surgery, full):
        try:
            with torch.device("meta"):
                tried = pretrained.build({**config, **changed})
        except CompressorError:
            continue
        shapes = {name: value.shape for name, value in tried.state_dict().items()}
        if shapes == {name: value.shape for name, value in state.items()}:
            made = as_stored_(pretrained.build({**config, **changed}), state).eval()
            made.load_state_dict(state)
            if _same(made, model, adapter):
                return made
    raise ReshapedError(f"without these blocks it is no {name} that a configuration of diffusers gives", _HINT)


def _renumbered(model: nn.Module, surgery: Surgery) -> dict[str, Tensor]:
    """The state of `model`, on the CPU, by the names that its blocks have once the others are gone."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    for parent, gone in _lists(surgery).items():
        renamed = {}
        for name, value in state.items():
            index, _, rest = name.removeprefix(f"{parent}.").partition(".")
            inside = name.startswith(f"{parent}.") and index.isdigit()
            renamed[f"{parent}.{_moved(int(index), gone)}.{rest}" if inside else name] = value
        state = renamed
    return state


def _lists(surgery: Surgery) -> dict[str, set[int]]:
    """The lists out of which modules went, by name, with their places."""
    found: dict[str, set[int]] = {}
    for name in surgery.removed:
        parent, _, index = name.rpartition(".")
        if index.isdigit():
            found.setdefault(parent, set()).add(int(index))
    return found


def _moved(index: int, gone: set[int]) -> int:
    return index - sum(one < index for one in gone)


def _candidates(model: nn.Module, surgery: Surgery, full: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings that may be those of `model`: fewer layers, whichever setting counts them."""
    lists = _lists(surgery)
    lengths = {name: len(list(model.get_submodule(name).children())) for name in lists}
    keys = [[key for key, value in full.items() if type(value) is int and value == n] for n in lengths.values()]
    for chosen in product(*keys):
        changed: dict[str, Any] = {}
        for key, (name, gone) in zip(chosen, lists.items(), strict=True):
            changed[key] = lengths[name] - len(gone)
            changed |= {k: v for k, v in _places(full, lengths[name], gone).items() if len(lists) == 1}
        if len(set(chosen)) == len(chosen):
            yield changed


def _places(full: Mapping[str, Any], length: int, gone: set[int]) -> dict[str, Any]:
    """Settings that name some of the layers by their places, as these are afterwards."""
    found = {}
    for key, value in full.items():
        listed = key.endswith("_layers") and isinstance(value, (list, tuple)) and value
        if listed and all(type(one) is int and 0 <= one < length for one in value):
            found[key] = tuple(_moved(one, gone) for one in value if one not in gone)
    return found


@torch.no_grad()
def _same(made: nn.Module, model: nn.Module, adapter: Adapter) -> bool:
    """Whether both answer the same to random inputs."""
    rng = generator("pipeline", "reshaped")
    try:
        example = adapter.example_inputs(1)
    except CompressorError:  # what it is called with is not known: it cannot be tried
        return False
    inputs = tree_map_only(
        Tensor,
        lambda t: t + torch.randn(t.shape, generator=rng) if t.is_floating_point() and t.dim() > 1 else t,
        example,
    )
    first = next(model.parameters())
    expected = adapter.predict(in_float32(model).eval(), tree_map_only(Tensor, lambda t: t.to(first.device), inputs))
    return torch.allclose(adapter.predict(in_float32(made), inputs), expected.cpu(), rtol=1e-3, atol=1e-4)
