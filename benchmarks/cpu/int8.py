"""V:2:4 weights in 8 and 7 bits against the same in float32, dense float32, and ONNX Runtime in 8 bits, layer by layer on one thread.

    OMP_NUM_THREADS=1 python benchmarks/cpu/int8.py [--rounds 41] [--tokens 1028]

The layers of a U-ViT-S/2: each Linear, and its feed-forward pair with GELU between. Normal weights with V:2:4 masks, normal
inputs, seed 0; all forms of a layer take turns in one process, and a ratio is the median of those of single rounds. Errors
are root mean squares against float64, relative to the layer's own output. ONNX Runtime gets the dense layer, which is as
fast for it as the sparse one, quantised as `compressor export --int8` does it: weights of 7 bits, because with 8 its sums are
cut off on processors without VNNI.
Writes benchmarks/results/int8_cpu.json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from compressor import NM
from compressor.cost.timing import interleaved, iqr_ms, median_ms
from compressor.environment import environment
from compressor.export.int8 import quantize
from compressor.lower import Unit
from compressor.lower.chooser import relative
from compressor.lower.dense import OneDNN
from compressor.lower.vnm import VNM, VNMW7A8, VNMInt8, level

SEED = 0
CPU = torch.device("cpu")
LAYERS = {"512 -> 512": (512, 512), "512 -> 1536": (512, 1536), "512 -> 2048": (512, 2048), "2048 -> 512": (2048, 512)}
DENSE = ("float32 eager", "float32 prepacked", "ONNX Runtime float32")
PAIR = "512 -> 2048 -> GELU -> 512"


def layer(inner: int, out: int, pattern: NM, rng: torch.Generator) -> nn.Linear:
    """A Linear with normal weights that obey `pattern`, and a bias."""
    made = nn.Linear(inner, out).requires_grad_(False)
    weight = torch.randn(out, inner, generator=rng) / inner**0.5
    made.weight.copy_(pattern.mask(weight.abs()).apply(weight))
    made.bias.copy_(torch.randn(out, generator=rng))
    return made


def layers(pattern: NM, rng: torch.Generator) -> dict[str, nn.Module]:
    """The layers of a block, and its pair."""
    made: dict[str, nn.Module] = {name: layer(*sizes, pattern, rng) for name, sizes in LAYERS.items()}
    return made | {PAIR: nn.Sequential(layer(512, 2048, pattern, rng), nn.GELU(), layer(2048, 512, pattern, rng))}


def onnx_runtime(module: nn.Module, file: Path, int8: bool) -> Callable[[Tensor], Tensor]:
    """The layers of `module` in ONNX Runtime, on one thread."""
    torch.onnx.export(
        module,
        (torch.zeros(4, next(module.parameters()).shape[1]),),
        file,
        dynamo=True,
        verbose=False,
        input_names=["x"],
        dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=65536)},),
        external_data=False,
    )
    if int8:
        quantize(file, "benchmark")
        assert any(node.op_type == "MatMulInteger" for node in onnx.load(file).graph.node)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def measured(name: str, module: nn.Module, pattern: NM, tokens: int, rounds: int, x: Tensor) -> dict[str, Any]:
    """One layer: the median time and the error of every form."""
    count = sum(isinstance(m, nn.Linear) for m in module.modules())
    unit = Unit(name, module, tuple(x.shape), torch.float32, CPU, (pattern,) * count)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "7-bit sparse": VNMW7A8().build(unit),
        "int8 sparse": VNMInt8().build(unit),
        "float32 sparse": VNM().build(unit),
        "float32 eager": module,
        "float32 prepacked": OneDNN().build(unit),
    }
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        as_matrices = Matrices(module).eval()  # quantisation takes products of matrices, and leaves Gemm alone
        forms["ONNX Runtime float32"] = onnx_runtime(as_matrices, Path(one) / "layer.onnx", int8=False)
        forms["ONNX Runtime int8"] = onnx_runtime(as_matrices, Path(other) / "layer.onnx", int8=True)
        wanted = x.double()
        for step in [module] if isinstance(module, nn.Linear) else module:
            linear = isinstance(step, nn.Linear)
            wanted = nn.functional.linear(wanted, step.weight.double(), step.bias.double()) if linear else step(wanted)
        errors = {key: relative(form(x), wanted) for key, form in forms.items()}
        seconds = interleaved([lambda f=form: f(x) for form in forms.values()], rounds, CPU)  # type: ignore[misc]
    times = dict(zip(forms, seconds, strict=True))
    medians = {key: median_ms(own) for key, own in times.items()}
    best = min(DENSE, key=medians.__getitem__)
    return {
        "layer": name,
        "pattern": str(pattern),
        "tokens": tokens,
        "median_ms": medians,
        "iqr_ms": {key: iqr_ms(own) for key, own in times.items()},
        "error": errors,
        "best_dense": best,
        **{
            f"{sparse} over": {
                key: median(other / own for other, own in zip(times[form], times[sparse], strict=True))
                for key, form in (("float32 sparse",) * 2, ("best float32 dense", best), ("ONNX Runtime int8",) * 2)
            }
            for sparse in ("7-bit sparse", "int8 sparse")
        },
    }


class Matrices(nn.Module):
    """Linears as plain products, x (tokens, in) times weight^T, plus bias."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.steps = nn.ModuleList([module] if isinstance(module, nn.Linear) else list(module.children()))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.matmul(x, step.weight.t()) + step.bias if isinstance(step, nn.Linear) else step(x)
        return x


@click.command()
@click.option("--rounds", default=41, show_default=True)
@click.option("--tokens", default=4 * 257, show_default=True)
@click.option("--patterns", default="4:2:4,2:2:4", show_default=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path(__file__).parents[1] / "results" / "int8_cpu.json",
    show_default=True,
)
@torch.no_grad()
def main(rounds: int, tokens: int, patterns: str, out: Path) -> None:
    """Measure every layer and write the JSON."""
    torch.set_num_threads(1)
    rows = []
    for text in patterns.split(","):
        pattern = NM(2, 4, int(text.partition(":")[0]))
        rng = torch.Generator().manual_seed(SEED)
        for name, module in layers(pattern, rng).items():
            x = torch.randn(tokens, int(name.split()[0]), generator=rng)
            rows.append(row := measured(name, module, pattern, tokens, rounds, x))
            over = ", ".join(f"{ratio:.2f}x over {key}" for key, ratio in row["7-bit sparse over"].items())
            click.echo(f"{pattern} {name}: {row['median_ms']['7-bit sparse']:.2f} ms, {over}")
    about = environment()
    about["versions"]["onnxruntime"] = onnxruntime.__version__
    result = {**about, "level": level(), "seed": SEED, "rounds": rounds, "threads": 1, "rows": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
