"""Paged attention through the native library (kernel.cpp), and the division of a step into its work items."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import native
from kernels.paged_attention.plan import AttentionPlan, Row

SPLIT_KEYS = 256  # as kSplitKeys in kernel.cpp
TILE_QUERIES = 16  # queries of a row that one item takes; times the heads that share a kv head they are a tile's rows
MIN_WORK_PER_THREAD = 100_000  # multiply-adds (some microseconds) for which waking another thread pays
ITEMS_PER_THREAD = 4  # a tile that is more than one of so many equal shares of the work is divided by keys


class Params(ctypes.Structure):
    """Field by field the Params of kernel.cpp."""

    _fields_ = (
        *((name, native.PTR) for name in ("q", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q")),
        *((name, native.PTR) for name in ("sinks", "paths", "out", "lse", "items", "merges")),
        *((name, native.PTR) for name in ("partial_acc", "partial_stats")),
        *((name, native.INT) for name in ("num_items", "num_merges", "num_heads", "num_kv_heads")),
        *((name, native.INT) for name in ("head_dim", "head_dim_v", "block_size")),
        *((name, native.INT) for name in ("q_stride_token", "q_stride_head", "out_stride_token", "out_stride_head")),
        *((name, native.INT) for name in ("k_stride_block", "k_stride_head", "v_stride_block", "v_stride_head")),
        *((name, native.INT) for name in ("table_stride_row", "table_stride_head")),
        *((name, native.INT) for name in ("lens_stride_row", "lens_stride_head", "paths_stride")),
        *((name, native.INT) for name in ("q_dtype", "cache_dtype", "window", "num_threads")),
        *((name, native.FLOAT) for name in ("scale", "soft_cap")),
    )


@dataclass(frozen=True)
class Work:
    """Items and merges as kernel.cpp reads them; every one stands for all kv heads."""

    items: Tensor  # [n, 6] int32
    merges: Tensor  # [m, 5] int32
    num_partials: int
    num_pairs: int  # queries times keys, of one kv head
    prepared: dict[Hashable, Prepared] = field(default_factory=dict)  # by layout of the tensors


class Prepared(NamedTuple):
    """What stays the same in all layers of one layout; addresses of tensors and options are set at every call."""

    params: Params
    partials: Tensor  # memory that params points to


def plan(rows: tuple[Row, ...], num_kv_heads: int, device: torch.device) -> Work:
    """Tiles of queries, heaviest first; tiles too heavy for an even share over the threads are divided by keys."""
    tiles = []  # cost, row, first query, queries, splits
    for index, (num_queries, seq_len) in enumerate(rows):
        for first in range(0, num_queries, TILE_QUERIES):
            count = min(TILE_QUERIES, num_queries - first)
            num_keys = max(0, seq_len - num_queries + first + count)
            tiles.append((count * num_keys, index, first, count, -(-num_keys // SPLIT_KEYS)))
    num_threads = native.num_threads()
    num_pairs = sum(tile[0] for tile in tiles)
    share = num_pairs * num_kv_heads / (num_threads * ITEMS_PER_THREAD) if num_threads > 1 else num_pairs
    items: list[tuple[int, tuple[int, ...]]] = []
    merges: list[tuple[int, ...]] = []
    num_partials = 0
    for cost, index, first, count, num_splits in tiles:
        if cost <= share or num_splits < 2:
            items.append((cost, (index, first, count, 0, num_splits, -1)))
            continue
        merges.append((index, first, count, num_splits, num_partials))
        for split in range(num_splits):
            items.append((cost // num_splits, (index, first, count, split, split + 1, num_partials)))
            num_partials += count
    items.sort(key=lambda item: -item[0])
    return Work(
        items=torch.tensor([item for _, item in items], dtype=torch.int32),
        merges=torch.tensor(merges, dtype=torch.int32),
        num_partials=num_partials,
        num_pairs=num_pairs,
    )


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
    work: Work = plan.work
    prepared = work.prepared.get(layout)
    if prepared is None:
        prepared = work.prepared[layout] = _prepare(q, k_cache, v_cache, block_table, seq_lens, out, work)
    params = prepared.params
    params.q = q.data_ptr()
    params.k_cache = k_cache.data_ptr()
    params.v_cache = v_cache.data_ptr()
    params.block_table = block_table.data_ptr()
    params.seq_lens = seq_lens.data_ptr()
    params.cu_seqlens_q = cu_seqlens_q.data_ptr()
    params.sinks = None if sinks is None else sinks.data_ptr()
    paths = plan.paths
    params.paths = None if paths is None else paths.data_ptr()
    params.paths_stride = 0 if paths is None else paths.stride(0)
    params.out = out.data_ptr()
    params.lse = None if lse is None else lse.data_ptr()
    params.scale = scale
    params.soft_cap = soft_cap
    params.window = window
    native.function("kvasir_paged_attention", native.PTR)(ctypes.addressof(params))


def _prepare(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: Tensor, out: Tensor, work: Work
) -> Prepared:
    num_heads, head_dim_v = q.shape[1], v_cache.shape[3]
    per_head_table, per_head_lens = block_table.dim() == 3, seq_lens.dim() == 2
    shared_cache_head = per_head_table and k_cache.shape[1] == 1
    num_partials = work.num_partials * num_heads
    partials = torch.empty(num_partials * (head_dim_v + 2))
    num_useful_threads = work.num_pairs * num_heads * (q.shape[2] + head_dim_v) // MIN_WORK_PER_THREAD
    params = Params(
        items=work.items.data_ptr(),
        merges=work.merges.data_ptr(),
        partial_acc=partials.data_ptr(),
        partial_stats=partials[num_partials * head_dim_v :].data_ptr(),
        num_items=work.items.shape[0],
        num_merges=work.merges.shape[0],
        num_heads=num_heads,
        num_kv_heads=block_table.shape[1] if per_head_table else k_cache.shape[1],
        head_dim=q.shape[2],
        head_dim_v=head_dim_v,
        block_size=k_cache.shape[2],
        q_stride_token=q.stride(0),
        q_stride_head=q.stride(1),
        out_stride_token=out.stride(0),
        out_stride_head=out.stride(1),
        k_stride_block=k_cache.stride(0),
        k_stride_head=0 if shared_cache_head else k_cache.stride(1),
        v_stride_block=v_cache.stride(0),
        v_stride_head=0 if shared_cache_head else v_cache.stride(1),
        table_stride_row=block_table.stride(0),
        table_stride_head=block_table.stride(1) if per_head_table else 0,
        lens_stride_row=seq_lens.stride(0),
        lens_stride_head=seq_lens.stride(1) if per_head_lens else 0,
        q_dtype=native.DTYPE_CODES[q.dtype],
        cache_dtype=native.DTYPE_CODES[k_cache.dtype],
        num_threads=max(1, min(native.num_threads(), num_useful_threads)),
    )
    return Prepared(params, partials)
