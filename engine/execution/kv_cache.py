"""Size and memory of the KV pools: [num_blocks, num_layers, num_kv_heads, block_size, head_dim] for K and for V."""

from __future__ import annotations

import torch

from engine.models.batch import KVCache, KVSpec


def bytes_per_token(spec: KVSpec, dtype: torch.dtype) -> int:
    """Bytes that one token takes in all layers, keys and values together."""
    return spec.num_layers * spec.num_kv_heads * (spec.head_dim + spec.head_dim_v) * dtype.itemsize


def allocate(spec: KVSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Zero-filled pools. On CPU the pages become resident only when blocks are first written."""
    shape = (num_blocks, spec.num_layers, spec.num_kv_heads, block_size)
    return KVCache(
        k=torch.zeros(*shape, spec.head_dim, dtype=dtype, device=device),
        v=torch.zeros(*shape, spec.head_dim_v, dtype=dtype, device=device),
    )
