"""What few bits cost in quality: `best` at 4:2:4 trained in float32 and with `quantise: int8`, each judged in float32 and in few bits.

    python benchmarks/quantised.py [--model uvit-digits] [--seeds 5]

Forms that are judged, on the very same weights of a training:
- `float32`: the weights that were trained in float32, in float32 arithmetic.
- `8-bit kernels`: every layer with a mask run by `vnm-int8` (8-bit weights, whole numbers of up to 16 bits as inputs), the rest in
  float32.
- `7-bit kernels`: the same by `vnm-w7a8` (7-bit weights, 8-bit inputs); of weights that were trained in float32 alone.
- `8-bit weights`, where the kernels do not take every layer with a mask: each weight under a mask in 8 bits per output row, in float32
  arithmetic. Weights of `quantise: int8` are so already.

Each training and its judgements are a file in runs/quantised/ (trained models beside it), so that what is interrupted goes on. Writes
benchmarks/results/quantised.json.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from compressor import files, saving
from compressor.comparison.statistics import summary
from compressor.environment import environment
from compressor.lower.job import prepared
from compressor.lower.units import put
from compressor.progress import result_of
from compressor.quality import drift, evaluate
from compressor.report.compared import Summary
from compressor.runs.inputs import Inputs, load_inputs, resolve
from compressor.runs.judge import Judge
from compressor.sparsity.codes import fake_quantised
from compressor.training.engine import steps

ROOT = Path(__file__).parent.parent
MODELS = ("uvit-digits", "ddpm-digits")
STEPS, SAMPLES = 300, 1797  # as many samples as real images
TRAINED = {"float32": "none", "int8": "int8"}
"""Name of a training: its setting `quantise`."""
KERNELS = {"8-bit kernels": "vnm-int8", "7-bit kernels": "vnm-w7a8"}
"""Name of a form: the backend that runs it."""


def recipe(model: str, seed: int, quantise: str) -> dict[str, Any]:
    """The settings of a training."""
    return {
        "model": model,
        "method": "sparsedm",
        "pattern": "4:2:4",
        "settings": {"preset": "best", "quantise": quantise},
        "train": {"steps": STEPS, "seed": seed},
        "evaluate": {"samples": SAMPLES, "measures": [], "bootstrap": 0, "latency_rounds": 0},
    }


def rounded(model: nn.Module, masked: Mapping[str, Any]) -> nn.Module:
    """A copy with every weight of `masked` in 8 bits per output row."""
    found = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if name in masked:
                weight.copy_(fake_quantised(weight))
    return found


def in_kernels(model: nn.Module, given: Inputs, masked: Mapping[str, Any], name: str) -> tuple[nn.Module, bool]:
    """A copy in which the backend `name` runs the layers with a mask that it takes, and whether those are all of them."""
    job = prepared(model, given.adapter.example_inputs(16), [name], None, given.adapter)
    backend, taken = job.backend(name), set()
    form = copy.deepcopy(job.base)
    for one in job.found:
        if backend.refusal(one.unit) is None:
            form = put(form, one.at, backend.build(one.unit))
            taken |= set(one.weights)
    return form, taken == set(masked)


@torch.no_grad()
def judged(judge: Judge, model: nn.Module) -> dict[str, float]:
    """The distance of what `model` draws, and the prediction error against the given dense model."""
    given, settings = judge.inputs, judge.inputs.recipe.evaluate
    images = result_of(judge.drawn("", model))
    if given.metric is None or judge.reference is None:
        raise RuntimeError("the model has no metric")
    first = evaluate.qualities(given.metric, images, judge.reference, settings)[0]
    predicted = [drift.predictions(given.adapter, m, given.data, settings, judge.device) for m in (model, given.model)]
    return {first.metric: first.value, "prediction_error": drift.prediction_error(*predicted).value}


def cell(model: str, seed: int, training: str, folder: Path) -> dict[str, Any]:
    """One training, judged in every form."""
    given = load_inputs(resolve(recipe(model, seed, TRAINED[training]), "recipe"))
    began = time.perf_counter()
    run = given.fine_tuning()
    for _ in steps(run):
        pass
    result = run.finish()
    seconds = time.perf_counter() - began
    saving.save(folder / f"{model}-{training}-seed-{seed}", result.model, result.masks, model)
    judge = Judge(given)
    result_of(judge.look())
    forms = {"float32": judged(judge, result.model)} if training == "float32" else {}
    for form, backend in KERNELS.items() if training == "float32" else [("8-bit kernels", "vnm-int8")]:
        lowered, whole = in_kernels(result.model, given, result.masks, backend)
        if whole or form == "7-bit kernels":  # of 7 bits the other layers stay in float32, as in a lowered model
            forms[form] = judged(judge, lowered)
        else:
            forms["8-bit weights"] = judged(judge, rounded(result.model, result.masks))
    own = {name: value for name, value in result.model.named_parameters() if name in result.masks}
    return {
        "model": model,
        "seed": seed,
        "training": training,
        "seconds": seconds,
        "weights_masked": len(own),
        "codes_hold": all(torch.equal(value, fake_quantised(value)) for value in own.values()),
        "forms": forms,
    }


def dense(model: str) -> dict[str, Any]:
    """The given dense model, and with those weights in 8 bits that a 4:2:4 run would mask."""
    given = load_inputs(resolve(recipe(model, 0, "none"), "recipe"))
    judge = Judge(given)
    result_of(judge.look())
    masked = given.one_shot().masks
    forms = {"float32": judged(judge, given.model), "8-bit weights": judged(judge, rounded(given.model, masked))}
    return {"model": model, "training": "dense, as given", "weights_masked": len(masked), "forms": forms}


_FORMS = (("float32", "float32"), ("float32", "8 bits"), ("float32", "7 bits"), ("int8", "8 bits"))
"""How a model was trained, and what it was judged in: the float32 one first, which the others are held against."""


def table(result: dict[str, Any]) -> str:
    """Distances by seed, and the paired differences from 4:2:4 in float32; of the seeds that have both trainings."""
    by_model = {model: _by_seed([row for row in result["rows"] if row["model"] == model]) for model in MODELS}
    seeds = sorted({seed for cells in by_model.values() for seed in cells})
    titles = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [
        f"| model | trained in | judged in | {titles} | fd-digits, mean | prediction error |",
        "|---|---|---|" + "---:|" * (len(seeds) + 2),
    ]
    changes = [
        "| model | few bits, against 4:2:4 in float32 | change of fd-digits | of the prediction error | n |",
        "|---|---|---:|---:|---:|",
    ]
    for model, cells in by_model.items():
        given = [row["forms"] for row in result["rows"] if row["model"] == model and "seed" not in row]
        for form, own in (pair for forms in given for pair in forms.items()):
            start = f"| `{model}` | dense, as given | {'float32' if form == 'float32' else '8 bits'} | {' | ' * (len(seeds) - 1)}"
            lines.append(f"{start} | {own['fd-digits']:.2f} | {own['prediction_error']:.3%} |")
        for trained, judged_in in _FORMS:
            every = {seed: cell[trained, judged_in] for seed, cell in cells.items() if (trained, judged_in) in cell}
            if not every:
                continue
            values = " | ".join(f"{every[seed]['fd-digits']:.2f}" if seed in every else "—" for seed in seeds)
            distance, error = (summary([own[name] for own in every.values()]) for name in _MEASURED)
            start = f"| `{model}` | {trained} | {judged_in} | {values}"
            lines.append(f"{start} | {_with_interval(distance, '.2f')} | {error.mean:.3%} |")
        for form, how in zip(
            _FORMS[1:], ("8, rounded after training", "7, rounded after training", "8, trained in 8 bits"), strict=True
        ):
            pairs = [(cell[form], cell[_FORMS[0]]) for cell in cells.values() if form in cell]
            if not pairs:
                continue
            distance, error = (summary([a[name] - b[name] for a, b in pairs]) for name in _MEASURED)
            shown = f"{_with_interval(distance, '+.3f')} | {_with_interval(error, '+.4%')}"
            changes.append(f"| `{model}` | {how} | {shown} | {len(pairs)} |")
    told = (
        f"`sparsedm` with `preset: best` at 4:2:4, {STEPS} steps for each; {SAMPLES:,} samples from the same noise, as many as real "
        "images. Lower is better; 95% intervals are Student's t over seeds, of differences paired by seed; each holds by itself. In "
        "few bits are the layers whose weights have masks, in the kernels of `vnm-int8` and `vnm-w7a8` (of `ddpm-digits` all but "
        "convolutions with a stride, which they did not take then); of dense models"
        f"{_rounded_alone(result)} the same weights rounded, and multiplied in float32. "
        f"{result['hardware']}; torch {result['versions']['torch']}. From `benchmarks/quantised.py`."
    )
    return "\n".join([*lines, "", *changes, "", told])


def _rounded_alone(result: dict[str, Any]) -> str:
    """The trainings that no kernel took when they were judged."""
    rows = [row for row in result["rows"] if "seed" in row and "8-bit weights" in row["forms"]]
    named = dict.fromkeys(f", and of `{row['model']}` trained in {row['training']}," for row in rows)
    return "".join(named)


_MEASURED = ("fd-digits", "prediction_error")


def _by_seed(rows: list[dict[str, Any]]) -> dict[int, dict[tuple[str, str], dict[str, float]]]:
    """What was measured of each of _FORMS, by the seeds that have all of them, but for 7 bits."""
    found: dict[int, dict[tuple[str, str], dict[str, float]]] = {}
    for row in rows:
        for form, value in row["forms"].items() if "seed" in row else ():
            judged_in = {"float32": "float32", "7-bit kernels": "7 bits"}.get(form, "8 bits")
            if form != "8-bit weights" or "8-bit kernels" not in row["forms"]:
                found.setdefault(row["seed"], {})[row["training"], judged_in] = value
    return {seed: cell for seed, cell in sorted(found.items()) if set(cell) >= set(_FORMS) - {("float32", "7 bits")}}


def _with_interval(found: Summary, form: str) -> str:
    return f"{found.mean:{form}}" + ("" if found.ci95 is None else f" [{found.ci95[0]:{form}}, {found.ci95[1]:{form}}]")


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), default=MODELS)
@click.option("--seeds", default=5, show_default=True)
@click.option("--from", "folder", type=click.Path(path_type=Path), default=ROOT / "runs" / "quantised")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "quantised.json")
def main(models: tuple[str, ...], seeds: int, folder: Path, out: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cells = [(model, seed, training) for model in models for seed in range(seeds) for training in TRAINED]
    jobs: dict[str, Any] = {f"{m}-{t}-seed-{s}": lambda m=m, s=s, t=t: cell(m, s, t, folder) for m, s, t in cells}
    jobs |= {f"{model}-dense": lambda m=model: dense(m) for model in models}
    for name, make in jobs.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            files.write_json(path, make())
        click.echo(f"{name}: {files.read_json(path)['forms']}")
        gather(folder, out)


def gather(folder: Path, out: Path) -> None:
    """Write what is in `folder` as one file."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    facts = {key: value for key, value in environment().items() if key in ("versions", "hardware", "platform")}
    text = json.dumps({**facts, "recipe": recipe("MODEL", 0, "none or int8"), "rows": rows}, indent=1) + "\n"
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
