"""The U-ViT adapter: noising, prediction, sampling and loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compressor.adapter import Adapter, Sampling, as_taken
from compressor.data.batches import parted
from compressor.environment import usual_torch
from compressor.errors import CompressorError
from compressor.model_zoo.sampling import Process, beginning, check, describe, draw, dropped, guided, merged
from compressor.model_zoo.uvit.architecture import checked, found_in
from compressor.model_zoo.uvit.network import UViT
from compressor.model_zoo.uvit.noise import TRAIN_TIMESTEPS, ContinuousTimes, Times
from compressor.weights import as_stored_, load_strictly, read_outline, read_weights


@dataclass(frozen=True)
class UViTAdapter(Adapter):
    """U-ViT with the constructor arguments in `config`; `weights` is the bundled file, None where there is none.

    `changed` are those of the arguments that are not as the name says, but as a file or the user does. `times` is what it was
    trained with. Of the labels, training leaves out the share `unlabelled` where there is an empty class (`null_class`).
    """

    config: Mapping[str, Any]
    name: str = "uvit"
    weights: Path | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    # As in the released SparseDM code: the blocks' linears are sparse, skip_linear stays dense.
    targets: tuple[str, ...] = ("*.attn.qkv", "*.attn.proj", "*.mlp.fc1", "*.mlp.fc2")
    ignore: tuple[str, ...] = ()

    null_class: bool = False  # whether the last class is the empty one of classifier-free guidance
    unlabelled: float = 0.15
    how: Sampling = Sampling("dpm-solver++")
    times: Times = ContinuousTimes()
    changed: Mapping[str, Any] = field(default_factory=dict)
    sized: bool = True  # whether the name says what size of images it is for
    family: str = "U-ViT"
    signed = True
    small_config: Mapping[str, Any] = field(default_factory=dict)  # what `small` changes; empty: there is none

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        return max(0, int(self.config.get("num_classes", -1)) - self.null_class)

    def opened(self, source: str | None, architecture: Mapping[str, Any] = MappingProxyType({})) -> UViTAdapter:
        own = found_in(read_outline(source), self.config) if source is not None and Path(source).is_file() else {}
        return self._with({**own, **architecture})

    @property
    def architecture(self) -> Mapping[str, Any]:
        return dict(self.changed)

    def rebuilt(self, architecture: Mapping[str, Any]) -> UViTAdapter:
        return self._with(architecture)

    def _with(self, settings: Mapping[str, Any]) -> UViTAdapter:
        """This adapter with other constructor arguments. Raises UsageError for what no U-ViT has."""
        if not settings:
            return self
        config = checked(self.config, settings)
        return replace(self, config=config, changed={**self.changed, **settings})

    def fitted(self, shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
        """As in Adapter; where the name says no size, patches give about 16 tokens a side, as in the published sizes."""
        if self.sized:
            return {}
        channels, height, _ = shape
        patch = next(size for size in range(max(1, height // 16), 0, -1) if height % size == 0)
        labels = classes + self.null_class if classes else -1
        return {"img_size": height, "patch_size": patch, "in_chans": channels, "num_classes": labels}

    def small(self) -> UViTAdapter | None:
        return replace(self, config={**self.config, **self.small_config}, weights=None) if self.small_config else None

    @usual_torch()
    def build(self) -> UViT:
        return UViT(**self.config)

    @usual_torch()
    def load(self, source: str | None) -> UViT:
        path = Path(source) if source is not None else self.weights
        if path is None:
            raise CompressorError(
                f"{self.name} comes without weights", f"Give --weights FILE. {self.about.get('weights', '')}".strip()
            )
        model, state = self.build(), read_weights(path)
        load_strictly(as_stored_(model, state), state, path)
        return model.eval()

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        return self._noised(batch, self.times.drawn(_count(batch), rng), rng)

    def noised_evenly(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        return self._noised(batch, self.times.drawn(_count(batch), rng, evenly=True), rng)

    def noised_at(self, batch: Any, time: float, rng: torch.Generator) -> tuple[Any, Tensor]:
        return self._noised(
            batch, self.times.at_shares(torch.full((_count(batch),), time, dtype=torch.float64)).float(), rng
        )

    def _noised(self, batch: Any, times: Tensor, rng: torch.Generator) -> tuple[Any, Tensor]:
        images, labels = parted(batch)
        noise = torch.randn(images.shape, generator=rng)
        if not self.num_classes:
            labels = None
        elif self.null_label is not None:
            labels = dropped(labels, self.null_label, self.unlabelled, rng)
        return (self.times.diffuse(images, noise, times), self.times.told(times), labels), noise

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        out: Tensor = module(*as_taken(inputs, module))
        return out

    @property
    def sampler(self) -> str:
        return describe(self.how)

    def sampling(self, settings: Sampling) -> UViTAdapter:
        how = merged(self.how, settings, self.null_label is not None, self.num_classes)
        check(how, self._process)
        return replace(self, how=how)

    @torch.no_grad()
    def sample(self, module: nn.Module, n: int, rng: torch.Generator, steps: int) -> Tensor:
        device = next(module.parameters()).device
        noise, labels = beginning(self.image_shape, self.num_classes, self.how, n, rng)
        noise, labels = noise.to(device), None if labels is None else labels.to(device)
        grid = self.times.told(self.times.grid()).float().to(device)

        def predict(images: Tensor, index: int) -> Tensor:
            guidance = self.how.guidance or 1.0
            return guided(module, images, grid[index].expand(n), labels, self.null_label, guidance)

        images = draw(predict, noise, self._process, self.how, steps, rng)
        return images if self.latent else images.clamp(-1, 1)

    def drawn_labels(self, n: int, rng: torch.Generator) -> Tensor | None:
        return beginning(self.image_shape, self.num_classes, self.how, n, rng)[1]

    @property
    def null_label(self) -> int | None:
        """The empty class of classifier-free guidance."""
        return self.num_classes if self.null_class and self.num_classes else None

    @property
    def latent(self) -> bool:
        """Whether the images are latents, which have no bounds."""
        return int(self.config["in_chans"]) == 4

    @property
    def _process(self) -> Process:
        return self.times.process(clip=not self.latent)

    def example_inputs(self, batch_size: int) -> Any:
        labels = torch.zeros(batch_size, dtype=torch.int64) if self.num_classes else None
        return torch.zeros(batch_size, *self.image_shape), torch.full((batch_size,), 0.5 * TRAIN_TIMESTEPS), labels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        size = int(self.config["img_size"])
        return int(self.config["in_chans"]), size, size


def _count(batch: Any) -> int:
    """The number of images in a batch, which may have labels."""
    return len(parted(batch)[0])
