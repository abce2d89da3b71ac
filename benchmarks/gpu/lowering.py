"""2:4 on a GPU: lowered models against dense ones in bfloat16, as they are, compiled, and replayed as CUDA graphs.

    python benchmarks/gpu/lowering.py --models uvit-s,uvit-l --batches 1,16
    python benchmarks/gpu/lowering.py --dry-run            # anywhere: which layers qualify, and what to expect of them

Random weights and inputs, forms that take turns, medians. A cell is one model at one batch; it is written as soon as it is
measured, and one that does not fit into memory or time is left out with a note. Adds to benchmarks/gpu/lowering.json.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from compressor import NM, CompressorError, registry
from compressor.cost.timing import interleaved, iqr_ms, median_ms
from compressor.environment import environment
from compressor.lower import lower, units
from compressor.lower.chooser import relative
from compressor.lower.cusparselt import CuSparseLt
from compressor.lower.cusparselt_tuning import SECONDS_VARIABLE
from compressor.lower.graphs import captured
from compressor.lower.job import in_dtype
from compressor.lower.plan import Plan
from compressor.lower.units import Found, find_units, put
from compressor.model_zoo.uvit.sizes import cifar10, imagenet256_h, imagenet256_l

OUT = Path(__file__).parent / "lowering.json"
PATTERN = NM(2, 4)
TOLERANCES = {"cusparselt": None, "cusparselt-int8": 0.05, "cusparselt-fp8": 0.12}
"""The largest relative error of a layer: rounding, and what 8 bits with a scale for each token and channel come to."""
PUBLISHED = (
    (10, "loses"),
    (20, "breaks even"),
    (40, "1.2x to 1.3x"),
    (80, "1.35x to 1.5x"),
    (float("inf"), "1.5x to 1.65x"),
)
"""Published for 2:4 in bfloat16 on an H100, both sides tuned, by GFLOP of a product. Not measured here; on an H200, whose dense
products are faster, the gain should begin later."""
ROUNDS, WARM_UP = 15, 3


@dataclass(frozen=True)
class Subject:
    """A model with random weights, what it is called with, and which of its layers are made 2:4."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    sparse: Callable[[str, nn.Module], bool]


def uvit(adapter: Any) -> Subject:
    """A U-ViT; its blocks' linears are sparse, as its authors' sparse fine-tuning has it."""

    def inputs(batch: int) -> tuple[Any, ...]:
        labels = torch.zeros(batch, dtype=torch.int64) if adapter.num_classes else None
        return torch.randn(batch, *adapter.image_shape), torch.full((batch,), 500.0), labels

    return Subject(adapter.build, inputs, lambda name, module: ".attn." in name or ".mlp." in name)


def dit() -> Subject:
    """DiT-XL/2 for 256x256 images: diffusers' DiTTransformer2DModel with the published model's sizes."""

    def build() -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            **{"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32},
            **{"in_channels": 4, "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000},
            **{"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "attention_bias": True},
        )

    def inputs(batch: int) -> tuple[Any, ...]:
        return torch.randn(batch, 4, 32, 32), torch.full((batch,), 500), torch.zeros(batch, dtype=torch.int64)

    return Subject(build, inputs, lambda name, module: ".attn1." in name or ".ff." in name)


def ddpm() -> Subject:
    """The DDPM UNet for CIFAR-10, with the sizes of google/ddpm-cifar10-32. Every layer but the first and last is sparse."""

    def build() -> nn.Module:
        from diffusers import UNet2DModel

        return UNet2DModel(
            **{"sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2},
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            **{"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
            **{"norm_eps": 1e-6, "mid_block_scale_factor": 1},
        )

    def inputs(batch: int) -> tuple[Any, ...]:
        return torch.randn(batch, 3, 32, 32), torch.full((batch,), 500)

    return Subject(build, inputs, lambda name, module: name not in ("conv_in", "conv_out"))


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "uvit-s": lambda: uvit(cifar10()),
    "uvit-l": lambda: uvit(imagenet256_l()),
    "uvit-h": lambda: uvit(imagenet256_h()),
    "dit-xl": dit,
    "ddpm-cifar10": ddpm,
}


def sparse_names(model: nn.Module, subject: Subject) -> list[str]:
    """The layers that are made 2:4."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and subject.sparse(name, module)
        and PATTERN.misfit(tuple(module.weight.shape)) is None
    ]


def plain(model: nn.Module) -> Callable[..., Tensor]:
    """The model's call with a tensor in place of diffusers' output."""
    return lambda *inputs: next(leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor))


# --- What to expect, without a GPU. ---


def expected(gflop: float) -> str:
    """The published gain of a product of that size."""
    return next(text for limit, text in PUBLISHED if gflop < limit)


def layers(subject: Subject, batch: int) -> tuple[list[Found], list[str], float]:
    """The units of the model at that batch, the layers that are sparse, and the GFLOP of its products: on no device at all."""
    with torch.device("meta"):
        model = subject.build().to(torch.bfloat16).eval().requires_grad_(False)
        inputs = tree_map_only(Tensor, lambda x: x.to("meta"), subject.inputs(batch))
        inputs = tree_map_only(Tensor, lambda x: x.bfloat16() if x.dim() > 1 else x, inputs)
    # Zeros cannot be looked for where there are no numbers: what would be made 2:4 is told by name.
    found, _ = find_units_without_numbers(model, lambda: plain(model)(*inputs))
    return found, sparse_names(model, subject), sum(gflops(one)[1] for one in found)


def find_units_without_numbers(model: nn.Module, forward: Callable[[], Any]) -> Any:
    """`find_units`, with no pattern in any weight."""
    looked, units.pattern_of = units.pattern_of, lambda weight: None
    try:
        return find_units(model, forward)
    finally:
        units.pattern_of = looked


def gflops(one: Found) -> tuple[list[float], float]:
    """GFLOP of each product of a unit, and their sum."""
    shape, each = one.unit.input_shape, []
    for layer in one.unit.layers:
        if isinstance(layer, nn.Conv2d):
            rows = layer(torch.empty(shape, dtype=one.unit.dtype, device="meta")).numel() // layer.out_channels
        else:
            rows = torch.Size(shape).numel() // shape[-1]
        each.append(2e-9 * rows * layer.weight.numel())
    return each, sum(each)


def dry_run(models: list[str], batches: list[int]) -> None:
    """Print the layers that qualify, grouped by shape, with what is published for products of that size."""
    backend = CuSparseLt()
    for name in models:
        for batch in batches:
            subject = SUBJECTS[name]()
            found, sparse, total = layers(subject, batch)
            groups: dict[tuple[Any, ...], list[str]] = {}
            covered = 0.0
            for one in found:
                wanted = all(weight.rpartition(".")[0] in sparse for weight in one.weights)
                patterns = tuple(PATTERN if wanted else None for _ in one.unit.patterns)
                reason = backend.refusal(type(one.unit)(**{**vars(one.unit), "patterns": patterns}))
                each, sum_ = gflops(one)
                covered += 0.0 if reason else sum_
                sizes = " + ".join("x".join(map(str, layer.weight.shape)) for layer in one.unit.layers)
                text = reason or ", ".join(expected(g) for g in dict.fromkeys(each))
                groups.setdefault((sizes, one.unit.input_shape, round(sum_, 2), text), []).append(one.at)
            click.echo(
                f"\n{name}, batch {batch}: {total:.0f} GFLOP in products, {covered / total:.0%} of them 2:4 on a GPU"
            )
            for (sizes, shape, sum_, text), names in groups.items():
                click.echo(f"  {len(names):4} x {sizes:32} input {shape!s:22} {sum_:9.2f} GFLOP  {text}")
    click.echo("\nGains are those published for an H100 (bfloat16, tuned, per product). Nothing above was measured.")


# --- Measuring. ---


def made_sparse(subject: Subject, device: torch.device) -> nn.Module:
    """The model with random weights, its layers' smallest halves of every four removed, in float32 on `device`."""
    torch.manual_seed(0)
    model = subject.build().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():  # some layers begin as zeros, on which hardware is faster
            nn.init.normal_(parameter, std=0.02)
    for name in sparse_names(model, subject):
        weight: Any = model.get_submodule(name).weight
        weight.copy_(PATTERN.mask(weight.abs()).apply(weight))
    return model.to(device)


class Tensors(nn.Module):
    """A model that takes and gives tensors, in the dtype of its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Tensor:
        return plain(self.model)(*inputs)


def replayed(model: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], object]:
    """A replay of the model's forward: what a sampler with a graph pays, without the copies in and out."""
    return captured(lambda given: model(*given), inputs).replay


@dataclass(frozen=True)
class Session:
    """Where a cell is measured, with what, and until when."""

    device: torch.device
    backends: list[str]
    end: float

    @property
    def over(self) -> bool:
        """Whether nothing more shall be begun."""
        return time.monotonic() > self.end


def forms(
    subject: Subject, batch: int, session: Session, notes: list[str], plans: dict[str, Plan]
) -> Iterator[tuple[str, Callable[[], object], float]]:
    """The forms of one cell: name, call, and relative error against float32."""
    device = session.device
    model = Tensors(made_sparse(subject, device))
    inputs = tree_map_only(Tensor, lambda x: x.to(device), subject.inputs(batch))
    step = max(1, batch // 16)  # float32 takes twice the memory: a part of the batch is enough to compare with
    few = tree_map_only(Tensor, lambda x: x[::step], inputs)
    wanted = model(*few)
    dense = in_dtype(model, torch.bfloat16)
    cast = tree_map_only(Tensor, lambda x: x.bfloat16() if x.dim() > 1 else x, inputs)

    def added(name: str, form: Any) -> Iterator[tuple[str, Callable[[], object], float]]:
        """A form as it is, and as a graph."""
        out = form(*inputs)
        error = relative(out[::step], wanted.double())
        del out
        if not error < 0.2:
            notes.append(f"{name}: its output differs by {error:.1e}: left out")
            return
        yield name, lambda: form(*inputs), error
        try:
            yield f"{name}, graph", replayed(form, inputs), error
        except CompressorError as failure:
            notes.append(f"{name}: {failure.message}")

    yield from added("dense", dense)
    compiled: Any = torch.compile(dense)
    yield from added("dense, compiled", compiled)
    for backend in session.backends:
        tolerance = TOLERANCES[backend]
        if reason := registry.backend(backend).unavailable(device):
            notes.append(f"{backend}: {reason}")
            continue
        if session.over:
            notes.append(f"{backend}: no time left")
            continue
        # Without a cached timing: a benchmark measures.
        result = lower(model, inputs, ["eager", backend], torch.bfloat16, tolerance=tolerance, cache=False)
        plans[backend] = result.plan
        if not any(layer.skips_zeros for layer in result.plan.layers):
            notes.append(f"{backend}: no layer gains")
        # Every layer that it takes, whether it gains alone or not: launching is what costs, and a graph has none of that.
        everywhere = on_backend(dense, backend, cast)
        yield from added(f"{backend} everywhere", everywhere)
        yield from added(f"{backend} everywhere, compiled", torch.compile(everywhere))
        if any(layer.skips_zeros for layer in result.plan.layers):
            chosen = on_backend(dense, backend, cast, {layer.name for layer in result.plan.layers if layer.skips_zeros})
            yield from added(f"{backend} chosen", chosen)
            yield from added(f"{backend} chosen, compiled", torch.compile(chosen))


def on_backend(dense: nn.Module, backend: str, inputs: Any, names: set[str] | None = None) -> nn.Module:
    """The model with every unit that `backend` takes on it, or those called `names`."""
    form = copy.deepcopy(dense)
    takes = registry.backend(backend)
    found, _ = find_units(form, lambda: form(*inputs))
    for one in found:
        if (names is None or one.at in names) and takes.refusal(one.unit) is None:
            form = put(form, one.at, takes.build(one.unit))
    return form


def cell(subject: Subject, batch: int, session: Session) -> dict[str, Any]:
    """One model at one batch."""
    device = session.device
    notes: list[str] = []
    plans: dict[str, Plan] = {}
    calls: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    with torch.no_grad():
        try:
            for name, call, error in forms(subject, batch, session, notes, plans):
                calls[name], errors[name] = call, error
        except torch.OutOfMemoryError as failure:
            notes.append(f"out of memory after {len(calls)} forms: {str(failure).splitlines()[0][:150]}")
        torch.cuda.empty_cache()
        times = interleaved(list(calls.values()), ROUNDS, device, WARM_UP) if calls else []
    measured = {
        name: {"median_ms": median_ms(seconds), "iqr_ms": iqr_ms(seconds), "error": errors[name]}
        for name, seconds in zip(calls, times, strict=True)
    }
    best = min((v["median_ms"] for name, v in measured.items() if name.startswith("dense")), default=None)
    for entry in measured.values():
        entry["speedup_over_best_dense"] = best / entry["median_ms"] if best else None  # type: ignore[assignment]
    return {
        "forms": measured,
        "plans": {name: plan.model_dump(mode="json") for name, plan in plans.items()},
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "notes": notes,
    }


@click.command()
@click.option("--models", default=",".join(SUBJECTS), show_default=True)
@click.option("--batches", default="1,16,64,256", show_default=True)
@click.option("--backends", default=",".join(TOLERANCES), show_default=True)
@click.option("--search-seconds", default=6, show_default=True, help="To search algorithms for a product.")
@click.option("--seconds", default=540.0, show_default=True, help="No form is begun after this.")
@click.option("--dry-run", "dry", is_flag=True, help="Print what qualifies. Needs no GPU.")
@click.option("--out", type=click.Path(path_type=Path), default=OUT, show_default=True)
def main(models: str, batches: str, backends: str, search_seconds: int, seconds: float, dry: bool, out: Path) -> None:
    names, sizes, chosen = models.split(","), [int(part) for part in batches.split(",")], backends.split(",")
    if unknown := (set(names) - set(SUBJECTS)) | (set(chosen) - set(TOLERANCES)):
        there = ", ".join([*SUBJECTS, *TOLERANCES])
        raise click.UsageError(f"unknown {', '.join(sorted(unknown))}; there are {there}")
    if dry:
        dry_run(names, sizes)
        return
    device = torch.device("cuda", 0)
    if reason := CuSparseLt().unavailable(device) if torch.cuda.is_available() else "torch finds no CUDA GPU":
        raise click.ClickException(reason)
    os.environ.setdefault(SECONDS_VARIABLE, str(search_seconds))
    session = Session(device, chosen, time.monotonic() + seconds)
    about = environment(device)
    about["versions"] |= {"cuda": torch.version.cuda, "cusparselt": torch.backends.cusparselt.version()}
    click.echo(f"{about['hardware']}; torch {torch.__version__}, cuSPARSELt {about['versions']['cusparselt']}")
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"cells": {}}
    if result.get("about", about) != about:
        raise click.ClickException(f"{out} was measured elsewhere, or with other versions: give another --out")
    result["about"] = about
    for name in names:
        for batch in sizes:
            if session.over:
                click.echo(f"{name}, batch {batch}: no time left; call again with --models {name} --batches {batch}")
                continue
            torch.cuda.reset_peak_memory_stats(device)
            found = cell(SUBJECTS[name](), batch, session)
            result["cells"][f"{name}, batch {batch}"] = found
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            click.echo(f"\n{name}, batch {batch} (peak {found['peak_gib']:.1f} GiB)")
            for form, entry in found["forms"].items():
                click.echo(
                    f"  {form:40} {entry['median_ms']:9.3f} ms  {entry['speedup_over_best_dense']:5.2f}x  "
                    f"error {entry['error']:.1e}"
                )
            for note in found["notes"]:
                click.echo(f"  note: {note}")
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
