"""Writes the tables of README.md and docs/ from the JSON in benchmarks/results: `python benchmarks/table.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import click
from cpu_tables import dense_bits, int8, levels, lowering, opponents, peaks, projections, sway, tokens, whole_picture
from merged import merged
from quantised import table as in_8_bits

from compressor.comparison.statistics import summary
from compressor.report.compared import Summary

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


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


def clustering(result: dict[str, Any], compared: dict[str, Any]) -> str:
    """What clustered rows keep, and what is left of the difference after fine-tuning."""
    lines = [
        "| pattern | energy kept, `uvit-digits` | energy kept, Gaussian 2048x512 | fd-digits after fine-tuning | seeds |",
        "|---|---:|---:|---:|---:|",
    ]
    tuned = {entry["pattern"]: entry for entry in compared["entries"] if entry["settings"] == {}}
    for pattern, kept in result["energy_kept"].items():
        found = tuned[pattern]["quality"] if pattern in tuned else None
        value = "—" if found is None else f"{found['mean']:.2f} [{_range(found['ci95'])}]"
        gaussian = result["energy_kept_gaussian_2048x512"][pattern]
        lines.append(f"| {pattern} | {kept:.3f} | {gaussian:.3f} | {value} | {found['n'] if found else '—'} |")
    steps, machine = compared["entries"][0]["recipe_train"]["steps"], compared["environment"]
    return "\n".join(
        [
            *lines,
            "",
            "Energy: the share of the sum of squares that magnitude masks keep. Lower fd-digits is better; intervals "
            f"are Student's t over seeds; {steps:,} steps of `sparsedm` each. {machine['hardware']}. "
            "From `benchmarks/clustering.py` and `benchmarks/comparisons.py`.",
        ]
    )


def comparison(result: dict[str, Any]) -> str:
    """One line per entry of a comparison."""
    metric, floor = result["metric"]["name"], result["metric"]["floor"]
    dense = result["dense"]
    lines = [
        f"| entry | pattern | {metric}, mean | 95% interval | one-shot | prediction error | effective MACs | n |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        f"| dense, as given | — | {dense['quality'][0]['value']:.2f} | {_range(dense['quality'][0]['ci95'])} * | — | — | 100% | — |",
    ]
    for entry in result["entries"]:
        quality = entry["quality"]
        bare = (
            "—"
            if entry["one_shot"] is None or entry["macs_effective"] == dense["macs_dense"]
            else f"{entry['one_shot']:.1f}"
        )
        lines.append(
            f"| {entry['label']} | {entry['pattern'] or '—'} | {quality['mean']:.2f} | {_range(quality['ci95'])} | {bare} "
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
            f"{result['sampler']}, {judged['sampler_steps']} steps. Lower is better; real against real images "
            f"({floor['samples']} each) is {floor['value']:.2f}; intervals are Student's t over seeds "
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
ROWS = (
    ("2:2:4 (against 2:4)", "sparsedm-V2", "sparsedm"),
    ("4:2:4 (against 2:4)", "sparsedm-V4", "sparsedm"),
    ("4c:2:4, clustered rows (against 4:2:4)", "sparsedm-V4-clustered", "sparsedm-V4"),
    ("the preset `best` at 2:4 (against `paper`)", "sparsedm-best", "sparsedm"),
    ("the preset `best` at 4:2:4 (against `paper`)", "best-V4", "sparsedm-V4"),
    ("the preset `best` at 4:2:4 (against `paper` at 2:4)", "best-V4", "sparsedm"),
    ("structured with 68% of the MACs (against `paper` at 4:2:4)", "structured-68", "sparsedm-V4"),
)
"""The same for rows that share a choice."""


def rows(result: dict[str, Any]) -> str:
    """What it costs that rows share a choice."""
    return effects(result, ROWS)


def effects(result: dict[str, Any], questions: Sequence[tuple[str, str, str]] = QUESTIONS) -> str:
    """The paired differences that each part makes, below zero where it helps."""
    metric = result["metric"]["name"]
    lines = [f"| what | change of {metric} | | change of the prediction error | | n |", "|---|---:|---|---:|---|---:|"]
    by_label = {entry["label"]: {cell["seed"]: cell for cell in entry["cells"]} for entry in result["entries"]}
    for what, having, lacking in questions:
        if having not in by_label or lacking not in by_label:
            continue
        seeds = sorted(by_label[having].keys() & by_label[lacking].keys())
        pairs = [(by_label[having][seed], by_label[lacking][seed]) for seed in seeds]
        quality = summary([a["value"] - b["value"] for a, b in pairs])
        error = summary([a["drift"]["prediction_error"] - b["drift"]["prediction_error"] for a, b in pairs])
        lines.append(
            f"| {what} | {_signed(quality, '+.2f')} | {_said(quality)} | {_signed(error, '+.3%')} | {_said(error)} | {len(seeds)} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Means and 95% intervals of the differences, paired by seed. Each interval holds by itself: of twenty, "
            "about one is wrong.",
        ]
    )


def _signed(found: Summary, form: str) -> str:
    interval = "" if found.ci95 is None else f" [{found.ci95[0]:{form}}, {found.ci95[1]:{form}}]"
    return f"{found.mean:{form}}{interval}"


def _said(found: Summary) -> str:
    if found.ci95 is None:
        return "one seed"
    low, high = found.ci95
    return "helps" if high < 0 else "hurts" if low > 0 else "not told apart"


def _values(result: dict[str, Any]) -> dict[str, dict[int, float]]:
    """The metric by label and seed."""
    return {e["label"]: {cell["seed"]: cell["value"] for cell in e["cells"]} for e in result["entries"]}


def gap(result: dict[str, Any]) -> str:
    """How much of the way from the published recipe to the dense model the preset `best` makes up for."""
    values = _values(result)
    drift = {e["label"]: {c["seed"]: c["drift"]["prediction_error"] for c in e["cells"]} for e in result["entries"]}
    for own in (values, drift):  # as other comparisons call the two
        own |= {new: own[old] for new, old in (("paper", "sparsedm"), ("best", "sparsedm-best")) if old in own}
    seeds = sorted(values["paper"])
    found = summary([values["paper"][seed] - values["best"][seed] for seed in seeds])
    errors = summary([drift["paper"][seed] - drift["best"][seed] for seed in seeds])
    dense = result["dense"]["quality"][0]["value"]
    whole = mean(values["paper"].values()) - dense
    low, high = found.ci95
    steps, paper = result["entries"][0]["recipe_train"]["steps"], mean(values["paper"].values())
    later = ""
    if len(seeds) > 5:  # added after the first five were looked at
        rest = summary([values["paper"][seed] - values["best"][seed] for seed in seeds[5:]])
        later = f" Seeds {seeds[5]} to {seeds[-1]} alone: by {rest.mean:.2f} [{rest.ci95[0]:.2f}, {rest.ci95[1]:.2f}]."
    return (
        f"`{result['model']}`, {len(seeds)} seeds, {steps} steps: `paper` {paper:.2f}, `best` {mean(values['best'].values()):.2f}, "
        f"dense {dense:.2f}. `best` is better by {found.mean:.2f} [{low:.2f}, {high:.2f}], which is "
        f"{found.mean / whole:.0%} [{low / whole:.0%}, {high / whole:.0%}] of the gap.{later} Its prediction error is lower by "
        f"{errors.mean:.3%} [{errors.ci95[0]:.3%}, {errors.ci95[1]:.3%}] of {mean(drift['paper'].values()):.3%}."
    )


def with_obs(*results: dict[str, Any]) -> str:
    """What `obs` has over the preset `best`, paired by seed: both begin with the same weights."""
    values = _values(merged(*results))
    own, best = values["obs"], values["sparsedm-best"]
    seeds = sorted(own.keys() & best)
    found = summary([own[seed] - best[seed] for seed in seeds])
    return (
        f"Of the same {len(seeds)} seeds, `obs` has {mean(own[s] for s in seeds):.2f} and `best` {mean(best[s] for s in seeds):.2f}: "
        f"a difference of {found.mean:+.2f} [{found.ci95[0]:+.2f}, {found.ci95[1]:+.2f}]."
    )


def muon(result: dict[str, Any], other: dict[str, Any]) -> str:
    """What Muon and even times change of the preset `best`, paired by seed with `other`, where it has AdamW and independent times."""
    (entry,) = result["entries"]
    with_muon = {cell["seed"]: cell for cell in entry["cells"]}
    before = {e["label"]: {cell["seed"]: cell for cell in e["cells"]} for e in other["entries"]}
    seeds = sorted(with_muon)
    paper, adamw, now = (
        mean(one[seed]["value"] for seed in seeds) for one in (before["paper"], before["best"], with_muon)
    )
    found = summary([with_muon[seed]["value"] - before["best"][seed]["value"] for seed in seeds])
    dense = other["dense"]["quality"][0]["value"]
    shares = []
    for what in ("prediction_error", "sample_rmse"):
        ratios = summary([with_muon[seed]["drift"][what] / before["best"][seed]["drift"][what] for seed in seeds])
        shares.append(f"{ratios.mean:.2f} [{ratios.ci95[0]:.2f}, {ratios.ci95[1]:.2f}]")
    return (
        f"`{result['model']}`, seeds {seeds[0]} to {seeds[-1]}, {entry['recipe_train']['steps']} steps: fd-digits {now:.2f} in "
        f"place of {adamw:.2f}, a change of {_signed(found, '+.2f')}. Of the gap between `paper`, {paper:.2f}, and dense, "
        f"{dense:.2f}, that closes {(paper - now) / (paper - dense):.0%} in place of {(paper - adamw) / (paper - dense):.0%}. "
        f"The prediction error is {shares[0]} of what it was, and the samples are {shares[1]} as far from the dense model's "
        "(root mean square)."
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
            cells.append(f"{found.mean:.2f} [{_range(found.ci95)}]")
        lines.append(f"| {entry['label']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"`{result['model']}`, {result['sampler']}, n = {len(result['seeds'])}."])


def as_fast(result: dict[str, Any]) -> str:
    """How the two compare that are equally fast on a CPU."""
    return effects(result, (("`best` at 4:2:4 (against structured with 68% of the MACs)", "best-V4", "structured-68"),))


def equal_latency(result: dict[str, Any]) -> str:
    """What share of the multiply-accumulates a structured model may keep to be as fast as a lowered one with masks."""
    entries = {entry["method"]: entry for entry in result["entries"]}
    smaller, masked = entries["structured"], entries["sparsedm"]
    times = [f"{e['latency'][-1]['median_ms']:.2f} ms" for e in (masked, smaller, result["dense"])]
    shares = [e["macs_effective"] / result["dense"]["macs_dense"] for e in (masked, smaller)]
    machine = result["environment"]
    return (
        f"On `{result['model']}`, batch {masked['latency'][-1]['batch']}, lowered, {masked['pattern']} takes {times[0]} with "
        f"{shares[0]:.0%} of the multiply-accumulates, and a structured model {times[1]} with {shares[1]:.0%}; the dense model at its "
        f"best takes {times[2]} ({machine['hardware']}; torch {machine['versions']['torch']})."
    )


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


def together(*results: dict[str, Any]) -> str:
    """One table of several comparisons."""
    return comparison(merged(*results))


def together_gap(*results: dict[str, Any]) -> str:
    """`gap` over the seeds of several comparisons."""
    return gap(merged(*results))


_FOUND = "docs/results.md"
_SPEED = "docs/speed.md"
_OF_PICTURES = (
    "methods-pictures",
    "methods-pictures-more",
    "best-pictures",
    "best-pictures-more",
    "obs-pictures",
    "obs-pictures-more",
    "taught-pictures",
)
PICTURES = " ".join(f"comparison_{name}.json" for name in _OF_PICTURES)
TABLES = (
    *((page, "methods", PICTURES, together) for page in ("README.md", _FOUND)),
    (_FOUND, "methods-uvit", "comparison_methods-uvit.json", comparison),
    *(("docs/lowering.md", it.__name__, f"{it.__name__}_cpu.json", it) for it in (int8, sway, levels, projections)),
    *((_SPEED, it.__name__, f"{it.__name__}_cpu.json", it) for it in (tokens, lowering)),
    ("docs/lowering.md", "dense-bits", "dense_bits_cpu.json dense_bits_cpu_avx2.json", dense_bits),
    *(
        (_SPEED, f"opponents{it}", f"opponents_cpu{it.replace('-', '_')}.json", opponents)
        for it in ("", "-avx-vnni", "-decoder", "-sd15", "-vnni", "-zen5")
    ),
    ("docs/pipelines.md", "whole-picture", "whole_picture_cpu.json", whole_picture),
    *(("docs/kernels.md", f"peaks{it}", f"roofline_cpu{it.replace('-', '_')}.json", peaks) for it in ("", "-avx2")),
    ("docs/onnx.md", "onnx", "onnx.json", onnx),
    (_SPEED, "clustering", "clustering.json comparison_methods-uvit.json", clustering),
    *((_FOUND, f"gap-{it}", f"comparison_best-{it}.json", gap) for it in ("uvit", "ddpm")),
    (_FOUND, "gap-pictures", PICTURES, together_gap),
    (_FOUND, "obs-pictures", PICTURES, with_obs),
    *((_FOUND, f"best-{it}", f"comparison_best-{it}.json", comparison) for it in ("uvit", "ddpm")),
    *((_FOUND, f"muon-{it}", f"comparison_muon-{it}.json comparison_best-{it}.json", muon) for it in ("uvit", "ddpm")),
    *((_FOUND, f"effects-{it}", f"comparison_ablation-{it}.json", effects) for it in ("uvit", "ddpm")),
    *((_FOUND, f"ablation-{it}", f"comparison_ablation-{it}.json", comparison) for it in ("uvit", "ddpm")),
    (_FOUND, "by-steps", "comparison_best-uvit.json", by_steps),
    (_FOUND, "rows", "comparison_methods-uvit.json", rows),
    (_FOUND, "equal-latency", "comparison_latency-uvit.json", equal_latency),
    (_FOUND, "as-fast", "comparison_cpu-uvit.json", as_fast),
    (_FOUND, "structured", "structured.json", structured),
    (_FOUND, "8-bits", "quantised.json", in_8_bits),
    (_FOUND, "trials", "sparsedm_trials.json", trials),
)
"""Page, marker, files of results, and how the table is written."""


def replaced(page: str, marker: str, new: str) -> str:
    """The page with the text between its markers replaced."""
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
    return re.sub(pattern, lambda found: f"{found[1]}{new}\n{found[2]}", page, flags=re.DOTALL)


def written(results: str, make: Any) -> str:
    """The table of files of results, named with spaces between them."""
    text: str = make(*(json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in results.split()))
    return text


@click.command()
def main() -> None:
    for name, marker, results, make in TABLES:
        page = ROOT / name
        page.write_text(replaced(page.read_text(encoding="utf-8"), marker, written(results, make)), encoding="utf-8")
        click.echo(f"{name}: {marker}")


if __name__ == "__main__":
    main()
