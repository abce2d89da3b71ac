"""CLIP score: how near a picture is to its prompt, in the features of a CLIP model from a folder of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.environment import quiet_libraries, resolve_device, usual_torch
from compressor.errors import CompressorError, UsageError, first_line
from compressor.foreign.loaded import refuse_partly_loaded
from compressor.quality.score import Score
from compressor.weights import weights_sha256

_AT_ONCE = 32
_HINT = "Give the folder of a CLIP model of transformers: --set evaluate.scores.clip-score=DIR. Nothing is downloaded."


class ClipScore(Score):
    """`clip-score`: 100 times the cosine between the features of a picture and of its prompt, at least 0.

    Source: Hessel et al. 2021, "CLIPScore", whose weight of 2.5 is 100 here, as is usual for generated pictures. Values of
    different CLIP models (published ones are mostly of ViT-B/32, -B/16 or -L/14) cannot be compared.
    """

    name = "clip-score"

    def __init__(self, model: nn.Module | None = None, processor: Any = None) -> None:
        self._model, self._processor = model, processor

    @usual_torch()
    def opened(self, weights: Path | None) -> ClipScore:
        if weights is None or not (weights / "config.json").is_file():
            raise UsageError(f"clip-score: {weights or 'no folder'} holds no model", _HINT)
        try:
            from transformers import CLIPModel, CLIPProcessor
        except ImportError as error:
            raise CompressorError(
                f"clip-score needs transformers: {first_line(error)}", 'pip install "diffusion-compressor[pipelines]"'
            ) from error
        try:
            with quiet_libraries():
                kind: Any = CLIPModel  # whose annotations know of no report
                made, report = kind.from_pretrained(
                    weights, local_files_only=True, use_safetensors=True, output_loading_info=True
                )
                processor = CLIPProcessor.from_pretrained(weights, local_files_only=True)
        except Exception as error:  # whatever transformers raises for a folder that is no CLIP model
            raise UsageError(f"clip-score: {weights}: {first_line(error)}", _HINT) from error
        refuse_partly_loaded(made, report, weights)
        return ClipScore(made.to(resolve_device("auto")).eval(), processor)

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        model: Any = self._loaded()
        found = []
        for first in range(0, len(images), _AT_ONCE):
            pixels = ((images[first : first + _AT_ONCE].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            given = self._processor(
                text=list(prompts[first : first + _AT_ONCE]), images=list(pixels), return_tensors="pt", padding=True,
                truncation=True,
            ).to(model.device)  # fmt: skip
            answer = model(**given)
            found.append(F.cosine_similarity(answer.image_embeds, answer.text_embeds, dim=-1).float().cpu())
        return 100 * torch.cat(found).clamp_min(0)

    @property
    def sha256(self) -> str:
        return weights_sha256(self._loaded())

    def _loaded(self) -> nn.Module:
        if self._model is None:
            raise UsageError("clip-score: no model", _HINT)
        return self._model
