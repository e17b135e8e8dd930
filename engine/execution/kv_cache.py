"""Size and memory of the KV pools: [num_blocks, num_layers, num_kv_heads, block_size, head_dim] for K and for V."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

from engine.models.batch import KVCache, KVSpec


def bytes_per_token(spec: KVSpec, dtype: torch.dtype) -> int:
    """Bytes that one token takes in all layers, keys and values together."""
    return spec.num_layers * spec.num_kv_heads * (spec.head_dim + spec.head_dim_v) * dtype.itemsize


def allocate(spec: KVSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Zero-filled pools. On CPU the pages become resident only when blocks are first written."""
    shape = (num_blocks, spec.num_layers, spec.num_kv_heads, block_size)
    return KVCache(
        k=_zeros((*shape, spec.head_dim), dtype, device),
        v=_zeros((*shape, spec.head_dim_v), dtype, device),
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Attention reads short runs from all over the pool: with 4 KiB pages, finding them costs up to a quarter of it.
        with contextlib.suppress(OSError):  # a kernel without them: only the hint is lost
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
