"""From a folder of pictures to a sparse model of them: `compressor train`, then `compressor run`.

    python examples/own_pictures.py --out runs/own

The folder is made of a few bundled pictures, to stand for yours. What is trained here is far too small and too short to draw anything.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from compressor import registry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/own"))
    parser.add_argument("--steps", type=int, default=30)
    arguments = parser.parse_args()
    tiny = "architecture.embed_dim=32 architecture.depth=2 architecture.num_heads=2 architecture.patch_size=8"
    small = "train.batch_size=16 evaluate.samples=16 evaluate.sampler_steps=4 evaluate.latency_rounds=2"
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "photos"
        write_pictures(photos, 60)
        data = ["--data", str(photos), "--set", "loading.size=32", "--steps", str(arguments.steps), *settings(small)]
        dense, sparse = arguments.out / "dense", arguments.out / "sparse"
        compressor("train", "--model", "uvit", *data, *settings(tiny), "--out", str(dense))
        compressor("run", "--weights", str(dense), *data, "--method", "sparsedm", "--out", str(sparse))
    print(f"look at {sparse / 'report.html'}")


def write_pictures(folder: Path, count: int) -> None:
    """Pictures of several classes, each in a subfolder of its class."""
    pictures = registry.images("pictures-32")
    for index in range(count):
        place = torch.tensor([index * (len(pictures) // count)])
        pixels, label = pictures.images(place)[0], int(pictures.labels[place])
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        array = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / str(label) / f"{index}.png")


def settings(text: str) -> list[str]:
    return [part for setting in text.split() for part in ("--set", setting)]


def compressor(*arguments: str) -> None:
    print("$ compressor", *arguments, flush=True)
    subprocess.run([Path(sys.executable).parent / "compressor", *arguments, "--quiet"], check=True)


if __name__ == "__main__":
    main()
