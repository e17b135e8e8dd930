"""The bounds on GPUs.

One program of the first kernel makes the bounds of one block and kv head, if its token is the block's last; one of the
second bounds a tile of a row's blocks for one kv head. Both read each key, or each bound, once: memory bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE_ELEMENTS = 4096  # of a tile of bounds


@triton.jit
def _update_kernel(
    k_ptr,
    bounds_ptr,
    slots_ptr,
    num_tokens,
    k_stride_b,  # elements between blocks
    k_stride_h,
    bounds_stride_b,
    bounds_stride_h,
    KV_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,  # of a head
    BLOCK_N: tl.constexpr,  # slots of a block, rounded up
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    next_slot = tl.load(slots_ptr + token + 1, mask=token + 1 < num_tokens, other=-1)
    block = slot // KV_BLOCK
    is_last = (next_slot < 0) | (next_slot // KV_BLOCK != block)
    if (slot >= 0) & is_last:
        filled = slot % KV_BLOCK + 1
        offset = tl.arange(0, BLOCK_N)  # [BLOCK_N]
        column = tl.arange(0, TILE)  # [TILE]
        is_filled = (offset < filled)[:, None]
        mask = is_filled & (column < SIZE)[None, :]
        base = k_ptr + block * k_stride_b + head * k_stride_h
        keys = tl.load(base + offset[:, None] * SIZE + column[None, :], mask=mask, other=0.0).to(tl.float32)
        smallest = tl.min(tl.where(is_filled, keys, float("inf")), axis=0)
        largest = tl.max(tl.where(is_filled, keys, float("-inf")), axis=0)
        target = bounds_ptr + block * bounds_stride_b + head * bounds_stride_h + column
        tl.store(target, smallest.to(bounds_ptr.dtype.element_ty), mask=column < SIZE)
        tl.store(target + SIZE, largest.to(bounds_ptr.dtype.element_ty), mask=column < SIZE)


@triton.jit
def _bound_kernel(
    q_ptr,
    bounds_ptr,
    table_ptr,
    num_blocks_ptr,
    scores_ptr,
    max_blocks,
    q_stride_r,  # elements between rows
    q_stride_h,
    bounds_stride_b,
    bounds_stride_h,
    table_stride,
    GROUP: tl.constexpr,  # query heads of one kv head
    SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # cache blocks of a tile
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    column = tl.arange(0, TILE)  # [TILE]
    is_column = column < SIZE
    is_used = place < tl.load(num_blocks_ptr + row)
    block = tl.load(table_ptr + row * table_stride + place, mask=is_used & (place < max_blocks), other=0).to(tl.int64)
    mask = (is_used & (place < max_blocks))[:, None] & is_column[None, :]
    base = bounds_ptr + block[:, None] * bounds_stride_b + kv_head * bounds_stride_h + column[None, :]
    smallest = tl.load(base, mask=mask, other=0.0).to(tl.float32)
    largest = tl.load(base + SIZE, mask=mask, other=0.0).to(tl.float32)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for g in tl.static_range(GROUP):
        head = kv_head * GROUP + g
        q = tl.load(q_ptr + row * q_stride_r + head * q_stride_h + column, mask=is_column, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.sum(tl.maximum(q[None, :] * smallest, q[None, :] * largest), axis=1))
    scores = tl.where(is_used, best, float("-inf"))
    target = scores_ptr + (row * tl.num_programs(1) + kv_head) * max_blocks + place
    tl.store(target, scores, mask=place < max_blocks)


def update_bounds(k_cache: Tensor, bounds: Tensor, slots: Tensor) -> None:
    num_kv_heads, block_size, size = k_cache.shape[1:]
    _update_kernel[(slots.shape[0], num_kv_heads)](
        *(k_cache, bounds, slots),
        slots.shape[0],
        *(k_cache.stride(0), k_cache.stride(1), bounds.stride(0), bounds.stride(1)),
        KV_BLOCK=block_size,
        SIZE=size,
        BLOCK_N=triton.next_power_of_2(block_size),
        TILE=triton.next_power_of_2(size),
    )


def bound_scores(q: Tensor, bounds: Tensor, block_table: Tensor, num_blocks: Tensor, scores: Tensor) -> None:
    """See `kernels.block_bounds.bound_scores`; num_blocks [R] int32. Writes scores [R, H_kv, MB]."""
    num_rows, num_kv_heads, max_blocks = scores.shape
    size = q.shape[2]
    tile = triton.next_power_of_2(size)
    block_n = min(triton.next_power_of_2(max_blocks), max(1, _TILE_ELEMENTS // tile))
    _bound_kernel[(num_rows, num_kv_heads, triton.cdiv(max_blocks, block_n))](
        *(q, bounds, block_table, num_blocks, scores),
        max_blocks,
        *(q.stride(0), q.stride(1), bounds.stride(0), bounds.stride(1), block_table.stride(0)),
        GROUP=q.shape[1] // num_kv_heads,
        SIZE=size,
        BLOCK_N=block_n,
        TILE=tile,
    )
