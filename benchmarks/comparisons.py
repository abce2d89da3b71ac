"""The comparisons that docs/results.md speaks of, and the slim form of their reports that is committed.

    python benchmarks/comparisons.py [--only ablation-uvit] [--workers 2]

runs `compressor compare` for each of them (hours on two cores) in runs/comparisons/ and writes
benchmarks/results/comparison_NAME.json. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parent.parent
_RECIPES = ("sparsedm-best", "sparsedm-V4", "best-V4", "sparsedm-V4-clustered", "sparsedm-V2", "structured-68")
_PICTURES = "--model uvit-pictures --steps 200 --set train.batch_size=128 --set evaluate.samples=512 --set evaluate.latency_rounds=0"
RUNS = {
    "best-uvit": ("--preset sparsedm-best --model uvit-digits --steps 300", 5),
    "best-ddpm": ("--preset sparsedm-best --model ddpm-digits --steps 300 --sampler-steps 25", 10),
    "muon-uvit": ("--config benchmarks/recipes/best-muon.yaml --model uvit-digits --steps 300", 5),
    "muon-ddpm": ("--config benchmarks/recipes/best-muon.yaml --model ddpm-digits --steps 300", 5),
    "ablation-uvit": ("--preset sparsedm-ablation --model uvit-digits --steps 200 --sampler-steps 25", 3),
    "ablation-ddpm": ("--preset sparsedm-ablation --model ddpm-digits --steps 200 --sampler-steps 25", 3),
    "methods-uvit": (
        "--methods dense-continued,magnitude,structured,depth,wanda,obs,sr-ste,sparsedm --model uvit-digits --steps 600 "
        + " ".join(f"--config benchmarks/recipes/{name}.yaml" for name in _RECIPES),
        3,
    ),
    "methods-pictures": (f"--methods dense-continued,magnitude,structured,depth,wanda,sr-ste {_PICTURES}", 2),
    "methods-pictures-more": (
        f"--methods dense-continued,magnitude,structured,depth,wanda,sr-ste --seed 2 {_PICTURES}",
        1,
    ),
    "obs-pictures": (f"--methods obs {_PICTURES}", 1),
    "best-pictures": (
        f"--methods sparsedm --config benchmarks/recipes/sparsedm-best.yaml --config benchmarks/recipes/best-muon.yaml {_PICTURES}",
        3,
    ),
    "best-pictures-more": (
        f"--methods sparsedm --config benchmarks/recipes/sparsedm-best.yaml --seed 3 {_PICTURES}",
        2,
    ),
    "obs-pictures-more": (f"--methods obs --seed 1 {_PICTURES}", 2),
    "taught-pictures": (
        f"--config benchmarks/recipes/structured-taught.yaml --config benchmarks/recipes/depth-taught.yaml "
        f"--set settings.macs=0.552 {_PICTURES}",  # what 2:4 leaves, which no entry here tells
        1,
    ),
    "cpu-uvit": (
        "--config benchmarks/recipes/structured-68.yaml --config benchmarks/recipes/best-V4.yaml --model uvit-digits --steps 600 "
        "--set evaluate.latency_rounds=0",
        5,
    ),
    "latency-uvit": (
        "--methods structured,sparsedm --pattern 4:2:4 --match latency --lower --model uvit-digits --steps 600 "
        "--set evaluate.latency_rounds=31",
        1,
    ),
}
"""Name: options of `compressor compare`, and seeds. Those on pictures make one table (`merged.py`)."""


def slim(report: dict[str, Any]) -> dict[str, Any]:
    """What tables and pages are made of: without layers, and of each cell the metric, drift and hash."""
    kept = {key: value for key, value in report.items() if key not in ("entries", "dense", "limitations")}
    dense = report["dense"]
    kept["dense"] = {**dense, "quality": dense["quality"][:1]}
    kept["entries"] = []
    for entry in report["entries"]:
        own = {key: value for key, value in entry.items() if key not in ("layers", "sensitivity", "one_shot", "cells")}
        bare = entry["one_shot"]
        own["one_shot"] = None if bare is None or not bare["quality"] else bare["quality"][0]["value"]
        own["cells"] = [
            {
                "seed": cell["seed"],
                "weights_sha256": cell["weights_sha256"],
                "value": cell["quality"][0]["value"],
                "drift": {drift["metric"]: drift["value"] for drift in cell["drift"]},
                "by_steps": {steps: found["value"] for steps, found in cell["by_steps"].items()},
                "seconds": cell["train"]["seconds"],
            }
            for cell in entry["cells"]
        ]
        kept["entries"].append(own)
    return kept


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(RUNS)))
@click.option("--workers", default=1, show_default=True)
@click.option("--from", "folder", type=click.Path(path_type=Path), default=ROOT / "runs" / "comparisons")
def main(only: tuple[str, ...], workers: int, folder: Path) -> None:
    for name, (options, seeds) in RUNS.items():
        if only and name not in only:
            continue
        out = folder.absolute() / name
        if not (out / "report.json").is_file():
            command = [sys.executable, "-m", "compressor.cli", "compare", *options.split(), "--seeds", str(seeds)]
            # as many as real digits
            judged = [] if "evaluate.samples" in options else ["--set", "evaluate.samples=1797"]
            subprocess.run([*command, *judged, "--workers", str(workers), "--out", str(out)], cwd=ROOT, check=True)
        found = slim(json.loads((out / "report.json").read_text(encoding="utf-8")))
        path = ROOT / "benchmarks" / "results" / f"comparison_{name}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        click.echo(f"{path.name}: {len(found['entries'])} entries, seeds {found['seeds']}")


if __name__ == "__main__":
    main()
