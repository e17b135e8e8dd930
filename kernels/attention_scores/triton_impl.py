"""Attention scores on GPUs. One program owns a tile of slots of one row, kv head and channel: no atomics.

It walks over the row's queries, tile by tile, skips tiles without weights, and adds up weights times probabilities in
the order of the queries; so a row's sums do not depend on its batch. Bound by reading the keys for few queries, by the
products for many. Channels read the keys again; nearly all policies have one.
Noisy probabilities have a softmax of their own: a first kernel, one program per tile of queries and kv head, walks over
all slots and leaves its denominators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.triton_impl import gumbel, philox

TILE_ROWS = 64  # queries times the heads that share a kv head
TILE_KEYS = 64


@triton.jit
def _noisy(x, noise_keys_ptr, temperature_ptr, token, head, row_mask, first_slot, num_heads, BLOCK_N: tl.constexpr):
    """(x + noise) / temperature of scores [BLOCK_M, BLOCK_N] at slots from first_slot, a multiple of 4."""
    key = tl.load(noise_keys_ptr + token * num_heads + head, mask=row_mask, other=0)[:, None]
    counter = (first_slot // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    counter = tl.broadcast_to(counter, x.shape[0], BLOCK_N // 4)
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1, c2, c3 = philox(counter, k0, k1)
    words = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    temperature = tl.load(temperature_ptr + token, mask=row_mask, other=1.0)
    return (x + gumbel(words)) / temperature[:, None]


@triton.jit
def _query_tile(
    q_ptr, first_query, start, num_queries, kv_head, q_stride_t, q_stride_h,
    GROUP: tl.constexpr, NUM_QUERIES: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries [BLOCK_M, BLOCK_D] with their place in the row, token, head and whether they exist, [BLOCK_M] each."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query = first_query + m // GROUP
    head = kv_head * GROUP + m % GROUP
    token = (start + query).to(tl.int64)
    row_mask = (m < NUM_QUERIES * GROUP) & (query < num_queries)
    offset = token[:, None] * q_stride_t + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + offset, mask=row_mask[:, None] & (d[None, :] < D), other=0.0)
    return q, query, token, head, row_mask


@triton.jit
def _logits(
    q, k_ptr, table_ptr, slot, end, scale, soft_cap, k_stride_b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KV_BLOCK: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Scaled and capped q.k [BLOCK_M, BLOCK_N] at slots below end; k_ptr and table_ptr are those of the kv head."""
    d = tl.arange(0, BLOCK_D)
    block = tl.load(table_ptr + slot // KV_BLOCK, mask=(slot >= 0) & (slot < end), other=0).to(tl.int64)
    offset = (block * k_stride_b + slot % KV_BLOCK * D)[None, :] + d[:, None]
    k = tl.load(k_ptr + offset, mask=((slot >= 0) & (slot < end))[None, :] & (d[:, None] < D), other=0.0)
    x = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale
    if HAS_CAP:
        x = soft_cap * (1.0 - 2.0 / (tl.exp(2.0 * x / soft_cap) + 1.0))  # tanh
    return x


@triton.jit
def _norm_kernel(
    q_ptr, k_ptr, table_ptr, lens_ptr, starts_ptr, noise_keys_ptr, temperature_ptr, norm_ptr,
    scale, soft_cap, window, num_heads,
    q_stride_t, q_stride_h, k_stride_b, k_stride_h,            # elements between tokens, heads; blocks, kv heads
    table_stride_r, table_stride_h, lens_stride_r, lens_stride_h,
    D: tl.constexpr, KV_BLOCK: tl.constexpr, GROUP: tl.constexpr, NUM_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    first_query = tl.program_id(0) * NUM_QUERIES
    row = tl.program_id(1).to(tl.int64)
    kv_head = tl.program_id(2).to(tl.int64)
    start = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - start
    if first_query < num_queries:
        before = tl.load(lens_ptr + row * lens_stride_r + kv_head * lens_stride_h) - num_queries
        q, query, token, head, row_mask = _query_tile(
            q_ptr, first_query, start, num_queries, kv_head, q_stride_t, q_stride_h,
            GROUP, NUM_QUERIES, BLOCK_M, D, BLOCK_D,
        )  # fmt: skip
        own = before + query
        begin = 0
        if HAS_WINDOW:
            begin = tl.maximum(0, before + first_query + 1 - window)
        end = before + tl.minimum(first_query + NUM_QUERIES, num_queries)
        k_ptr += kv_head * k_stride_h
        table_ptr += row * table_stride_r + kv_head * table_stride_h
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for first in range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
            slot = first + tl.arange(0, BLOCK_N)
            readable = tl.where(slot >= begin, slot, -1)
            x = _logits(q, k_ptr, table_ptr, readable, end, scale, soft_cap, k_stride_b, D, BLOCK_D, KV_BLOCK, HAS_CAP)
            x = _noisy(x, noise_keys_ptr, temperature_ptr, token, head, row_mask, first, num_heads, BLOCK_N)
            visible = slot[None, :] <= own[:, None]
            if HAS_WINDOW:
                visible = visible & (slot[None, :] > own[:, None] - window)
            x = tl.where(visible, x, float("-inf"))
            now = tl.maximum(largest, tl.max(x, axis=1))
            base = tl.where(now == float("-inf"), 0.0, now)
            total = total * tl.exp(largest - base) + tl.sum(tl.exp(x - base[:, None]), axis=1)
            largest = now
        is_blind = total == 0.0
        norm = tl.where(is_blind, float("-inf"), largest + tl.log(tl.where(is_blind, 1.0, total)))
        tl.store(norm_ptr + token * num_heads + head, norm, mask=row_mask)


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, table_ptr, lens_ptr, starts_ptr, norm_ptr, weights_ptr, noise_keys_ptr, temperature_ptr, out_ptr,
    scale, soft_cap, window, num_heads, num_tokens, num_rows, num_slots,
    q_stride_t, q_stride_h, k_stride_b, k_stride_h,            # elements between tokens, heads; blocks, kv heads
    table_stride_r, table_stride_h, lens_stride_r, lens_stride_h,
    D: tl.constexpr, KV_BLOCK: tl.constexpr, GROUP: tl.constexpr, NUM_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, IS_COUNT: tl.constexpr, IS_NOISY: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_N
    channel = (tl.program_id(1) // num_rows).to(tl.int64)
    row = (tl.program_id(1) % num_rows).to(tl.int64)
    kv_head = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(lens_ptr + row * lens_stride_r + kv_head * lens_stride_h)
    start = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - start
    before = seq_len - num_queries
    k_ptr += kv_head * k_stride_h
    table_ptr += row * table_stride_r + kv_head * table_stride_h
    weights_ptr += channel * num_tokens
    slot = first + tl.arange(0, BLOCK_N)
    own_out = out_ptr + ((channel * num_rows + row) * tl.num_programs(2) + kv_head) * num_slots + slot
    out_mask = (slot < num_slots) & (slot < seq_len)

    # Queries before this one see nothing of the tile.
    first_seeing = tl.maximum(0, first - before) // NUM_QUERIES * NUM_QUERIES
    if first >= seq_len:
        first_seeing = num_queries
    sums = tl.load(own_out, mask=out_mask, other=0.0)
    for first_query in range(first_seeing, num_queries, NUM_QUERIES):
        m = tl.arange(0, BLOCK_M)
        is_query = (m < NUM_QUERIES * GROUP) & (first_query + m // GROUP < num_queries)
        weight = tl.load(weights_ptr + start + first_query + m // GROUP, mask=is_query, other=0.0)
        if tl.max(tl.abs(weight)) > 0.0:
            q, query, token, head, row_mask = _query_tile(
                q_ptr, first_query, start, num_queries, kv_head, q_stride_t, q_stride_h,
                GROUP, NUM_QUERIES, BLOCK_M, D, BLOCK_D,
            )  # fmt: skip
            own = before + query
            readable = slot
            if HAS_WINDOW:  # what is behind the window of the tile's first query may be gone
                readable = tl.where(slot > before + first_query - window, slot, -1)
            end = before + tl.minimum(first_query + NUM_QUERIES, num_queries)
            x = _logits(q, k_ptr, table_ptr, readable, end, scale, soft_cap, k_stride_b, D, BLOCK_D, KV_BLOCK, HAS_CAP)
            if IS_NOISY:
                x = _noisy(x, noise_keys_ptr, temperature_ptr, token, head, row_mask, first, num_heads, BLOCK_N)
            norm = tl.load(norm_ptr + token * num_heads + head, mask=row_mask, other=float("-inf"))
            seeing = row_mask & (norm != float("-inf")) & (weight != 0.0)
            visible = seeing[:, None] & (slot[None, :] <= own[:, None])
            if HAS_WINDOW:
                visible = visible & (slot[None, :] > own[:, None] - window)
            term = tl.exp(x - tl.where(seeing, norm, 0.0)[:, None])
            if IS_COUNT:
                num_seen = own + 1
                if HAS_WINDOW:
                    num_seen = tl.minimum(num_seen, window)
                term = tl.where(term * num_seen[:, None] < 0.9999, 1.0, 0.0)
            sums += tl.sum(tl.where(visible, weight[:, None] * term, 0.0), axis=0)
    tl.store(own_out, sums, mask=out_mask)


def attention_scores(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    lse: Tensor,
    weights: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    kind: str,
    noise_keys: Tensor | None,
    temperature: Tensor | None,
) -> None:
    """See `kernels.attention_scores.attention_scores`; noise_keys is [T, H]. Adds to out [C, R, H_kv, S]."""
    num_tokens, num_heads, head_dim = q.shape
    num_channels, num_rows, num_kv_heads, num_slots = out.shape
    per_head_table = block_table.dim() == 3
    group = num_heads // num_kv_heads
    num_queries = max(1, TILE_ROWS // group)
    strides = (
        *(q.stride(0), q.stride(1), k_cache.stride(0)),
        0 if per_head_table and k_cache.shape[1] == 1 else k_cache.stride(1),
        *(block_table.stride(0), block_table.stride(1) if per_head_table else 0),
        *(seq_lens.stride(0), seq_lens.stride(1) if seq_lens.dim() == 2 else 0),
    )
    sizes = {
        "D": head_dim,
        "KV_BLOCK": k_cache.shape[2],
        "GROUP": group,
        "NUM_QUERIES": num_queries,
        "BLOCK_M": max(16, triton.next_power_of_2(num_queries * group)),
        "BLOCK_N": TILE_KEYS,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "HAS_WINDOW": window > 0,
        "HAS_CAP": soft_cap > 0,
    }
    where = q, k_cache, block_table, seq_lens, cu_seqlens_q
    norm = lse
    if kind == "noisy":
        norm = torch.empty_like(lse)
        _norm_kernel[(triton.cdiv(num_tokens, num_queries), num_rows, num_kv_heads)](
            *(*where, noise_keys, temperature, norm), *(scale, soft_cap, window, num_heads), *strides, **sizes
        )
    _scores_kernel[(triton.cdiv(num_slots, TILE_KEYS), num_channels * num_rows, num_kv_heads)](
        *(*where, norm, weights, noise_keys, temperature, out),
        *(scale, soft_cap, window, num_heads, num_tokens, num_rows, num_slots),
        *strides,
        **sizes,
        IS_COUNT=kind == "count",
        IS_NOISY=kind == "noisy",
    )
