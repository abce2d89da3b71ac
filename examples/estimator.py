"""An estimator of your own: what gradient pruned weights receive.

    python examples/estimator.py
    compressor run --pruner examples/estimator.py:FadingPruner --steps 100

This one begins as the straight-through estimator and gives pruned weights less and less, the nearer to zero they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

import compressor
from compressor import NM, Estimator, Mask, Pattern, Pruner, registry


@dataclass(frozen=True)
class Fading(Estimator):
    """Pruned weights receive their gradient times |w| / (|w| + scale): those near zero stay where they are."""

    scale: float = 0.01

    def gradient(self, grad: Tensor, dense: Tensor, mask: Mask) -> Tensor:
        share = dense.abs() / (dense.abs() + self.scale)
        return mask.apply(grad) + mask.rest(grad * share)


@dataclass(frozen=True)
class FadingPruner(Pruner):
    """Magnitude masks, chosen anew at each step, with the estimator above."""

    pattern: Pattern = NM(2, 4)
    scale: float = 0.01

    @property
    def estimator(self) -> Estimator:  # type: ignore[override]
        return Fading(self.scale)

    def masks(self, weights: Mapping[str, Tensor], progress: float, previous: Mapping[str, Mask]) -> Mapping[str, Mask]:
        return self.pattern.masks({name: weight.abs() for name, weight in weights.items()}, previous)


def main() -> None:
    adapter, data = registry.adapter("uvit-digits"), registry.images("digits")
    for scale in (0.0, 0.01, 0.1):  # 0 is the straight-through estimator
        result = compressor.prune(
            adapter.load(None), FadingPruner(scale=scale), adapter=adapter, data=data, steps=20, batch_size=32
        )
        last = sum(step.loss for step in result.steps[-5:]) / 5
        flipped = sum(result.flipped.values()) / len(result.flipped)
        print(f"scale {scale}: loss {last:.3f}, share of the masks that changed {flipped:.2%}")


if __name__ == "__main__":
    main()
