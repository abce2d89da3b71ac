"""The adapter of recorded calls: fine-tuning and calibration on what a pipeline really asked its model, and nothing else."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compressor.adapter import Adapter, dtype_taken
from compressor.data.calls import Call, Picture, Recording, answer, joined
from compressor.data.variants import copy_others, variant_of
from compressor.errors import CompressorError
from compressor.pipelines.opened import Opened
from compressor.sparsity.surgery import surgery_of


@dataclass(frozen=True, eq=False)
class CallsAdapter(Adapter):
    """Connects the part of `opened` whose calls are in `records` to the engine. A batch is a list of `Call`.

    The model is asked call by call, each as the pipeline asked it: no two are joined, as nothing is known of their arguments. Its
    inputs are (args, kwargs, the shape of the answer). What the dense model answered is in the records, so that no teacher is needed.
    `pictures` are those of the records with their very arguments, where some are no JSON.
    `targets`, `ignore`: rules for layers. `registered`: the adapter by which a saved model is built again, and written
    where its structure became smaller; None for parts that no registered model stands for.
    """

    opened_pipeline: Opened
    records: Recording
    targets: Sequence[str] = ()
    ignore: Sequence[str] = ()
    registered: Adapter | None = None
    name: str = "pipeline"
    pictures: Sequence[Picture] = ()
    answered: bool = True
    writes_pipeline: bool = True
    fixed_batch: bool = True

    @property
    def held_out(self) -> list[Picture]:
        """The pictures that are judged, as the pipeline draws them."""
        return [picture for picture in self.pictures or self.records.index.pictures if picture.unseen]

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        """The calls as they were; nothing is drawn."""
        calls: list[Call] = batch
        inputs = [(call.args, dict(call.kwargs), tuple(call.output.shape)) for call in calls]
        return inputs, joined([call.output.float() for call in calls])

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        """The answers to all calls, as `joined` has them."""
        stored = self.records.index.torch_dtype
        own = dtype_taken(module) or stored

        def here(tensor: Tensor) -> Tensor:  # trained in float32, a model takes half-precision records in float32
            return tensor.to(own) if tensor.dtype == stored != own else tensor

        given = tree_map_only(Tensor, here, inputs)
        return joined([answer(module(*args, **kwargs)) for args, kwargs, _ in given])

    def pieces(self, inputs: Any, target: Tensor, count: int) -> Iterator[tuple[Any, Tensor, float]]:
        """Call by call, whatever the `count`: that takes the least memory, and gives the same numbers."""
        shapes = [shape for _, _, shape in inputs]
        parts = torch.split(target.flatten(), [math.prod(shape) for shape in shapes])
        for one, part, shape in zip(inputs, parts, shapes, strict=True):
            yield [one], part.view(shape), 1 / len(inputs)

    def example_inputs(self, batch_size: int) -> Any:
        """The first recorded call, as it is: how many samples a call has is the pipeline's to say."""
        inputs, _ = self.noised(self.records.take(torch.arange(1)), torch.Generator())
        return inputs

    @property
    def sampler(self) -> str:
        """The class of the pipeline's scheduler."""
        return type(getattr(self.opened_pipeline.pipe, "scheduler", None)).__name__

    @property
    def architecture(self) -> Mapping[str, Any]:
        return {} if self.registered is None else self.registered.architecture

    @property
    def writes_reshaped(self) -> bool:  # type: ignore[override]
        return self.registered is not None and self.registered.writes_reshaped

    def write_pipeline(self, module: nn.Module, folder: Path) -> None:
        """Write the pipeline as it came, with `module` in the place of the part, into `folder`."""
        opened = self.opened_pipeline
        name = opened.component
        reshaped = surgery_of(module) is not None
        if reshaped and self.registered is not None:
            self.registered.write_pipeline(module, folder)
            return
        with opened.having(module) as pipe:
            component: Any = getattr(pipe, name)
            if not callable(getattr(component, "save_pretrained", None)):
                raise CompressorError(
                    f"{opened.name}: its {name} is a {type(component).__name__}, which cannot be saved by diffusers",
                    "Use compressor.save(..., packed=False).",
                )
            if opened.source is None:
                pipe.save_pretrained(folder)
                return
            own = opened.source / name
            copy_others(opened.source, folder, own)
            # as text: MultiControlNetModel appends a number to it
            component.save_pretrained(str(folder / name), variant=variant_of(own))
            if (own / "config.json").is_file():  # the very settings, without the path that they were read from
                shutil.copyfile(own / "config.json", folder / name / "config.json")
