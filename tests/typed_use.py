"""What users write, for mypy alone (`make lint`): the public names have the types that they are used by."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

import compressor
from compressor import NM, Lowered, Result
from compressor.plugins.magnitude import Magnitude


def used(model: nn.Module, x: Tensor, adapter: compressor.Adapter, out: Path) -> tuple[Tensor, str]:
    result: Result = compressor.prune(model, Magnitude(NM(2, 4)), adapter=adapter, data=x, steps=0)
    compressor.save(out, result.model, result.masks)
    lowered: Lowered = compressor.lower(compressor.load(out, model), x, max_error=0.02)  # a package that is called
    answer: Tensor = lowered.model(x)
    return answer, lowered.plan.choice
