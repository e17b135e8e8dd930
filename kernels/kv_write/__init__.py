"""Writes new keys and values into their cache slots, alone or fused with the rotation that comes before it.

Shape letters: T tokens, H query heads, H_kv kv heads, D and Dv head dims, NB blocks of BS slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend
from kernels.rope import check_rope

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Store k[t], v[t] at cache slot slots[t], in place; slot -1 skips the token.

    k, v              [T, H_kv, D], [T, H_kv, Dv] float; any strides, last dim contiguous
    k_cache, v_cache  [NB, H_kv, BS, D], [NB, H_kv, BS, Dv] float, rounded to their type; any strides between blocks
                      and heads, last two dims contiguous
    slots             [T] int64, block * BS + offset, unique where >= 0; not checked against NB
    Raises ValueError when shapes or types disagree.
    """
    _check(k, v, k_cache, v_cache, slots)
    if k.shape[0]:
        implementation = backend.implementation("kv_write", k.device)
        implementation.kv_write(k, k_cache, slots)
        implementation.kv_write(v, v_cache, slots)


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    interleaved: bool = False,
) -> None:
    """`apply_rope` of q in place, and of k on its way into the cache; k itself stays as it is. v as in `kv_write`.

    Arguments as in `apply_rope` and `kv_write`. One pass over k instead of two.
    """
    check_rope(q, k, positions, cos_sin)
    _check(k, v, k_cache, v_cache, slots)
    if q.shape[0]:
        backend.implementation("kv_write", q.device).rope_kv_write(
            q, k, v, positions, cos_sin, k_cache, v_cache, slots, interleaved
        )


def _check(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if x.ndim != 3 or x.dtype not in _FLOATS or x.stride(2) != 1:
            raise ValueError(f"{name} must be [T, H_kv, D] float with a contiguous last dim, got {list(x.shape)}")
        if cache.ndim != 4 or cache.dtype not in _FLOATS or cache.stride()[2:] != (cache.shape[3], 1):
            raise ValueError(f"{name}_cache must be [NB, H_kv, BS, D] float with contiguous slots")
        if cache.shape[1] != x.shape[1] or cache.shape[3] != x.shape[2]:
            raise ValueError(f"{name} {list(x.shape)} does not fit {name}_cache {list(cache.shape)}")
    if k.shape[0] != v.shape[0] or k_cache.shape[2] != v_cache.shape[2] or k_cache.dtype != v_cache.dtype:
        raise ValueError("k and v, or their caches, disagree in tokens, block size or type")
    if slots.shape != k.shape[:1] or slots.dtype != torch.int64:
        raise ValueError(f"slots must be [{k.shape[0]}] int64, got {list(slots.shape)} {slots.dtype}")
