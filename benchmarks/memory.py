"""How much memory one-shot pruning takes beside the model: a random model of 1 GiB in float16, pruned in place.

    python benchmarks/memory.py --out benchmarks/results/memory.json

Reported are the most that the process held while it pruned, less what it held before: with the model and its records there, and
nothing done yet. What the method keeps of its calibration (`memory_mb` for Hessians, and the largest layer's) is told beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import compressor
from compressor.environment import environment
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.obs import OBS

GIB = 2**30


def held(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def forget() -> None:
    """Let the most that was held begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def model(layers: int) -> torch.nn.Module:
    """PixArt's transformer at its published width, with as many layers as make 1 GiB of float16."""
    import diffusers

    torch.set_default_dtype(torch.float16)
    try:
        made = diffusers.PixArtTransformer2DModel(
            num_layers=layers, num_attention_heads=16, attention_head_dim=72, sample_size=8, in_channels=4, out_channels=8,
            caption_channels=64, cross_attention_dim=1152,
        )  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    return made.to(torch.float16).eval()


class Calls(compressor.Adapter):
    """Random calls of the model, of 16 tokens each."""

    def noised(self, batch, rng):
        n = len(batch)
        given = {
            "hidden_states": torch.randn(n, 4, 8, 8, generator=rng).half(),
            "encoder_hidden_states": torch.randn(n, 8, 64, generator=rng).half(),
            "timestep": torch.full((n,), 500),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        return given, torch.zeros(n, 8, 8, 8)

    def predict(self, module, inputs):
        return module(**inputs, return_dict=False)[0]


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--layers", type=int, default=25)
    options.add_argument("--memory-mb", type=int, default=1024)
    options.add_argument("--timesteps", type=int, default=2)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    facts = {"environment": environment(torch.device("cpu")), "threads": torch.get_num_threads(), "runs": []}
    rule = ["re:transformer_blocks.*(attn|ff)"]
    for pruner in (Magnitude(), OBS(timesteps=given.timesteps, memory_mb=given.memory_mb)):
        torch.manual_seed(0)
        made = model(given.layers)
        size = sum(value.nbytes for value in made.parameters())
        data = [torch.zeros(1)]
        largest = max(
            8 * layer.weight[0].numel() ** 2
            for layer in compressor.choose_layers(made, pruner, Calls(), rule, None)
            if layer.reason is None
        )
        forget()
        before, began = held("VmRSS"), time.perf_counter()
        result = compressor.prune_(made, pruner, adapter=Calls(), data=data, targets=rule)
        seconds, most = time.perf_counter() - began, held("VmHWM")
        calibration = max(given.memory_mb * 2**20, largest) if isinstance(pruner, OBS) else 0
        for name, mask in result.masks.items():
            mask.pattern.verify(made.get_parameter(name))
        facts["runs"].append(
            {
                "method": type(pruner).__name__.lower(),
                "model_bytes": size,
                "masked_weights": len(result.masks),
                "before_bytes": before,
                "most_bytes": most,
                "beyond_model_bytes": most - before,
                "calibration_bytes": calibration,
                "beyond_model_and_calibration_gib": round((most - before - calibration) / GIB, 3),
                "seconds": round(seconds, 1),
            }
        )
        print(json.dumps(facts["runs"][-1]), flush=True)
        del made, result
    if given.out is not None:
        given.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
