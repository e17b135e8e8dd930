"""The move on GPUs, in two kernels: all sources into a buffer, then the buffer to the destinations.

One program copies one row; bound by memory bandwidth. Two launches, because programs of one launch have no order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _copy_rows_kernel(
    from_ptr,
    to_ptr,
    src_ptr,  # [n] int64 rows of from_ptr
    dst_ptr,  # [n] int64 rows of to_ptr
    SIZE: tl.constexpr,  # elements of a row
    GATHERS: tl.constexpr,  # write row i of the buffer; else read it
    TILE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    src = tl.load(src_ptr + i)
    dst = tl.load(dst_ptr + i)
    if (src >= 0) & (dst >= 0):
        column = tl.arange(0, TILE)  # [TILE]
        mask = column < SIZE
        source = src
        target = dst
        if GATHERS:
            target = i
        else:
            source = i
        values = tl.load(from_ptr + source * SIZE + column, mask=mask)
        tl.store(to_ptr + target * SIZE + column, values, mask=mask)


def move_slots(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    src, dst = src.contiguous(), dst.contiguous()
    size = pool.shape[1]
    buffer = torch.empty(src.numel(), size, dtype=pool.dtype, device=pool.device)
    for source, target, gathers in ((pool, buffer, True), (buffer, pool, False)):
        _copy_rows_kernel[(src.numel(),)](
            source, target, src, dst, SIZE=size, GATHERS=gathers, TILE=triton.next_power_of_2(size)
        )
