"""A user's own LoRA merged into the sparse model of a run: added under its masks, so that every zero stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compressor import files, saving
from compressor.adapter import Adapter
from compressor.errors import UsageError
from compressor.files import file_sha256
from compressor.runs.directory import refuse_used_directory
from compressor.runs.lora_file import read_lora, weights_file
from compressor.runs.run import commit_pipeline
from compressor.runs.saved import saved_model
from compressor.sparsity.notation import parse
from compressor.sparsity.pattern import Mask
from compressor.sparsity.surgery import surgery_of
from compressor.training.given import Given
from compressor.weights import float32_

FILE = "lora.json"
"""What of a LoRA was merged, in the folder of the result."""


@dataclass(frozen=True)
class MergedLayer:
    """A layer that a LoRA changes: the Frobenius norm of the change, and the share of that norm which the mask removed."""

    name: str
    norm: float
    removed: float


@dataclass(frozen=True, eq=False)
class Merged:
    """A sparse model with a LoRA in it. `removed` is the share of the LoRA's norm, over all layers, that the masks removed;
    `left_out` counts the file's tensors that are of other parts of a pipeline, by part."""

    model: nn.Module
    layers: Sequence[MergedLayer]
    left_out: Mapping[str, int]
    out: Path | None = None

    @property
    def removed(self) -> float:
        """The share of the LoRA's norm that the masks removed, over all layers."""
        whole = math.sqrt(sum(layer.norm**2 for layer in self.layers))
        gone = math.sqrt(sum((layer.norm * layer.removed) ** 2 for layer in self.layers))
        return gone / whole if whole else 0.0

    def as_json(self) -> dict[str, Any]:
        """All but the model."""
        layers = [{"name": layer.name, "norm": layer.norm, "removed": layer.removed} for layer in self.layers]
        return {"removed": self.removed, "layers": layers, "left_out": dict(self.left_out)}


def merge_lora(run: str | Path, lora: str | Path, out: str | Path | None = None, scale: float = 1.0) -> Merged:
    """The sparse model of `run` (its directory, or a saved model's folder) with the LoRA of the file `lora` merged into it.

    Each masked weight becomes W + `scale` · (B A) ∘ mask, in its own dtype, with the LoRA's own alpha in B A; other tensors take all
    of it. A saved model does not tell an entry that was kept and is zero from one that was pruned: both stay zero. With `out`, the
    result is written there as a run's is: `model/`, `pipeline/`, and `lora.json`. `lora` is a file with the model's own names of
    its layers, or in a layout that the pipelines of diffusers read; or a folder of peft.

    Raises UsageError, and merges nothing, where the file is no plain LoRA of this model, with the first names that do not fit.
    """
    run, lora, target = Path(run), Path(lora), None if out is None else Path(out)
    if not math.isfinite(scale):
        raise UsageError(f"scale {scale}", "Give a number, such as 0.8.")
    if target is not None:
        refuse_used_directory(target, overwrite=None)
    adapter, model = saved_model(run)
    patterns = saving.read_config(saving.model_folder(run)).patterns
    changes, left_out = read_lora(lora, model)
    given, merged = Given.of(model), float32_(copy.deepcopy(model))
    masks = {name: Mask(merged.get_parameter(name).detach() != 0, parse(text)) for name, text in patterns.items()}
    layers = []
    for name, found in changes.items():
        change = found.made(merged.get_parameter(name).shape)
        kept = change * masks[name].keep if name in masks else change
        norm = float(change.norm())
        layers.append(MergedLayer(name, norm, float((change - kept).norm()) / norm if norm else 0.0))
        merged.get_parameter(name).data.add_(kept, alpha=scale)
    result = Merged(given.returned(merged), layers, left_out, target)
    if target is not None:
        facts = {"source": str(run), "lora_sha256": file_sha256(weights_file(lora)), "scale": scale}
        with files.claimed(target):
            refuse_used_directory(target, overwrite=None)  # again: another process may have been faster
            files.commit(target, lambda folder: _write(result, adapter, masks, run, folder, facts), listed=False)
    return result


def _write(
    found: Merged, adapter: Adapter, masks: Mapping[str, Mask], run: Path, out: Path, facts: Mapping[str, Any]
) -> None:
    """Write all of it to `out`."""
    config = saving.read_config(saving.model_folder(run))
    pipeline = run / "pipeline"
    if pipeline.is_dir() and surgery_of(found.model) is None:
        adapter = adapter.opened(str(pipeline))  # what else the pipeline has comes along
    commit_pipeline(adapter, found.model, out)
    saving.save(out / "model", found.model, masks, config.model, architecture=config.architecture)
    files.write_json(out / FILE, {**facts, **found.as_json()})
