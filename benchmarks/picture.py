"""One picture of what pruning does to samples: a line per model, a column per noise, the same noise in all lines.

    compressor run --steps 600 --set train.lr=1e-3 --set evaluate.samples=1797 --out runs/picture/published
    compressor run --steps 600 --set train.lr=1e-3 --set evaluate.samples=1797 --set settings.preset=best --out runs/picture/best
    python benchmarks/picture.py runs/picture/published runs/picture/best --names published best --out samples.png
    python benchmarks/picture.py --comparison runs/comparisons/best-pictures --entries sparsedm sparsedm-best \\
        --names published best --out docs/pictures.png

The first lines are the dense model and its one-shot pruning, as the first run has them; then comes each run's own model. Of a
comparison come its first seed's pictures, as it left them, and only the one-shot model is drawn. Nothing is chosen: the columns are
the first ones of the sampler's order, with the seed of the runs' evaluation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import compressor
from compressor import recipe as recipes
from compressor.quality.evaluate import sample
from compressor.report import read_report
from compressor.report.content import DENSE, ONE_SHOT
from compressor.runs.inputs import Inputs, load_inputs, resolve
from compressor.runs.pictures import picture
from compressor.weights import in_float32

GAP, HEAD, SIZE = 3, 190, 56


def drawn(found: Inputs, model: nn.Module, count: int) -> Tensor:
    """The first `count` samples, (n, channels, h, w) in [-1, 1]."""
    settings = found.recipe.evaluate.model_copy(update={"samples": count, "batch_size": count})
    (images,) = sample(found.adapter, in_float32(model).eval(), settings)
    return images


def enlarged(image: Tensor) -> Image.Image:
    factor, made = max(1, round(SIZE / max(image.shape[1:]))), picture(image).convert("RGB")
    return made.resize((made.width * factor, made.height * factor), Image.Resampling.NEAREST)


def sheet(lines: dict[str, tuple[str, Tensor]]) -> Image.Image:
    """A line for each entry: its name, what is to be said below it, its pictures."""
    rows = {name: (said, [enlarged(image) for image in images]) for name, (said, images) in lines.items()}
    size = max(one.width for _, row in rows.values() for one in row) + GAP
    width = HEAD + size * max(len(row) for _, row in rows.values())
    made = Image.new("RGB", (width + GAP, size * len(rows) + GAP), "white")
    writer = ImageDraw.Draw(made)
    for number, (name, (said, row)) in enumerate(rows.items()):
        top = GAP + number * size
        writer.text((8, top + size // 2 - 20), name, fill="black", font=ImageFont.load_default(17))
        writer.text((8, top + size // 2 + 3), said, fill="#555555", font=ImageFont.load_default(12))
        for column, one in enumerate(row):
            made.paste(one, (HEAD + column * size, top))
    return made


def grid(path: Path, size: int, count: int) -> Tensor:
    """The first `count` pictures (count, channels, size, size) in [-1, 1] of a grid with a pixel between them."""
    whole = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    across = whole.shape[2] // (size + 1)
    places = [(1 + at // across * (size + 1), 1 + at % across * (size + 1)) for at in range(count)]
    return torch.stack([whole[:, top : top + size, left : left + size] for top, left in places])


def compared(folder: Path, entries: list[str], names: list[str], count: int) -> dict[str, tuple[str, Tensor]]:
    """The lines of a comparison: dense, one-shot of the first of its `entries`, and these."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    cells = [folder / "cells" / f"{entry}-seed-{report['seeds'][0]}" for entry in entries]
    recipe = json.loads((cells[0] / "job.json").read_text(encoding="utf-8"))["recipe"]
    recipe["train"]["device"] = "auto"  # wherever it was trained
    first = load_inputs(resolve(recipe, str(folder)))
    rows = [json.loads((cell / "row.json").read_text(encoding="utf-8")) for cell in cells]
    size = first.adapter.image_shape[-1] if first.adapter.image_shape else 0
    lines = {
        "dense": (report["dense"]["quality"][0], grid(folder / "dense" / "samples.png", size, count)),
        "one-shot 2:4": (rows[0]["one_shot"]["quality"][0], drawn(first, first.one_shot().model, count)),
    }
    for name, cell, row in zip(names or entries, cells, rows, strict=True):
        lines[name] = (row["row"]["quality"][0], grid(cell / "samples.png", size, count))
    return {
        name: (f"{report['metric']['name']} {found['value']:.3g}", images) for name, (found, images) in lines.items()
    }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("runs", type=Path, nargs="*")
    options.add_argument("--comparison", type=Path, help="a folder of `compressor compare` in place of runs")
    options.add_argument("--entries", nargs="+", default=[])
    options.add_argument("--names", nargs="+", help="what the models of the runs are called; default: their methods")
    options.add_argument("--count", type=int, default=14)
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    if given.comparison:
        save(sheet(compared(given.comparison, given.entries, given.names, given.count)), given.out)
        return
    reports = [read_report(run / "report.json") for run in given.runs]
    inputs = [load_inputs(resolve(recipes.read(run / "recipe.yaml"), str(run))) for run in given.runs]
    first = inputs[0]
    figures = {row.name: row.quality[0] for row in reports[0].rows}
    models = {"dense": (figures[DENSE], first.model), "one-shot 2:4": (figures[ONE_SHOT], first.one_shot().model)}
    for place, (run, report) in enumerate(zip(given.runs, reports, strict=True)):
        name = given.names[place] if given.names else report.method
        models[name] = (report.final.quality[0], compressor.load(run))
    made = sheet(
        {
            name: (f"{found.metric} {found.value:.3g}", drawn(first, model, given.count))
            for name, (found, model) in models.items()
        }
    )
    save(made, given.out)


def save(made: Image.Image, out: Path) -> None:
    made.save(out, "PNG", optimize=True)
    print(f"{out}: {made.width}x{made.height}, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
