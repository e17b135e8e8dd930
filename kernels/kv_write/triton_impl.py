"""Cache writes on GPUs. One program writes all kv heads of one token; bound by memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.rope import triton_impl as rope
from kernels.rope.triton_impl import rotated_pair


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
def _rope_k_write_kernel(
    k_ptr,
    cache_ptr,
    positions_ptr,
    cos_sin_ptr,
    slots_ptr,
    num_heads,
    k_stride_t,  # elements between tokens
    k_stride_h,
    cache_stride_b,  # elements between blocks
    cache_stride_h,
    KV_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
    REST: tl.constexpr,  # columns beyond the rotated ones, rounded up; 0 for none
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        position = tl.load(positions_ptr + token)
        heads = tl.arange(0, HEADS)
        token_ptr = k_ptr + token * k_stride_t
        target = cache_ptr + slot // KV_BLOCK * cache_stride_b + slot % KV_BLOCK * SIZE
        a, b, first, second, mask = rotated_pair(
            token_ptr, cos_sin_ptr + position * 2 * HALF, heads, k_stride_h, num_heads, HALF, INTERLEAVED, HEADS, TILE
        )
        base = target + heads[:, None] * cache_stride_h
        tl.store(base + first[None, :], a.to(cache_ptr.dtype.element_ty), mask=mask)
        tl.store(base + second[None, :], b.to(cache_ptr.dtype.element_ty), mask=mask)
        if REST > 0:
            _copy_heads(token_ptr, target, k_stride_h, cache_stride_h, num_heads, 2 * HALF, SIZE, HEADS, REST)


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
    rope.apply_rope(q, positions, cos_sin, interleaved)
    half = cos_sin.shape[1] // 2
    rest = k.shape[2] - 2 * half
    _rope_k_write_kernel[(k.shape[0],)](
        k,
        k_cache,
        positions.contiguous(),
        cos_sin,
        slots.contiguous(),
        k.shape[1],
        k.stride(0),
        k.stride(1),
        k_cache.stride(0),
        k_cache.stride(1),
        KV_BLOCK=k_cache.shape[2],
        SIZE=k.shape[2],
        HALF=half,
        INTERLEAVED=interleaved,
        HEADS=triton.next_power_of_2(k.shape[1]),
        TILE=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(rest) if rest else 0,
    )
    kv_write(v, v_cache, slots)
