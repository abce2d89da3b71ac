"""Lowered models beside every engine that a user of a CPU would take instead, side by side in one process.

    python benchmarks/cpu/opponents.py --out benchmarks/results/opponents_cpu.json

Random weights, pruned by magnitude: U-ViT-S/2 (4:2:4 in every Linear of the blocks), the DDPM UNet for CIFAR-10 (8:2:4 in every layer
that it fits), one block of DiT-XL/2 at 512 pixels, which is 1,024 tokens (4:2:4 in its attention and feed-forward), the autoencoder's
decoder of Stable Diffusion 1.5 (8:2:4 in its residual blocks and its attention), and the UNet (8:2:4 in the default targets), whose
cell takes half an hour and nearly 24 GiB of memory. The dense weights run
in PyTorch (eager, prepacked; in 8 bits by the kernels here), ONNX Runtime and OpenVINO, in float32 and int8 each; the pruned ones
lowered in float32, and with `max_error`, where 8-bit kernels may be taken. Errors are root mean square differences from the same
weights in eager float32, in standard deviations of the output. Cells of a former file stay unless they are measured again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import compressor
from compressor import registry
from compressor.adapter import Adapter
from compressor.cost.timing import side_by_side
from compressor.environment import environment
from compressor.export.engines import engines, opened, written
from compressor.lower.forms import dense_forms
from compressor.lower.job import lively
from compressor.lower.plan import Plan
from compressor.lower.vnm_kernels import level
from compressor.model_zoo.generic.layers import BLOCK_LAYERS
from compressor.sparsity.layers import select

CELLS = {
    "uvit-s2 4": ("U-ViT-S/2, 32x32", "4:2:4", 4),
    "uvit-s2 1": ("U-ViT-S/2, 32x32", "4:2:4", 1),
    "ddpm-cifar10 4": ("DDPM UNet, CIFAR-10", "8:2:4", 4),
    "ddpm-cifar10 1": ("DDPM UNet, CIFAR-10", "8:2:4", 1),
    "dit-xl-2-block 1": ("one block of DiT-XL/2, 1,024 tokens", "4:2:4", 1),
    "sd15-decoder 1": ("decoder of Stable Diffusion 1.5, 128 pixels", "8:2:4", 1),
    "sd15 2": ("UNet of Stable Diffusion 1.5, 256 pixels", "8:2:4", 2),  # a picture with guidance
}
_LARGE = ("sd15",)
"""Models whose dense weights PyTorch runs in one form of float32 and one of 8 bits alone: each form holds the weights once more."""
_FEW_BITS = ", 8 bits"
"""What the names of dense forms in few bits by the kernels here end with."""

_TORCH = {
    "eager": "eager",
    "dense": "prepacked",
    "eager, compiled": "compiled",
    "dense, compiled": "prepacked, compiled",
    f"dense{_FEW_BITS}": f"prepacked{_FEW_BITS}",
    f"dense, compiled{_FEW_BITS}": f"prepacked, compiled{_FEW_BITS}",
}
"""What PyTorch's forms of the dense model are called here."""


class _Decoder(Adapter):
    """What makes pictures of latents, by the rule of layers that parts of pipelines have."""

    targets = (BLOCK_LAYERS,)

    def build(self) -> nn.Module:
        decoder: nn.Module = autoencoder().decoder
        return decoder

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def predict(self, model: nn.Module, inputs: Any) -> Tensor:
        return model(inputs)  # type: ignore[no-any-return]

    def example_inputs(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 4, 16, 16)


def autoencoder(widths: tuple[int, ...] = (128, 256, 512, 512)) -> Any:
    """That of Stable Diffusion 1.5, with random weights; or one of other `widths`."""
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4, **kinds)


def adapter_of(cell: str) -> Any:
    """The adapter of a cell's model; a DiT of one block."""
    name = cell.rpartition(" ")[0]
    if name == "sd15-decoder":
        return _Decoder()
    if name == "sd15":
        sizes = {"sample_size": 32, "cross_attention_dim": 768, "attention_head_dim": 8}
        plain: Any = registry.adapter("diffusers")
        return replace(plain, config={"_class_name": "UNet2DConditionModel", **sizes})  # type: ignore[no-any-return]
    if name == "dit-xl-2-block":
        whole: Any = registry.adapter("dit-xl-2-512")
        return replace(whole, config={**whole.config, "num_layers": 1})  # type: ignore[no-any-return]
    return registry.adapter({"uvit-s2": "uvit-cifar10"}.get(name, name))


def _dense(cell: str) -> nn.Module:
    """A cell's model, with the same random weights each time."""
    torch.manual_seed(0)
    return adapter_of(cell).build().eval()


@torch.no_grad()
def pruned(model: nn.Module, adapter: Adapter, pattern: str) -> int:
    """Prune in place what the adapter says that methods prune, U-ViT's skip_linear too, by magnitude. How many weights that were."""
    rule, weights = compressor.parse(pattern), dict(model.named_parameters())
    skips = ("*.skip_linear",) if any(".skip_linear." in name for name in weights) else ()
    targets = (*adapter.targets, *skips) if adapter.targets else ()
    taken = [one.name for one in select(model, rule, set(weights), targets, adapter.ignore) if one.reason is None]
    for name in taken:
        weights[name].copy_(rule.mask(weights[name].abs()).apply(weights[name]))
    return len(taken)


def _of_torch(dense: nn.Module, example: Any, plan: Plan, adapter: Adapter, large: bool) -> dict[str, nn.Module]:
    """PyTorch's forms of the `dense` weights that `plan` timed; of a `large` model one alone, compiled in few bits."""
    form = plan.form("dense, compiled")
    one = "dense, compiled" if form is not None and form.products else "dense"
    kept = [form.name for form in plan.forms if not large or form.name == one]
    found = dense_forms(dense, example, plan.only(kept), adapter=adapter)
    return {one: found[one]} if large else found


@torch.no_grad()
def measured(cell: str, folder: Path, rounds: int, max_error: float, compiled: bool) -> dict[str, Any]:
    _, pattern, batch = CELLS[cell]
    large = cell.rpartition(" ")[0] in _LARGE
    if large:  # in another process, and first: it takes much memory
        subprocess.run([sys.executable, __file__, "--only", cell, "--write", str(folder)], check=True)
    adapter, example = adapter_of(cell), adapter_of(cell).example_inputs(batch)
    sparse = _dense(cell)
    count = pruned(sparse, adapter, pattern)
    example = lively(example, partial(adapter.predict, sparse))  # on zeros, errors are small and products fast
    plans = {
        "lowered, float32": compressor.lower(sparse, example, adapter=adapter, compiled=compiled, cache=False),
        "lowered, 8 bits": compressor.lower(
            sparse, example, adapter=adapter, compiled=compiled, max_error=max_error, cache=False
        ),
    }
    wanted = {"sparse": adapter.predict(sparse, example)}
    del sparse  # a large model and all engines take much memory
    dense = _dense(cell)
    wanted["dense"] = adapter.predict(dense, example)
    calls = {}
    for plan, bits in (("lowered, float32", ""), ("lowered, 8 bits", _FEW_BITS)):
        for name, form in _of_torch(dense, example, plans[plan].plan, adapter, large).items():
            if (known := _TORCH.get(f"{name}{bits}")) and (not bits or name in plans[plan].plan.dense_in_few_bits):
                calls[known] = lambda form=form: adapter.predict(form, example)
    if large:
        del dense
        others, left = opened(folder, openvino=True)
        left |= json.loads((folder / "left.json").read_text())
    else:
        others, left = engines(dense, adapter, folder, openvino=True)
    calls |= {one.name: lambda one=one: one.run(example) for one in others}
    calls |= {name: lambda form=form: adapter.predict(form.model, example) for name, form in plans.items()}
    errors = {}
    for name, call in calls.items():
        own = wanted["sparse" if name.startswith("lowered") else "dense"]
        errors[name] = float((call() - own).square().mean().sqrt() / own.std())
    times = side_by_side(calls, rounds, torch.device("cpu"))
    medians = {name: own.median_ms for name, own in times.items()}
    found = {
        name: {
            **gains(name, medians, errors),
            "choice": form.plan.choice,
            "layers": dict(Counter(one.choice for one in form.plan.layers)),
        }
        for name, form in plans.items()
    }
    return {
        "model": CELLS[cell][0], "batch": batch, "pattern": pattern, "pruned": count, "max_error": max_error, "rounds": rounds,
        "seed": 0, "median_ms": medians, "iqr_ms": {name: own.iqr_ms for name, own in times.items()}, "error": errors,
        "left_out": left, "speedup": found,
    }  # fmt: skip


def gains(name: str, medians: Mapping[str, float], errors: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """What the lowered form `name` gains on other engines' dense forms: on the fastest that is no less exact, and on the fastest;
    and on the dense form of the kernels here in few bits, where there is one."""
    dense = [one for one in medians if not one.startswith("lowered")]
    own = [one for one in dense if one.endswith(_FEW_BITS)]
    others = [one for one in dense if one not in own]
    rivals = {
        "over the best no less exact": [one for one in others if errors[one] <= max(errors[name], 1e-4)],
        "over the fastest other engine": others,
        "over dense in few bits here": own if "8 bits" in name else [],
    }
    best = {title: min(names, key=medians.__getitem__) for title, names in rivals.items() if names}
    return {title: {rival: medians[rival] / medians[name]} for title, rival in best.items()}


def cells_of(out: Path | None, facts: Mapping[str, Any], same: Sequence[str]) -> dict[str, Any]:
    """The cells that the file `out` has from before; it must have been measured with the `same` of these facts."""
    former = json.loads(out.read_text()) if out is not None and out.exists() else {"cells": {}}
    if differ := [name for name in same if former.get(name, facts[name]) != facts[name]]:
        raise click.UsageError(f"{out} was measured with another {' and '.join(differ)}: write to another file")
    found: dict[str, Any] = former["cells"]
    return found


@click.command()
@click.option("--only", type=click.Choice(list(CELLS)), multiple=True, help="These cells alone.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--max-error", default=0.05, show_default=True)
@click.option("--compiled", is_flag=True, help="Forms under torch.compile too; takes minutes.")
@click.option("--write", type=click.Path(path_type=Path), hidden=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    only: tuple[str, ...], rounds: int, max_error: float, compiled: bool, write: Path | None, out: Path | None
) -> None:
    from importlib.metadata import version

    if write is not None:
        left = written(_dense(only[0]), adapter_of(only[0]), write, openvino=True)
        (write / "left.json").write_text(json.dumps(left))
        return
    facts: dict[str, Any] = environment(torch.device("cpu"))
    facts["versions"] |= {name: version(name) for name in ("onnxruntime", "openvino", "nncf")}
    hidden = os.environ.get("BENCHMARK_HIDES")  # by without_avx512.py
    facts |= {"threads": torch.get_num_threads(), "level": level(), "hidden": hidden}
    facts["cells"] = cells_of(out, facts, ("hardware", "level", "hidden"))
    for cell in only or CELLS:
        with tempfile.TemporaryDirectory() as folder:
            facts["cells"][cell] = measured(cell, Path(folder), rounds, max_error, compiled)
        click.echo(json.dumps({cell: facts["cells"][cell]}, indent=1))
        if out is not None:
            out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
