"""NNI's mask pruners as baselines. Needs the extra `nni`, in an environment of its own."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch import Tensor, nn

from compressor.adapter import Adapter
from compressor.data.batches import Batches
from compressor.errors import CompressorError
from compressor.sparsity.estimator import Estimator, Exact
from compressor.sparsity.pattern import Mask, Unstructured
from compressor.training.engine import chosen
from compressor.training.pruner import Pruner, found

_PRUNERS = {"level": "LevelPruner", "l1-norm": "L1NormPruner", "l2-norm": "L2NormPruner", "fpgm": "FPGMPruner"}


@dataclass(frozen=True)
class NNI(Pruner):
    """Masks that NNI 3.0 chooses, once; fine-tuning then moves only what was kept.

    `algorithm`: `level` (the largest |w| of each layer), or whole output channels: `l1-norm`, `l2-norm`, `fpgm`. The channels
    are masked, not removed. `pattern` is the kept share of each layer; where NNI keeps more by rounding, the least of it goes.

    Source: https://github.com/microsoft/nni, version 3.0 (archived).
    """

    pattern: Unstructured = Unstructured(0.5)
    algorithm: Literal["level", "l1-norm", "l2-norm", "fpgm"] = "level"
    estimator: Estimator = Exact()
    chosen: Mapping[str, Tensor] = found(dict)

    def prepare(self, model: nn.Module, adapter: Adapter, batches: Batches) -> Self:
        algorithm = getattr(_nni(), _PRUNERS[self.algorithm])
        layers = chosen(model, self, adapter)
        settings = [{"op_names": [layer.module_name for layer in layers], "sparse_ratio": 1 - self.pattern.density}]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, masks = algorithm(copy.deepcopy(model), settings).compress()  # it wraps modules: of a copy
        return replace(self, chosen={layer.name: masks[layer.module_name]["weight"] for layer in layers})

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        if previous:
            return previous
        return {name: self.pattern.mask(self._score(name, weight)) for name, weight in weights.items()}

    def _score(self, name: str, weight: Tensor) -> Tensor:
        """NNI's choice first, and |w| within it."""
        size = weight.abs()
        if name not in self.chosen:
            return size
        return size + self.chosen[name].to(size) * (1 + size.max())


def _nni() -> Any:
    try:
        return importlib.import_module("nni.compression.pruning")
    except ImportError as error:
        raise CompressorError(
            f"the method nni needs NNI 3.0, which cannot be imported: {error}",
            'In an environment of its own: pip install "diffusion-compressor[nni]". It needs an older filelock than others do.',
        ) from error
