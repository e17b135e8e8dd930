"""Cache write by index assignment."""

from __future__ import annotations

from torch import Tensor

from kernels.rope import torch_impl as rope


def kv_write(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    written = slots >= 0
    slots = slots[written]
    block_size = cache.shape[2]
    # the two index tensors stand apart, so the indexed dim comes first: [n, H_kv, D]
    cache[slots // block_size, :, slots % block_size] = x[written].to(cache.dtype)


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    interleaved: bool,
) -> None:
    k = k.clone()
    rope.apply_rope(q, positions, cos_sin, interleaved)
    rope.apply_rope(k, positions, cos_sin, interleaved)
    kv_write(k, k_cache, slots)
    kv_write(v, v_cache, slots)
