"""The merge on GPUs. One program merges all heads of one token; bound by memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge_kernel(
    a_ptr,
    lse_a_ptr,
    b_ptr,
    lse_b_ptr,
    num_heads,
    a_stride_t,  # elements between tokens
    a_stride_h,
    b_stride_t,
    b_stride_h,
    SIZE: tl.constexpr,  # of a head
    HEADS: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)  # [HEADS]
    column = tl.arange(0, TILE)  # [TILE]
    is_head = head < num_heads
    mask = is_head[:, None] & (column < SIZE)[None, :]
    pair = token * num_heads + head
    lse_a = tl.load(lse_a_ptr + pair, mask=is_head, other=0.0)
    lse_b = tl.load(lse_b_ptr + pair, mask=is_head, other=0.0)
    a_ptr += token * a_stride_t + head[:, None] * a_stride_h + column[None, :]
    b_ptr += token * b_stride_t + head[:, None] * b_stride_h + column[None, :]
    a = tl.load(a_ptr, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr, mask=mask, other=0.0).to(tl.float32)

    is_blind_a = lse_a == float("-inf")
    is_blind_b = lse_b == float("-inf")
    largest = tl.maximum(lse_a, lse_b)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    keep = tl.exp(lse_a - base)
    add = tl.exp(lse_b - base)
    total = tl.where(is_blind_a & is_blind_b, 1.0, keep + add)
    merged = a * (keep / total)[:, None] + b * (add / total)[:, None]
    merged = tl.where(is_blind_a[:, None], b, merged)
    merged = tl.where(is_blind_b[:, None], a, merged)
    lse = tl.where(is_blind_a | is_blind_b, largest, base + tl.log(total))
    tl.store(a_ptr, merged.to(a_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_a_ptr + pair, lse, mask=is_head)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    num_tokens, num_heads, size = out_a.shape
    _merge_kernel[(num_tokens,)](
        *(out_a, lse_a, out_b, lse_b),
        num_heads,
        *(out_a.stride(0), out_a.stride(1), out_b.stride(0), out_b.stride(1)),
        SIZE=size,
        HEADS=triton.next_power_of_2(num_heads),
        TILE=triton.next_power_of_2(size),
    )
