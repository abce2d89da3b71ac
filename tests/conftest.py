"""What tests share: a tiny model with its adapter, and no way to the network."""

from __future__ import annotations

import os
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor, nn

from compressor import Adapter


class TinyAdapter(Adapter):
    """Noise prediction for a plain network on vectors: x + noise -> noise."""

    name = "tiny"

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        noise = torch.randn(batch.shape, generator=rng)
        return 0.8 * batch + 0.6 * noise, noise

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        out: Tensor = module(inputs)
        return out

    def example_inputs(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 16)


def tiny_model(seed: int = 0) -> nn.Sequential:
    """Two linear layers, 16 -> 32 -> 16."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


@pytest.fixture
def adapter() -> TinyAdapter:
    return TinyAdapter()


@pytest.fixture
def model() -> nn.Sequential:
    return tiny_model()


@pytest.fixture
def samples() -> Tensor:
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
