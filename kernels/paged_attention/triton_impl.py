"""Paged attention in Triton, with split keys for long rows (flash-decoding), in two kernels.

One program of the first kernel holds a tile of queries of one row times the heads that share one kv head (so keys and
values are read once for all of them) and walks over a range of slots with an online softmax. Rows of few queries are
bound by memory: small tiles, and the row is divided into splits of a fixed number of slots from slot 0, which the
second kernel merges in order; so a row's sums do not depend on its batch. Prompt chunks are bound by arithmetic: large
tiles that walk over all their slots.
Sources: Dao et al. 2022, arXiv:2205.14135 (online softmax); Dao et al. 2023, "Flash-Decoding for long-context
inference" (split keys).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.paged_attention.plan import AttentionPlan
from kernels.paged_attention.triton_plan import FixedWork, Tiles, Work, fixed_plan, plan

__all__ = ["fixed_plan", "paged_attention", "plan"]

MAX_KEY_TILE_BYTES = 16 * 1024  # of one tile of keys, so that a pipeline of key and value tiles fits shared memory
# The address of a tile comes out of the block table, which takes stages of the pipeline: compiled for sm_90, 3 stages
# keep one tile of keys and of values in shared memory, 5 keep two.
STAGES_16_BIT = 5
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _finish(acc, largest, total, sinks_ptr, head, row_mask, HAS_SINKS: tl.constexpr):
    """Divide by the softmax denominator, the head's sink included; also the log of the denominator."""
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head, mask=row_mask, other=0.0)
        with_sink = tl.maximum(largest, sink)
        factor = _exp(largest - with_sink)
        total = total * factor + _exp(sink - with_sink)
        acc = acc * factor[:, None]
        largest = with_sink
    is_blind = total == 0.0
    divisor = tl.where(is_blind, 1.0, total)
    return acc / divisor[:, None], tl.where(is_blind, float("-inf"), largest + tl.log(divisor))


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, lens_ptr, starts_ptr, sinks_ptr, out_ptr, lse_ptr, acc_ptr, stats_ptr, item_ptr,
    depths_ptr, bits_ptr,
    scale, soft_cap, window, num_heads,
    q_stride_t, q_stride_h, out_stride_t, out_stride_h,        # elements between tokens, heads
    k_stride_b, k_stride_h, v_stride_b, v_stride_h,            # between cache blocks, kv heads
    table_stride_r, table_stride_h, lens_stride_r, lens_stride_h,
    D: tl.constexpr, DV: tl.constexpr, KV_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,                                       # query heads of one kv head
    NUM_QUERIES: tl.constexpr,                                 # of a tile
    BLOCK_M: tl.constexpr,                                     # at least NUM_QUERIES * GROUP
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
    IS_SPLIT: tl.constexpr,                                    # write a partial result, not the output
    HAS_TREES: tl.constexpr,                                   # some rows are trees: AttentionPlan.tree_bits
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.load(item_ptr + item * 4).to(tl.int64)
    if row < 0:  # room of a fixed plan that is not used
        return
    first_query = tl.load(item_ptr + item * 4 + 1)
    begin = tl.load(item_ptr + item * 4 + 2)
    end = tl.load(item_ptr + item * 4 + 3)
    seq_len = tl.load(lens_ptr + row * lens_stride_r + kv_head * lens_stride_h)
    start = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - start
    before = seq_len - num_queries  # slots before the row's first query

    m = tl.arange(0, BLOCK_M)
    query = first_query + m // GROUP  # [BLOCK_M]
    head = kv_head * GROUP + m % GROUP
    token = (start + query).to(tl.int64)
    row_mask = (m < NUM_QUERIES * GROUP) & (query < num_queries)
    own = before + query  # slot of the query itself
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_offset = token[:, None] * q_stride_t + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=row_mask[:, None] & (d[None, :] < D), other=0.0)

    # Slots that some query of the tile sees; tiles of keys stay aligned to slot 0.
    end = tl.minimum(end, before + tl.minimum(first_query + NUM_QUERIES, num_queries))
    if HAS_TREES:
        depth = tl.load(depths_ptr + token, mask=row_mask, other=-1)  # -1: the row is a simple sequence
        bits = tl.load(bits_ptr + token, mask=row_mask, other=0)
        place = tl.where(depth >= 0, before + depth, own)  # in the text, if the path were all there is
        if HAS_WINDOW:
            begin = tl.maximum(begin, tl.min(tl.where(row_mask, place, end), axis=0) + 1 - window)
    elif HAS_WINDOW:
        begin = tl.maximum(begin, before + first_query + 1 - window)
    table_ptr += row * table_stride_r + kv_head * table_stride_h
    k_ptr += kv_head * k_stride_h
    v_ptr += kv_head * v_stride_h

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for tile in range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
        slot = tile + tl.arange(0, BLOCK_N)
        in_range = (slot >= begin) & (slot < end)
        block = tl.load(table_ptr + slot // KV_BLOCK, mask=in_range, other=0).to(tl.int64)
        offset = slot % KV_BLOCK
        k_offset = (block * k_stride_b + offset * D)[None, :] + d[:, None]
        k = tl.load(k_ptr + k_offset, mask=in_range[None, :] & (d[:, None] < D), other=0.0)
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if HAS_CAP:
            scores = soft_cap * (1.0 - 2.0 / (_exp(2.0 * scores / soft_cap) + 1.0))  # tanh
        if HAS_TREES:
            node = slot - before  # among the row's own tokens
            shift = tl.minimum(tl.maximum(node - 1, 0), 63).to(tl.int64)
            on_path = (node[None, :] <= 0) | (((bits[:, None] >> shift[None, :]) & 1) == 1)
            visible = in_range[None, :] & tl.where(depth[:, None] >= 0, on_path, slot[None, :] <= own[:, None])
            if HAS_WINDOW:
                is_own = in_range & (node > 0)
                node_depth = tl.load(depths_ptr + (start + node).to(tl.int64), mask=is_own, other=0)
                key_place = tl.where(is_own & (node_depth >= 0), before + node_depth, slot)
                visible = visible & (key_place[None, :] > place[:, None] - window)
        else:
            visible = in_range[None, :] & (slot[None, :] <= own[:, None])
            if HAS_WINDOW:
                visible = visible & (slot[None, :] > own[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))

        now = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = _exp(scores - base[:, None])
        decay = _exp(largest - base)
        total = total * decay + tl.sum(weights, axis=1)
        largest = now
        v_offset = (block * v_stride_b + offset * DV)[:, None] + dv[None, :]
        v = tl.load(v_ptr + v_offset, mask=in_range[:, None] & (dv[None, :] < DV), other=0.0)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc, input_precision="ieee")

    if IS_SPLIT:
        partial = (item * tl.num_programs(1) + kv_head) * BLOCK_M + m
        tl.store(acc_ptr + partial[:, None] * BLOCK_DV + dv[None, :], acc)
        tl.store(stats_ptr + partial * 2, largest)
        tl.store(stats_ptr + partial * 2 + 1, total)
    else:
        out, lse = _finish(acc, largest, total, sinks_ptr, head, row_mask, HAS_SINKS)
        out_offset = token[:, None] * out_stride_t + head[:, None] * out_stride_h + dv[None, :]
        out_mask = row_mask[:, None] & (dv[None, :] < DV)
        tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=out_mask)
        if HAS_LSE:
            tl.store(lse_ptr + token * num_heads + head, lse, mask=row_mask)


@triton.jit
def merge_kernel(
    starts_ptr, sinks_ptr, out_ptr, lse_ptr, acc_ptr, stats_ptr, tile_ptr,
    num_heads,
    out_stride_t, out_stride_h,
    DV: tl.constexpr, GROUP: tl.constexpr, NUM_QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.load(tile_ptr + tile * 4).to(tl.int64)
    first_query = tl.load(tile_ptr + tile * 4 + 1)
    first_item = tl.load(tile_ptr + tile * 4 + 2).to(tl.int64)
    num_items = tl.load(tile_ptr + tile * 4 + 3)
    start = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - start

    m = tl.arange(0, BLOCK_M)
    query = first_query + m // GROUP
    head = kv_head * GROUP + m % GROUP
    token = (start + query).to(tl.int64)
    row_mask = (m < NUM_QUERIES * GROUP) & (query < num_queries)
    dv = tl.arange(0, BLOCK_DV)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in range(0, num_items):
        partial = ((first_item + i) * tl.num_programs(1) + kv_head) * BLOCK_M + m
        part_largest = tl.load(stats_ptr + partial * 2)
        now = tl.maximum(largest, part_largest)
        base = tl.where(now == float("-inf"), 0.0, now)
        keep = _exp(largest - base)
        add = _exp(part_largest - base)
        total = total * keep + tl.load(stats_ptr + partial * 2 + 1) * add
        part = tl.load(acc_ptr + partial[:, None] * BLOCK_DV + dv[None, :])
        acc = acc * keep[:, None] + part * add[:, None]
        largest = now

    out, lse = _finish(acc, largest, total, sinks_ptr, head, row_mask, HAS_SINKS)
    out_offset = token[:, None] * out_stride_t + head[:, None] * out_stride_h + dv[None, :]
    out_mask = row_mask[:, None] & (dv[None, :] < DV)
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=out_mask)
    if HAS_LSE:
        tl.store(lse_ptr + token * num_heads + head, lse, mask=row_mask)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    plan: AttentionPlan,
    layout: Hashable,
) -> None:
    """See `kernels.paged_attention.paged_attention`; writes out [T, H, Dv] and lse [T, H]."""
    work: Work | FixedWork = plan.work
    head_dim, head_dim_v, num_heads = q.shape[2], v_cache.shape[3], q.shape[1]
    per_head_table = block_table.dim() == 3
    num_kv_heads = block_table.shape[1] if per_head_table else k_cache.shape[1]
    group = num_heads // num_kv_heads
    shared_cache_head = per_head_table and k_cache.shape[1] == 1
    block_dv = max(16, triton.next_power_of_2(head_dim_v))
    depths, bits = plan.tree_bits or (None, None)
    for tiles in work.launches(group, wide=max(head_dim, head_dim_v) > 128):
        block_m = max(16, triton.next_power_of_2(tiles.num_queries * group))
        partial_acc, partial_stats = _partials(tiles, num_kv_heads, block_m, block_dv, q.device)
        _attend_kernel[(tiles.items.shape[0], num_kv_heads)](
            *(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, sinks, out, lse, partial_acc, partial_stats),
            *(tiles.items, depths, bits),
            *(scale, soft_cap, window, num_heads),
            *(q.stride(0), q.stride(1), out.stride(0), out.stride(1)),
            *(k_cache.stride(0), 0 if shared_cache_head else k_cache.stride(1)),
            *(v_cache.stride(0), 0 if shared_cache_head else v_cache.stride(1)),
            *(block_table.stride(0), block_table.stride(1) if per_head_table else 0),
            *(seq_lens.stride(0), seq_lens.stride(1) if seq_lens.dim() == 2 else 0),
            D=head_dim,
            DV=head_dim_v,
            KV_BLOCK=k_cache.shape[2],
            GROUP=group,
            NUM_QUERIES=tiles.num_queries,
            BLOCK_M=block_m,
            BLOCK_N=_key_tile(max(head_dim, head_dim_v), k_cache.element_size()),
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_DV=block_dv,
            HAS_WINDOW=window > 0,
            HAS_CAP=soft_cap > 0,
            HAS_SINKS=sinks is not None,
            HAS_LSE=lse is not None,
            IS_SPLIT=tiles.is_split,
            HAS_TREES=depths is not None,
            num_warps=8 if block_m >= 128 else 4,
            num_stages=STAGES_16_BIT if k_cache.element_size() == 2 else 2,
        )
        if tiles.is_split:
            merge_kernel[(tiles.tiles.shape[0], num_kv_heads)](
                *(cu_seqlens_q, sinks, out, lse, partial_acc, partial_stats, tiles.tiles),
                *(num_heads, out.stride(0), out.stride(1)),
                DV=head_dim_v,
                GROUP=group,
                NUM_QUERIES=tiles.num_queries,
                BLOCK_M=block_m,
                BLOCK_DV=block_dv,
                HAS_SINKS=sinks is not None,
                HAS_LSE=lse is not None,
                num_warps=4,
            )


def _key_tile(head_dim: int, element_bytes: int) -> int:
    """Keys of one step of the loop: 128 at most, fewer for long or wide heads; a power of two from 16."""
    room = MAX_KEY_TILE_BYTES // (triton.next_power_of_2(head_dim) * element_bytes)
    return max(16, min(128, room))


def _partials(
    tiles: Tiles, num_kv_heads: int, block_m: int, block_dv: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Room for sums of values and for (largest score, sum of weights) of every item, where tiles are split."""
    if not tiles.is_split:
        return None, None
    shape = tiles.items.shape[0], num_kv_heads, block_m
    return torch.empty(*shape, block_dv, device=device), torch.empty(*shape, 2, device=device)
