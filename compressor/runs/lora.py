"""A user's own LoRA merged into the sparse model of a run: added under its masks, so that every zero stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compressor import files, saving
from compressor.adapter import Adapter
from compressor.errors import CompressorError, UsageError, first_line
from compressor.files import file_sha256
from compressor.runs.directory import locked, refuse_used_directory
from compressor.runs.run import commit_pipeline
from compressor.runs.saved import saved_model
from compressor.sparsity.notation import parse
from compressor.sparsity.pattern import Mask
from compressor.sparsity.surgery import surgery_of
from compressor.training.given import Given
from compressor.weights import float32_, read_weights

FILE = "lora.json"
"""What of a LoRA was merged, in the folder of the result."""
_PREFIXES = ("transformer.", "unet.", "prior.", "diffusion_model.", "base_model.model.")
_LAYOUTS = {
    "UNet2DConditionModel": "StableDiffusionLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
}
"""The classes of diffusers that bring files of other programs into its own layout, by the class of the model."""


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

    Each masked weight becomes W + `scale` · (B A) ∘ mask, in its own dtype, with the LoRA's own alpha in B A; other weights
    take all of it. A saved model does not tell an entry that was kept and is zero from one that was pruned: both stay zero. With
    `out`, the result is written there as a run's is: `model/`, `pipeline/`, and `lora.json`. The file is read by diffusers, in
    every layout that its pipelines read.

    Raises UsageError where the file is no LoRA of this model, with the first names that do not fit.
    """
    run, lora, target = Path(run), Path(lora), None if out is None else Path(out)
    if not math.isfinite(scale):
        raise UsageError(f"scale {scale}", "Give a number, such as 0.8.")
    if target is not None:
        refuse_used_directory(target, overwrite=None)
    adapter, model = saved_model(run)
    patterns = saving.read_config(saving.model_folder(run)).patterns
    changes, left_out = _changes(lora, model)
    given, merged = Given.of(model), float32_(copy.deepcopy(model))
    masks = {name: Mask(merged.get_parameter(name).detach() != 0, parse(text)) for name, text in patterns.items()}
    layers = []
    for name, change in changes.items():
        kept = change * masks[name].keep if name in masks else change
        norm = float(change.norm())
        layers.append(MergedLayer(name, norm, float((change - kept).norm()) / norm if norm else 0.0))
        merged.get_parameter(name).data.add_(kept, alpha=scale)
    found = Merged(given.returned(merged), layers, left_out, target)
    if target is not None:
        with locked(target):
            refuse_used_directory(target, overwrite=None)  # again: another process may have been faster
            facts = {"source": str(run), "lora_sha256": file_sha256(lora), "scale": scale}
            _write(found, adapter, masks, run, target, facts)
    return found


def _write(
    found: Merged, adapter: Adapter, masks: Mapping[str, Mask], run: Path, out: Path, facts: Mapping[str, Any]
) -> None:
    config = saving.read_config(saving.model_folder(run))
    files.write_json(out / FILE, {**facts, **found.as_json()})
    pipeline = run / "pipeline"
    if pipeline.is_dir() and surgery_of(found.model) is None:
        adapter = adapter.opened(str(pipeline))  # what else the pipeline has comes along
    commit_pipeline(adapter, found.model, out)
    saving.save(out / "model", found.model, masks, config.model, architecture=config.architecture)


# --- The file. ---


def _changes(file: Path, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, int]]:
    """B A of each layer by its weight's name, alpha included, in the weight's shape; and how many tensors are of other parts."""
    state, alphas, metadata = _read(file, model)
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in state)), "")
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    others = [name.partition(".")[0] for name in state if not name.startswith(prefix)]
    own = _plain(own)
    _refuse_misfit(file, own, model)
    carrier: Any = float32_(copy.deepcopy(model))
    named = {f"transformer.{name}": value.float() for name, value in own.items()}
    given = {f"transformer.{name.removeprefix(prefix)}": float(value) for name, value in alphas.items()}
    config = {f"transformer.{name.removeprefix(prefix)}": value for name, value in metadata.items()}
    try:
        carrier.load_lora_adapter(
            named, prefix="transformer", network_alphas=given or None, metadata=None if given else config or None
        )
    except Exception as error:  # diffusers and peft raise whatever they meet
        raise UsageError(
            f"{file}: diffusers cannot read it: {first_line(error)}", "Is it a LoRA of this model?"
        ) from error
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {name: part for name, part in carrier.named_modules() if isinstance(part, LoraLayer)}
    changes = {
        f"{name}.weight": layer.get_delta_weight(layer.active_adapters[0]).detach().float()
        for name, layer in layers.items()
    }
    if len(changes) * 2 != len(own):
        raise UsageError(
            f"{file}: of its {len(own) // 2} layers {len(changes)} were read", "Save it again with diffusers."
        )
    return changes, {part: others.count(part) for part in sorted(set(others))}


def _read(file: Path, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The tensors of a LoRA file in diffusers' layout, its alphas, and what its metadata say of its configuration."""
    try:
        import diffusers
        import peft  # noqa: F401
        from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata
    except ImportError as error:
        raise CompressorError(
            f"merging a LoRA needs peft, and diffusers 0.34 or later: {error}",
            'pip install -U "diffusion-compressor[lora]" diffusers',
        ) from error
    loaders: Any = diffusers.loaders  # it has few annotations
    if not isinstance(model, loaders.PeftAdapterMixin):
        raise UsageError(
            f"diffusers reads no LoRA for {type(model).__name__}",
            "It does for UNet2DConditionModel, SD3, Flux and others.",
        )
    state: dict[str, Any] = read_weights(file)
    metadata = _load_sft_state_dict_metadata(str(file)) if file.suffix == ".safetensors" else None
    alphas: dict[str, Any] = {}
    layout = getattr(loaders, _LAYOUTS.get(type(model).__name__, ""), None)
    if layout is not None:
        extra: dict[str, Any] = {"return_alphas": True} if "Flux" in layout.__name__ else {}
        extra |= {"unet_config": model.config} if layout is loaders.StableDiffusionLoraLoaderMixin else {}
        try:
            found = layout.lora_state_dict(dict(state), **extra)
        except Exception as error:  # whatever its converters meet
            raise UsageError(
                f"{file}: diffusers cannot read it: {first_line(error)}", "Is it a LoRA of this model?"
            ) from error
        state, alphas = found if isinstance(found, tuple) else (found, {})
    alphas = dict(alphas or {}) | {name: state[name] for name in state if name.endswith(".alpha")}
    return {name: value for name, value in state.items() if name not in alphas}, alphas, dict(metadata or {})


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` by peft's names of the matrices, where it has those of diffusers before peft."""
    from diffusers.utils import state_dict_utils

    convert: Any = state_dict_utils.convert_unet_state_dict_to_peft
    return dict(state) if any("lora_A" in name for name in state) else dict(convert(dict(state)))


def _refuse_misfit(file: Path, state: Mapping[str, Tensor], model: nn.Module) -> None:
    """Raise UsageError, with the first names, unless `state` has two matrices for each of some layers of `model`."""
    modules = dict(model.named_modules())
    wrong = []
    for name, value in state.items():
        layer, dot, kind = name.rpartition(".lora_")
        weight = getattr(modules.get(layer), "weight", None)
        if not dot or kind not in ("A.weight", "B.weight"):
            wrong.append(f"{name} is no matrix of a plain LoRA")
        elif weight is None:
            wrong.append(f"{name}: the model has no layer {layer!r}")
        elif f"{layer}.lora_{'B' if kind[0] == 'A' else 'A'}.weight" not in state:
            wrong.append(f"{name} is there without its other half")
        elif value.shape[kind[0] == "A"] != weight.shape[kind[0] == "A"]:
            wrong.append(f"{name} is {tuple(value.shape)}, the weight {tuple(weight.shape)}")
    if wrong or not state:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UsageError(
            f"{file} does not fit {type(model).__name__}: {'; '.join(wrong[:3]) or 'it holds nothing for it'}{more}",
            "Give a plain LoRA (no DoRA, LoHa, LoKr) that was trained for this very model.",
        )
