"""Dense layers in few bits by the kernels here, against float32, oneDNN's int8, and the same layers at 8:2:4, layer by layer.

    python benchmarks/cpu/dense_bits.py [--rounds 41]

Layers of the UNet of Stable Diffusion 1.5 at 256 pixels, a picture with guidance; random weights as PyTorch makes them, normal inputs,
seed 0. All forms of a layer take turns in one process, and a ratio is the median of those of single rounds. oneDNN's int8 is torch's
own operators: weights with a scale per channel, inputs with one for all, found on each call. Errors are root mean squares relative to
the layer's own output. Writes benchmarks/results/dense_bits_cpu.json; kept to AVX2 (`COMPRESSOR_CPU_LEVEL=avx2
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`) give another `--out`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor, nn

from compressor import NM
from compressor.cost.timing import interleaved, iqr_ms, median_ms
from compressor.environment import environment
from compressor.lower import Unit
from compressor.lower.backend import Backend
from compressor.lower.chooser import relative
from compressor.lower.dense import OneDNN
from compressor.lower.vnm import VNMW7A8, VNMW8A8, level
from compressor.lower.vnm_dense import VNMDenseInt8, VNMDenseW7A8, VNMDenseW8A8
from compressor.sparsity.codes import quantised

SEED = 0
CPU = torch.device("cpu")
PATTERN = NM(2, 4, 8)
LAYERS: tuple[tuple[str, Callable[[], nn.Linear | nn.Conv2d], tuple[int, ...]], ...] = (
    ("2 x 1024 tokens, 320 -> 320", lambda: nn.Linear(320, 320), (2, 1024, 320)),
    ("2 x 1024 tokens, 320 -> 2560", lambda: nn.Linear(320, 2560), (2, 1024, 320)),
    ("2 x 256 tokens, 640 -> 640", lambda: nn.Linear(640, 640), (2, 256, 640)),
    ("2 x 64 tokens, 1280 -> 1280", lambda: nn.Linear(1280, 1280), (2, 64, 1280)),
    ("1x1, 640 -> 640, 16 x 16", lambda: nn.Conv2d(640, 640, 1), (2, 640, 16, 16)),
    ("1x1, 2560 -> 1280, 8 x 8", lambda: nn.Conv2d(2560, 1280, 1), (2, 2560, 8, 8)),
    ("3x3 of stride 2, 320 -> 320, 32 x 32", lambda: nn.Conv2d(320, 320, 3, 2, 1), (2, 320, 32, 32)),
    ("3x3, 640 -> 640, 16 x 16", lambda: nn.Conv2d(640, 640, 3, 1, 1), (2, 640, 16, 16)),
    ("3x3, 1280 -> 1280, 8 x 8", lambda: nn.Conv2d(1280, 1280, 3, 1, 1), (2, 1280, 8, 8)),
)


def onednn_int8(layer: nn.Linear | nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """The layer through torch's operators of oneDNN's int8; inputs become bytes by the lowest and the highest of all."""
    ops: Any = torch.ops.onednn
    codes, scales = quantised(layer.weight.detach().flatten(1), torch.int8)
    codes, scales = codes.view_as(layer.weight), scales.flatten()
    zeros, after = torch.zeros(len(scales), dtype=torch.int64), (1.0, 0, torch.float32, "none", [], "")

    def in_bytes(x: Tensor) -> tuple[Tensor, float, int]:
        low, high = (float(end) for end in torch.aminmax(x))
        scale = (high - low) / 255
        zero = round(-low / scale)
        return torch.quantize_per_tensor(x, scale, zero, torch.quint8).int_repr(), scale, zero

    if isinstance(layer, nn.Linear):
        packed = ops.qlinear_prepack(codes, None)
        return lambda x: ops.qlinear_pointwise(*in_bytes(x), packed, scales, zeros, layer.bias, *after)
    where = (list(layer.stride), list(map(int, layer.padding)), [1, 1], 1)
    packed = ops.qconv_prepack(codes, scales, 0.02, 128, *where, None)
    return lambda x: ops.qconv_pointwise(*in_bytes(x), packed, scales, zeros, layer.bias, *where, *after)


def measured(name: str, layer: nn.Linear | nn.Conv2d, shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """One layer: the median time and the error of every form. The sparse layer's error is from its own weights."""
    pruned = copy.deepcopy(layer)
    pruned.weight.copy_(PATTERN.mask(layer.weight.abs()).apply(layer.weight))
    unit = Unit(name, layer, shape, torch.float32, CPU, (None,))
    dense, sparse = (b if b.unavailable(CPU) is None else a for a, b in _BYTES)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "float32, eager": layer,
        "float32, prepacked": OneDNN().build(unit),
        "int8 of oneDNN": onednn_int8(layer),
        "vnm-dense-int8": VNMDenseInt8().build(unit),
        dense.name: dense.build(unit),
        f"{PATTERN}, {sparse.name}": sparse.build(replace(unit, module=pruned, patterns=(PATTERN,))),
    }
    x = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    wanted = copy.deepcopy(layer).double()(x.double())
    of_pruned = copy.deepcopy(pruned).double()(x.double())
    errors = {
        key: relative(form(x), of_pruned if key.startswith(str(PATTERN)) else wanted) for key, form in forms.items()
    }
    seconds = interleaved([lambda f=form: f(x) for form in forms.values()], rounds, CPU)  # type: ignore[misc]
    times = dict(zip(forms, seconds, strict=True))
    medians = {key: median_ms(own) for key, own in times.items()}
    best = min(("float32, eager", "float32, prepacked"), key=medians.__getitem__)
    of, to = times[dense.name], {"best float32": best, "int8 of oneDNN": "int8 of oneDNN"}
    pairs = {f"dense over {key}": (times[form], of) for key, form in to.items()}
    pairs[f"{PATTERN} over dense"] = (of, times[f"{PATTERN}, {sparse.name}"])
    return {
        "layer": name,
        "median_ms": medians,
        "iqr_ms": {key: iqr_ms(own) for key, own in times.items()},
        "error": errors,
        "ratios": {key: median(a / b for a, b in zip(*two, strict=True)) for key, two in pairs.items()},
    }


_BYTES: tuple[tuple[Backend, Backend], ...] = ((VNMDenseW7A8(), VNMDenseW8A8()), (VNMW7A8(), VNMW8A8()))
"""Dense and sparse: without VNNI, and with it."""


@click.command()
@click.option("--rounds", default=41, show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parents[1] / "results" / "dense_bits_cpu.json",
    show_default=True,
)
@torch.no_grad()
def main(rounds: int, out: Path) -> None:
    """Measure every layer and write the JSON."""
    rows = []
    for name, make, shape in LAYERS:
        torch.manual_seed(SEED)
        rows.append(row := measured(name, make().requires_grad_(False), shape, rounds))
        click.echo(f"{name}: " + ", ".join(f"{key} {ratio:.2f}x" for key, ratio in row["ratios"].items()))
    threads = torch.get_num_threads()
    result = {**environment(), "level": level(), "seed": SEED, "rounds": rounds, "threads": threads, "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
