"""Between pixels and latents: an autoencoder of diffusers, for models that work on what it gives."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.data.outsized import check_built, check_pipeline, stored_bytes
from compressor.data.sets import Images, ImageSet
from compressor.data.variants import outline_of, refuse_codes, variant_of
from compressor.environment import usual_torch
from compressor.errors import CompressorError, first_line
from compressor.files import read_json
from compressor.foreign.loaded import refuse_partly_loaded
from compressor.weights import state_sha256, untied_state

_BATCH = 8


class Autoencoder:
    """The AutoencoderKL in the folder `source`, a model's or a pipeline's; or `source` itself, an autoencoder of a pipeline in memory.

    Latents are shifted and scaled as the pipelines of diffusers do: by one number each, or by one of each channel.
    """

    def __init__(self, source: str | Path | nn.Module, device: torch.device | str = "cpu") -> None:
        model: Any = source if isinstance(source, nn.Module) else _read(Path(source))
        self.model = model.to(device).eval()
        own = model.config
        mean, deviation = own.get("latents_mean"), own.get("latents_std")
        self.scale = _number_or_channels(own.get("scaling_factor") or 1.0)
        self.shift = _number_or_channels(own.get("shift_factor") or 0.0)
        if mean is not None and deviation is not None:
            self.scale, self.shift = self.scale / _number_or_channels(deviation), _number_or_channels(mean)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The latents (n, c, h / 8, w / 8), the means of the posterior, of `images` (n, 3, h, w) in [-1, 1]; on the CPU."""
        parts = [_mean(self.model.encode(self._here(part))).cpu() for part in torch.split(images, _BATCH)]
        return self.scaled(torch.cat(parts))

    def scaled(self, plain: Tensor) -> Tensor:
        """Latents as models take them, of those that the autoencoder itself gives and takes."""
        return (plain - self.shift.to(plain.device)) * self.scale.to(plain.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The images (n, 3, h, w) in [-1, 1] of `latents`; on the CPU."""
        plain = latents / self.scale.to(latents.device) + self.shift.to(latents.device)
        return torch.cat(
            [self.model.decode(self._here(part)).sample.cpu() for part in torch.split(plain, _BATCH)]
        ).clamp(-1, 1)

    def picture_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """The (3, height, width) of pictures whose latents have `shape`."""
        channels, height, width = shape
        if channels != self.model.config.latent_channels:
            raise CompressorError(
                f"the autoencoder's latents have {self.model.config.latent_channels} channels, the model takes {channels}",
                "Give the autoencoder that the model was trained with.",
            )
        factor = 2 ** (len(self.model.config.block_out_channels) - 1)
        return int(self.model.config.in_channels), height * factor, width * factor

    def encoded(self, pictures: ImageSet) -> Images:
        """The latents of all `pictures`, in memory, with their labels."""
        parts = [self.encode(pictures.images(rows)) for rows in torch.split(torch.arange(len(pictures)), _BATCH)]
        made_of = hashlib.sha256(f"latents {pictures.sha256} {self.sha256}".encode()).hexdigest()
        return Images(pictures.name, torch.cat(parts), pictures.labels, pictures.skipped, made_of=made_of)

    @cached_property
    def sha256(self) -> str:
        """A hash of its weights and of how latents are scaled."""
        return state_sha256({**untied_state(self.model), "scale": self.scale, "shift": self.shift})

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.device, self.model.dtype)


@usual_torch()
def _read(path: Path) -> nn.Module:
    import diffusers

    made: Any = diffusers.AutoencoderKL  # it has no annotations
    path = path / "vae" if (path / "vae").is_dir() else path
    if not (path / "config.json").is_file():
        raise CompressorError(f"{path}: no config.json", "Give the folder of an AutoencoderKL of diffusers.")
    check_pipeline(path)
    check_built(made, read_json(path / "config.json"), path / "config.json", stored_bytes(path))
    refuse_codes(outline_of(path, variant := variant_of(path)), path)
    try:
        model: nn.Module
        model, report = made.from_pretrained(path, local_files_only=True, variant=variant, output_loading_info=True)
    except Exception as error:  # a dozen types, from missing files to damaged ones
        reason = first_line(error)
        raise CompressorError(f"{path}: cannot be loaded: {reason}", "The folder is incomplete or damaged.") from error
    refuse_partly_loaded(model, report, path)
    return model


def _number_or_channels(value: float | Sequence[float]) -> Tensor:
    """`value` as a tensor that goes with latents (n, c, h, w)."""
    found = torch.tensor(value)
    return found if found.dim() == 0 else found.view(1, -1, 1, 1)


def _mean(output: Any) -> Tensor:
    """The latents in what an autoencoder's `encode` gives: the mean of a posterior, or the only ones (AutoencoderDC)."""
    found: Tensor = output.latent_dist.mean if hasattr(output, "latent_dist") else output.latent
    return found
