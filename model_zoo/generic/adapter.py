"""Any denoising model of diffusers: noising by its scheduler, its own arguments, example inputs from its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter, Conditions, Sampling, as_taken, plain
from compressor.data.batches import parted
from compressor.data.single_file import refuse_single_file
from compressor.data.variants import copy_others, variant_of
from compressor.environment import usual_torch
from compressor.errors import CompressorError, ReshapedError, UsageError
from compressor.model_zoo.generic import pretrained, shapes
from compressor.model_zoo.generic.arguments import called, example, marked, noisy_name
from compressor.model_zoo.generic.conditions import conditions
from compressor.model_zoo.generic.conventions import CONVENTIONS, HOW_TO_RECORD, Convention, convention
from compressor.model_zoo.generic.layout import Layout
from compressor.model_zoo.generic.noise import Noise, flow
from compressor.model_zoo.generic.pretrained import Pretrained
from compressor.model_zoo.generic.reshaped import as_configured
from compressor.model_zoo.sampling import beginning, check, describe, draw, dropped, guided, merged
from compressor.saving.plain import apart
from compressor.sparsity.surgery import surgery_of
from compressor.weights import as_stored_, load_strictly, read_outline, read_weights


@dataclass(frozen=True)
class DiffusersAdapter(Adapter):
    """Connects a model of diffusers with `config`, trained with `scheduler`, to the engine.

    A batch is images, a pair (images, labels), or a mapping of the model's own arguments. In a mapping, the first argument
    (`sample` or `hidden_states`) holds clean images or latents, which the scheduler's process noises; or there is a
    `target`, and then the mapping is passed on as it is.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    name: str = "diffusers"
    weights: Path | None = None
    source: Pretrained | None = None
    targets: Sequence[str] = ()
    ignore: Sequence[str] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    how: Sampling = Sampling("ddim", "quadratic")
    layout: Layout | None = None
    file: Path | None = None  # the file of weights that `config` is of
    writes_pipeline: bool = True
    of_pipelines: bool = False
    writes_reshaped: bool = True
    family: str = ""
    signed = True
    small_config: Mapping[str, Any] = field(default_factory=dict)  # what `small` changes; empty: there is none
    new_config: Mapping[str, Any] = field(default_factory=dict)  # of a model to be trained from scratch, less its size
    example: Mapping[str, Any] | None = None  # what inputs look like (`shapes.of`), where a batch has told it

    # --- The model. ---

    def opened(self, source: str | None, architecture: Mapping[str, Any] = MappingProxyType({})) -> DiffusersAdapter:
        """As in Adapter; `architecture` may also hold `scheduler`, settings of the scheduler that the model was trained with."""
        opened, source = self, pretrained.whole(source)
        if source is not None and Path(source).is_file():
            if self.layout is not None:  # the names and shapes in the file tell what it is of
                config = self.layout.configuration(read_outline(source), self.config, architecture)
                opened = replace(self, config=config, file=Path(source))
            else:
                refuse_single_file(Path(source))
                if not self.config and (beside := pretrained.find_beside(Path(source))) is not None:
                    opened = self._of(beside)
                elif not self.config and "_class_name" not in architecture:
                    raise UsageError(
                        f"{source}: a file of weights alone, without the config.json that says of which model they are",
                        f"Put it beside the file, or say it: --set architecture._class_name=…. {self._hint}",
                    )
        elif source is not None:
            opened = self._of(pretrained.find(source))
        given = dict(architecture)
        if (scheduler := given.pop("scheduler", None)) is not None:
            if not isinstance(scheduler, Mapping):
                raise UsageError(
                    f"architecture.scheduler {scheduler!r}", "Set its keys, such as architecture.scheduler.beta_end."
                )
            opened = replace(opened, scheduler={**opened.scheduler, **scheduler})
            Noise.of(opened.scheduler)  # raises now where it means nothing
        if given:
            opened = replace(opened, config={**opened.config, **given})
            own = () if self.layout is None else self.layout.own
            pretrained.check_settings(opened.config, [name for name in given if name not in own])
        return opened

    def _of(self, found: Pretrained) -> DiffusersAdapter:
        return replace(self, config=found.config, scheduler=found.scheduler or self.scheduler, source=found)

    @property
    def architecture(self) -> Mapping[str, Any]:
        found: dict[str, Any] = {"config": dict(self.config), "scheduler": dict(self.scheduler)}
        return found if self.example is None else {**found, "example": dict(self.example)}

    def rebuilt(self, architecture: Mapping[str, Any]) -> DiffusersAdapter:
        config, scheduler = architecture.get("config", self.config), architecture.get("scheduler", self.scheduler)
        example = architecture.get("example")
        if (
            not isinstance(config, Mapping)
            or not isinstance(scheduler, Mapping)
            or not (example is None or shapes.is_sound(example))
        ):
            raise CompressorError(f"{self.name}: its saved architecture is damaged", "Use another copy.")
        return replace(self, config=config, scheduler=scheduler, example=example)

    def fitted(self, shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
        return shapes.fitted(self.new_config, shape, classes)

    def small(self) -> DiffusersAdapter | None:
        return replace(self, config={**self.config, **self.small_config}, weights=None) if self.small_config else None

    def build(self) -> nn.Module:
        if not self.config:
            raise CompressorError(f"{self.name} names no model by itself", self._hint)
        return self._prepared(pretrained.build(self._plain_config), trained=False)

    @usual_torch()
    def load(self, source: str | None) -> nn.Module:
        source = pretrained.whole(source)
        if source is not None and not Path(source).is_file():
            found = self.source or pretrained.find(source)
            settings = self._plain_config if self.source is not None else found.config
            if self.layout is not None and self.config and self.source is None:
                self._refuse_unless(self.layout.is_plain(self.config), source)
            return self._prepared(pretrained.load(found, settings), trained=True)
        path = Path(source) if source is not None else self.weights
        if path is None or not self.config:
            raise CompressorError(f"{self.name} comes without weights", self._hint)
        state, model = read_weights(path), self.build()
        if self.layout is not None:
            seen = self.file == path
            self._refuse_unless(seen or self.layout.configuration(state, self.config, {}) == dict(self.config), path)
            if self.layout.recognises(state):
                state = self.layout.translated(state)
        state = pretrained.modern_names(model, state)
        load_strictly(as_stored_(model, state), state, path)
        return model.eval()

    def write_pipeline(self, module: nn.Module, folder: Path) -> None:
        import diffusers

        reshaped = surgery_of(module) is not None
        if self.layout is not None and not self.layout.is_plain(self.config):
            if reshaped:
                raise ReshapedError("the authors' files are of the original shape", "Load it with compressor.load.")
            # diffusers would build another network from its folder, so that the file is the authors', for their own code
            torch.save(self.layout.original(module), folder / f"{self.name}.pt")
            (folder / "README.txt").write_text(self.layout.why_not_plain, encoding="utf-8")
            return
        library: Any = diffusers  # it has few annotations
        own_model: Any = as_configured(module, self._plain_config, self) if reshaped else self._copied(module)
        source = self.source
        if source is not None and source.pipeline is not None:
            own = source.folder
            # whatever of the pipeline is not this model's comes along as it is
            copy_others(source.pipeline, folder, own)
            own_model.save_pretrained(folder / own.name, variant=variant_of(own))  # its other parts may have no other
        elif self.config.get("_class_name") == "UNet2DModel" and self.scheduler:
            scheduler = library.DDPMScheduler.from_config(dict(self.scheduler))
            library.DDPMPipeline(own_model, scheduler).save_pretrained(folder)
        else:
            own_model.save_pretrained(folder)

    def _copied(self, module: nn.Module) -> nn.Module:
        """A model to be written: the given one may share tensors between names, which diffusers does not save."""
        with torch.device("meta"):
            plain = pretrained.build(self._plain_config)
        plain.load_state_dict(apart(module.state_dict()), assign=True)
        return plain

    def _prepared(self, model: nn.Module, trained: bool) -> nn.Module:
        from diffusers.models.embeddings import LabelEmbedding

        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0  # labels are dropped in `noised`, for teacher and student alike
        if self.layout is not None:
            self.layout.prepare(model, self.config, trained)
        return model.eval()

    def _refuse_unless(self, same: bool, source: str | Path) -> None:
        if not same:
            raise CompressorError(
                f"{source} is of another configuration than that of {self.name}",
                "Let the adapter look at it first: adapter = adapter.opened(path); model = adapter.load(path).",
            )

    @property
    def _plain_config(self) -> dict[str, Any]:
        """The settings that diffusers' class has."""
        own = () if self.layout is None else self.layout.own
        return {name: value for name, value in self.config.items() if name not in own}

    @property
    def _hint(self) -> str:
        return self.about.get("weights", "Give a diffusers folder, or a name on the hub (owner/name).")

    # --- Fine-tuning. ---

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        return self._noised(batch, None, rng)

    def noised_evenly(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        return self._noised(batch, "even", rng)

    def noised_at(self, batch: Any, time: float, rng: torch.Generator) -> tuple[Any, Tensor]:
        return self._noised(batch, time, rng)

    def _noised(self, batch: Any, at: float | Literal["even"] | None, rng: torch.Generator) -> tuple[Any, Tensor]:
        if isinstance(batch, Mapping) and "target" in batch:
            given = {name: value for name, value in batch.items() if name != "target"}
            return marked(self._convention, given), plain(batch["target"])
        told, name = convention(self.config), noisy_name(self.config)
        if isinstance(batch, Mapping):
            given = dict(batch)
            if name not in given:
                raise CompressorError(
                    f"a batch has {sorted(given)}, and neither {name!r} nor 'target'",
                    f"Give clean images as {name!r}, or the model's inputs and what it shall answer as 'target'.",
                )
        else:
            images, labels = parted(batch)
            given = {name: images}
            if self.num_classes and labels is not None:
                given["class_labels"] = labels
        timestep, noised, target = self._noise.noised(given[name], rng, at)
        if "class_labels" in given:
            given["class_labels"] = dropped(given["class_labels"], self.null_label, 0.1, rng)
        given |= {name: noised, told.time: told.told(timestep, self.config)}
        return marked(told, given), -target if told.negated else target

    @property
    def _convention(self) -> Convention | None:
        return CONVENTIONS.get(str(self.config.get("_class_name")))

    @cached_property
    def _noise(self) -> Noise:
        """The process that the model was trained with. Raises UsageError where it is not known."""
        told, name = convention(self.config), self.config.get("_class_name")
        if not self.scheduler and told.process != "flow":
            raise UsageError(
                f"a {name} without a scheduler: with what noise it was trained is not known",
                "Give the folder of its pipeline, or say it: --set architecture.scheduler._class_name=DDIMScheduler "
                f"--set architecture.scheduler.beta_schedule=scaled_linear and so on. Or: {HOW_TO_RECORD}",
            )
        noise = Noise.of(self.scheduler) if self.scheduler else flow()
        if told.process == "flow" and not noise.is_flow:
            raise UsageError(
                f"{name} is a model of rectified flow, and {self.scheduler.get('_class_name')} is of another process",
                "Give the scheduler that it was trained with.",
            )
        if self.source is not None and self.source.shares_times:
            raise UsageError(
                f"{self.source.pipeline}: of its two models each was trained for some of the times only", HOW_TO_RECORD
            )
        if told.scale != 1 and noise.timesteps != 1000:
            raise UsageError(
                f"num_train_timesteps {noise.timesteps}: the pipeline of {name} counts 1000", HOW_TO_RECORD
            )
        return noise

    def conditions(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Conditions:
        return conditions(self.config, args, kwargs)

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        """The answer's first half where the model also learned a variance: that half is neither trained nor sampled with."""
        out: Any = module(**called(self._convention, as_taken(inputs, module)), return_dict=False)[0]
        noisy = inputs[noisy_name(self.config)]
        answer: Tensor = out if isinstance(out, Tensor) else torch.stack(list(out))
        if not isinstance(noisy, Tensor):
            return answer
        if noisy.dim() == 4 and answer.dim() == 5:  # the frame that `called` put in
            answer = answer.squeeze(2)
        has_variance = answer.dim() == 4 and answer.shape[1] == 2 * noisy.shape[1]
        return answer[:, : noisy.shape[1]] if has_variance else answer

    def example_inputs(self, batch_size: int) -> Any:
        return example(self.config, batch_size) if self.example is None else shapes.made(self.example, batch_size)

    def exampled(self, inputs: Any) -> DiffusersAdapter:
        """As in Adapter; what the inputs look like is saved with the model, so that it is known without the data."""
        return replace(self, example=shapes.of(inputs))

    @property
    def null_label(self) -> int | None:
        """The empty class of classifier-free guidance: DiT has one after the last."""
        return self.num_classes if self._is_dit else None

    @property
    def _is_dit(self) -> bool:
        return bool(self.config.get("_class_name") == "DiTTransformer2DModel")

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        if self._is_dit:
            return int(self.config.get("num_embeds_ada_norm") or 0)
        return int(self.config.get("num_class_embeds") or 0)

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        size = self.config.get("sample_size")
        if size is None:
            return None
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return int(self.config["in_channels"]), int(height), int(width)

    # --- Sampling. ---

    @property
    def sampler(self) -> str:
        return describe(self.how)

    def sampling(self, settings: Sampling) -> DiffusersAdapter:
        if reason := self._not_drawn:
            if settings != Sampling():
                raise UsageError(reason, "Leave out sampler, spacing and guidance.")
            return self
        how = merged(self.how, settings, self.null_label is not None, self.num_classes)
        check(how, self._noise.process())
        return replace(self, how=how)

    @property
    def unsampled(self) -> str:
        name = self.config.get("_class_name")
        try:
            conditions = set(example(self.config, 1)) - {noisy_name(self.config), "timestep", "class_labels"}
        except CompressorError:  # nothing is known of what it is called with
            conditions = {"unknown"}
        if conditions or self.image_shape is None:
            return f"{name} needs conditions that only its pipeline makes"
        return self._not_drawn

    @property
    def _not_drawn(self) -> str:
        """Why no sampler here goes with the noise that the model was trained with; empty where one does."""
        if not self.config:  # nothing is opened yet
            return ""
        try:
            check(self.how, self._noise.process())
        except CompressorError as error:
            return error.message
        return ""

    def drawn_labels(self, n: int, rng: torch.Generator) -> Tensor | None:
        return beginning(self.image_shape or (), self.num_classes, self.how, n, rng)[1]

    @torch.no_grad()
    def sample(self, module: nn.Module, n: int, rng: torch.Generator, steps: int) -> Tensor:
        shape = self.image_shape
        if self.unsampled or shape is None:
            raise CompressorError(
                self.unsampled, "Sample with the pipeline that the run writes, or set evaluate.samples to 0."
            )
        device = next(module.parameters()).device
        start, labels = beginning(shape, self.num_classes, self.how, n, rng)
        start, labels = start.to(device), None if labels is None else labels.to(device)
        process = self._noise.process()

        def ask(images: Tensor, time: Tensor, classes: Tensor | None) -> Tensor:
            given = {noisy_name(self.config): images, "timestep": time}
            return self.predict(module, given if classes is None else {**given, "class_labels": classes})

        def predict(images: Tensor, index: int) -> Tensor:
            time = torch.full((n,), index, device=device)
            return guided(ask, images, time, labels, self.null_label, self.how.guidance or 1.0)

        images = draw(predict, start, process, self.how, steps, rng)
        return images.clamp(-1, 1) if process.clip else images
