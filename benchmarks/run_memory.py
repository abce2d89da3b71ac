"""The memory of `compressor run --pipeline` and `export` at the size of Stable Diffusion 1.5: random weights of its very sizes.

    python benchmarks/run_memory.py --out benchmarks/results/run_memory.json

The UNet has 860 million weights in float32, the text encoder 123 and the autoencoder 84; pictures have 64 by 64 pixels, which saves
time and changes little of the memory: the weights are nearly all of it. Told is the most that the process held of its own (RssAnon of
Linux: without the files that it has mapped, such as the weights that it was given) in each stage, in a process for each command.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from compressor.cli import tables
from compressor.cli.app import main as compressor
from compressor.environment import environment

GIB = 2**30


def make(folder: Path) -> None:
    """A pipeline with Stable Diffusion 1.5's sizes and random weights, and a tokenizer of single letters."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    sizes = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768}
    text = CLIPTextConfig(**sizes, **ends, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77)
    blocks = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae=AutoencoderKL(
            **blocks, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77),
        scheduler=PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")


class Watch(threading.Thread):
    """Notes the most memory of each stage of a run, as its progress names them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stage, self.most = "start", dict[str, float]()
        shown = tables.Ticker.show

        def show(ticker, progress) -> None:
            self.stage = progress.stage
            shown(ticker, progress)

        tables.Ticker.show = show

    def run(self) -> None:
        while True:
            found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
            held = int(found[1]) * 1024 if found is not None else 0
            self.most[self.stage] = max(self.most.get(self.stage, 0), held)
            time.sleep(0.02)


def watched(command: Sequence[str], folder: Path) -> dict[str, float | dict[str, float]]:
    """The seconds and the memory of `command`, in a process of its own."""
    if (child := os.fork()) == 0:
        sys.argv = ["compressor", *command]
        watch = Watch()
        watch.start()
        began = time.perf_counter()
        try:
            compressor()
        except SystemExit as end:
            if end.code:
                os._exit(1)
        most = {stage: round(held / GIB, 2) for stage, held in watch.most.items()}
        found = {"seconds": round(time.perf_counter() - began, 1), "most_gib": max(most.values()), "stages_gib": most}
        (folder / "found.json").write_text(json.dumps(found))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    return json.loads((folder / "found.json").read_text())


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--method", default="magnitude")
    options.add_argument("--pattern", default="8:2:4")
    options.add_argument("--steps", type=int, default=0)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["COMPRESSOR_CACHE"] = str(folder / "cache")
        if (made := os.fork()) == 0:  # what making it takes is not the run's
            make(folder)
            os._exit(0)
        assert os.waitpid(made, 0)[1] == 0
        prompts = folder / "prompts.txt"
        prompts.write_text("a red cat\na blue house\nan old boat\n")
        own = ["--method", given.method, "--pattern", given.pattern, "--steps", str(given.steps)]
        small = {"record.n": 2, "record.unseen": 1, "record.steps": 2, "evaluate.latency_rounds": 0}
        small |= {"record.arguments.height": 64, "record.arguments.width": 64}
        settings = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
        run = str(folder / "run")
        source = ["--pipeline", str(folder / "pipeline"), "--prompts", str(prompts)]
        found = {"run": watched(["run", *source, *own, *settings, "--out", run], folder)}
        for what in ([], ["--int8"]):
            command = ["export", run, "--to", "onnx", *what]
            found[" ".join(["export", *what])] = watched([*command, "--out", str(folder / "model.onnx")], folder)
            (folder / "model.onnx").unlink()
        report = json.loads((folder / "run" / "report.json").read_text())
    facts = {
        "environment": environment(torch.device("cpu")),
        "method": given.method,
        "pattern": given.pattern,
        "steps": given.steps,
        "weights": report["rows"][0]["params"],
        **found,
    }
    print(json.dumps(facts, indent=1))
    if given.out is not None:
        given.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
