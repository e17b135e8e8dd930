"""Block copy on GPUs. One program moves one tile of one block; bound by memory bandwidth."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit
def _copy_blocks_kernel(
    pool_ptr,
    pairs_ptr,
    block_size,  # elements of a block
    TILE: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    source = tl.load(pairs_ptr + 2 * pair)
    destination = tl.load(pairs_ptr + 2 * pair + 1)
    element = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)  # [TILE]
    mask = element < block_size
    values = tl.load(pool_ptr + source * block_size + element, mask=mask)
    tl.store(pool_ptr + destination * block_size + element, values, mask=mask)


def copy_blocks(pool: Tensor, pairs: Tensor) -> None:
    block_size = pool.stride(0)
    _copy_blocks_kernel[(pairs.shape[0], triton.cdiv(block_size, TILE))](
        pool, pairs.contiguous(), block_size, TILE=TILE
    )
