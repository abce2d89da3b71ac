"""Which weights `obs` keeps where nothing is grouped: its rule against SparseGPT's, on inputs that neither has seen.

    OMP_NUM_THREADS=1 python benchmarks/obs_unstructured.py

Per layer of the bundled models, the squared error of the output, over that of the whole output. Writes
benchmarks/results/obs_unstructured.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean

import click
import torch
from torch import Tensor

from compressor import Unstructured, registry
from compressor.data.batches import as_batches
from compressor.environment import environment
from compressor.plugins.obs import OBS, prune_layer
from compressor.sparsity.pattern import largest
from compressor.training.calibration import matrix, observe, visits
from compressor.training.engine import chosen

MODELS, DENSITIES, TIMES, BATCH = ("uvit-digits", "ddpm-digits"), (0.5, 0.3), 16, 64


def sparsegpt(weight: Tensor, hessian: Tensor, density: float, block: int = 128) -> Tensor:
    """The weight (out, columns) as SparseGPT leaves it: of each 128 columns the same share stays. No column is dead."""
    weight, width = weight.double().clone(), weight.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    keep = torch.zeros(weight.shape, dtype=torch.bool)
    for at in range(width):
        if at % block == 0:
            some = slice(at, min(at + block, width))
            score = weight[:, some] ** 2 / factor.diagonal()[some] ** 2
            keep[:, some] = largest(score, round(density * score.numel()))
        lost = weight[:, at].masked_fill(keep[:, at], 0.0) / factor[at, at]
        weight[:, at:] -= lost[:, None] * factor[at, at:]
    return weight.masked_fill(~keep, 0.0)


def hessians(name: str, seed: int, skip: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer, weight and Hessian. By another `seed` and `skip`, no image meets the same noise at the same time again."""
    adapter = registry.adapter(name)
    model, found = adapter.load(None), dict[str, Tensor]()

    def take(layer: str, columns: Tensor, weight: float) -> None:
        product = (columns.T @ columns).double().mul_(2 * weight)
        found[layer] = found[layer] + product if layer in found else product

    layers = chosen(model, OBS(), adapter)
    seen = list(visits(adapter, as_batches(registry.images("digits"), BATCH, seed), TIMES + skip))[skip:]
    observe(model, adapter, iter(seen), {layer.name: layer.module for layer in layers}, take)
    return {layer.name: (layer.weight.detach(), found[layer.name]) for layer in layers}


def error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    lost = weight - pruned
    return float(((lost @ hessian) * lost).sum() / ((weight @ hessian) * weight).sum())


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "obs_unstructured.json"
)
def main(out: Path) -> None:
    results = []
    for name in MODELS:
        known, held_out = hessians(name, 0, 0), hessians(name, 5, 3)
        for density in DENSITIES:
            ratios = []
            for layer, (weight, hessian) in known.items():
                flat, unseen = matrix(weight).double(), held_out[layer][1]
                ours = matrix(prune_layer(weight, hessian.clone(), Unstructured(density), 0.01)[0]).double()
                theirs = sparsegpt(flat, hessian, density)
                ratios.append(error(flat, ours, unseen) / error(flat, theirs, unseen))
            results.append(
                {
                    "model": name,
                    "density": density,
                    "layers": len(ratios),
                    "ratio_geometric_mean": geometric_mean(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                }
            )
            click.echo(str(results[-1]))
    given = {"times": TIMES, "batch_size": BATCH, "seeds": [0, 5]}
    out.write_text(json.dumps({**environment(), "calibration": given, "results": results}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
