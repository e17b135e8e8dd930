"""Definition of the cache write: token by token."""

from __future__ import annotations

from torch import Tensor

from kernels.rope import reference


def kv_write(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    block_size = cache.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            cache[slot // block_size, :, slot % block_size] = x[token].to(cache.dtype)


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
    reference.apply_rope(q, positions, cos_sin, interleaved)
    reference.apply_rope(k, positions, cos_sin, interleaved)
    kv_write(k, k_cache, slots)
    kv_write(v, v_cache, slots)
