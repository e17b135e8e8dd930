"""Cache writes on GPUs; bound by memory bandwidth. One program writes all kv heads of one token.

Fused with the rotation it is one launch: a program rotates a few query heads of a token in place, or writes a few of
its kv heads, rotated keys or values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.rope.triton_impl import rotated_pair

HEADS_OF_A_PROGRAM = 8  # so that one token still keeps several processors busy


@triton.jit
def _copy_heads(
    x_ptr,  # of the token
    cache_ptr,  # of the slot
    x_stride_h,
    cache_stride_h,
    num_heads,
    START: tl.constexpr,  # first column to copy
    SIZE: tl.constexpr,  # columns of a head
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    heads = tl.arange(0, HEADS)  # [HEADS]
    column = START + tl.arange(0, TILE)  # [TILE]
    mask = (heads < num_heads)[:, None] & (column < SIZE)[None, :]
    values = tl.load(x_ptr + heads[:, None] * x_stride_h + column[None, :], mask=mask)
    target = cache_ptr + heads[:, None] * cache_stride_h + column[None, :]
    tl.store(target, values.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _kv_write_kernel(
    x_ptr,
    cache_ptr,
    slots_ptr,
    num_heads,
    x_stride_t,  # elements between tokens
    x_stride_h,
    cache_stride_b,  # elements between blocks
    cache_stride_h,
    KV_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        target = cache_ptr + slot // KV_BLOCK * cache_stride_b + slot % KV_BLOCK * SIZE
        _copy_heads(x_ptr + token * x_stride_t, target, x_stride_h, cache_stride_h, num_heads, 0, SIZE, HEADS, TILE)


@triton.jit
def _rope_kv_write_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, cos_sin_ptr, slots_ptr, k_cache_ptr, v_cache_ptr,
    num_heads, num_kv_heads,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h,  # elements between tokens, heads
    k_cache_stride_b, k_cache_stride_h, v_cache_stride_b, v_cache_stride_h,  # between blocks, heads
    KV_BLOCK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,                                       # of a program
    TILE: tl.constexpr,                                        # HALF, rounded up
    TILE_V: tl.constexpr,                                      # DV, rounded up
    REST: tl.constexpr,                                        # columns beyond the rotated ones, rounded up; 0 for none
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_q_parts = tl.cdiv(num_heads, HEADS)
    num_kv_parts = tl.cdiv(num_kv_heads, HEADS)
    slot = tl.load(slots_ptr + token)
    row_ptr = cos_sin_ptr + tl.load(positions_ptr + token) * 2 * HALF
    heads = tl.arange(0, HEADS)
    if part < num_q_parts:
        first_head = part * HEADS
        head_ptr = q_ptr + token * q_stride_t + first_head.to(tl.int64) * q_stride_h
        num_left = num_heads - first_head
        a, b, first, second, mask = rotated_pair(
            head_ptr, row_ptr, heads, q_stride_h, num_left, HALF, INTERLEAVED, HEADS, TILE
        )
        base = head_ptr + heads[:, None] * q_stride_h
        tl.store(base + first[None, :], a.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(base + second[None, :], b.to(q_ptr.dtype.element_ty), mask=mask)
    elif slot >= 0:
        block, offset = slot // KV_BLOCK, slot % KV_BLOCK
        if part < num_q_parts + num_kv_parts:
            first_head = (part - num_q_parts) * HEADS
            num_left = num_kv_heads - first_head
            head_ptr = k_ptr + token * k_stride_t + first_head.to(tl.int64) * k_stride_h
            target = k_cache_ptr + block * k_cache_stride_b + first_head.to(tl.int64) * k_cache_stride_h + offset * D
            a, b, first, second, mask = rotated_pair(
                head_ptr, row_ptr, heads, k_stride_h, num_left, HALF, INTERLEAVED, HEADS, TILE
            )
            base = target + heads[:, None] * k_cache_stride_h
            tl.store(base + first[None, :], a.to(k_cache_ptr.dtype.element_ty), mask=mask)
            tl.store(base + second[None, :], b.to(k_cache_ptr.dtype.element_ty), mask=mask)
            if REST > 0:
                _copy_heads(head_ptr, target, k_stride_h, k_cache_stride_h, num_left, 2 * HALF, D, HEADS, REST)
        else:
            first_head = (part - num_q_parts - num_kv_parts) * HEADS
            num_left = num_kv_heads - first_head
            head_ptr = v_ptr + token * v_stride_t + first_head.to(tl.int64) * v_stride_h
            target = v_cache_ptr + block * v_cache_stride_b + first_head.to(tl.int64) * v_cache_stride_h + offset * DV
            _copy_heads(head_ptr, target, v_stride_h, v_cache_stride_h, num_left, 0, DV, HEADS, TILE_V)


def kv_write(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    _kv_write_kernel[(x.shape[0],)](
        x,
        cache,
        slots.contiguous(),
        x.shape[1],
        x.stride(0),
        x.stride(1),
        cache.stride(0),
        cache.stride(1),
        KV_BLOCK=cache.shape[2],
        SIZE=x.shape[2],
        HEADS=triton.next_power_of_2(x.shape[1]),
        TILE=triton.next_power_of_2(x.shape[2]),
    )


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
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, head_dim_v = v.shape[1:]
    half = cos_sin.shape[1] // 2
    rest = head_dim - 2 * half
    heads = min(HEADS_OF_A_PROGRAM, triton.next_power_of_2(num_heads))
    num_parts = triton.cdiv(num_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    _rope_kv_write_kernel[(num_tokens, num_parts)](
        *(q, k, v, positions.contiguous(), cos_sin, slots.contiguous(), k_cache, v_cache),
        *(num_heads, num_kv_heads),
        *(stride for x in (q, k, v) for stride in x.stride()[:2]),
        *(stride for cache in (k_cache, v_cache) for stride in cache.stride()[:2]),
        KV_BLOCK=k_cache.shape[2],
        D=head_dim,
        DV=head_dim_v,
        HALF=half,
        INTERLEAVED=interleaved,
        HEADS=heads,
        TILE=triton.next_power_of_2(half),
        TILE_V=triton.next_power_of_2(head_dim_v),
        REST=triton.next_power_of_2(rest) if rest else 0,
    )
