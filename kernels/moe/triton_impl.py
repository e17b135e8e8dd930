"""The grouped products on GPUs, in five launches whose grids follow from shapes alone.

Two small kernels sort the choices by expert and cut them into blocks of one expert each; a program of the two products
takes a block and a tile of the expert's rows, finds its tokens through the sorted order, and leaves at once where the
grid has more blocks than there are. A last kernel sums the choices of each token. Bound by reading the chosen experts'
matrices for few tokens, by arithmetic for many: the block is as high as an expert's usual number of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.act_and_mul.triton_impl import activated

_SCAN_TILE = 1024  # choices that the sort looks at together
_SUM_TILE = 1024


class _Tile(NamedTuple):
    """Of both products; the first has twice as many columns, gate and up."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def _tile(rows_per_expert: float) -> _Tile:
    if rows_per_expert <= 16:
        return _Tile(rows=16, columns=64, depth=64, num_warps=4, num_stages=4)
    if rows_per_expert <= 64:
        return _Tile(rows=64, columns=64, depth=64, num_warps=4, num_stages=4)
    return _Tile(rows=128, columns=64, depth=64, num_warps=8, num_stages=3)


@triton.jit
def _count_kernel(experts_ptr, counts_ptr, num_choices, TILE: tl.constexpr):
    expert = tl.program_id(0)
    count = 0
    for start in range(0, num_choices, TILE):
        choice = start + tl.arange(0, TILE)
        found = tl.load(experts_ptr + choice, mask=choice < num_choices, other=-1)
        count += tl.sum((found == expert).to(tl.int32), axis=0)
    tl.store(counts_ptr + expert, count)


@triton.jit
def _sort_kernel(
    experts_ptr,
    counts_ptr,
    order_ptr,  # [choices] int32 out: choices by expert, in order within one
    blocks_ptr,  # [blocks, 3] int32 out: expert, first entry of the order, entries; -1 where there is none
    num_choices,
    num_experts,
    ROWS: tl.constexpr,  # most entries of a block
    EXPERTS: tl.constexpr,  # num_experts rounded up to a power of two
    TILE: tl.constexpr,
):
    expert = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + e, mask=(e < num_experts) & (e < expert), other=0)
    first = tl.sum(counts, axis=0)
    block = tl.sum((counts + ROWS - 1) // ROWS, axis=0)
    count = tl.load(counts_ptr + expert)
    for done in range(0, count, ROWS):
        tl.store(blocks_ptr + block * 3, expert)
        tl.store(blocks_ptr + block * 3 + 1, first + done)
        tl.store(blocks_ptr + block * 3 + 2, tl.minimum(count - done, ROWS))
        block += 1
    for start in range(0, num_choices, TILE):
        choice = start + tl.arange(0, TILE)
        is_own = tl.load(experts_ptr + choice, mask=choice < num_choices, other=-1) == expert
        place = tl.cumsum(is_own.to(tl.int32), axis=0)
        tl.store(order_ptr + first + place - 1, choice, mask=is_own)
        first += tl.sum(is_own.to(tl.int32), axis=0)


@triton.jit
def _gate_up_kernel(
    x_ptr,
    weight_ptr,  # [E, 2 * SIZE, HIDDEN]
    order_ptr,
    blocks_ptr,
    inner_ptr,  # [choices, SIZE] out, in the order of the sort
    x_stride,
    top_k,
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    block = tl.program_id(0)
    expert = tl.load(blocks_ptr + block * 3).to(tl.int64)
    if expert < 0:
        return
    i = tl.arange(0, ROWS)
    is_row = i < tl.load(blocks_ptr + block * 3 + 2)
    row = (tl.load(blocks_ptr + block * 3 + 1) + i).to(tl.int64)
    token = tl.load(order_ptr + row, mask=is_row, other=0).to(tl.int64) // top_k
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + token[:, None] * x_stride + k[None, :]
    gate_ptrs = weight_ptr + expert * (2 * SIZE * HIDDEN) + column[None, :] * HIDDEN + k[:, None]
    is_column = (column < SIZE)[None, :]
    gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        in_depth = k < HIDDEN - start
        x = tl.load(x_ptrs + start, mask=is_row[:, None] & in_depth[None, :], other=0.0)
        mask = is_column & in_depth[:, None]
        gate_weight = tl.load(gate_ptrs + start, mask=mask, other=0.0)
        up_weight = tl.load(gate_ptrs + SIZE * HIDDEN + start, mask=mask, other=0.0)
        gate = tl.dot(x, gate_weight, gate, input_precision="ieee")
        up = tl.dot(x, up_weight, up, input_precision="ieee")
    inner = (activated(gate, ACTIVATION) * up).to(inner_ptr.dtype.element_ty)
    tl.store(inner_ptr + row[:, None] * SIZE + column[None, :], inner, mask=is_row[:, None] & is_column)


@triton.jit
def _down_kernel(
    inner_ptr,
    weight_ptr,  # [E, HIDDEN, SIZE]
    order_ptr,
    blocks_ptr,
    result_ptr,  # [choices, HIDDEN] out, by choice
    HIDDEN: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    block = tl.program_id(0)
    expert = tl.load(blocks_ptr + block * 3).to(tl.int64)
    if expert < 0:
        return
    i = tl.arange(0, ROWS)
    is_row = i < tl.load(blocks_ptr + block * 3 + 2)
    row = (tl.load(blocks_ptr + block * 3 + 1) + i).to(tl.int64)
    choice = tl.load(order_ptr + row, mask=is_row, other=0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    inner_ptrs = inner_ptr + row[:, None] * SIZE + k[None, :]
    weight_ptrs = weight_ptr + expert * (HIDDEN * SIZE) + column[None, :] * SIZE + k[:, None]
    is_column = (column < HIDDEN)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, SIZE, DEPTH):
        in_depth = k < SIZE - start
        inner = tl.load(inner_ptrs + start, mask=is_row[:, None] & in_depth[None, :], other=0.0)
        weight = tl.load(weight_ptrs + start, mask=is_column & in_depth[:, None], other=0.0)
        sums = tl.dot(inner, weight, sums, input_precision="ieee")
    result = sums.to(result_ptr.dtype.element_ty)
    tl.store(result_ptr + choice[:, None] * HIDDEN + column[None, :], result, mask=is_row[:, None] & is_column)


@triton.jit
def _sum_kernel(result_ptr, weights_ptr, out_ptr, hidden, TOP_K: tl.constexpr, TILE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = column < hidden
    total = tl.zeros((TILE,), dtype=tl.float32)
    for j in tl.static_range(TOP_K):
        weight = tl.load(weights_ptr + token * TOP_K + j).to(tl.float32)
        result = tl.load(result_ptr + (token * TOP_K + j) * hidden + column, mask=mask, other=0.0)
        total += weight * result.to(tl.float32)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def moe(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor, activation: str, out: Tensor
) -> None:
    num_experts, hidden, size = down.shape
    top_k, num_choices = experts.shape[1], experts.numel()
    tile = _tile(num_choices / num_experts)
    # every expert may leave one block that is not full
    num_blocks = num_choices // tile.rows + min(num_experts, num_choices)
    _, order, blocks = _sorted_by_expert(experts, num_experts, num_blocks, tile.rows)
    inner = torch.empty(num_choices, size, dtype=x.dtype, device=x.device)
    results = torch.empty(num_choices, hidden, dtype=x.dtype, device=x.device)
    options = {
        "HIDDEN": hidden,
        "SIZE": size,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    _gate_up_kernel[(num_blocks, triton.cdiv(size, tile.columns))](
        x, gate_up, order, blocks, inner, x.stride(0), top_k, ACTIVATION=activation, **options
    )
    _down_kernel[(num_blocks, triton.cdiv(hidden, tile.columns))](inner, down, order, blocks, results, **options)
    sum_tile = min(_SUM_TILE, triton.next_power_of_2(hidden))
    _sum_kernel[(x.shape[0], triton.cdiv(hidden, sum_tile))](results, weights, out, hidden, TOP_K=top_k, TILE=sum_tile)


def _sorted_by_expert(experts: Tensor, num_experts: int, num_blocks: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choices of each expert [E], choices by expert [T * k], and the blocks [num_blocks, 3] that they are cut into."""
    num_choices = experts.numel()
    counts = torch.empty(num_experts, dtype=torch.int32, device=experts.device)
    order = torch.empty(num_choices, dtype=torch.int32, device=experts.device)
    blocks = torch.full((num_blocks, 3), -1, dtype=torch.int32, device=experts.device)
    scan = min(_SCAN_TILE, triton.next_power_of_2(num_choices))
    _count_kernel[(num_experts,)](experts, counts, num_choices, TILE=scan)
    _sort_kernel[(num_experts,)](
        *(experts, counts, order, blocks, num_choices, num_experts),
        ROWS=rows,
        EXPERTS=triton.next_power_of_2(num_experts),
        TILE=scan,
    )
    return counts, order, blocks
