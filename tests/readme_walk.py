"""The README as a new user walks it: every command of its blocks, as written, one after another, in a folder with what it names.

    python tests/readme_walk.py PYTHON [--folder DIR] [--whole] [--log FILE]

`PYTHON` is that of an environment where the package is installed, from a wheel perhaps: nothing of this repository is on its path.
Without `--whole` each command is followed by settings that make it short (few steps, few samples), else it is as it stands. What is
bundled with nothing stands in for what a user brings: a tiny pipeline, random weights in the published formats, made-up pictures.
Exit code 1 where a command fails, or where what it promises is not there; the log has every command with its time and output.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
_JUDGED = "evaluate.samples=8 evaluate.sampler_steps=2 evaluate.bootstrap=2 evaluate.latency_rounds=2"
_TRAINED = f"train.batch_size=4 {_JUDGED}"
_RECORDED = "record.n=2 record.unseen=1 record.steps=2"
SHORTER = {
    "run": ("--steps 2", _TRAINED),
    "train": ("--steps 2", f"{_TRAINED} architecture.embed_dim=32 architecture.depth=2 architecture.num_heads=2"),
    "compare": ("--steps 2 --seeds 1", _TRAINED),
    "evaluate": ("--samples 8", "evaluate.sampler_steps=2 evaluate.bootstrap=2 evaluate.latency_rounds=2"),
    "bench": ("--no-compiled", ""),
    "plan": ("--steps 2 --no-lower", _TRAINED),
    "sample": ("--n 4 --steps 2", ""),
    "export": ("", ""),
}
"""By command: what is put behind it, and the settings that are."""
LEFT = (
    "runs/*/report.html",
    "runs/*/model/model.safetensors",
    "runs/compare-*/report.html",
    "runs/*/pipeline/model_index.json",
    "runs/*/model.onnx",
)
"""What must be there at the end."""


def blocks(language: str) -> list[str]:
    """The README's blocks of `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def block(language: str, holding: str) -> str:
    """The one that has `holding` in it."""
    return next(text for text in blocks(language) if holding in text)


def commands() -> list[str]:
    """Those of the README's blocks, without what is said beside them; all but how to install."""
    lines = [line for text in blocks("console") for line in text.splitlines()]
    return [
        shlex.join(shlex.split(line, comments=True)) for line in lines if line.startswith(("compressor ", "torchrun "))
    ]


def shorter(words: list[str]) -> list[str]:
    """A command, made short."""
    if words[0] == "torchrun":
        return [*_instead(words, "--nproc_per_node", "2"), *_settings(_TRAINED), "--steps", "2"]
    if "--batches" in words:  # may be given once
        words = _instead(words, "--batches", "1")
    flags, settings = SHORTER[words[1]]
    more = f"{settings} {_RECORDED}" if "--pipeline" in words and "--prompts" in words else settings
    if "--pipeline" in words and "--data" in words:
        more = "train.batch_size=2 record.unseen=1 evaluate.latency_rounds=2"
    if "--weights" in words and words[words.index("--weights") + 1].endswith(".pth"):  # a model of the published size
        more = more.replace("latency_rounds=2", "latency_rounds=0").replace("samples=8", "samples=2")
    one_shot = "--steps 0" in shlex.join(words)
    return [*words, *([] if one_shot else flags.split()), *_settings(more)]


def _instead(words: list[str], option: str, value: str) -> list[str]:
    """`words` with `value` in place of what follows `option`."""
    at = words.index(option) + 1
    return [*words[:at], value, *words[at + 1 :]]


def _settings(text: str) -> list[str]:
    return [part for setting in text.split() for part in ("--set", setting)]


@dataclass
class Walk:
    """A user with the interpreter `python`, in `folder`."""

    python: Path
    folder: Path
    log: Path

    def play(self, words: list[str]) -> None:
        """Do one command. Raises RuntimeError where it fails."""
        programs = str(self.python.parent)
        surroundings = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(self.folder), "HF_HUB_OFFLINE": "1"}
        surroundings |= {"COMPRESSOR_CACHE": str(self.folder / "cache"), "COLUMNS": "160", "PYTHONSAFEPATH": "1"}
        surroundings |= {name: os.environ[name] for name in ("OMP_NUM_THREADS", "LANG") if name in os.environ}
        shown, began = shlex.join(words), time.monotonic()
        if words[0] == "compressor":
            words = [str(self.python), "-m", "compressor", *words[1:]]
        elif words[0] == "torchrun":
            words = [str(self.python), "-m", "torch.distributed.run", *words[1:]]
        done = subprocess.run(
            words, cwd=self.folder, env=surroundings, capture_output=True, text=True, errors="replace", check=False
        )
        took = time.monotonic() - began
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shown}\n{done.stdout}{done.stderr}[exit code {done.returncode}, {took:.1f} s]\n\n")
        print(f"{took:6.1f} s  exit code {done.returncode}  {shown}", flush=True)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}: {shown}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")

    def python_blocks(self) -> None:
        """The README's two blocks of Python: the second one is a pruner, which `run --pruner` takes."""
        for name, holding in (("first.py", "compressor.prune("), ("my_pruner.py", "class MyPruner")):
            (self.folder / name).write_text(block("python", holding), encoding="utf-8")
            self.play([str(self.python), name])
        self.play(shorter(shlex.split("compressor run --pruner my_pruner.py:MyPruner --out runs/mine")))
        if not (self.folder / "sparse" / "model.safetensors").is_file():
            raise RuntimeError("compressor.save left no model")


def brought(folder: Path) -> None:
    """What a user has: made by this repository's own environment, not by the one that is tried."""
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    import tiny_pipelines
    import torch
    from PIL import Image

    from compressor import registry
    from compressor.model_zoo.ddpm.sizes import SCHEDULER

    rng = np.random.default_rng(0)
    saved = tiny_pipelines.saved("sd", folder / "path")
    saved.rename(saved.parent / "to-be")
    (folder / "path" / "to").mkdir()
    (saved.parent / "to-be").rename(folder / "path" / "to" / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(tiny_pipelines.PROMPTS) + "\n", encoding="utf-8")
    for name, caption in (("captioned-pictures", "a red cat"), ("photos", "")):
        (folder / name).mkdir()
        for number in range(12):
            Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(folder / name / f"{number}.png")
            if caption:
                (folder / name / f"{number}.txt").write_text(caption, encoding="utf-8")
    cifar = folder / "cifar-10-batches-bin"
    cifar.mkdir()
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        rows = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        (cifar / name).write_bytes(rows.tobytes())
    torch.manual_seed(0)
    torch.save(registry.adapter("uvit-cifar10").build().state_dict(), folder / "cifar10_uvit_small.pth")
    import diffusers

    unet = diffusers.UNet2DModel(
        sample_size=32,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    scheduler = diffusers.DDPMScheduler.from_config({k: v for k, v in SCHEDULER.items() if k != "_class_name"})
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder / "google" / "ddpm-cifar10-32")
    (folder / "recipe.yaml").write_text("model: uvit-digits\nmethod: sparsedm\n", encoding="utf-8")


def walk(python: Path, folder: Path, log: Path, whole: bool = False) -> None:
    """Raises RuntimeError at the first command that fails."""
    brought(folder)
    user = Walk(python, folder, log)
    for line in commands():
        words = shlex.split(line)
        user.play(words if whole else shorter(words))
    user.python_blocks()
    if missing := [pattern for pattern in LEFT if not list(folder.glob(pattern))]:
        raise RuntimeError(f"nothing like {missing[0]} is there")
    for report in folder.glob("runs/*/report.json"):
        json.loads(report.read_text(encoding="utf-8"))


def main() -> int:
    options = argparse.ArgumentParser(description="Walk through the README.")
    options.add_argument("python", type=Path)
    options.add_argument("--folder", type=Path, help="where; default: a temporary folder")
    options.add_argument("--whole", action="store_true", help="every command as it stands: hours")
    options.add_argument("--log", type=Path, default=Path("walk.log"))
    given = options.parse_args()
    given.log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="walk-") as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            walk(given.python.absolute(), folder, given.log.absolute(), given.whole)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
