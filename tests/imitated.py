"""cuSPARSELt's two operators, imitated: they keep its contract and check it. And what goes through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor import NM
from compressor.lower import Unit

CUDA = torch.device("cuda", 0)
TWO_OF_FOUR = NM(2, 4)
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sparse_(layer: nn.Linear | nn.Conv2d, pattern: NM = TWO_OF_FOUR) -> Any:
    with torch.no_grad():
        layer.weight.copy_(pattern.mask(normal(*layer.weight.shape)).apply(layer.weight))
    return layer


def unit(
    module: nn.Module,
    shape: tuple[int, ...],
    pattern: NM | None = TWO_OF_FOUR,
    dtype: torch.dtype = BF16,
    device: torch.device = CUDA,
) -> Unit:
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return Unit("layer", module.to(dtype), shape, dtype, device, (pattern,) * len(layers))


def error(out: Tensor, wanted: Tensor) -> float:
    out, wanted = out.detach().double(), wanted.detach().double()
    return float((out - wanted).norm() / wanted.norm())


# --- The library, imitated. ---


class Library:
    """Packs as cuSPARSELt does in effect: the first two entries of four whose bits are not all zero; the rest is lost.

    `capability` is the GPU's: Hopper splits by segments (-1) or not at all, those before it never by segments.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability = capability
        self.calls: list[dict[str, Any]] = []
        self.fault: Callable[[Tensor], Tensor] = lambda out: out

    def compress(self, weight: Tensor) -> Tensor:
        assert weight.dim() == 2 and weight.is_contiguous()
        out, inner = weight.shape
        side = 32 if weight.dtype.itemsize == 1 else 16
        assert out % side == 0 and inner % side == 0
        groups = weight.float().view(out, inner // 4, 4)
        kept = (groups != 0) | groups.signbit()
        places = kept.to(torch.int8).argsort(dim=2, descending=True, stable=True)[..., :2].sort(dim=2).values
        values = groups.gather(2, places)
        return torch.cat([values.flatten(1), places.flatten(1).float()], dim=1).to(weight.dtype)

    def unpacked(self, packed: Tensor) -> Tensor:
        """The weight (out, inner) that `compress` was given, in float32."""
        out, inner = packed.shape
        values, places = packed.float().view(out, 2, inner // 4, 2).unbind(1)
        return torch.zeros(out, inner // 4, 4).scatter_(2, places.long(), values).flatten(1)

    def sparse_mm(
        self,
        packed: Tensor,
        right: Tensor,
        bias: Tensor | None = None,
        alpha: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
        alg_id: int = 0,
        split_k: int = 1,
        split_k_mode: int = -1,
    ) -> Tensor:
        self.calls.append({"tokens": right.shape[1], "alg_id": alg_id, "split_k": split_k, "mode": split_k_mode})
        eight = packed.dtype.itemsize == 1
        if self.capability[0] < 9 or split_k != -1:
            assert split_k == 1 or (split_k > 1 and self.capability[0] != 9), "split-K is not supported"
        assert not (torch.is_grad_enabled() and right.requires_grad), "it has no derivative"
        assert packed.dtype == right.dtype and right.dim() == 2 and alpha is None
        assert right.t().is_contiguous() and not right.is_contiguous()
        assert right.shape[1] > 0 and right.shape[1] % (16 if eight else 8) == 0
        assert (out_dtype == BF16) if eight else (out_dtype is None)
        assert bias is None or (bias.dtype == packed.dtype and bias.shape == packed.shape[:1])
        result = self.unpacked(packed) @ right.float()
        if bias is not None:
            result = result + bias.float()[:, None]
        result = self.fault(result.t()).t().to(out_dtype or packed.dtype)
        return result.t().contiguous() if transpose_result else result.contiguous()
