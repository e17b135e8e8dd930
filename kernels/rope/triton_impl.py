"""Rotation on GPUs. One program rotates all heads of one token; bound by memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotated_pair(
    x_ptr,  # of the token
    cos_ptr,  # of the token's position
    heads,  # [HEADS]
    x_stride_h,
    num_heads,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Both rotated halves [HEADS, TILE] of a token's heads in float32, their offsets in a head, and their mask."""
    i = tl.arange(0, TILE)  # [TILE]
    cos = tl.load(cos_ptr + i, mask=i < HALF, other=0.0)[None, :]
    sin = tl.load(cos_ptr + HALF + i, mask=i < HALF, other=0.0)[None, :]
    first = 2 * i if INTERLEAVED else i
    second = first + 1 if INTERLEAVED else i + HALF
    mask = (heads < num_heads)[:, None] & (i < HALF)[None, :]
    base = x_ptr + heads[:, None] * x_stride_h
    a = tl.load(base + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(base + second[None, :], mask=mask, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin, first, second, mask


@triton.jit
def _apply_rope_kernel(
    x_ptr,
    positions_ptr,
    cos_sin_ptr,
    num_heads,
    x_stride_t,  # elements between tokens
    x_stride_h,  # elements between heads
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    heads = tl.arange(0, HEADS)
    token_ptr = x_ptr + token * x_stride_t
    a, b, first, second, mask = rotated_pair(
        token_ptr, cos_sin_ptr + position * 2 * HALF, heads, x_stride_h, num_heads, HALF, INTERLEAVED, HEADS, TILE
    )
    base = token_ptr + heads[:, None] * x_stride_h
    tl.store(base + first[None, :], a.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(base + second[None, :], b.to(x_ptr.dtype.element_ty), mask=mask)


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> None:
    half = cos_sin.shape[1] // 2
    _apply_rope_kernel[(x.shape[0],)](
        x,
        positions.contiguous(),
        cos_sin,
        x.shape[1],
        x.stride(0),
        x.stride(1),
        HALF=half,
        INTERLEAVED=interleaved,
        HEADS=triton.next_power_of_2(x.shape[1]),
        TILE=triton.next_power_of_2(half),
    )
