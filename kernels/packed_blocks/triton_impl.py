"""Packed blocks in Triton: unpacking, and attention; sealing is triton_seal.py.

Attention: one program holds a tile of queries of one row times the heads that share a kv head, and walks over a split
of the row's packed tokens, which it decodes in registers; the splits are merged as those of paged attention are. Splits
start at fixed tokens of the row, so its sums do not depend on its batch. The kernel here takes
heads and blocks of any size; triton_attend.py those whose sizes are powers of two, in fewer instructions.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.packed_blocks.layout import SCALE_BITS, PackedLayout, Side, packed_layout
from kernels.packed_blocks.triton_attend import attend_words_kernel, suits_words, words_options
from kernels.packed_blocks.triton_seal import as_float, fp8_value, scale_places, seal_blocks, unit_offset
from kernels.paged_attention.plan import AttentionPlan, Row
from kernels.paged_attention.triton_impl import merge_kernel
from kernels.paged_attention.triton_plan import SPLIT_KEYS, Tiles

__all__ = ["packed_attention", "plan", "seal_blocks", "unpack_blocks"]

TILE_QUERIES = 4  # of rows that have more than one
KEY_TILE_BYTES = 8 * 1024  # of a decoded tile in float32
_LOG2_E = tl.constexpr(1.4426950408889634)
_SCALE_BITS = tl.constexpr(SCALE_BITS)
_NOT_FINITE = tl.constexpr(255)  # the number of a scale, as in __init__.py


@triton.jit
def _scale_of(number, CODING: tl.constexpr):
    scale = as_float((number + 832) << 20 if CODING == "int8" else number << 23)
    return tl.where(number == _NOT_FINITE, float("nan"), scale)


@triton.jit
def _decode(
    bytes_ptr, halves_ptr, group, t, mask,                     # [N] each: byte where the group starts, token in it
    DIM: tl.constexpr, CODING: tl.constexpr, BITS: tl.constexpr, NUM_SCALES: tl.constexpr,
    PER_TOKEN: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tokens t of groups, [N, BLOCK_D] float32; zero where masked."""
    ROW_BYTES: tl.constexpr = DIM * BITS // 8
    d = tl.arange(0, BLOCK_D)[None, :]
    mask2 = mask[:, None] & (d < DIM)
    row = group + NUM_SCALES * 4 + t * ROW_BYTES
    codes = tl.load(bytes_ptr + row[:, None] + d % ROW_BYTES, mask=mask2, other=0).to(tl.int32)
    if NUM_SCALES > 0:
        codes = (codes >> (d // ROW_BYTES * BITS)) & ((1 << BITS) - 1)
        index = (group // 2 + t * PER_TOKEN)[:, None] + d // CHANNELS
        scale = tl.load(halves_ptr + index, mask=mask2, other=0.0).to(tl.float32)
        zero = tl.load(halves_ptr + NUM_SCALES + index, mask=mask2, other=0.0).to(tl.float32)
        return codes.to(tl.float32) * scale + zero
    bit = tl.arange(0, _SCALE_BITS)[None, :]
    first = (row if CODING == "int8" else group)[:, None]
    low = tl.load(bytes_ptr + first + bit, mask=mask[:, None] & (bit >= 0), other=0).to(tl.int32) & 1
    scale = _scale_of(tl.sum(low << bit, axis=1), CODING)[:, None]
    if CODING == "int8":
        values = ((codes << 24) >> 24).to(tl.float32)
    else:
        values = fp8_value(codes & 127)
        values = tl.where(codes >= 128, -values, values)
    return tl.where(mask2, values * scale, 0.0)


@triton.jit
def _unpack_kernel(
    bytes_ptr, halves_ptr, block_ptr, place_ptr, out_ptr,
    units, unit_bytes, group_bytes,
    BS: tl.constexpr, DIM: tl.constexpr, CODING: tl.constexpr, BITS: tl.constexpr, NUM_SCALES: tl.constexpr,
    PER_TOKEN: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    group = unit_offset(block_ptr, units) * unit_bytes + tl.load(place_ptr + program // units) * group_bytes
    x = _decode(
        bytes_ptr, halves_ptr, group + tl.zeros([BLOCK_S], tl.int64), t, t < BS,
        DIM, CODING, BITS, NUM_SCALES, PER_TOKEN, CHANNELS, BLOCK_D,
    )  # fmt: skip
    mask = (t < BS)[:, None] & (d < DIM)[None, :]
    tl.store(out_ptr + program * (BS * DIM) + t[:, None] * DIM + d[None, :], x, mask=mask)


def unpack_blocks(
    k_pool: Tensor, v_pool: Tensor, blocks: Tensor, places: Tensor, format: str, k: Tensor, v: Tensor
) -> None:
    layout = packed_layout(format, k_pool.shape[4], v_pool.shape[4], k_pool.shape[3], k_pool.dtype)
    units = k_pool.shape[1] * k_pool.shape[2]
    for pool, side, out in ((k_pool, layout.keys, k), (v_pool, layout.values, v)):
        _unpack_kernel[(len(blocks) * units,)](
            *(pool.view(torch.uint8), pool.view(torch.float16), blocks, places, out),
            *(units, side.block_size * side.dim * pool.element_size(), side.group_bytes),
            BS=side.block_size,
            DIM=side.dim,
            CODING=side.coding,
            BLOCK_S=triton.next_power_of_2(side.block_size),
            BLOCK_D=triton.next_power_of_2(side.dim),
            **scale_places(side),
        )


# ---- attention ----


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _attend_kernel(
    q_ptr, k_bytes_ptr, k_halves_ptr, v_bytes_ptr, v_halves_ptr, table_ptr, lens_ptr, starts_ptr, acc_ptr, stats_ptr,
    item_ptr,
    scale, soft_cap,
    q_stride_t, q_stride_h, table_stride_r,                    # elements
    k_block_bytes, k_unit_bytes, k_group_bytes, k_first_byte,  # k_first_byte: of the layer in its block
    v_block_bytes, v_unit_bytes, v_group_bytes, v_first_byte,
    PLACES: tl.constexpr, BS: tl.constexpr, BITS: tl.constexpr,
    D: tl.constexpr, K_CODING: tl.constexpr, K_SCALES: tl.constexpr, K_PER_TOKEN: tl.constexpr,
    K_CHANNELS: tl.constexpr,
    DV: tl.constexpr, V_CODING: tl.constexpr, V_SCALES: tl.constexpr, V_PER_TOKEN: tl.constexpr,
    V_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,                                       # query heads of one kv head
    NUM_QUERIES: tl.constexpr,                                 # of a tile
    BLOCK_M: tl.constexpr,                                     # at least NUM_QUERIES * GROUP
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    row = tl.load(item_ptr + item * 4).to(tl.int64)
    first_query = tl.load(item_ptr + item * 4 + 1)
    begin = tl.load(item_ptr + item * 4 + 2)
    end = tl.minimum(tl.load(item_ptr + item * 4 + 3), tl.load(lens_ptr + row))
    start = tl.load(starts_ptr + row)
    num_queries = tl.load(starts_ptr + row + 1) - start

    m = tl.arange(0, BLOCK_M)
    query = first_query + m // GROUP
    token = (start + query).to(tl.int64)
    head = kv_head * GROUP + m % GROUP
    row_mask = (m < NUM_QUERIES * GROUP) & (query < num_queries)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_offset = token[:, None] * q_stride_t + head[:, None] * q_stride_h + d[None, :]
    q = tl.load(q_ptr + q_offset, mask=row_mask[:, None] & (d[None, :] < D), other=0.0)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for tile in range(begin, end, BLOCK_N):
        n = tile + tl.arange(0, BLOCK_N)
        in_range = n < end
        index = n // BS
        block = tl.load(table_ptr + row * table_stride_r + index // PLACES, mask=in_range, other=0).to(tl.int64)
        place = index % PLACES
        group = k_first_byte + block * k_block_bytes + kv_head * k_unit_bytes + place * k_group_bytes
        k = _decode(
            k_bytes_ptr, k_halves_ptr, group, n % BS, in_range,
            D, K_CODING, BITS, K_SCALES, K_PER_TOKEN, K_CHANNELS, BLOCK_D,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k).to(q.dtype), input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if HAS_CAP:
            scores = soft_cap * (1.0 - 2.0 / (_exp(2.0 * scores / soft_cap) + 1.0))  # tanh
        scores = tl.where(in_range[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, axis=1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = _exp(scores - base[:, None])
        decay = _exp(largest - base)
        total = total * decay + tl.sum(weights, axis=1)
        largest = now
        group = v_first_byte + block * v_block_bytes + kv_head * v_unit_bytes + place * v_group_bytes
        v = _decode(
            v_bytes_ptr, v_halves_ptr, group, n % BS, in_range,
            DV, V_CODING, BITS, V_SCALES, V_PER_TOKEN, V_CHANNELS, BLOCK_DV,
        )  # fmt: skip
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")

    partial = (item * tl.num_programs(1) + kv_head) * BLOCK_M + m
    tl.store(acc_ptr + partial[:, None] * BLOCK_DV + dv[None, :], acc)
    tl.store(stats_ptr + partial * 2, largest)
    tl.store(stats_ptr + partial * 2 + 1, total)


def plan(rows: tuple[Row, ...], num_kv_heads: int, device: torch.device) -> list[Tiles]:
    """One launch for rows of one query, one for the others; tiles as in paged attention, every one split."""
    decode = [(i, row) for i, row in enumerate(rows) if row.num_queries == 1]
    others = [(i, row) for i, row in enumerate(rows) if row.num_queries > 1]
    classes = (decode, 1), (others, TILE_QUERIES)
    return [_make_tiles(members, num_queries, device) for members, num_queries in classes if members]


def _make_tiles(rows: list[tuple[int, Row]], num_queries: int, device: torch.device) -> Tiles:
    tiles: list[tuple[int, int, int, int]] = []
    items: list[tuple[int, int, int, int]] = []
    for index, row in rows:
        splits = range(0, max(1, row.seq_len), SPLIT_KEYS)
        for first in range(0, row.num_queries, num_queries):
            tiles.append((index, first, len(items), len(splits)))
            items.extend((index, first, begin, begin + SPLIT_KEYS) for begin in splits)
    return Tiles(
        num_queries=num_queries,
        items=torch.tensor(items, dtype=torch.int32).to(device, non_blocking=True),
        tiles=torch.tensor(tiles, dtype=torch.int32).to(device, non_blocking=True),
        is_split=True,
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
    num_heads, head_dim, head_dim_v, num_kv_heads = q.shape[1], q.shape[2], v_pool.shape[4], k_pool.shape[2]
    layout = packed_layout(format, head_dim, head_dim_v, k_pool.shape[3], k_pool.dtype)
    group = num_heads // num_kv_heads
    block_dv = max(16, triton.next_power_of_2(head_dim_v))
    for tiles in plan.work:
        block_m = max(16, triton.next_power_of_2(tiles.num_queries * group))
        shape = tiles.items.shape[0], num_kv_heads, block_m
        acc, stats = torch.empty(*shape, block_dv, device=q.device), torch.empty(*shape, 2, device=q.device)
        tensors = packed_table, packed_lens, cu_seqlens_q, acc, stats, tiles.items
        numbers = scale, soft_cap, q.stride(0), q.stride(1), packed_table.stride(0)
        _launch_attend(q, k_pool, v_pool, layout, tensors, numbers, layer, group, tiles.num_queries, block_m)
        merge_kernel[(tiles.tiles.shape[0], num_kv_heads)](
            *(cu_seqlens_q, None, out, lse, acc, stats, tiles.tiles),
            *(num_heads, out.stride(0), out.stride(1)),
            DV=head_dim_v,
            GROUP=group,
            NUM_QUERIES=tiles.num_queries,
            BLOCK_M=block_m,
            BLOCK_DV=block_dv,
            HAS_SINKS=False,
            HAS_LSE=True,
        )


def _launch_attend(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, layout: PackedLayout, tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...], layer: int, group: int, num_queries: int, block_m: int,
) -> None:  # fmt: skip
    """Through triton_attend.py where sizes allow it."""
    sides = layout.keys, layout.values
    head_dim, head_dim_v = (side.dim for side in sides)
    grid = tensors[-1].shape[0], k_pool.shape[2]
    k_strides, v_strides = _byte_strides(k_pool, layout.keys, layer), _byte_strides(v_pool, layout.values, layer)
    sizes: dict[str, Any] = {
        "PLACES": layout.places,
        "BS": k_pool.shape[3],
        "BITS": layout.keys.bits,
        "D": head_dim,
        "K_CODING": layout.keys.coding,
        "DV": head_dim_v,
        "V_CODING": layout.values.coding,
        "GROUP": group,
        "NUM_QUERIES": num_queries,
        "BLOCK_M": block_m,
        "HAS_CAP": numbers[1] > 0,
    }
    if suits_words(layout.keys) and suits_words(layout.values):
        attend_words_kernel[grid](
            *(q, k_pool.view(torch.int32), k_pool.view(torch.float16)),
            *(v_pool.view(torch.int32), v_pool.view(torch.float16)),
            *tensors,
            *numbers,
            *(size // 4 for block, unit, _, first in (k_strides, v_strides) for size in (block, unit, first)),
            K_GROUP_WORDS=layout.keys.group_bytes // 4,
            V_GROUP_WORDS=layout.values.group_bytes // 4,
            **sizes,
            **words_options(layout.keys, layout.values, q.element_size(), block_m),
        )
        return
    keys, values = scale_places(layout.keys), scale_places(layout.values)
    block_d, block_dv = (max(16, triton.next_power_of_2(side.dim)) for side in sides)
    _attend_kernel[grid](
        *(q, k_pool.view(torch.uint8), k_pool.view(torch.float16)),
        *(v_pool.view(torch.uint8), v_pool.view(torch.float16)),
        *tensors,
        *numbers,
        *k_strides,
        *v_strides,
        K_SCALES=keys["NUM_SCALES"],
        K_PER_TOKEN=keys["PER_TOKEN"],
        K_CHANNELS=keys["CHANNELS"],
        V_SCALES=values["NUM_SCALES"],
        V_PER_TOKEN=values["PER_TOKEN"],
        V_CHANNELS=values["CHANNELS"],
        BLOCK_N=max(16, min(128, KEY_TILE_BYTES // (4 * max(block_d, block_dv)))),
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        **sizes,
    )


def _byte_strides(pool: Tensor, side: Side, layer: int) -> tuple[int, int, int, int]:
    """Bytes of a block, of a unit and of a group; where the layer starts in its block."""
    size = pool.element_size()
    return pool.stride(0) * size, pool.stride(2) * size, side.group_bytes, layer * pool.stride(1) * size
