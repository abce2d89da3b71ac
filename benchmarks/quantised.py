"""What few bits cost in quality: `best` at 4:2:4 trained in float32 and with `quantise: int8`, each judged in float32 and in few bits.

    python benchmarks/quantised.py [--model uvit-digits] [--seeds 5]

Forms that are judged, on the very same weights of a training:
- `float32`: float32 arithmetic; of weights that were trained in float32 alone.
- `vnm-int8`: every layer with a mask in 8-bit weights and whole numbers of up to 16 bits as inputs, the rest in float32.
- `vnm-w8a8`: in 8-bit weights and 8-bit inputs, where the processor takes them.
- `vnm-w7a8`: in 7-bit weights and 8-bit inputs; of weights that were trained in float32 alone. Where there is `vnm-w8a8` it is not
  chosen, and gives the same sums of whole numbers.
Of the given dense model, which no such kernel takes: `8-bit weights`, each weight that a run would mask in 8 bits per output row, in
float32 arithmetic.

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
from compressor.lower.vnm import VNMW7A8, VNMW8A8, VNMInt8
from compressor.lower.vnm_kernels import VNNI, level
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
KERNELS = (VNMInt8(), VNMW8A8(), VNMW7A8())


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


def in_kernels(model: nn.Module, given: Inputs, masked: Mapping[str, Any], backend: VNMInt8) -> nn.Module:
    """A copy in which `backend` runs every layer with a mask."""
    job = prepared(model, given.adapter.example_inputs(16), [backend], None, given.adapter)
    form, taken = copy.deepcopy(job.base), set()
    for one in job.found:
        if backend.refusal(one.unit) is None:
            form = put(form, one.at, backend.build(one.unit))
            taken |= set(one.weights)
    if missing := set(masked) - taken:
        raise RuntimeError(f"{backend.name} does not take {sorted(missing)}")
    return form


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
    for backend in KERNELS:
        if backend.products == "w8a8" and level() not in VNNI:
            continue
        if backend.products == "w7a8" and training == "int8":
            continue
        forms[backend.name] = judged(judge, in_kernels(result.model, given, result.masks, backend))
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


_PLAIN = ("float32", "float32")
"""What the others are held against."""
_FORMS = {
    _PLAIN: "float32",
    ("float32", "vnm-int8"): "8, rounded after training",
    ("float32", "vnm-w8a8"): "8, inputs in 8, rounded after training",
    ("float32", "vnm-w7a8"): "7, inputs in 8, rounded after training",
    ("int8", "vnm-int8"): "8, trained in 8 bits",
    ("int8", "vnm-w8a8"): "8, inputs in 8, trained in 8 bits",
}
"""How a model was trained and what it was judged in: what that is called."""
_DENSE = {"float32": "float32", "8-bit weights": "8-bit weights alone"}


def table(result: dict[str, Any]) -> str:
    """Distances by seed, and the paired differences from 4:2:4 in float32."""
    rows = [row for row in result["rows"] if "seed" in row]
    seeds = sorted({row["seed"] for row in rows})
    titles = " | ".join(f"seed {seed}" for seed in seeds)
    lines = [
        f"| model | trained in | judged in | {titles} | fd-digits, mean | prediction error |",
        "|---|---|---|" + "---:|" * (len(seeds) + 2),
    ]
    changes = [
        "| model | few bits, against 4:2:4 in float32 | change of fd-digits | of the prediction error | n |",
        "|---|---|---:|---:|---:|",
    ]
    for model in MODELS:
        given = [row["forms"] for row in result["rows"] if row["model"] == model and "seed" not in row]
        for form, own in (pair for forms in given for pair in forms.items()):
            start = f"| `{model}` | dense, as given | {_DENSE[form]} | {' | ' * (len(seeds) - 1)}"
            lines.append(f"{start} | {own['fd-digits']:.2f} | {own['prediction_error']:.3%} |")
        plain = _by_seed(rows, model, *_PLAIN)
        for (trained, form), called in _FORMS.items():
            own = _by_seed(rows, model, trained, form)
            if not own:
                continue
            values = " | ".join(f"{own[seed]['fd-digits']:.2f}" if seed in own else "—" for seed in seeds)
            distance, error = (summary([one[name] for one in own.values()]) for name in _MEASURED)
            start = f"| `{model}` | {trained} | {form if form == 'float32' else f'`{form}`'} | {values}"
            lines.append(f"{start} | {_with_interval(distance, '.2f')} | {error.mean:.3%} |")
            pairs = [(one, plain[seed]) for seed, one in own.items() if seed in plain]
            if (trained, form) == _PLAIN or not pairs:
                continue
            distance, error = (summary([a[name] - b[name] for a, b in pairs]) for name in _MEASURED)
            shown = f"{_with_interval(distance, '+.3f')} | {_with_interval(error, '+.4%')}"
            changes.append(f"| `{model}` | {called} | {shown} | {len(pairs)} |")
    told = (
        f"`sparsedm` with `preset: best` at 4:2:4, {STEPS} steps for each; {SAMPLES:,} samples from the same noise, as many as real "
        "images. Lower is better; 95% intervals are Student's t over seeds, of differences paired by seed; each holds by itself. In "
        "few bits are all layers whose weights have masks, in the kernels that are named; of dense models the same weights rounded, "
        f"and multiplied in float32. {result['hardware']}; torch {result['versions']['torch']}. From `benchmarks/quantised.py`."
    )
    return "\n".join([*lines, "", *changes, "", told])


_MEASURED = ("fd-digits", "prediction_error")


def _by_seed(rows: list[dict[str, Any]], model: str, trained: str, form: str) -> dict[int, dict[str, float]]:
    """What was measured of one form, by the seeds that have it."""
    own = [row for row in rows if (row["model"], row["training"]) == (model, trained)]
    return {row["seed"]: row["forms"][form] for row in own if form in row["forms"]}


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
