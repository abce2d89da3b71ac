"""Writes the tables of README.md and docs/ from the JSON in benchmarks/results: `python benchmarks/table.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

import click

from compressor.comparison.statistics import summary

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"dense": "dense (as bundled)", "one-shot": "one-shot 2:4, no training"}


def methods(result: dict[str, Any]) -> str:
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


_MODELS = {"uvit-s2": "U-ViT-S/2, 32x32", "ddpm-cifar10": "DDPM UNet, CIFAR-10"}


def lowering(result: dict[str, Any]) -> str:
    """The speed of lowered models against dense ones."""
    lines = [
        "| model | pattern | precision | batch | eager dense, ms | best dense, ms | lowered, ms | over eager | over best dense |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    cells = list(result["cells"].values())
    for cell in cells:
        times, speed = cell["median_ms"], cell["speedup"]
        eager = times.get("eager float32", times["eager"])
        best = f"{times[cell['best_dense']]:.1f} ({_DENSE[cell['best_dense']]})"
        precision = cell["dtype"] + (", AVX2 only" if cell["level"] == "avx2" else "")
        lines.append(
            f"| {_MODELS[cell['model']]} | {cell['pattern']} | {precision} | {cell['batch']} | {eager:.1f} | {best} "
            f"| {times['lowered']:.1f} | {speed['over eager float32']:.2f}x | {speed['over best dense']:.2f}x |"
        )
    first = cells[0]
    return "\n".join(
        [
            *lines,
            "",
            "Whole forward passes, random weights; in turns, medians of "
            f"{_rounds(cells)} rounds, seed {first['seed']}; {first['hardware']}; "
            f"torch {first['versions']['torch']}. Eager dense is float32 in "
            "every line; the best dense form is the fastest of eager, prepacked and compiled in the line's own precision. "
            "U-ViT: every Linear of every block; UNet: every layer that the pattern fits. From `benchmarks/cpu/lowering.py`.",
        ]
    )


def short_lowering(result: dict[str, Any]) -> str:
    """The same for batch 4, on everything that this machine has."""
    cells = {name: cell for name, cell in result["cells"].items() if cell["batch"] == 4 and not cell["level"]}
    return lowering({**result, "cells": cells})


def _rounds(cells: list[dict[str, Any]]) -> str:
    counts = sorted({cell["n"] for cell in cells})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


_DENSE = {"eager": "eager", "dense": "prepacked", "eager, compiled": "compiled"}


def onnx(result: dict[str, Any]) -> str:
    """ONNX Runtime: the gathered form and int8 against its own dense form."""
    batches = sorted({row["batch"] for row in result["rows"]}, reverse=True)
    by_form: dict[str, dict[int, dict[str, Any]]] = {}
    for row in result["rows"]:
        by_form.setdefault(row["form"], {})[row["batch"]] = row
    lines = [
        "| form | " + " | ".join(f"batch {batch}" for batch in batches) + " | error | file |",
        "|---|" + "---:|" * (len(batches) + 2),
    ]
    for form, rows in by_form.items():
        times = " | ".join(f"{rows[b]['median_ms']:.1f} ms, {rows[b]['speedup']:.2f}x" for b in batches)
        first = rows[batches[0]]
        lines.append(f"| {form} | {times} | {first['max_error']:.1e} | {first['size_bytes'] / 1e6:.0f} MB |")
    return "\n".join(
        [
            *lines,
            "",
            "U-ViT-S/2, 32x32, random weights, masks on the linears of every block; in turns, medians of "
            f"{result['rounds']} rounds, seed {result['seed']}; {result['hardware']}; "
            f"ONNX Runtime {result['versions']['onnxruntime']}. Speed-ups are over its own dense form; the error is the largest "
            "difference from PyTorch, in standard deviations of the output. From `benchmarks/cpu/onnx_runtime.py`.",
        ]
    )


def clustering(result: dict[str, Any]) -> str:
    """What clustered rows keep, and what it brings after fine-tuning."""
    lines = [
        "| pattern | energy kept, `uvit-digits` | energy kept, Gaussian 2048x512 | fd-digits after fine-tuning | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    for pattern, kept in result["energy_kept"].items():
        tuned = result["fd-digits"].get(pattern)
        value = "—" if tuned is None else f"{tuned['mean']:.2f}"
        if tuned and tuned["ci95"]:
            value += " [{:.2f}, {:.2f}]".format(*tuned["ci95"])
        gaussian = result["energy_kept_gaussian_2048x512"][pattern]
        lines.append(f"| {pattern} | {kept:.3f} | {gaussian:.3f} | {value} | {tuned['n'] if tuned else '—'} |")
    return "\n".join(
        [
            *lines,
            "",
            "Energy: the share of the sum of squares that magnitude masks keep. Lower fd-digits is better; intervals "
            f"are Student's t over seeds; {result['steps']:,} steps of `sparsedm` each. {result['hardware']}. "
            "From `benchmarks/clustering.py`.",
        ]
    )


def comparison(result: dict[str, Any]) -> str:
    """One line per entry of a comparison."""
    metric = result["metric"]["name"]
    dense = result["dense"]
    lines = [
        f"| entry | {metric}, mean | 95% interval | one-shot | prediction error | effective MACs | n |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| dense, as given | {dense['quality'][0]['value']:.2f} | {_range(dense['quality'][0]['ci95'])} * | — | — | 100% | — |",
    ]
    for entry in result["entries"]:
        quality = entry["quality"]
        bare = (
            "—"
            if entry["one_shot"] is None or entry["macs_effective"] == dense["macs_dense"]
            else f"{entry['one_shot']:.1f}"
        )
        lines.append(
            f"| {entry['label']} | {quality['mean']:.2f} | {_range(quality['ci95'])} | {bare} "
            f"| {entry['drift']['prediction_error']['mean']:.3%} | {entry['macs_effective'] / dense['macs_dense']:.0%} "
            f"| {quality['n']} |"
        )
    train, judged, machine = result["entries"][0]["recipe_train"], result["evaluate"], result["environment"]
    return "\n".join(
        [
            *lines,
            "",
            f"`{result['model']}`; {train['steps']:,} steps of batch {train['batch_size']} at lr {train['lr']:g} for every entry, "
            f"seeds {result['seeds'][0]} to {result['seeds'][-1]}; {judged['samples']:,} samples from the same noise, "
            f"{result['sampler']}, {judged['sampler_steps']} steps. Lower is better; intervals are Student's t over seeds "
            f"(* : bootstrap over samples); one-shot is without fine-tuning. {machine['hardware']}; "
            f"torch {machine['versions']['torch']}. "
            "From `benchmarks/comparisons.py`.",
        ]
    )


QUESTIONS = (
    ("the teacher (against none)", "paper", "no teacher"),
    ("the teacher alone (against noise and teacher)", "teacher only", "paper"),
    ("SR-STE's decay (against STE)", "paper", "STE"),
    ("the decay decoupled (against in the gradient)", "decoupled decay", "paper"),
    ("masks that move (against fixed ones)", "paper", "fixed masks"),
    ("the progressive schedule (against direct 2:4)", "progressive", "paper"),
    ("a start from OBS (against the pretrained weights)", "obs start", "paper"),
    ("the preset `best` (against `paper`)", "best", "paper"),
    ("4:8 (against 2:4)", "4:8", "paper"),
    ("1:4 (against 2:4)", "1:4", "paper"),
    ("2:2:4 (against 2:4)", "2:2:4", "paper"),
    ("4:2:4 (against 2:4)", "4:2:4", "paper"),
)
"""What is asked, the entry that has it, and the one that has not."""


def effects(result: dict[str, Any]) -> str:
    """The paired difference that each part makes, below zero where it helps."""
    values = {e["label"]: {cell["seed"]: cell["value"] for cell in e["cells"]} for e in result["entries"]}
    lines = [f"| what | change of {result['metric']['name']} | 95% interval | so | n |", "|---|---:|---:|---|---:|"]
    for what, having, lacking in QUESTIONS:
        if having not in values or lacking not in values:
            continue
        seeds = sorted(values[having].keys() & values[lacking].keys())
        found = summary([values[having][seed] - values[lacking][seed] for seed in seeds])
        interval = found["ci95"]
        said = (
            "one seed"
            if interval is None
            else "helps"
            if interval[1] < 0
            else "hurts"
            if interval[0] > 0
            else "not told apart"
        )
        lines.append(f"| {what} | {found['mean']:+.2f} | {_range(interval)} | {said} | {found['n']} |")
    return "\n".join(
        [
            *lines,
            "",
            "Paired by seed; each interval holds with 95% by itself, so of a dozen one may be wrong half of the time.",
        ]
    )


def gap(result: dict[str, Any]) -> str:
    """How much of the way from the published recipe to the dense model the preset `best` makes up for."""
    values = {e["label"]: {cell["seed"]: cell["value"] for cell in e["cells"]} for e in result["entries"]}
    drift = {e["label"]: {c["seed"]: c["drift"]["prediction_error"] for c in e["cells"]} for e in result["entries"]}
    seeds = sorted(values["paper"])
    found = summary([values["paper"][seed] - values["best"][seed] for seed in seeds])
    errors = summary([drift["paper"][seed] - drift["best"][seed] for seed in seeds])
    dense = result["dense"]["quality"][0]["value"]
    whole = mean(values["paper"].values()) - dense
    low, high = found["ci95"]
    steps, paper = result["entries"][0]["recipe_train"]["steps"], mean(values["paper"].values())
    return (
        f"`{result['model']}`, {len(seeds)} seeds, {steps} steps: `paper` {paper:.2f}, `best` {mean(values['best'].values()):.2f}, "
        f"dense {dense:.2f}. `best` is better by {found['mean']:.2f} [{low:.2f}, {high:.2f}], which is "
        f"{found['mean'] / whole:.0%} [{low / whole:.0%}, {high / whole:.0%}] of the gap. Its prediction error is lower by "
        f"{errors['mean']:.3%} [{errors['ci95'][0]:.3%}, {errors['ci95'][1]:.3%}] of {mean(drift['paper'].values()):.3%}."
    )


def by_steps(result: dict[str, Any]) -> str:
    """The metric by number of sampler steps."""
    usual = str(result["evaluate"]["sampler_steps"])
    counts = sorted({*result["dense"]["by_steps"], usual}, key=int)
    lines = ["| entry | " + " | ".join(f"{count} steps" for count in counts) + " |", "|---|" + "---:|" * len(counts)]
    dense = {
        **{k: v["value"] for k, v in result["dense"]["by_steps"].items()},
        usual: result["dense"]["quality"][0]["value"],
    }
    lines.append("| dense, as given | " + " | ".join(f"{dense[count]:.2f}" for count in counts) + " |")
    for entry in result["entries"]:
        cells = []
        for count in counts:
            found = summary([cell["value"] if count == usual else cell["by_steps"][count] for cell in entry["cells"]])
            cells.append(f"{found['mean']:.2f} [{_range(found['ci95'])}]")
        lines.append(f"| {entry['label']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"`{result['model']}`, {result['sampler']}, n = {len(result['seeds'])}."])


def trials(result: dict[str, Any]) -> str:
    """What single seeds said of variants of SparseDM."""
    lines = ["| | `uvit-digits` | `ddpm-digits` |", "|---|---:|---:|"]
    for name, found in result["fd-digits"].items():
        lines.append(f"| {name} | {found['uvit-digits']:.2f} | {found['ddpm-digits']:.2f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"fd-digits, seed {result['seed']}, {result['steps']} steps, n = 1; {result['hardware']}; torch {result['torch']}.",
        ]
    )


def structured(result: dict[str, Any]) -> str:
    """How much faster smaller models are."""
    lines = [
        "| model | batch | MACs kept | parameters kept | eager | best dense forms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, cell in result["cells"].items():
        lines.append(
            f"| `{name}` | {cell['batch']} | {cell['macs_share']:.0%} | {cell['params_share']:.0%} | {cell['speedup_eager']:.2f}x "
            f"| {cell['speedup_lowered']:.2f}x |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Over the dense model of the same form, in turns, medians of {result['rounds']} rounds, random weights; "
            f"{result['hardware']}; torch {result['versions']['torch']}. From `benchmarks/structured.py`.",
        ]
    )


def _range(interval: list[float] | None) -> str:
    return "—" if interval is None else f"{interval[0]:.2f} to {interval[1]:.2f}"


TABLES = (
    ("README.md", "methods", "methods_digits.json", methods),
    ("README.md", "lowering", "lowering_cpu.json", short_lowering),
    ("docs/lowering.md", "lowering", "lowering_cpu.json", lowering),
    ("docs/onnx.md", "onnx", "onnx.json", onnx),
    ("docs/lowering.md", "clustering", "clustering.json", clustering),
    ("docs/results.md", "gap-uvit", "comparison_best-uvit.json", gap),
    ("docs/results.md", "gap-ddpm", "comparison_best-ddpm.json", gap),
    ("docs/results.md", "best-uvit", "comparison_best-uvit.json", comparison),
    ("docs/results.md", "best-ddpm", "comparison_best-ddpm.json", comparison),
    ("docs/results.md", "by-steps", "comparison_best-uvit.json", by_steps),
    ("docs/results.md", "baselines", "comparison_baselines-uvit.json", comparison),
    ("docs/results.md", "structured", "structured.json", structured),
    ("docs/results.md", "trials", "sparsedm_trials.json", trials),
)
"""Page, marker, file of results, and how the table is written."""


def replaced(page: str, marker: str, new: str) -> str:
    """The page with the text between its markers replaced."""
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{new}\n{found[2]}", page, flags=re.DOTALL)


def written(results: str, make: Any) -> str:
    """The table of a file of results."""
    text: str = make(json.loads((RESULTS / results).read_text(encoding="utf-8")))
    return text


@click.command()
def main() -> None:
    for name, marker, results, make in TABLES:
        page = ROOT / name
        page.write_text(replaced(page.read_text(encoding="utf-8"), marker, written(results, make)), encoding="utf-8")
        click.echo(f"{name}: {marker}")


if __name__ == "__main__":
    main()
