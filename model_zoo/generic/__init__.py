"""Any denoising model of diffusers: read from a folder or the hub, noised, called, sampled, and written back."""

from compressor.model_zoo.generic.adapter import DiffusersAdapter


def diffusers() -> DiffusersAdapter:
    """Any denoising model of diffusers (UNet2DConditionModel, SD3, Flux, PixArt, …), from --weights FOLDER; data of your own."""
    return DiffusersAdapter(
        about={
            "source": "any model or pipeline that diffusers loads",
            "data": "an .npz of the model's own arguments",
            "weights": "Give --weights: a diffusers folder, or a name on the hub (owner/name).",
            "licence": "that of the weights",
        }
    )


__all__ = ["DiffusersAdapter", "diffusers"]
