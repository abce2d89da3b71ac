"""Writes the README's table from benchmarks/results/methods_digits.json: `python benchmarks/table.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import click

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "methods_digits.json"
NAMES = {"dense": "dense (as bundled)", "one-shot": "one-shot 2:4, no training"}


def table(result: dict[str, Any]) -> str:
    """The Markdown table, with a sentence on how it was made."""
    train, judged = result["train"], result["evaluate"]
    lines = ["| method | fd-digits, mean | 95% interval | prediction error | seeds |", "|---|---:|---:|---:|---:|"]
    for method, entry in result["methods"].items():
        cells = [cell for cell in result["cells"].values() if cell["method"] == method]
        # One cell has no spread over seeds of training: its interval is that of drawing samples, and marked so.
        low, high = entry["ci95"] or cells[0]["quality"]["ci95"]
        mark = "" if entry["ci95"] else " *"
        error = mean(cell["prediction_error"] for cell in cells)
        name = NAMES.get(method, method)
        lines.append(f"| {name} | {entry['mean']:.2f} | {low:.2f} to {high:.2f}{mark} | {error:.2%} | {entry['n']} |")
    floor = result["metric"]["floor"]
    return "\n".join(
        [
            *lines,
            "",
            f"`uvit-digits`, {result['pattern']} on every block's linears, {train['steps']:,} steps of batch "
            f"{train['batch_size']} at lr {train['lr']:g} for every trained row; {judged['samples']:,} samples, "
            f"{judged['sampler_steps']} DPM-Solver++ steps, the same noise for all. Lower is better; real against real images "
            f"({floor['samples']} each) is {floor['value']:.2f}. Intervals are Student's t over seeds (* : bootstrap over "
            "samples). Prediction error is the mean square difference from the dense model's noise prediction, relative. "
            f"{result['hardware']}; torch {result['versions']['torch']}. From `benchmarks/methods_digits.py`, by "
            "`benchmarks/table.py`.",
        ]
    )


def replaced(readme: str, new: str) -> str:
    """The README with the text between its markers replaced."""
    pattern = r"(<!-- methods -->\n).*?(\n<!-- /methods -->)"
    return re.sub(pattern, lambda found: found[1] + new + found[2], readme, flags=re.DOTALL)


@click.command()
def main() -> None:
    page = ROOT / "README.md"
    new = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    page.write_text(replaced(page.read_text(encoding="utf-8"), new), encoding="utf-8")
    click.echo(new)


if __name__ == "__main__":
    main()
