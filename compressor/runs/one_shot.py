"""The model as its method leaves it before fine-tuning: prepared once, and kept in the run's directory until the report is written.

It is kept on disk, not in memory: training needs that for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from compressor import files, saving
from compressor.errors import CompressorError
from compressor.report.content import Layer
from compressor.runs.inputs import Inputs
from compressor.sparsity.surgery import Surgery
from compressor.training.engine import LEFT_DENSE, Result

FOLDER = "one-shot"


@dataclass(frozen=True, eq=False)
class OneShot:
    """A pruned model without fine-tuning, the patterns of its masked weights by name, and a line on each of its layers."""

    model: nn.Module
    patterns: Mapping[str, str]
    layers: Sequence[Layer]

    @classmethod
    def of(cls, result: Result) -> OneShot:
        """What `result`, a model without fine-tuning, comes to."""
        patterns = {name: str(mask.pattern) for name, mask in result.masks.items()}
        weights = dict(result.model.named_parameters())
        layers = [
            Layer(
                name=layer.name,
                shape=tuple(layer.weight.shape),
                pattern=patterns.get(layer.name),
                density=_density(weights.get(layer.name, layer.weight)),
                flips_per_weight=None,
                reason=layer.reason,
            )
            for layer in result.layers
        ]
        return cls(result.model, patterns, layers)


def keep(result: Result, folder: Path, inputs: Inputs) -> None:
    """Leave `result`, what `inputs` give without fine-tuning, in `folder`, whole or not at all."""
    made = OneShot.of(result)
    state = {
        "made": inputs.identity(),
        "model": result.model.state_dict(),
        "patterns": made.patterns,
        "layers": [layer.as_json() for layer in made.layers],
        "surgery": None if result.surgery is None else result.surgery.to_json(),
    }
    files.commit(folder, lambda inside: saving.save_state(inside, state))


def one_shot(inputs: Inputs, folder: Path) -> OneShot:
    """What was kept in `folder`; prepared anew where nothing was, or where it is damaged or of another run."""
    try:
        files.verify(folder, needs=("state.json", "state.safetensors"))
        state = saving.load_state(folder, mapped=True)
    except CompressorError:
        state = {}
    if state.get("made") != inputs.identity():
        return OneShot.of(inputs.one_shot())
    model = copy.deepcopy(inputs.model)
    if state["surgery"] is not None:
        Surgery.from_json(state["surgery"], str(folder)).apply(model)
    model.load_state_dict(state["model"])
    return OneShot(model.eval(), state["patterns"], [Layer.model_validate(layer) for layer in state["layers"]])


def layer_rows(
    layers: Sequence[Layer], patterns: Mapping[str, str], final: nn.Module, flipped: Mapping[str, float]
) -> tuple[Layer, ...]:
    """The report's lines on `layers`, those of the model without fine-tuning, as they are in `final`: pattern, density and flips."""
    weights = dict(final.named_parameters())
    return tuple(
        Layer(
            name=layer.name,
            shape=layer.shape,
            pattern=patterns.get(layer.name),
            density=_density(weights[layer.name]) if layer.name in weights else layer.density,
            flips_per_weight=flipped.get(layer.name),
            reason=None if layer.name in patterns else layer.reason or LEFT_DENSE,
        )
        for layer in layers
    )


def _density(weight: torch.Tensor) -> float:
    return int(torch.count_nonzero(weight)) / max(1, weight.numel())
