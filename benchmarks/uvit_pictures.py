"""The weights of a run of uvit-pictures in half precision, with the facts of its training beside them.

    compressor train --config benchmarks/recipes/uvit-pictures.yaml --out runs/uvit-pictures
    python benchmarks/uvit_pictures.py runs/uvit-pictures --out trained

A run that starts from such weights (`compressor run --method dense-continued --weights FILE`) has their facts within its own.
The run may be interrupted at any step: of one that is not finished, the average of the weights at the last checkpoint is taken.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import click

import compressor
from compressor import recipe as recipes
from compressor import registry
from compressor.files import file_sha256, verify
from compressor.model_zoo.generic.provenance import save_with_facts
from compressor.model_zoo.pictures import images
from compressor.report import read_report
from compressor.saving import load_state


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), default=Path("trained"), show_default=True)
def main(run: Path, out: Path) -> None:
    recipe = recipes.read(run / "recipe.yaml")
    model, steps, seconds = averaged(run, recipe) if checkpoints(run) else finished(run)
    adapter = registry.adapter(recipe["model"]).opened(None, recipe["architecture"])
    weights = recipe["weights"] or getattr(adapter, "weights", None)
    facts = {
        "architecture": dict(getattr(adapter, "config", {})),
        **({"started_from": started_from(Path(weights))} if weights else {}),
        "training": {**recipe["train"], "steps": steps},
        "data_sha256": images().sha256,
    }
    command = "compressor train --config benchmarks/recipes/uvit-pictures.yaml; python benchmarks/uvit_pictures.py"
    began = time.perf_counter() - seconds
    click.echo(save_with_facts(model.half(), out / "uvit-pictures.safetensors", command, began, facts))


def started_from(weights: Path) -> dict[str, Any]:
    """The hash of the file that a run started from, with the facts that lie beside it."""
    beside = weights.with_suffix(".json")
    facts: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    return {**facts, "file_sha256": file_sha256(weights)}


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run that is not finished, in order."""
    found = [path for path in run.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def averaged(run: Path, recipe: dict[str, Any]) -> tuple[Any, int, float]:
    """The model with the average of the weights at the last checkpoint, its step, and the seconds until then."""
    folder = checkpoints(run)[-1]
    verify(folder)
    found = load_state(folder)
    model = registry.adapter(recipe["model"]).opened(None, recipe["architecture"]).build()
    model.load_state_dict({**found["run"]["model"], **found["run"]["average"]})
    return model, int(found["run"]["step"]), float(found["seconds"])


def finished(run: Path) -> tuple[Any, int, float]:
    """The model of a finished run, its steps, and the seconds that they took."""
    train = read_report(run / "report.json").final.train
    return compressor.load(run), train.steps, train.seconds


if __name__ == "__main__":
    main()
