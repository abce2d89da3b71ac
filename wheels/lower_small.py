"""Lowers small sparse models to the compiled kernels alone, and holds them against float64. Run by `wheels/check.py` where nothing
but the wheel and its dependencies is installed."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

import compressor
from compressor.lower.vnm_kernels import kernels
from compressor.sparsity.pattern import NM

EXACT = 1e-5
PATTERN = NM(1, 4, 8)
"""A quarter of the weights: no machine is so busy that the sparse kernels are not faster."""


def sparse(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.weight.data = PATTERN.mask(layer.weight.abs()).apply(layer.weight.data)
    return model.requires_grad_(False)


def main() -> None:
    if found := [name for name in ("cc", "gcc", "clang", "g++", "ld", "as") if shutil.which(name)]:
        sys.exit(f"there is a compiler here ({', '.join(found)}): this shows nothing")
    extension, remark = kernels()
    if extension is None:
        sys.exit(str(remark))
    print("python", sys.version.split()[0], "torch", torch.__version__, "in", Path(compressor.__file__).parent)
    print("environment:", *sorted(os.environ), "| level:", extension.level(), "| remark:", remark)
    torch.manual_seed(0)
    pair = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    convolution = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1))
    for model, x in ((sparse(pair), torch.randn(256, 512)), (sparse(convolution), torch.randn(4, 128, 32, 32))):
        lowered = compressor.lower(model, x, ["vnm"], cache=False)
        out, wanted = lowered.model(x), copy.deepcopy(model).double()(x.double())
        error = float((out.double() - wanted).norm() / wanted.norm())
        choices = [layer.choice for layer in lowered.plan.layers]
        print(type(model[0]).__name__, lowered.plan.choice, choices, f"error {error:.1e};", lowered.plan.reason)
        if not lowered.plan.lowered or set(choices) != {"vnm"} or not error < EXACT:
            sys.exit("the kernels were not used, or are wrong")


if __name__ == "__main__":
    main()
