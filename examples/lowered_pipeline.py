"""A lowered model in a pipeline: the same pictures from kernels that skip the zeros.

    python examples/lowered_pipeline.py

Whether it is faster, `lower` measures: the tiny model here is likely to stay dense, and the plan says why.
"""

import tempfile
from pathlib import Path

import torch
from tiny import pipeline

import compressor
from compressor.plugins.magnitude import Magnitude


def main() -> None:
    torch.manual_seed(0)
    pipe = pipeline()
    with tempfile.TemporaryDirectory() as folder:
        asked = [{"class_labels": [label]} for label in range(4)]
        records = compressor.record(pipe, asked, Path(folder) / "records", n=3, unseen=1, steps=2)
        # 4:2:4: four rows share their choice, which is what a CPU can run faster.
        result = compressor.prune(pipe, Magnitude(pattern=compressor.parse("4:2:4")), data=records, steps=0)

    example = compressor.example_inputs(pipe, class_labels=[3])
    lowered = compressor.lower(result.model, example)
    print(f"taken: {lowered.plan.choice} ({lowered.plan.reason})")
    pictures = []
    for model in (result, lowered):
        with compressor.apply(pipe, model):
            noise = torch.Generator().manual_seed(1)
            pictures.append(pipe([3], num_inference_steps=4, generator=noise, output_type="np").images)
    print(f"largest difference of a pixel: {abs(pictures[0] - pictures[1]).max():.1e}")


if __name__ == "__main__":
    main()
