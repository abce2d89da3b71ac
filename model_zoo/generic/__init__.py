"""Any denoising model of diffusers: read from a folder or the hub, noised, called, sampled, and written back."""

from compressor.model_zoo.generic.adapter import DiffusersAdapter
from compressor.model_zoo.generic.layers import BLOCK_LAYERS


def diffusers() -> DiffusersAdapter:
    """Any denoising model of diffusers (UNet2DConditionModel, SD3, Flux, PixArt, …), from --weights FOLDER; data of your own."""
    return DiffusersAdapter(
        about={
            "size": "that of the weights",
            "source": "any model or pipeline that diffusers loads",
            "data": "an .npz of the model's own arguments",
            "weights": "Give --weights: a diffusers folder, or a name on the hub (owner/name).",
            "licence": "that of the weights",
        },
        targets=(BLOCK_LAYERS,),
        of_pipelines=True,
        defaults={"evaluate": {"samples": 0}},  # conditions to sample with are the pipeline's to make
    )


__all__ = ["DiffusersAdapter", "diffusers"]
