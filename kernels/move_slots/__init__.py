"""Moves slots of a paged cache, keys and values alike: the compaction of a cache, and the accepted path of a draft.

Knows addresses; no blocks, layers or requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend


def move_slots(k: Tensor, v: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy row src[i, j] of k and of v to row dst[i, j], in place.

    k, v      [S, D], [S, Dv]  any type, contiguous: the pools, seen as one row per (block, layer, kv head, offset)
    src, dst  [n_segments, n] int64, on the device of k; a pair with a negative number is skipped

    Within a segment everything is read before anything is written, so its sources and destinations may overlap.
    No segment touches what another one writes, and the destinations of a segment are unique. Not checked, nor are
    addresses against S.
    Raises ValueError when shapes or types disagree.
    """
    for name, pool in (("k", k), ("v", v)):
        if pool.ndim != 2 or not pool.is_contiguous() or pool.shape[0] != k.shape[0]:
            raise ValueError(f"{name} must be [{k.shape[0]}, D], contiguous, got {list(pool.shape)} {pool.stride()}")
    if src.ndim != 2 or src.shape != dst.shape or not src.dtype == dst.dtype == torch.int64:
        raise ValueError(
            f"src and dst must be [n_segments, n] int64, got {list(src.shape)} {src.dtype} and {list(dst.shape)} "
            f"{dst.dtype}"
        )
    if src.numel():
        implementation = backend.implementation("move_slots", k.device)
        for pool in (k, v):
            implementation.move_slots(pool, src, dst)
