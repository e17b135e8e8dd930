"""The model whose sizes the benchmarks use, and the device that they run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Sizes of a dense decoder; on CPU activations and caches are float32, as the engine's are there."""

    device: torch.device
    weights: torch.dtype
    activations: torch.dtype
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    tokens: int  # of operations that work token by token: enough to leave the caches

    def random(self, *shape: int) -> Tensor:
        """Activations."""
        return torch.randn(*shape, dtype=self.activations, device=self.device)

    def weight(self, rows: int, columns: int) -> Tensor:
        weight: Tensor = torch.randn(rows, columns, device=self.device) / columns**0.5
        return weight.to(self.weights)

    def ints(self, values: Tensor | list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self.device)


def cpu_setup() -> Setup:
    """Qwen2.5-0.5B's sizes with a vocabulary of 32k."""
    return Setup(
        device=torch.device("cpu"),
        weights=torch.bfloat16,
        activations=torch.float32,
        hidden=896,
        intermediate=4864,
        heads=14,
        kv_heads=2,
        head_dim=64,
        vocab=32000,
        layers=24,
        tokens=8192,
    )


def cuda_setup() -> Setup:
    """Llama-3.1-8B's sizes."""
    return Setup(
        device=torch.device("cuda"),
        weights=torch.bfloat16,
        activations=torch.bfloat16,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=128256,
        layers=32,
        tokens=8192,
    )
