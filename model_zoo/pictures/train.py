"""Training of what is bundled with the pictures: `python -m compressor.model_zoo.pictures.train classifier --out DIR`.

Writes the weights and a provenance file beside them. The bundled files came from the default settings.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from compressor.model_zoo.generic.classified import fit
from compressor.model_zoo.generic.provenance import save_with_facts
from compressor.model_zoo.pictures.classifier import PicturesClassifier
from compressor.model_zoo.pictures.dataset import images

_SHIFT = 2


@click.group()
def main() -> None:
    """Train what is bundled again."""


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("trained"), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--epochs", default=60, show_default=True)
def classifier(out: Path, seed: int, epochs: int) -> None:
    """The network of `fd-pictures`: AdamW and cosine, shifts by up to two pixels, other brightness; judged on the held-out tenth."""
    torch.manual_seed(seed)
    began = time.perf_counter()
    data = images()
    model = PicturesClassifier()

    def loss_of(rows: Tensor, rng: torch.Generator) -> Tensor:
        pixels, labels = data.take(rows)
        return _loss(model, _varied(pixels, rng), labels)

    for epoch, loss in enumerate(fit(model, torch.arange(len(data)), loss_of, seed, epochs), 1):
        if epoch % 5 == 0:
            click.echo(f"{epoch}/{epochs}  loss {loss:.4f}  {time.perf_counter() - began:.0f} s", err=True)
    pixels, labels = data.unseen.take(torch.arange(len(data.unseen)))
    with torch.no_grad():
        model.eval()
        accuracy = float((model(pixels).argmax(1) == labels).float().mean())
        small = float(F.mse_loss(model.small(model.features(pixels)), _small(pixels)) / _small(pixels).var(0).mean())
    facts: dict[str, Any] = {
        "seed": seed,
        "epochs": epochs,
        "held_out": len(labels),
        "held_out_accuracy": round(accuracy, 4),
    }
    facts |= {"held_out_error_of_small": round(small, 4), "data_sha256": data.sha256}
    recipe = "python -m compressor.model_zoo.pictures.train classifier"
    click.echo(save_with_facts(model, out / "classifier.safetensors", recipe, began, facts))


def _varied(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """`pixels` (n, 3, 32, 32) shifted, on white, and a little brighter or darker, each by itself."""
    n, _, height, width = pixels.shape
    padded = F.pad(pixels, (_SHIFT,) * 4, value=1.0)
    places = torch.randint(0, 2 * _SHIFT + 1, (n, 2), generator=rng).tolist()
    moved = torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, places, strict=True)])
    return 1 - (1 - moved) * (0.9 + 0.2 * torch.rand(n, 1, 1, 1, generator=rng))


def _small(pixels: Tensor) -> Tensor:
    """`pixels` in 8x8, (n, 192)."""
    return F.avg_pool2d(pixels, 4).flatten(1)


def _loss(model: PicturesClassifier, pixels: Tensor, labels: Tensor) -> Tensor:
    features = model.features(pixels)
    told = F.cross_entropy(model.output(features), labels, label_smoothing=0.1)
    return told + 4 * F.mse_loss(model.small(features), _small(pixels))


if __name__ == "__main__":
    main()
