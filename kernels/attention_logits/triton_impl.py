"""The logits on GPUs.

One program takes a tile of slots for one token and kv head, and reads each key, or its chosen channels, once for all
query heads that share it: memory bandwidth.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE_ELEMENTS = 4096  # of a tile of keys
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _logits_kernel(
    q_ptr,
    k_ptr,
    table_ptr,
    rows_ptr,
    visible_ptr,
    channels_ptr,
    out_ptr,
    scale,
    soft_cap,
    num_slots,
    q_stride_t,  # elements between tokens
    q_stride_h,
    k_stride_b,  # between cache blocks
    k_stride_h,
    table_stride,
    GROUP: tl.constexpr,  # query heads of one kv head
    SIZE: tl.constexpr,  # of a head
    COUNT: tl.constexpr,  # channels of it
    KV_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,  # slots of a tile
    TILE: tl.constexpr,  # COUNT, rounded up
    HAS_CHANNELS: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    visible = tl.load(visible_ptr + token)
    row = tl.load(rows_ptr + token).to(tl.int64)
    is_seen = slot < visible
    column = tl.arange(0, TILE)  # [TILE]
    is_column = column < COUNT
    channel = column.to(tl.int64)
    if HAS_CHANNELS:
        channel = tl.load(channels_ptr + kv_head * COUNT + column, mask=is_column, other=0)
    block = tl.load(table_ptr + row * table_stride + slot // KV_BLOCK, mask=is_seen, other=0).to(tl.int64)
    base = block * k_stride_b + kv_head * k_stride_h + (slot % KV_BLOCK) * SIZE  # [BLOCK_N]
    mask = is_seen[:, None] & is_column[None, :]
    keys = tl.load(k_ptr + base[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    for g in tl.static_range(GROUP):
        head = kv_head * GROUP + g
        q = tl.load(q_ptr + token * q_stride_t + head * q_stride_h + channel, mask=is_column, other=0.0).to(tl.float32)
        logits = tl.sum(keys * q[None, :], axis=1) * scale
        if HAS_CAP:
            logits = soft_cap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * _LOG2_E) / soft_cap) + 1.0))  # tanh
        target = out_ptr + (token * tl.num_programs(1) * GROUP + head) * num_slots + slot
        tl.store(target, tl.where(is_seen, logits, float("-inf")), mask=slot < num_slots)


def attention_logits(
    q: Tensor, k_cache: Tensor, block_table: Tensor, rows: Tensor, visible: Tensor, channels: Tensor | None,
    out: Tensor, *, scale: float, soft_cap: float,
) -> None:  # fmt: skip
    """See `kernels.attention_logits.attention_logits`; of each token its row and how many slots it sees, [T] int32."""
    num_kv_heads, block_size, size = k_cache.shape[1:]
    count = size if channels is None else channels.shape[1]
    tile = triton.next_power_of_2(count)
    block_n = min(triton.next_power_of_2(out.shape[2]), max(1, _TILE_ELEMENTS // tile))
    _logits_kernel[(q.shape[0], num_kv_heads, triton.cdiv(out.shape[2], block_n))](
        *(q, k_cache, block_table, rows, visible, rows if channels is None else channels, out),
        *(scale, soft_cap, out.shape[2]),
        *(q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), block_table.stride(0)),
        GROUP=q.shape[1] // num_kv_heads,
        SIZE=size,
        COUNT=count,
        KV_BLOCK=block_size,
        BLOCK_N=block_n,
        TILE=tile,
        HAS_CHANNELS=channels is not None,
        HAS_CAP=soft_cap > 0,
    )
