"""Copies whole cache blocks, all layers at once: the copy of copy-on-write.

Shape letters: NB blocks, L layers, H_kv kv heads, BS slots of a block, D head dim, n pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend


def copy_blocks(k_pool: Tensor, v_pool: Tensor, pairs: Tensor) -> None:
    """Copy block pairs[i, 0] to block pairs[i, 1] of both pools, in place.

    k_pool, v_pool  [NB, L, H_kv, BS, D]  any type, contiguous; D may differ between the two
    pairs           [n, 2] int64, on any device; destinations are unique and none of them is a source
    Raises ValueError when shapes or types disagree. Block ids are not checked against NB.
    """
    if k_pool.shape[:4] != v_pool.shape[:4] or not (k_pool.is_contiguous() and v_pool.is_contiguous()):
        raise ValueError(f"pools must be contiguous and alike, got {list(k_pool.shape)} and {list(v_pool.shape)}")
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs must be [n, 2] int64, got {list(pairs.shape)} {pairs.dtype}")
    if pairs.shape[0]:
        implementation = backend.implementation("block_copy", k_pool.device)
        for pool in (k_pool, v_pool):
            implementation.copy_blocks(pool, pairs.to(pool.device))
