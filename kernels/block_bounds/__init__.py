"""Smallest and largest key of every cache block, channel by channel, and what they promise: no logit is above a bound.

Knows caches, slots and block tables; not which blocks are read for it, that is a policy's choice.
Shape letters: T tokens, R rows (requests), H query heads, H_kv kv heads, D head dim, NB blocks of BS slots, MB blocks
of a table. Source: Tang et al. 2024 (Quest), arXiv:2406.10774.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import backend

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def update_bounds(k_cache: Tensor, bounds: Tensor, slots: Tensor) -> None:
    """Make the bounds of the blocks that hold these slots those of their keys, in place; after the keys are written.

    k_cache  [NB, H_kv, BS, D] float; any strides between blocks and heads, last two dims contiguous
    bounds   [NB, H_kv, 2, D]  type of k_cache, likewise: smallest, then largest
    slots    [T] int64, block * BS + offset, -1 skips the token; not checked against NB. Tokens of one block follow
             each other with rising offsets

    A block counts as filled up to the last of its slots here: what was written behind it and then rolled back is
    forgotten, for minima and maxima are made anew from the keys. Raises ValueError when shapes or types disagree.
    """
    if k_cache.dim() != 4 or k_cache.dtype not in _FLOATS or k_cache.stride()[2:] != (k_cache.shape[3], 1):
        raise ValueError("k_cache must be [NB, H_kv, BS, D] float with contiguous slots")
    _check_bounds(bounds, k_cache.shape[1], k_cache.shape[3])
    if bounds.dtype != k_cache.dtype:
        raise ValueError(f"bounds is {bounds.dtype}, need the cache's {k_cache.dtype}")
    if slots.dim() != 1 or slots.dtype != torch.int64:
        raise ValueError(f"slots must be [T] int64, got {list(slots.shape)} {slots.dtype}")
    if slots.numel():
        backend.implementation("block_bounds", k_cache.device).update_bounds(k_cache, bounds, slots.contiguous())


def bound_scores(q: Tensor, bounds: Tensor, block_table: Tensor, seq_lens: Tensor, *, block_size: int) -> Tensor:
    """Upper bounds of q.k over the keys of each block of each row, the largest of a kv head's query heads.

    q            [R, H, D]             float, one query per row; any strides, last dim contiguous
    bounds       [NB, H_kv, 2, D]      float; smallest, then largest key of each block
    block_table  [R, MB] int32
    seq_lens     [R] int32             slots of the row; blocks beyond are not read
    block_size   slots of a block

    Returns [R, H_kv, MB] float32, without scale; -inf beyond a row's blocks. The sum over channels of the larger of
    q * smallest and q * largest. In the C++ implementation it is at least q.k also as `paged_attention` rounds it.
    Raises ValueError when shapes or types disagree.
    """
    num_kv_heads = bounds.shape[1]
    _check_bounds(bounds, num_kv_heads, q.shape[2])
    if q.dim() != 3 or q.dtype not in _FLOATS or q.stride(2) != 1 or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q is {list(q.shape)} {q.dtype}, need [R, a multiple of {num_kv_heads}, D], last dim contiguous"
        )
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0] or seq_lens.shape != q.shape[:1]:
        raise ValueError(f"q has {q.shape[0]} rows, block_table is {list(block_table.shape)}, seq_lens {len(seq_lens)}")
    if not block_table.dtype == seq_lens.dtype == torch.int32 or block_table.stride(1) != 1:
        raise ValueError("block_table and seq_lens must be int32, rows of block_table contiguous")
    shape = q.shape[0], num_kv_heads, block_table.shape[1]
    scores = torch.empty(shape, dtype=torch.float32, device=q.device)
    if scores.numel():
        implementation = backend.implementation("block_bounds", q.device)
        num_blocks = torch.div(seq_lens + (block_size - 1), block_size, rounding_mode="floor").to(torch.int32)
        implementation.bound_scores(q, bounds, block_table, num_blocks, scores)
    return scores


def _check_bounds(bounds: Tensor, num_kv_heads: int, head_dim: int) -> None:
    if bounds.dtype not in _FLOATS or bounds.shape[1:] != (num_kv_heads, 2, head_dim):
        raise ValueError(
            f"bounds is {list(bounds.shape)} {bounds.dtype}, need [NB, {num_kv_heads}, 2, {head_dim}] float"
        )
    if bounds.stride()[2:] != (head_dim, 1):
        raise ValueError(f"the last two dims of bounds must be contiguous, got strides {bounds.stride()}")
