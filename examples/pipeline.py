"""Prune what denoises in a pipeline of diffusers, towards the pipeline's own answers, and draw with it.

    python examples/pipeline.py

Replace `tiny.pipeline()` by `DiffusionPipeline.from_pretrained("path/to/yours")`, and the labels by prompts.
"""

import tempfile
from pathlib import Path

import torch
from tiny import pipeline

import compressor
from compressor.plugins.obs import OBS


def main() -> None:
    torch.manual_seed(0)
    pipe = pipeline()
    asked = [{"class_labels": [label]} for label in range(8)]  # for pipelines of text: prompts, as plain strings
    with tempfile.TemporaryDirectory() as folder:
        # 1. Run the pipeline and keep every call of its denoiser: six pictures to learn from, two to be judged on.
        records = compressor.record(pipe, asked, Path(folder) / "records", n=6, unseen=2, steps=4)
        # 2. Prune to 2:4 by second-order information, and fine-tune towards the recorded answers.
        result = compressor.prune(pipe, OBS(timesteps=4), data=records, steps=10, lr=3e-4)
        sparse = sum(int(mask.keep.numel() - mask.keep.sum()) for mask in result.masks.values())
        print(f"{len(result.masks)} layers are 2:4, {sparse:,} weights are zero")
        # 3. Draw with it. The pipeline is as it was after the block.
        noise = torch.Generator().manual_seed(1)
        with compressor.apply(pipe, result):
            picture = pipe([3], num_inference_steps=4, generator=noise).images[0]
        print(f"a picture of {picture.size[0]}x{picture.size[1]}")
        # 4. Keep it. `compressor run --pipeline` writes a whole pipeline folder as well.
        compressor.save(Path(folder) / "sparse", result.model, result.masks)


if __name__ == "__main__":
    main()
