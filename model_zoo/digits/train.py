"""Training recipes of the bundled models: `python -m compressor.model_zoo.digits.train [classifier|uvit|ddpm] --out DIR`.

Writes the weights and a provenance file beside them. The bundled files came from the default settings.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.discovery import load
from compressor.model_zoo.ddpm.sizes import digits as ddpm_digits
from compressor.model_zoo.digits.classifier import DigitsClassifier
from compressor.model_zoo.digits.dataset import images
from compressor.model_zoo.generic.classified import fit
from compressor.model_zoo.generic.provenance import save_tensors, save_with_facts
from compressor.model_zoo.uvit.sizes import digits as uvit_digits
from compressor.seeds import generator
from compressor.training.engine import FineTuning, steps
from compressor.training.settings import Training


@click.group()
def main() -> None:
    """Train the bundled models again."""


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("trained"), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--epochs", default=60, show_default=True)
def classifier(out: Path, seed: int, epochs: int) -> None:
    """The digits classifier: four fifths to train on, one fifth held out for its accuracy; shifts by one pixel."""
    torch.manual_seed(seed)
    began = time.perf_counter()
    data = images()
    order = torch.randperm(len(data), generator=generator(seed, "split"))
    held_out, train = order[: len(data) // 5], order[len(data) // 5 :]
    model = DigitsClassifier()

    def loss_of(rows: Tensor, rng: torch.Generator) -> Tensor:
        pixels, labels = data.take(rows)
        dy, dx = torch.randint(-1, 2, (2,), generator=rng).tolist()
        shifted = F.pad(pixels, (1, 1, 1, 1), value=-1.0)[..., 1 + dy : 9 + dy, 1 + dx : 9 + dx]
        return F.cross_entropy(model(shifted), labels, label_smoothing=0.05)

    for _ in fit(model, train, loss_of, seed, epochs):
        pass
    pixels, labels = data.take(held_out)
    with torch.no_grad():
        accuracy = float((model.eval()(pixels).argmax(1) == labels).float().mean())
    facts = {"epochs": epochs, "held_out": len(held_out), "held_out_accuracy": round(accuracy, 4)}
    _save(model, out / "classifier.safetensors", seed, data.sha256, began, facts)


def _dense_options(command: Any) -> Any:
    for option in (
        click.option("--lr", default=1e-3, show_default=True),
        click.option("--seed", default=0, show_default=True),
        click.option("--out", type=click.Path(path_type=Path), default=Path("trained"), show_default=True),
    ):
        command = option(command)
    return command


@main.command()
@click.option("--steps", "count", default=16_000, show_default=True)
@_dense_options
def uvit(out: Path, seed: int, count: int, lr: float) -> None:
    """The dense U-ViT: AdamW, warm-up and cosine, EMA of the weights, no labels."""
    _dense(uvit_digits(), out, seed, count, lr)


@main.command()
@click.option("--steps", "count", default=2_500, show_default=True)
@_dense_options
def ddpm(out: Path, seed: int, count: int, lr: float) -> None:
    """The dense DDPM, by the same settings."""
    _dense(ddpm_digits(), out, seed, count, lr)


def _dense(adapter: Adapter, out: Path, seed: int, count: int, lr: float) -> None:
    began = time.perf_counter()
    torch.manual_seed(seed)
    training = Training(
        steps=count, lr=lr, warmup=500, ema=0.999, clip=1.0, betas=(0.9, 0.99), weight_decay=0.01, seed=seed
    )
    data = images()
    untouched = load("pruners", "dense-continued")()
    run = FineTuning(adapter.build(), untouched, adapter=adapter, data=data, training=training)
    losses = []
    for record in steps(run):
        losses.append(record.loss)
        if record.step % 200 == 0:
            seconds = time.perf_counter() - began
            click.echo(f"{record.step}/{count}  loss {sum(losses[-200:]) / 200:.4f}  {seconds:.0f} s", err=True)
        if record.step % 4000 == 0:
            save_tensors(run.average, out / f"{adapter.name}-step{record.step}.safetensors")
    model = run.finish().model
    facts = {"training": training.model_dump(mode="json"), "final_loss": round(sum(losses[-500:]) / 500, 5)}
    _save(model, out / f"{adapter.name}.safetensors", seed, data.sha256, began, facts)


def _save(model: nn.Module, path: Path, seed: int, data: str, began: float, facts: dict[str, Any]) -> None:
    facts = {"seed": seed, **facts, "data_sha256": data}
    click.echo(save_with_facts(model, path, "python -m compressor.model_zoo.digits.train", began, facts))


if __name__ == "__main__":
    main()
