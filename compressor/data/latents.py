"""Between pixels and latents: an autoencoder of diffusers, for models that work on what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.data.sets import Images, ImageSet
from compressor.errors import CompressorError, first_line
from compressor.weights import variant_of

_BATCH = 8


class Autoencoder:
    """The AutoencoderKL in `folder`, a model's or a pipeline's. Latents are scaled as the pipelines of diffusers do."""

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        import diffusers

        made: Any = diffusers.AutoencoderKL  # it has no annotations
        path = Path(folder)
        path = path / "vae" if (path / "vae").is_dir() else path
        if not (path / "config.json").is_file():
            raise CompressorError(f"{path}: no config.json", "Give the folder of an AutoencoderKL of diffusers.")
        try:
            model = made.from_pretrained(path, local_files_only=True, variant=variant_of(path))
        except Exception as error:  # a dozen types, from missing files to damaged ones
            reason = first_line(error)
            raise CompressorError(
                f"{path}: cannot be loaded: {reason}", "The folder is incomplete or damaged."
            ) from error
        self.model = model.to(device).eval()
        self.scale = float(model.config.scaling_factor or 1.0)
        self.shift = float(model.config.shift_factor or 0.0)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The latents (n, c, h / 8, w / 8), the means of the posterior, of `images` (n, 3, h, w) in [-1, 1]; on the CPU."""
        parts = [self.model.encode(self._here(part)).latent_dist.mean.cpu() for part in torch.split(images, _BATCH)]
        return (torch.cat(parts) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The images (n, 3, h, w) in [-1, 1] of `latents`; on the CPU."""
        plain = latents / self.scale + self.shift
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
        return Images(pictures.name, torch.cat(parts), pictures.labels, pictures.skipped)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.device, self.model.dtype)
