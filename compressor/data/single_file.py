"""Weights as their authors give them, a model or a whole pipeline in one file: what is said of them, as diffusers reads folders."""

from __future__ import annotations

from pathlib import Path

from compressor.errors import CompressorError, UsageError
from compressor.weights import read_outline

_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".sft")
_DENOISERS = (
    *("model.diffusion_model.", "double_blocks.0.img_attn.qkv.", "joint_blocks.", "input_blocks.", "double_layers."),
    "net.blocks.",
)
"""How names of a denoiser begin that diffusers has by other ones, in all of its classes."""
_PIPELINES = {
    "conditioner.embedders.": "StableDiffusionXLPipeline",
    "text_encoders.clip_g.": "StableDiffusion3Pipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
    "first_stage_model.": "PIPELINE_CLASS",
    "text_encoders.": "PIPELINE_CLASS",
}
"""The pipeline whose encoders' names begin so."""


def refuse_single_file(path: Path, anyway: bool = False) -> None:
    """Raise UsageError where `path` is a file of weights in the form of its authors, or one of GGUF; with `anyway`, where it is any
    file, as a folder is wanted."""
    if path.suffix.lower() == ".gguf":
        raise UsageError(
            f"{path}: GGUF holds quantised weights, which cannot be pruned",
            "Take the model in float16 or bfloat16, prune it, and quantise what comes out of it.",
        )
    try:
        names = list(read_outline(path)) if path.suffix.lower() in _ENDINGS else []
    except CompressorError:  # what is wrong with it is said where it is read
        names = []
    for start, kind in _PIPELINES.items():
        if any(name.startswith(start) for name in names):
            raise UsageError(
                f"{path}: a whole pipeline in a single file, in the form of its authors",
                f"Make it a folder once, and give that: pipe = diffusers.{kind}.from_single_file({str(path)!r}); "
                "pipe.save_pretrained(FOLDER). Without a network, from_single_file needs config= the folder of such a pipeline.",
            )
    if any(name.startswith(_DENOISERS) for name in names) or (anyway and names):
        raise UsageError(
            f"{path}: a single file of weights, not a folder of diffusers",
            "Put it into the folder of its pipeline once, and give that: pipe = diffusers.DiffusionPipeline.from_pretrained(BASE); "
            f"pipe.transformer = type(pipe.transformer).from_single_file({str(path)!r}, config=BASE, subfolder='transformer'); "
            "pipe.save_pretrained(FOLDER). Where the pipeline has a unet, write unet for transformer.",
        )
    if anyway:
        raise UsageError(
            f"{path}: a file, not the folder of a pipeline", "Give the folder of a pipeline (with model_index.json)."
        )
