"""What users can name stays: the package's names, its entry points, and every command with its help.

`public.json` is what version 0.1.0 offered before its modules moved into folders, written by that code; help is as click
prints it at 1,000 columns. What came later is listed here. Nothing is taken away from either without a word in CHANGELOG.md.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import compressor
from compressor.cli.app import app

ROOT = Path(__file__).parent.parent
BEFORE: dict[str, Any] = json.loads((Path(__file__).parent / "public.json").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

NEW_NAMES = {
    "Average",
    "Merged",
    "Recording",
    "apply",
    "merge_lora",
    "prune_",
    "record",
    "Preset",
    "Surgery",
    "choose_layers",
    "example_inputs",
    "found",
}
NEW_ENTRY_POINTS: dict[str, set[str]] = {
    "compressor.scores": {"clip-score"},
    "compressor.models": {"uvit", "uvit-pictures"},
    "compressor.data": {"pictures-32"},
    "compressor.metrics": {"fd-pictures", "fd-scattering"},
    "compressor.backends": {
        "vnm-dense",
        "vnm-dense-int8",
        "vnm-dense-w7a8",
        "vnm-dense-w8a8",
        "vnm-int8",
        "vnm-w7a8",
        "vnm-w8a8",
        "attention",
        "attention-int16",
        "attention-int8",
        "dense-int8",
        "dense-gelu",
        "dense-fp8",
        "cusparselt-direct",
        "torchao-fp8",
    },
}
"""By group."""
_BUDGETS = [
    "--quick A look: few samples, the metric alone, few rounds of timing.",
    "--full For publication: as many samples as real images, whatever it costs.",
]
_TRAIN = ["--train full|lora Train all, or adapters under the masks (lora.rank, lora.alpha)."]
_PIPELINES = """
--pipeline DIR|OWNER/NAME A pipeline of diffusers, not a --model: learns from its calls (--prompts) or captioned pictures (--data).
--prompts FILE Prompts for --pipeline: one a line, JSON objects of arguments (.jsonl), or a JSON list (.json).
--part NAME The part of the pipeline: unet, transformer, vae.decoder, … Default: what denoises.
--records DIR Where its recorded calls are kept. Default: the user's cache folder.
"""
_RECORD = """
Usage: compressor record [OPTIONS] PIPELINE
Run PIPELINE and keep every call of its denoiser: what it was told, and what it answered.
`compressor run --pipeline PIPELINE --prompts FILE --records DIR` learns from them. Interrupted, the same command goes on.
Options:
--prompts FILE One a line, JSON objects of arguments (.jsonl), or a list (.json). [required]
--n INTEGER RANGE Pictures to learn from. [default: 16; x>=1]
--unseen INTEGER RANGE Pictures to be judged on. [default: 4; x>=1]
--steps INTEGER RANGE Sampler steps. Default: the pipeline's own number. [x>=1]
--keep INTEGER RANGE Calls of each picture to keep, by chance. Default: all. [x>=1]
--seed INTEGER RANGE Chooses prompts and noise. [default: 0; x>=0]
--part NAME unet, transformer, vae.decoder, … Default: what denoises.
--device TEXT auto, cpu, cuda, cuda:1, … [default: auto]
--argument KEY=VALUE The pipeline's own, e.g. guidance_scale=3.
-o, --out DIR The records. [required]
--json Print the result as JSON.
-q, --quiet No progress.
--debug Show the traceback of an error.
-h, --help Show this message and exit.
"""
_MERGE_LORA = """
Usage: compressor merge-lora [OPTIONS] RUN LORA
Merge a LoRA of your own into the sparse model of a run, under its masks.
LORA is a file in a layout that diffusers reads, or a folder of peft. Every zero stays, and the output says how much of the LoRA the masks removed. DIR gets model/ and pipeline/, as a run's directory has them.
Options:
-o, --out DIR Default: RUN-LORA, beside RUN.
--scale FLOAT How strong the LoRA is. [default: 1.0]
--json Print the result as JSON.
-q, --quiet No progress.
--debug Show the traceback of an error.
-h, --help Show this message and exit.
"""  # noqa: E501
NEW_HELP: dict[str, list[str]] = {
    f"compressor {name}": _BUDGETS + _TRAIN + _PIPELINES.strip().splitlines() for name in ("run", "plan", "compare")
}
NEW_HELP["compressor compare"] = [
    *NEW_HELP["compressor compare"],
    "--devices cuda:N,… GPUs to use, one process on each. Default: all.",
    "--shared Share DIR with the same command elsewhere: each takes cells that none has.",
    "--patience SECONDS With --shared: after so much silence of another computer its cells are taken over. Default: 300. [x>=1]",
    "--max-error FLOAT RANGE With --lower: how far a lowered model may be from the weights judged; lets 8-bit kernels in. [0<x<=1]",
]
_TOLERANCE = (
    "--tolerance FLOAT RANGE How far a layer may be from dense (relative, root mean square): lets 8-bit kernels in, from about "
    "0.01 on. [0<x<=1]"
)
_MAX_ERROR = (
    "--max-error FLOAT RANGE How far the whole model's output may be from dense: lets 8-bit kernels in, as many as fit. "
    "[0<x<=1]"
)
_FUSE = """--fuse-projections / --no-fuse-projections
Layers that take the same tensor (query, key, value) as one product. Default: on a GPU."""
_LOWERING = [_TOLERANCE, _MAX_ERROR, *_FUSE.splitlines()]
NEW_HELP["compressor plan"] = [
    *NEW_HELP.get("compressor plan", []),
    "The time of evaluation, and of the whole, is told too.",
    *_LOWERING,
]
NEW_HELP["compressor lower"] = [
    "--no-compiled Leave them out on a GPU too, where they are tried by default.",
    *_LOWERING,
]
NEW_HELP["compressor bench"] = f"""
{_TOLERANCE}
{_MAX_ERROR}
{_FUSE}
A pipeline's run can also be drawn with caches and fewer steps, dense and sparse, from the same noise: its report then shows the time of each against what the pictures lose.
--cache NAME[:KEY=VALUE]… Of a pipeline's run: also with this cache of diffusers, e.g. first-block:threshold=0.1. May be repeated.
--steps N,N,… Of a pipeline's run: also with these numbers of sampler steps.
""".strip().splitlines()  # noqa: E501
NEW_HELP["compressor export"] = [
    "--to tensorrt-ready writes float16 (with --int8, 8 bits around products of 2:4) to RUN/tensorrt.onnx, and beside it the command "
    "that builds an engine, and which layers TensorRT may take as sparse.",
    "--batch N tensorrt-ready: what the engine is tuned for. [default: 16] [x>=1]",
]
NEW_HELP["compressor merge-lora"] = _MERGE_LORA.strip().splitlines()
NEW_HELP["compressor record"] = _RECORD.strip().splitlines()
NEW_HELP["compressor report"] = [
    "Given several finished RUNs, it shows their reports side by side. Nothing is trained or measured again; quality is compared "
    "where model, data and metric are the same.",
    "--out DIR Of several runs: write their pages there.",
]
_LOG_WITH = "--log-with NAME Send the steps to tensorboard, wandb, trackio or mlflow too. May be repeated."
NEW_HELP["compressor run"] = [*NEW_HELP["compressor run"], _LOG_WITH, *_LOWERING]
NEW_HELP["compressor resume"] = [_LOG_WITH]
NEW_HELP["compressor doctor"] = """
Usage: compressor doctor [OPTIONS]
Look at this machine: hardware, kernels, versions, what is missing and the command that gets it.
Nothing is changed, downloaded or measured.
Options:
--json Print the result as JSON.
-q, --quiet No progress.
--debug Show the traceback of an error.
-h, --help Show this message and exit.
""".strip().splitlines()
NEW_HELP["compressor push"] = """
Usage: compressor push [OPTIONS] RUN [OWNER/NAME]
Upload a finished run's model to the hub of Hugging Face, with samples and a model card from its report.
`compressor.load("OWNER/NAME")` reads it there. A repository that is there already keeps its visibility.
Options:
--public A repository that everybody sees. Default: a private one.
--revision BRANCH Upload to this branch, which is made where it is not there.
--message TEXT Of the commit. [default: Upload by compressor]
--folder DIR Write the folder, and upload nothing.
--json Print the result as JSON.
-q, --quiet No progress.
--debug Show the traceback of an error.
-h, --help Show this message and exit.
""".strip().splitlines()
NEW_HELP["compressor"] = [
    "doctor Look at this machine: hardware, kernels, versions, what is missing and the command that gets it.",
    "push Upload a finished run's model to the hub of Hugging Face, with samples and a model card from its report.",
    "record Run PIPELINE and keep every call of its denoiser: what it was told, and what it answered.",
    "merge-lora Merge a LoRA of your own into the sparse model of a run, under its masks.",
]
"""The lines that a command's help has gained, such as "compressor run": ["--option TEXT What it does."]."""
NEW_HELP["compressor train"] = """
Usage: compressor train [OPTIONS]
Train a dense model from random weights, to be pruned then.
Its size: --set architecture.embed_dim=256 and the like; docs/training.md. Prune it with `compressor run --weights DIR`.
Options:
--config FILE A recipe (YAML).
--model NAME uvit, ddpm or dit, which take the size of the data; any other of `compressor list models`.
--data PATH|NAME A folder of pictures, CIFAR, .npz, … (docs/data.md), or a bundled set.
--vae DIR An AutoencoderKL of diffusers, for models of latents: it encodes pictures.
--steps INTEGER Steps of training.
--seed INTEGER Seed of everything random.
--device TEXT auto, cpu, cuda, cuda:1, …
--dtype TEXT auto, float32 or bfloat16 (autocast).
--set KEY=VALUE Any setting, e.g. train.lr=1e-4.
--quick A look: few samples, the metric alone, few rounds of timing.
--full For publication: as many samples as real images, whatever it costs.
--log-with NAME Send the steps to tensorboard, wandb, trackio or mlflow too. May be repeated.
-o, --out DIR Default: runs/MODEL-trained.
--overwrite Replace a former run in DIR; other files in it stay.
--json Print the result as JSON.
-q, --quiet No progress.
--debug Show the traceback of an error.
-h, --help Show this message and exit.
""".strip().splitlines()
NEW_HELP["compressor evaluate"] = """
Usage: compressor evaluate [OPTIONS] RUN
Judge a finished run again, in another way: its report is made anew, its model stays.
What is not given stays as it was. A run with `--lower`, or one that was benched, is timed again, too.
Options:
--samples INTEGER RANGE Images per row; 0 draws none. [x>=0]
--metric NAME `compressor list metrics` shows all.
--sampler NAME ddim, ddpm, dpm-solver++, unipc, euler-maruyama.
--spacing NAME Of ddim's timesteps: uniform, trailing, quadratic.
--sampler-steps INTEGER RANGE Steps of the sampler. [1<=x<=999]
--guidance FLOAT RANGE Scale of classifier-free guidance; 1 is none. [x>=0]
--inception-weights FILE Measure FID with these weights (docs/metrics.md).
--quick A look: few samples, the metric alone, few rounds of timing.
--full For publication: as many samples as real images, whatever it costs.
--set KEY=VALUE Any setting of `evaluate`.
--json Print the result as JSON.
-q, --quiet No progress.
--debug Show the traceback of an error.
-h, --help Show this message and exit.
""".strip().splitlines()
NEW_HELP["compressor resume"] = [
    *NEW_HELP.get("compressor resume", []),
    "--set evaluate.KEY=VALUE Evaluate otherwise than the run says.",
]
NEW_HELP["compressor sample"] = [
    *NEW_HELP.get("compressor sample", []),
    "--class INTEGER RANGE Draw images of this class; may be repeated, in turn then. Default: each image's by chance. [x>=0]",
]
NEW_HELP["compressor"] = [
    *NEW_HELP.get("compressor", []),
    "evaluate Judge a finished run again, in another way: its report is made anew, its model stays.",
    "train Train a dense model from random weights, to be pruned then.",
]


def lines(text: str | list[str]) -> list[str]:
    """Lines that say something, however wide their columns are."""
    return [" ".join(line.split()) for line in (text.splitlines() if isinstance(text, str) else text) if line.strip()]


def help_of(command: str) -> list[str]:
    _, *arguments = command.split()
    shown = io.StringIO()
    with redirect_stdout(shown):
        app.main([*arguments, "--help"], prog_name="compressor", standalone_mode=False, terminal_width=1000)
    return lines(shown.getvalue())


def test_the_package_offers_the_names_that_it_did() -> None:
    assert set(compressor.__all__) == set(BEFORE["names"]) | NEW_NAMES
    assert [name for name in compressor.__all__ if not hasattr(compressor, name)] == []


def test_entry_points_are_those_that_were() -> None:
    names = {group: set(entries) for group, entries in PROJECT["entry-points"].items()}
    before = {group: set(entries) for group, entries in BEFORE["entry_points"].items()}
    groups = before.keys() | NEW_ENTRY_POINTS.keys()
    assert names == {group: before.get(group, set()) | NEW_ENTRY_POINTS.get(group, set()) for group in groups}


def test_the_console_script_is_the_one_that_was() -> None:
    assert PROJECT["scripts"] == BEFORE["scripts"]


@pytest.mark.parametrize("command", ["compressor", *(f"compressor {name}" for name in sorted(app.commands))])
def test_help_says_what_it_said(command: str) -> None:
    shown, new = help_of(command), NEW_HELP.get(command, [])
    assert [line for line in new if line not in shown] == []
    assert [line for line in shown if line not in new] == lines(BEFORE["help"].get(command, []))


def test_no_command_is_gone() -> None:
    assert BEFORE["help"].keys() <= {"compressor", *(f"compressor {name}" for name in app.commands)}


@pytest.mark.parametrize("module", ["compressor", "compressor.cli"])
def test_the_module_is_the_command_line_under_its_own_name(module: str) -> None:
    command = [sys.executable, "-m", module, "resume"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["error: Missing argument 'RUN'.", "See compressor resume --help"]
