"""Packed blocks through the native library (kernel.cpp), and the division of attention into its work items."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import native
from kernels.hadamard import hadamard_size
from kernels.packed_blocks.layout import CODINGS, VALUE_GROUP, PackedLayout, packed_layout
from kernels.packed_blocks.layout import Side as SideLayout
from kernels.paged_attention.cpp_impl import MIN_WORK_PER_THREAD, SPLIT_KEYS, TILE_QUERIES, Params
from kernels.paged_attention.plan import AttentionPlan, Row

MAX_PARTIALS = 4096  # of one wave: bounds the memory of partial results


class Side(ctypes.Structure):
    """Field by field the Side of codes.h."""

    _fields_ = tuple(
        (name, native.INT)
        for name in ("coding", "bits", "dim", "block_size", "row_bytes", "group_bytes", "num_scales", "value_group")
    )


class Pool(ctypes.Structure):
    """Field by field the Pool of kernel.cpp."""

    _fields_ = (
        ("side", Side),
        ("data", native.PTR),
        *((name, native.INT) for name in ("num_layers", "num_heads", "unit_bytes")),
    )


class Packed(ctypes.Structure):
    """Field by field the Packed of kernel.cpp."""

    _fields_ = (("keys", Pool), ("values", Pool), ("layer", native.INT), ("places", native.INT))


@dataclass(frozen=True)
class Wave:
    """Work whose partial results are in memory together; columns as in paged_attention/attention.h."""

    items: Tensor  # [n, 6] int32, one split each
    merges: Tensor  # [m, 5] int32
    num_partials: int


@dataclass(frozen=True)
class Work:
    waves: list[Wave]
    num_pairs: int  # queries times keys, of one kv head


def plan(rows: tuple[Row, ...], num_kv_heads: int, device: torch.device) -> Work:
    """Tiles of queries, each divided into splits of SPLIT_KEYS keys; waves of tiles."""
    waves: list[Wave] = []
    items: list[tuple[int, ...]] = []
    merges: list[tuple[int, ...]] = []
    num_partials = 0
    for index, (num_queries, length) in enumerate(rows):
        num_splits = -(-length // SPLIT_KEYS)
        for first in range(0, num_queries, TILE_QUERIES):
            count = min(TILE_QUERIES, num_queries - first)
            if num_partials + count * num_splits > MAX_PARTIALS and merges:
                waves.append(_wave(items, merges, num_partials))
                items, merges, num_partials = [], [], 0
            merges.append((index, first, count, num_splits, num_partials))
            for split in range(num_splits):
                items.append((index, first, count, split, split + 1, num_partials + split * count))
            num_partials += count * num_splits
    if merges:
        waves.append(_wave(items, merges, num_partials))
    return Work(waves, sum(num_queries * length for num_queries, length in rows))


def _wave(items: list[tuple[int, ...]], merges: list[tuple[int, ...]], num_partials: int) -> Wave:
    return Wave(
        torch.tensor(items, dtype=torch.int32).view(-1, 6), torch.tensor(merges, dtype=torch.int32), num_partials
    )


def seal_blocks(
    k_pool: Tensor,
    v_pool: Tensor,
    origins: tuple[Tensor, Tensor],
    sources: tuple[Tensor, Tensor],
    destination: Tensor,
    places: Tensor,
    format: str,
) -> None:
    """origins, sources: of keys and of values, where block sources[i] of origins is read."""
    for pool, origin, source in zip(_pools(k_pool, v_pool, format)[:2], origins, sources, strict=True):
        native.function("kvasir_seal_blocks", *[native.PTR] * 2, native.INT, *[native.PTR] * 3, native.INT, native.INT)(
            ctypes.addressof(pool),
            origin.data_ptr(),
            native.DTYPE_CODES[origin.dtype],
            *(x.data_ptr() for x in (source, destination, places)),
            len(destination),
            native.num_threads(),
        )


def unpack_blocks(
    k_pool: Tensor, v_pool: Tensor, blocks: Tensor, places: Tensor, format: str, k: Tensor, v: Tensor
) -> None:
    for pool, out in zip(_pools(k_pool, v_pool, format)[:2], (k, v), strict=True):
        native.function("kvasir_unpack_blocks", native.PTR, *[native.PTR] * 3, native.INT, native.INT)(
            ctypes.addressof(pool),
            blocks.data_ptr(),
            places.data_ptr(),
            out.data_ptr(),
            len(blocks),
            native.num_threads(),
        )


def packed_attention(
    q: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    packed_table: Tensor,
    packed_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    layer: int,
    scale: float,
    soft_cap: float,
    format: str,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
) -> None:
    """See `kernels.packed_blocks.packed_attention`; writes out [T, H, Dv] and lse [T, H]."""
    work: Work = plan.work
    keys, values, layout = _pools(k_pool, v_pool, format)
    packed = Packed(keys, values, layer, layout.places)
    num_heads, head_dim, head_dim_v = q.shape[1], q.shape[2], v_pool.shape[4]
    num_useful_threads = work.num_pairs * num_heads * (head_dim + head_dim_v) // MIN_WORK_PER_THREAD
    for wave in work.waves:
        num_partials = wave.num_partials * num_heads
        partials = torch.empty(num_partials * (head_dim_v + 2))
        params = Params(
            q=q.data_ptr(),
            block_table=packed_table.data_ptr(),
            seq_lens=packed_lens.data_ptr(),
            cu_seqlens_q=cu_seqlens_q.data_ptr(),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            items=wave.items.data_ptr(),
            merges=wave.merges.data_ptr(),
            partial_acc=partials.data_ptr(),
            partial_stats=partials[num_partials * head_dim_v :].data_ptr(),
            num_items=len(wave.items),
            num_merges=len(wave.merges),
            num_heads=num_heads,
            num_kv_heads=k_pool.shape[2],
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            q_stride_token=q.stride(0),
            q_stride_head=q.stride(1),
            out_stride_token=out.stride(0),
            out_stride_head=out.stride(1),
            table_stride_row=packed_table.stride(0),
            q_dtype=native.DTYPE_CODES[q.dtype],
            num_threads=max(1, min(native.num_threads(), num_useful_threads)),
            scale=scale,
            soft_cap=soft_cap,
        )
        native.function("kvasir_packed_attention", native.PTR, native.PTR)(
            ctypes.addressof(params), ctypes.addressof(packed)
        )


def packed_structure(k_pool: Tensor, v_pool: Tensor, format: str) -> tuple[Packed, int]:
    """For native callers, of layer 0; and how many entries of a query must be mixed, 0 for none."""
    keys, values, layout = _pools(k_pool, v_pool, format)
    return Packed(keys, values, 0, layout.places), hadamard_size(k_pool.shape[4]) if layout.is_rotated else 0


def _pools(k_pool: Tensor, v_pool: Tensor, format: str) -> tuple[Pool, Pool, PackedLayout]:
    layout = packed_layout(format, k_pool.shape[4], v_pool.shape[4], k_pool.shape[3], k_pool.dtype)
    return _pool(k_pool, layout.keys), _pool(v_pool, layout.values), layout


def _pool(pool: Tensor, side: SideLayout) -> Pool:
    _, num_layers, num_heads, block_size, dim = pool.shape
    return Pool(
        Side(
            CODINGS.index(side.coding),
            side.bits,
            dim,
            block_size,
            side.row_bytes,
            side.group_bytes,
            side.num_scales,
            VALUE_GROUP,
        ),
        pool.data_ptr(),
        num_layers,
        num_heads,
        block_size * dim * pool.element_size(),
    )
