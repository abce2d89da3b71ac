"""Writes the measured part of docs/gpu.md, and its plot, from the lines of `lowering.py` and `training.py`.

    python benchmarks/gpu/report.py

What is decided from the figures follows rules that were written before anything was measured; they stand in `verdict`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from lines import HERE, compared, read

DOCS = HERE.parents[1] / "docs"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NOTHING = "Nothing has been measured on a GPU yet."
GOALS = {"bfloat16": 1.33, "fp8": 1.2, "int8": 1.2}
"""Over the fastest dense form of the same precision."""
MASKED_GOAL = 1.02
"""What a masked step of training may cost over a dense one."""
_NOISE = 2.0
"""A gain counts from this many interquartile ranges on."""

_IMITATION = "**imitation**: the steps ran on a CPU with an imitated GPU. No figure below means anything.\n"
_TUNED = {
    False: "Nothing was compiled by `max-autotune`.",
    True: "Of all forms `dense` alone was also compiled by `max-autotune`: no opponent in 8 bits was, and nothing with 2:4.",
}

Line = Mapping[str, Any]


def machines(paths: Sequence[Path]) -> dict[str, list[Line]]:
    """The lines of forms by GPU and libraries, the last of each form: only those of one are held against each other."""
    found: dict[str, dict[tuple[str, str], Line]] = {}
    for path in paths:
        for line in read(path):
            if "form" in line:
                found.setdefault(json.dumps(compared(line["about"])), {})[line["cell"], line["form"]] = line
    return {key: list(own.values()) for key, own in found.items()}


def pairs(lines: Sequence[Line]) -> list[tuple[str, str, Line, Line]]:
    """Of every cell and precision the fastest dense and the fastest sparse form: cell, precision, dense, sparse."""
    found = []
    cells = list(dict.fromkeys((line["cell"], line["precision"]) for line in lines if line.get("sparse")))
    for cell, precision in cells:
        own = [line for line in lines if line["cell"] == cell and line.get("precision") == precision]
        dense, sparse = ([line for line in own if line["sparse"] is kind] for kind in (False, True))
        if dense and sparse:
            fastest = [min(forms, key=lambda line: line["median_ms"]) for forms in (dense, sparse)]
            found.append((cell, precision, fastest[0], fastest[1]))
    return found


def ratio(dense: Line, sparse: Line) -> float:
    """Of the same rounds where both took turns, else of medians."""
    beside = sparse["against"].get(dense["form"])
    return float(beside["ratio"]) if beside else float(dense["median_ms"] / sparse["median_ms"])


def verdict(precision: str, dense: Line, sparse: Line, wide: float | None = None) -> str:
    """What a pair decides, in words. `wide` is the sparse form's speed over the fastest dense one in bfloat16."""
    gain = ratio(dense, sparse)
    noise = _NOISE * max(dense["iqr_ms"] / dense["median_ms"], sparse["iqr_ms"] / sparse["median_ms"])
    held = dense["sustained_ms"] / sparse["sustained_ms"]
    if abs(gain - 1) <= noise:
        return "no difference beyond noise"
    if gain < 1:
        return "2:4 is slower: stay dense"
    kept = "" if held >= gain / 1.05 else f"; {held:.2f}x when run for seconds"
    if wide is not None and wide < 1:
        return f"gains, and is slower than bfloat16: stay dense{kept}"  # added when the first results were there
    return ("goal met" if gain >= GOALS[precision] else f"gains, below the goal of {GOALS[precision]}x") + kept


def table(lines: Sequence[Line]) -> str:
    """Cell by cell, against the fastest dense form of the same precision."""
    rows = [
        "| model, batch | precision | fastest dense | ms | fastest 2:4 | ms | 2:4 over dense | over dense bf16 "
        "| error, dense and 2:4 | verdict |",
        "|---|---|---|---:|---|---:|---:|---:|---:|---|",
    ]
    found = pairs(lines)
    wide = [line for line in lines if line.get("precision") == "bfloat16" and not line["sparse"]]
    bf16 = {
        cell: min((line for line in wide if line["cell"] == cell), key=lambda line: line["median_ms"])
        for cell in {line["cell"] for line in wide}
    }
    for cell, precision, dense, sparse in found:
        over = ratio(bf16[cell], sparse) if cell in bf16 else None
        name, batch = cell.rsplit(" ", 1)
        times = " | ".join(f"{one['form']} | {one['median_ms']:.2f}" for one in (dense, sparse))
        rows.append(
            f"| {name}, {batch} | {precision} | {times} "
            f"| {ratio(dense, sparse):.2f}x | {'' if over is None else f'{over:.2f}x'} | {dense['error']:.1e}, {sparse['error']:.1e} "
            f"| {verdict(precision, dense, sparse, over)} |"
        )
    failed = [line for line in lines if "failed" in line]
    more = ["", *(f"- {line['cell']}, {line['form']}: {line['failed']}" for line in failed)] if failed else []
    return "\n".join(rows + more)


def _rounds(lines: Sequence[Line]) -> int:
    return max((one["rounds"] for line in lines for one in line.get("against", {}).values()), default=0)


def _tuned(lines: Sequence[Line]) -> bool:
    return any(line["form"] == "dense, autotuned" and "median_ms" in line for line in lines)


def page(lines: Sequence[Line]) -> str:
    """What was measured on one GPU."""
    about = lines[-1]["about"]
    versions = about["versions"]
    said = (
        f"{about['hardware']}; torch {versions['torch']}, CUDA {versions['cuda']}, cuSPARSELt {versions['cusparselt'] or 'none'}. "
        f"Forms in turns, medians of {_rounds(lines)} rounds; a ratio is the median of those of single rounds. Random weights. "
        f"Blocks are compiled one by one; every form is a CUDA graph. {_TUNED[_tuned(lines)]}"
    )
    return "\n".join([*[_IMITATION] * about["imitation"], said, "", table(lines)])


def trained(lines: Sequence[Line]) -> str:
    """What masks cost while training on one GPU, as `training.py` measured it."""
    about = lines[-1]["about"]
    said = "**imitation**: no figure below means anything. " if about["imitation"] else ""
    rows = [
        f"{said}A step of training under 2:4 masks (`sr-ste`, bfloat16 passes) over a dense one, in turns; {about['hardware']}, torch "
        f"{about['versions']['torch']}.\n",
        "| model, batch | form | dense, ms | masked | masked, by torch's operators | verdict |",
        "|---|---|---:|---:|---:|---|",
    ]
    for line in lines:
        start = f"| {line['cell'].replace(' ', ', ')} | {line['form']} |"
        if "failed" in line:
            rows.append(f"{start} | | | {line['failed']} |")
            continue
        kept = line["masked ratio"] <= MASKED_GOAL
        word = "goal met" if kept else f"above the goal of {MASKED_GOAL}x"
        rows.append(
            f"{start} {line['dense ms']:.1f} | {line['masked ratio']:.3f}x | {line['by torch ratio']:.3f}x "
            f"| {word if line.get('kernels') else f'{word}; without Triton'} |"
        )
    return "\n".join(rows)


def plot(by_machine: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Bars: 2:4 over the fastest dense form of the same precision."""
    from matplotlib.figure import Figure

    imitation = any(line["about"]["imitation"] for lines in by_machine.values() for line in lines)
    found = {
        (f"{cell}, {lines[-1]['about']['hardware'].split(',')[0]}", precision): ratio(dense, sparse)
        for lines in by_machine.values()
        for cell, precision, dense, sparse in pairs(lines)
    }
    cells = list(dict.fromkeys(cell for cell, _ in found))
    figure = Figure(figsize=(8, 0.5 * len(cells) + 1.6), layout="constrained")
    axes = figure.subplots()
    for place, precision in enumerate(GOALS):
        own = {cell: gain for (cell, its), gain in found.items() if its == precision}
        at = [cells.index(cell) + 0.25 * (place - 1) for cell in own]
        if own:
            axes.barh(at, list(own.values()), height=0.23, label=precision, color=f"C{place}")
    axes.axvline(1, color="0.4", linewidth=1)
    axes.set_yticks(range(len(cells)), cells)
    axes.invert_yaxis()
    axes.set_xlabel(
        "speed of 2:4 over the fastest dense form of the same precision" + (" (imitation)" if imitation else "")
    )
    figure.legend(loc="outside upper right", ncols=len(GOALS))
    figure.savefig(path)


def replaced(text: str, part: str) -> str:
    """The page with `part` between its marks."""
    head, _, rest = text.partition(BEGIN)
    _, mark, tail = rest.partition(END)
    if not mark:
        raise click.ClickException(f"the page has no {BEGIN} … {END}")
    return f"{head}{BEGIN}\n{part}\n{END}{tail}"


def _measured(what: str) -> tuple[Path, ...]:
    return tuple(sorted(HERE.glob(f"{what}_*.jsonl")))


@click.command()
@click.option(
    "--lines",
    "sources",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Of `lowering.py`; by default those that are here.",
)
@click.option("--training", "steps", type=click.Path(path_type=Path), multiple=True, help="Of `training.py`, likewise.")
@click.option("--page", "out", type=click.Path(path_type=Path), default=DOCS / "gpu.md", show_default=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path), default=HERE / "lowering.svg", show_default=True)
def main(sources: tuple[Path, ...], steps: tuple[Path, ...], out: Path, picture: Path) -> None:
    """Write the tables, one for each GPU, and the plot of what was measured."""
    lowered, masked = machines(sources or _measured("lowering")), machines(steps or _measured("training"))
    text = (out if out.exists() else DOCS / "gpu.md").read_text(encoding="utf-8")
    parts = [*map(page, lowered.values()), *map(trained, masked.values())]
    out.write_text(replaced(text, "\n\n".join(parts) or NOTHING), encoding="utf-8")
    rows = sum(len(pairs(lines)) for lines in lowered.values())
    if rows:
        plot(lowered, picture)
    click.echo(f"{out}: {rows} rows, {sum(map(len, masked.values()))} of training")


if __name__ == "__main__":
    main()
